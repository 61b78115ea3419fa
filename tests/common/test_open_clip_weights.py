"""open_clip's weights by transformers' names are the same network, compared with a slow copy and with open_clip."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d, gelu, layer_norm, multi_head_attention_forward

from ray_ddpo.common.image_models.clip_preprocessing import clip_pixels
from ray_ddpo.common.image_models.clip_towers import ClipTowers, clip_towers
from ray_ddpo.common.image_models.open_clip_weights import State, as_transformers, load_open_clip, sizes
from ray_ddpo.common.model_files.model_hub import Weights
from tests.tiny_clip import (
    EMBEDDING,
    SIDE,
    ViT,
    open_clip_shapes,
    save_tiny_open_clip,
    save_tiny_tokenizer,
    tiny_open_clip_state,
    vocabulary,
)

HEADS = 16
PROMPTS = ["a cat", "dog " * 300, ""]


@pytest.fixture
def towers(tmp_path: Path) -> ClipTowers:
    model = load_open_clip(save_tiny_open_clip(tmp_path / "weights.pt"), HEADS, torch.float32)
    tokenizer = Weights(str(save_tiny_tokenizer(tmp_path / "words")), ("tokenizer.json",), "reward.tokenizer")
    return clip_towers(model, tokenizer, "cpu")


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (3, SIDE, SIDE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def token_numbers(folder: Path) -> Tensor:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder)
    return tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=77, return_tensors="pt")["input_ids"]


def norm(state: State, name: str, values: Tensor) -> Tensor:
    return layer_norm(values, values.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])


def block(state: State, name: str, values: Tensor, mask: Tensor | None) -> Tensor:
    """Compute one block as open_clip does: attention and an MLP, each with a norm and a residual. [L, B, D]"""
    inner = norm(state, f"{name}.ln_1", values)
    attended, _ = multi_head_attention_forward(
        inner, inner, inner, inner.shape[-1], HEADS,
        state[f"{name}.attn.in_proj_weight"], state[f"{name}.attn.in_proj_bias"], None, None, False, 0.0,
        state[f"{name}.attn.out_proj.weight"], state[f"{name}.attn.out_proj.bias"], training=False, attn_mask=mask,
    )  # fmt: skip
    values = values + attended
    inner = norm(state, f"{name}.ln_2", values)
    inner = gelu(inner @ state[f"{name}.mlp.c_fc.weight"].T + state[f"{name}.mlp.c_fc.bias"])
    return values + inner @ state[f"{name}.mlp.c_proj.weight"].T + state[f"{name}.mlp.c_proj.bias"]


def slow_images(state: State, pixels: Tensor) -> Tensor:
    patches = conv2d(pixels, state["visual.conv1.weight"], stride=8).flatten(2).transpose(1, 2)
    first = state["visual.class_embedding"].expand(len(patches), 1, -1)
    values = torch.cat([first, patches], dim=1) + state["visual.positional_embedding"]
    values = norm(state, "visual.ln_pre", values).transpose(0, 1)
    for number in range(2):
        values = block(state, f"visual.transformer.resblocks.{number}", values, mask=None)
    embeddings = norm(state, "visual.ln_post", values[0]) @ state["visual.proj"]
    return embeddings / embeddings.norm(dim=1, keepdim=True)


def slow_texts(state: State, numbers: Tensor) -> Tensor:
    values = (state["token_embedding.weight"][numbers] + state["positional_embedding"]).transpose(0, 1)
    later = torch.full((77, 77), -torch.inf).triu(1)
    for number in range(2):
        values = block(state, f"transformer.resblocks.{number}", values, later)
    values = norm(state, "ln_final", values.transpose(0, 1))
    embeddings = values[torch.arange(len(numbers)), numbers.argmax(1)] @ state["text_projection"]
    return embeddings / embeddings.norm(dim=1, keepdim=True)


def test_both_towers_are_a_slow_copy_of_open_clips(towers: ClipTowers, images: Tensor, tmp_path: Path) -> None:
    state = tiny_open_clip_state()
    torch.testing.assert_close(towers.embed_images(images), slow_images(state, clip_pixels(images, SIDE)))
    torch.testing.assert_close(towers.embed_texts(PROMPTS), slow_texts(state, token_numbers(tmp_path / "words")))
    assert towers.logit_scale == pytest.approx(99.484316)  # exp(4.6)


def test_both_towers_are_open_clips_own(towers: ClipTowers, images: Tensor, tmp_path: Path) -> None:
    model = pytest.importorskip(
        "open_clip.model", reason="open_clip_torch is not installed; the slow copy stands for it"
    )
    vision = model.CLIPVisionCfg(layers=2, width=32, head_width=2, patch_size=8, image_size=SIDE)
    text = model.CLIPTextCfg(context_length=77, vocab_size=len(vocabulary()), width=32, heads=HEADS, layers=2)
    theirs = model.CLIP(EMBEDDING, vision, text).eval()
    theirs.load_state_dict(tiny_open_clip_state())
    with torch.no_grad():
        pil_images = theirs.encode_image(clip_pixels(images, SIDE), normalize=True)
        texts = theirs.encode_text(token_numbers(tmp_path / "words"), normalize=True)
    torch.testing.assert_close(towers.embed_images(images), pil_images)
    torch.testing.assert_close(towers.embed_texts(PROMPTS), texts)


def test_the_shapes_of_vit_h_14_give_its_sizes_and_every_weight_has_its_place() -> None:
    from transformers import CLIPConfig, CLIPModel

    with torch.device("meta"):
        vit = ViT(1280, 32, 14, 224, 1024, 24, 49_408, 1024)
        state = {name: torch.empty(shape) for name, shape in open_clip_shapes(vit).items()}
        model = CLIPModel(CLIPConfig(**sizes(state, HEADS)))
    config = model.config
    assert (config.vision_config.image_size, config.vision_config.patch_size) == (224, 14)
    assert (config.vision_config.intermediate_size, config.text_config.intermediate_size) == (5120, 4096)
    assert (config.text_config.bos_token_id, config.text_config.eos_token_id) == (49_406, 49_407)
    found = {name: weight.shape for name, weight in as_transformers(state).items()}
    assert found == {name: weight.shape for name, weight in model.state_dict().items()}
    assert sum(weight.numel() for weight in state.values()) == 986_109_441


def test_the_mask_that_older_checkpoints_carry_is_let_go(tmp_path: Path) -> None:
    state = tiny_open_clip_state() | {"attn_mask": torch.zeros(77, 77)}
    torch.save(state, tmp_path / "weights.pt")  # and without a dict around it
    model = load_open_clip(tmp_path / "weights.pt", HEADS, torch.float16)
    assert model.dtype == torch.float16
    assert torch.equal(model.text_projection.weight, state["text_projection"].T.half())


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("visual.proj", "it lacks 'visual.proj'"),
        ("visual.transformer.resblocks.1.ln_2.bias", "missing: vision_model.encoder.layers.1.layer_norm2.bias"),
        ("transformer.resblocks.0.attn.in_proj_weight", "missing: text_model.encoder.layers.0.self_attn.k_proj.weight"),
    ],
)
def test_a_missing_weight_is_named(tmp_path: Path, name: str, found: str) -> None:
    state = tiny_open_clip_state()
    del state[name]
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=f"weights.pt is no open_clip ViT with a text tower.*{found}"):
        load_open_clip(tmp_path / "weights.pt", HEADS, torch.float32)


@pytest.mark.parametrize("name", ["visual.trunk.weight", "transformer.resblocks.0.attn.ln.weight"])
def test_a_weight_of_another_architecture_is_refused_by_name(tmp_path: Path, name: str) -> None:
    torch.save(tiny_open_clip_state() | {name: torch.zeros(1)}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=f"no open_clip ViT with a text tower: it has '{name}'"):
        load_open_clip(tmp_path / "weights.pt", HEADS, torch.float32)
