"""Configuration keys of a model's parts: what is drawn equals plain diffusers' images, or the key is refused by name."""

import shutil
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.diffusion.policy import quiet_libraries
from common.recipe_tables import SamplingTable
from tests.accepted_page import assert_accepted, assert_refused
from tests.changed_keys import (
    ABSENT,
    LIBRARY_ERRORS,
    UNETS,
    Change,
    assert_same,
    changed_model,
    config_of,
    ours_drawn,
    plainly_drawn,
)
from tests.tiny_families import MAKERS

quiet_libraries()

UNET: dict[str, list[Any]] = {
    "center_input_sample": [True],
    "flip_sin_to_cos": [False],
    "freq_shift": [1],
    "mid_block_type": ["UNetMidBlock2D", None],
    "only_cross_attention": [True, [True, False]],
    "layers_per_block": [2, [1, 2]],
    "downsample_padding": [0],
    "mid_block_scale_factor": [2.0],
    "dropout": [0.5],
    "act_fn": ["gelu", "mish"],
    "norm_num_groups": [4, None],
    "norm_eps": [0.01],
    "cross_attention_dim": [24, [16, 16], [40, 40]],
    "transformer_layers_per_block": [2, [1, 2]],
    "encoder_hid_dim": [16, 40, 20],
    "encoder_hid_dim_type": ["text_proj", "image_proj", "text_image_proj", "ip_image_proj"],
    "attention_head_dim": [4, [2, 8]],
    "num_attention_heads": [2],
    "dual_cross_attention": [True],
    "use_linear_projection": [True, False],
    "class_embed_type": ["timestep", "identity", "projection", "simple_projection"],
    "num_class_embeds": [10],
    "addition_embed_type": ["text", "text_time", "image", "text_image", "image_hint", None],
    "addition_time_embed_dim": [16, None],
    "projection_class_embeddings_input_dim": [16],
    "upcast_attention": [True, None],
    "resnet_time_scale_shift": ["scale_shift"],
    "resnet_skip_time_act": [True],
    "resnet_out_scale_factor": [2.0],
    "time_embedding_type": ["fourier"],
    "time_embedding_dim": [32],
    "time_embedding_act_fn": ["silu"],
    "timestep_post_act": ["silu"],
    "time_cond_proj_dim": [8],
    "conv_in_kernel": [1],
    "conv_out_kernel": [1],
    "attention_type": ["gated"],
    "mid_block_only_cross_attention": [True],
    "cross_attention_norm": ["layer_norm"],
    "sample_size": [4, 16],
    "in_channels": [9],
    "out_channels": [8, 1],
    "block_out_channels": [[8, 16]],
    "quantization_config": [{"quant_method": "bitsandbytes", "load_in_4bit": True}],
    "unknown_key": [3],
}
DECODER: dict[str, list[Any]] = {
    "scaling_factor": [0.5],
    "shift_factor": [0.3, None],
    "latents_mean": [[1.0, 0.0, 2.0, 0.0]],
    "latents_std": [[1.0, 3.0, 2.0, 1.0]],
    "force_upcast": [False],
    "block_out_channels": [[8, 16], [16, 16, 16, 16]],
    "latent_channels": [8],
    "act_fn": ["gelu"],
    "layers_per_block": [2],
    "use_quant_conv": [False, True],
    "use_post_quant_conv": [False, True],
    "mid_block_add_attention": [False],
    "out_channels": [4, 1],
    "unknown_key": [1],
}
TINY_DECODER: dict[str, list[Any]] = {
    "scaling_factor": [0.5],
    "shift_factor": [0.3, None],
    "latent_magnitude": [5],
    "latent_shift": [0.2],
    "upsample_fn": ["bilinear"],
    "upsampling_scaling_factor": [4],
    "act_fn": ["gelu"],
    "latent_channels": [8],
    "force_upcast": [True],
    "decoder_block_out_channels": [[8, 8, 8], [4, 4]],
    "encoder_block_out_channels": [[16, 16]],
    "num_decoder_blocks": [[2, 1]],
    "out_channels": [1],
}
CLIP: dict[str, list[Any]] = {
    "eos_token_id": [2, 5],
    "hidden_act": ["gelu"],
    "projection_dim": [20],
    "hidden_size": [32],
    "num_hidden_layers": [1, 3],
    "layer_norm_eps": [0.1],
    "max_position_embeddings": [7, 12],
    "use_attention_mask": [True],
    "intermediate_size": [20],
    "vocab_size": [600, 500],
    "return_dict": [False],
    "output_hidden_states": [True],
    "attention_dropout": [0.3],
    "num_attention_heads": [4, 3],
}
TOKENIZER: dict[str, list[Any]] = {
    "model_max_length": [6, 12, ABSENT],
    "padding_side": ["left"],
    "pad_token": ["!"],
    "eos_token": ["!"],
    "truncation_side": ["left"],
}
T5: dict[str, list[Any]] = {
    "d_model": [24],
    "num_layers": [2],
    "feed_forward_proj": ["relu"],
    "layer_norm_epsilon": [0.1],
    "relative_attention_num_buckets": [8],
    "dropout_rate": [0.5],
    "vocab_size": [80],
    "d_ff": [30],
}
T5_TOKENIZER: dict[str, list[Any]] = {"model_max_length": [6, ABSENT], "padding_side": ["left"]}
DDIM: dict[str, list[Any]] = {
    "beta_end": [0.02],
    "set_alpha_to_one": [True],
    "steps_offset": [0, 5],
    "prediction_type": ["v_prediction"],
    "timestep_spacing": ["trailing", "linspace"],
    "clip_sample": [True],
    "thresholding": [True],
    "use_karras_sigmas": [True],
}
FLOW: dict[str, list[Any]] = {
    "shift": [1.0, ABSENT],
    "use_dynamic_shifting": [True, False],
    "max_shift": [2.0],
    "shift_terminal": [0.1],
    "use_karras_sigmas": [True],
    "time_shift_type": ["linear"],
    "stochastic_sampling": [True],
}
INDEX: dict[str, list[Any]] = {
    "requires_safety_checker": [True],
    "force_zeros_for_empty_prompt": [False],
    "add_watermarker": [True, False],
    "unknown_key": [1],
}
SD3: dict[str, list[Any]] = {
    "sample_size": [4],
    "patch_size": [1, 4],
    "in_channels": [8],
    "num_layers": [1],
    "attention_head_dim": [4],
    "joint_attention_dim": [24],
    "caption_projection_dim": [8],
    "pooled_projection_dim": [20],
    "out_channels": [8, None],
    "pos_embed_max_size": [4, 16],
    "dual_attention_layers": [[], [1]],
    "qk_norm": [None],
}
FLUX: dict[str, list[Any]] = {
    "patch_size": [2],
    "in_channels": [64, 18],
    "out_channels": [4, 16],
    "num_layers": [2],
    "num_single_layers": [2],
    "num_attention_heads": [4],
    "joint_attention_dim": [24],
    "pooled_projection_dim": [20],
    "guidance_embeds": [False],
    "axes_dims_rope": [[6, 4, 6], [4, 4, 4]],
}
UNET_PARTS: dict[str, dict[str, list[Any]]] = {"unet": UNET, "scheduler": DDIM, "model_index": INDEX}
FLOW_PARTS: dict[str, dict[str, list[Any]]] = {
    "vae": DECODER,
    "scheduler": FLOW,
    "text_encoder": CLIP,
    "tokenizer": TOKENIZER,
}
PARTS: dict[str, dict[str, dict[str, list[Any]]]] = {
    "stable_diffusion": UNET_PARTS | {"vae": TINY_DECODER, "text_encoder": CLIP, "tokenizer": TOKENIZER},
    "sdxl": UNET_PARTS
    | {"vae": DECODER, "text_encoder": CLIP, "text_encoder_2": CLIP, "tokenizer": TOKENIZER, "tokenizer_2": TOKENIZER},
    "sd3": FLOW_PARTS
    | {"transformer": SD3, "text_encoder_2": CLIP, "text_encoder_3": T5, "tokenizer_2": TOKENIZER}
    | {"tokenizer_3": T5_TOKENIZER},
    "flux": FLOW_PARTS | {"transformer": FLUX, "text_encoder_2": T5, "tokenizer_2": T5_TOKENIZER},
}
EVERY = [
    (name, Change(part, key, value))
    for name, parts in PARTS.items()
    for part, keys in parts.items()
    for key, values in keys.items()
    for value in values
]


