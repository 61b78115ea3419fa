"""Configuration keys of a model's parts: sampled images equal plain diffusers', or the key is refused by name."""

import shutil
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ray_ddpo.common.diffusion.policy import quiet_libraries
from ray_ddpo.common.recipe.tables import SamplingTable
from tests.accepted_page import assert_accepted, assert_refused
from tests.changed_keys import (
    LIBRARY_ERRORS,
    Change,
    assert_same,
    changed_model,
    config_of,
    ours_drawn,
    plainly_drawn,
)
from tests.key_candidates import EVERY, PARTS, PARTS_OF_FAMILIES
from tests.tiny_families import BY_DDIM, MAKERS

quiet_libraries()


class Models:
    """Small models of all families, made on demand, and folders for changed ones."""

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


def check_outcome(models: Models, name: str, changes: tuple[Change, ...], stochastic: bool = False) -> bool:
    """Compare with plain diffusers, or check that the refusal names what was changed.

    Return whether it was accepted.
    """
    model, eta = models.changed(name, *changes), 1.0 if stochastic else 0.0
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
    """Return the error of the check before loading, which only reads configuration files."""
    model = models.changed(name, *changes)
    with pytest.raises(ValueError) as error:
        config_of(name, model).check()
    return str(error.value)


REFUSED: dict[str, tuple[str, Change]] = {
    "a UNet that wants class labels, images or the guidance scale as an input (`class_embed_type`, `num_class_embeds`, "
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
    "a decoder whose `scaling_factor` is 0, null or no number": (
        "stable_diffusion",
        Change("vae", "scaling_factor", 0),
    ),
    "another scheduler of SANA than one of a flow": ("sana", Change("scheduler", "use_flow_sigmas", False)),
    "a solver of SANA with noise levels or predictions of another kind": (
        "sana",
        Change("scheduler", "prediction_type", "epsilon"),
    ),
    "`out_channels` null in a transformer that may predict variances": (
        "pixart_sigma",
        Change("transformer", "out_channels", None),
    ),
    "a network whose `sample_size` is no size": ("stable_diffusion", Change("unet", "sample_size", "8")),
    "`beta_start` or `beta_end` that is no number, or below 0": (
        "stable_diffusion",
        Change("scheduler", "beta_start", "0.001"),
    ),
    "`add_watermarker` true in an SDXL's model_index.json": ("sdxl", Change("model_index", "add_watermarker", True)),
    "quantized weights (`quantization_config`)": (
        "stable_diffusion",
        Change("unet", "quantization_config", {"quant_method": "bitsandbytes"}),
    ),
}


def test_a_key_that_cannot_be_honoured_is_refused_before_anything_is_loaded(models: Models) -> None:
    for situation, (name, change) in REFUSED.items():
        assert_refused(situation, refusal(models, name, change))


def test_numbers_that_nothing_can_be_computed_with_are_refused_by_key(models: Models) -> None:
    for name, change in (
        ("stable_diffusion", Change("vae", "scaling_factor", None)),
        ("flux", Change("vae", "scaling_factor", "0.5")),
        ("sd3", Change("vae", "shift_factor", "0.1")),
        ("sdxl", Change("vae", "latents_std", [1.0, "2", 1.0, 1.0])),
        ("qwen_image", Change("vae", "latents_std", [1.0, 1.0, 0.0, 1.0])),
        ("flux2_edit", Change("vae", "batch_norm_eps", "x")),
        ("flux2_klein_edit", Change("vae", "patch_size", [1, 1])),
        ("qwen_image", Change("vae", "latents_mean", [1.0, 1.0])),
        ("qwen_image", Change("vae", "latents_mean", None)),
        ("sd3", Change("transformer", "sample_size", 0)),
        ("sdxl", Change("unet", "sample_size", [8, 8, 8])),
        ("stable_diffusion", Change("scheduler", "beta_end", -0.1)),
    ):
        assert change.key in refusal(models, name, change), str(change)


def test_what_a_library_refuses_is_named_when_the_model_is_loaded(models: Models) -> None:
    for situation, *changes in (
        ("keys of a part that diffusers or transformers refuse", Change("unet", "num_attention_heads", 2)),
        ("keys of a part with which it cannot compute", Change("unet", "cross_attention_dim", [40, 40])),
        ("a text of a part's configuration that a library does not know", Change("text_encoder", "hidden_act", "nope")),
        (
            "a tokenizer that pads with a token that its text encoder has not",
            Change("tokenizer", "pad_token", "<another>"),
            Change("text_encoder", "vocab_size", 514),
        ),
    ):
        with pytest.raises(ValueError) as error:
            ours_drawn("stable_diffusion", models.changed("stable_diffusion", *changes), 0.0)
        assert_refused(situation, str(error.value))


def test_an_sdxl_decoder_honours_mean_and_std_and_no_shift(models: Models) -> None:
    keys = {"latents_mean": [1.0, 0.0, 2.0, 0.0], "latents_std": [1.0, 3.0, 2.0, 1.0], "shift_factor": 0.7}
    changes = [Change("vae", key, value) for key, value in keys.items()]
    changes += [
        Change("unet", "act_fn", "mish"),
        Change("unet", "unknown_key", 1),
        Change("text_encoder", "eos_token_id", 2),
    ]
    changes += [Change("tokenizer", "padding_side", "left"), Change("tokenizer_2", "pad_token", "!")]
    changes += [Change("model_index", "force_zeros_for_empty_prompt", False)]
    assert check_outcome(models, "sdxl", tuple(changes), stochastic=True)
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
@pytest.mark.rotated(every=50)
@pytest.mark.parametrize(("name", "part"), PARTS_OF_FAMILIES)
def test_each_key_alone_is_honoured_as_diffusers_does_or_refused_by_name(models: Models, name: str, part: str) -> None:
    changes = [change for family, change in EVERY if (family, change.part) == (name, part)]
    accepted = [check_outcome(models, name, (change,)) for change in changes]
    assert any(accepted), "a part of which all changes are refused tells nothing"


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
    check_outcome(models, name, tuple(changes), stochastic=name in BY_DDIM and data.draw(st.booleans()))
