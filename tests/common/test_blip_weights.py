"""BLIP's weights in transformers' models are the same network, compared with a slow copy of BLIP's own code."""

import pytest
import torch

from ray_ddpo.common.image_models.blip_weights import image_sizes, image_weights, load_blip, text_sizes, without_prefix
from tests.reference.blip_reference import slow_blip
from tests.tiny_blip import SIDE, image_reward_shapes, tiny_image_reward_state


def test_both_towers_are_a_slow_copy_of_blips() -> None:
    state = tiny_image_reward_state()
    images, texts = load_blip(without_prefix(state, "blip."), torch.float32, "missing")
    pixels = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    numbers, mask = torch.tensor([[2, 5, 6, 3], [2, 3, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    expected_seen, expected = slow_blip(state, pixels, numbers, mask)
    with torch.no_grad():
        seen = images(pixel_values=pixels).last_hidden_state
        read = texts(numbers, mask, encoder_hidden_states=seen).last_hidden_state
    torch.testing.assert_close(seen, expected_seen, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(read[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-4)


def test_the_shapes_of_image_reward_give_its_sizes_and_every_weight_has_its_place() -> None:
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    shapes = image_reward_shapes(1024, 768, (24, 12), patch=16, words=30_524)
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in shapes.items()}
        images, texts = (without_prefix(state, f"blip.{tower}_encoder.") for tower in ("visual", "text"))
        image_tower = BlipVisionModel(BlipVisionConfig(**image_sizes(images)))
        text_tower = BlipTextModel(BlipTextConfig(**text_sizes(texts)), add_pooling_layer=False)
    config = image_tower.config
    assert (config.image_size, config.patch_size, config.num_attention_heads, config.intermediate_size) == (
        224, 16, 16, 4096,
    )  # fmt: skip
    assert (text_tower.config.num_attention_heads, text_tower.config.encoder_hidden_size) == (12, 1024)
    for tower, weights in ((image_tower, image_weights(images)), (text_tower, texts)):
        found = {name: weight.shape for name, weight in weights.items()}
        assert found == {name: weight.shape for name, weight in tower.state_dict().items()}


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("visual_encoder.pos_embed", "it lacks visual_encoder.pos_embed"),
        ("visual_encoder.blocks.1.norm2.bias", "missing: encoder.layers.1.layer_norm2.bias"),
        ("text_encoder.encoder.layer.1.crossattention.self.key.weight", "missing: encoder.layer.1.crossattention"),
        ("text_encoder.embeddings.word_embeddings.weight", "it lacks text_encoder.embeddings.word_embeddings.weight"),
    ],
)
def test_a_missing_weight_is_named(name: str, found: str) -> None:
    state = without_prefix(tiny_image_reward_state(), "blip.")
    del state[name]
    with pytest.raises(ValueError, match=f"^no BLIP .*{found}"):
        load_blip(state, torch.float32, "no BLIP")


def test_a_weight_of_another_image_tower_is_refused_by_name() -> None:
    state = without_prefix(tiny_image_reward_state(), "blip.") | {"visual_encoder.head.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match="it has visual_encoder.head.weight"):
        load_blip(state, torch.float32, "no BLIP")