class Models:
    """The families' small models, made when they are asked for, and folders for changed ones."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._number = folder, count()
        self._made: dict[str, Path] = {}

    def made(self, name: str) -> Path:
        if name not in self._made:
            self._made[name] = MAKERS[name](self._folder / name)
        return self._made[name]

    def changed(self, name: str, *changes: Change) -> Path:
        return changed_model(self.made(name), changes, self._folder / f"changed-{next(self._number)}")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


def check_outcome(models: Models, name: str, changes: tuple[Change, ...], noisy: bool = False) -> bool:
    """Compare with plain diffusers, or check that the refusal names what was changed; return whether it was taken."""
    model, eta = models.changed(name, *changes), 1.0 if noisy else 0.0
    try:
        try:
            ours = ours_drawn(name, model, eta)
        except ValueError as error:
            said = str(error).replace(str(model), "")
            parts = {
                "unet": "UNet2D",
                "vae": "Autoencoder",
                "transformer": "Transformer2D",
                "text_encoder": "TextModel",
            }
            words = [
                word for change in changes for word in (change.key, change.part, parts.get(change.part, change.part))
            ]
            assert any(word in said for word in words), f"{list(map(str, changes))}: {said}"
            assert "\n" not in said
            return False
        try:
            plain = plainly_drawn(name, model, eta)
        except LIBRARY_ERRORS as error:
            raise AssertionError(f"diffusers refuses {list(map(str, changes))}: {error}") from error
        assert_same(ours, plain)
        return True
    finally:
        shutil.rmtree(model)


def refusal(models: Models, name: str, *changes: Change) -> str:
    """What the check before loading says, which reads nothing but configuration files."""
    model = models.changed(name, *changes)
    with pytest.raises(ValueError) as error:
        config_of(name, model).check()
    return str(error.value)


REFUSED: dict[str, tuple[str, Change]] = {
    "a UNet that wants class labels, images or the guidance told (`class_embed_type`, `num_class_embeds`, "
    "`encoder_hid_dim_type`, `addition_embed_type`, `time_cond_proj_dim`)": (
        "stable_diffusion",
        Change("unet", "time_cond_proj_dim", 8),
    ),
    "a network that takes other channels than the decoder's latents have, as those for inpainting": (
        "stable_diffusion",
        Change("unet", "in_channels", 9),
    ),
    "a network whose text is of another width than its text encoders give": (
        "stable_diffusion",
        Change("unet", "cross_attention_dim", 24),
    ),
    "a tokenizer that gives more tokens than its text encoder has positions": (
        "stable_diffusion",
        Change("tokenizer", "model_max_length", 12),
    ),
    "an SD3's or FLUX's decoder without `shift_factor`": ("sd3", Change("vae", "shift_factor", None)),
    "a decoder of other than three colours": ("stable_diffusion", Change("vae", "out_channels", 1)),
    "`add_watermarker` true in an SDXL's model_index.json": ("sdxl", Change("model_index", "add_watermarker", True)),
    "quantized weights (`quantization_config`)": (
        "stable_diffusion",
        Change("unet", "quantization_config", {"quant_method": "bitsandbytes"}),
    ),
}


def test_a_key_that_cannot_be_honoured_is_refused_before_anything_is_loaded(models: Models) -> None:
    for situation, (name, change) in REFUSED.items():
        assert_refused(situation, refusal(models, name, change))


def test_what_a_library_refuses_is_named_when_the_model_is_loaded(models: Models) -> None:
    for situation, change in (
        ("keys of a part that diffusers or transformers refuse", Change("unet", "num_attention_heads", 2)),
        ("keys of a part with which it cannot compute", Change("unet", "cross_attention_dim", [40, 40])),
    ):
        with pytest.raises(ValueError) as error:
            ours_drawn("stable_diffusion", models.changed("stable_diffusion", change), 0.0)
        assert_refused(situation, str(error.value))


def test_an_sdxls_decoder_takes_mean_and_deviation_and_no_shift(models: Models) -> None:
    keys = {"latents_mean": [1.0, 0.0, 2.0, 0.0], "latents_std": [1.0, 3.0, 2.0, 1.0], "shift_factor": 0.7}
    changes = [Change("vae", key, value) for key, value in keys.items()]
    changes += [
        Change("unet", "act_fn", "mish"),
        Change("unet", "unknown_key", 1),
        Change("text_encoder", "eos_token_id", 2),
    ]
    changes += [Change("tokenizer", "padding_side", "left"), Change("tokenizer_2", "pad_token", "!")]
    changes += [Change("model_index", "force_zeros_for_empty_prompt", False)]
    assert check_outcome(models, "sdxl", tuple(changes), noisy=True)
    assert_accepted("`latents_mean` and `latents_std` of an SDXL's decoder, `shift_factor` of any")
    assert_accepted("any key of a network, decoder, text encoder or tokenizer that its own class computes with")
    assert_accepted("a key that no class knows")


def test_an_sdxl_in_float16_decodes_in_float16_where_its_decoder_allows(models: Models) -> None:
    model = models.changed("sdxl", Change("vae", "force_upcast", False))
    for folder, dtype in ((models.made("sdxl"), "torch.float32"), (model, "torch.float16")):
        half = config_of("sdxl", folder).model_copy(update={"dtype": "float16", "train": "lora"})
        assert str(half.decoder_dtype) == dtype
    assert_accepted("`force_upcast` false of an SDXL's decoder in float16")


def test_fewer_tokens_than_positions_are_planned_as_they_are_encoded(models: Models) -> None:
    config = config_of(
        "stable_diffusion", models.changed("stable_diffusion", Change("tokenizer", "model_max_length", 6))
    )
    assert config.sizes(SamplingTable(), "cpu").conditioning_shape["prompt_embeds"] == (6, 16)


def test_a_number_of_steps_that_the_schedule_has_not_is_refused_with_the_plan(models: Models) -> None:
    config = config_of("stable_diffusion", models.changed("stable_diffusion", Change("scheduler", "steps_offset", 0)))
    with pytest.raises(ValueError, match=r"sampling.num_steps is 1000: .*steps_offset=1 .* timestep 1000"):
        config.sizes(SamplingTable(num_steps=1000), "cpu")  # as this pipeline corrects the offset


@pytest.mark.thorough
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_key_of_any_part_is_honoured_as_diffusers_does_or_refused_by_name(models: Models, data: Any) -> None:
    """Change one key of one to four parts, so that a difference shrinks to the key that makes it."""
    name = data.draw(st.sampled_from(sorted(PARTS)))
    parts = data.draw(st.sets(st.sampled_from(sorted(PARTS[name])), min_size=1, max_size=4))
    changes = []
    for part in sorted(parts):
        of_part = [change for family, change in EVERY if family == name and change.part == part]
        changes.append(data.draw(st.sampled_from(of_part)))
    check_outcome(models, name, tuple(changes), noisy=name in UNETS and data.draw(st.booleans()))
