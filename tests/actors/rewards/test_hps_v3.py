"""HPSv3 is the head's first output at the reward token, compared with the authors' steps written again for one image."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ray_ddpo.actors.rewards.hps_v3 import PARAMETERS, HpsV3
from ray_ddpo.common.image_models.hps_v3_network import INSTRUCTION, renamed, resized_size, score_head
from tests.tiny_qwen import save_tiny_hps_v3, save_tiny_qwen, tiny_qwen_config

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 40, 64, 3), dtype=np.uint8)
PROMPTS = ["a cat", "two big dog on the grass with a horse"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("hps_v3")
    qwen = save_tiny_qwen(folder / "qwen")
    return save_tiny_hps_v3(folder / "HPSv3.safetensors", qwen), qwen


def reward(files: tuple[Path, Path]) -> HpsV3:
    return HpsV3(checkpoint=str(files[0]), model=str(files[1]), dtype="float32")


def authors_score(files: tuple[Path, Path], image: np.ndarray, prompt: str) -> float:
    """Follow `Qwen2VLRewardModelBT.forward` step by step, for one image without padding."""
    from transformers import AddedToken, AutoTokenizer
    from transformers.models.qwen2_vl import Qwen2VLForConditionalGeneration, Qwen2VLImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(files[1])
    tokenizer.add_tokens([AddedToken("<|Reward|>", special=True)], special_tokens=True)
    state = load_file(files[0])
    model = Qwen2VLForConditionalGeneration(tiny_qwen_config(len(tokenizer))).eval()
    names = {
        name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): name
        for name in model.state_dict()
    }
    model.load_state_dict({names[name]: value for name, value in state.items() if not name.startswith("rm_head.")})
    head = score_head(32).eval()
    head.load_state_dict({name[8:]: value for name, value in state.items() if name.startswith("rm_head.")})
    size = (588, 364)  # width and height: 40 × 64 scaled to about 200,704 pixels, up to multiples of 28
    pixels = Qwen2VLImageProcessorPil()(
        [Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)], return_tensors="pt"
    )
    assert pixels["image_grid_thw"].tolist() == [[1, 26, 42]]
    text = INSTRUCTION.replace("{prompt}", prompt)
    text = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        + "<|image_pad|>" * (13 * 21)
        + f"<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        embeddings = model.model.language_model.embed_tokens(ids)
        seen = model.model.visual(pixels["pixel_values"], grid_thw=pixels["image_grid_thw"]).pooler_output
        is_image = (ids == model.config.image_token_id).unsqueeze(-1).expand_as(embeddings)
        hidden = model.model.language_model(
            inputs_embeds=embeddings.masked_scatter(is_image, seen),
            position_ids=torch.arange(ids.shape[1]).expand(3, 1, -1),
        )[0]
        logits = head(hidden.float())
    (chosen,) = logits[ids == tokenizer.convert_tokens_to_ids("<|Reward|>")]
    return float(chosen[0])


def test_the_score_is_the_authors_one_for_images_scored_together(files: tuple[Path, Path]) -> None:
    scores = reward(files).load("cpu")(IMAGES, PROMPTS, [{}, {}])
    expected = [authors_score(files, image, prompt) for image, prompt in zip(IMAGES, PROMPTS, strict=True)]
    np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    assert abs(expected[0] - expected[1]) > 0.01 * np.abs(expected).max()


def test_old_and_new_names_of_weights_give_the_same_score(files: tuple[Path, Path], tmp_path: Path) -> None:
    new = save_tiny_hps_v3(tmp_path / "new.safetensors", files[1], old_names=False)
    first, second = (reward((path, files[1])).load("cpu")(IMAGES, PROMPTS, [{}, {}]) for path in (files[0], new))
    assert first.tolist() == second.tolist()
    assert renamed("model.layers.3.mlp.up_proj.weight") == "backbone.language_model.layers.3.mlp.up_proj.weight"
    assert renamed("visual.blocks.0.norm1.weight") == renamed("model.visual.blocks.0.norm1.weight")


@pytest.mark.parametrize(
    ("size", "resized"),
    [
        ((512, 512), (448, 448)),  # 512 / √(512² / 448²) = 448
        ((448, 448), (448, 448)),
        ((1024, 1024), (448, 448)),
        ((64, 64), (448, 448)),
        ((512, 1024), (308, 616)),  # scale √(200704 / 524288) = .6187: 316.8 and 633.6, down to multiples of 28
        ((40, 64), (364, 588)),  # scale 8.854: 354.2 and 566.7, up to multiples of 28
        ((3, 900), (28, 7784)),  # scale 8.622: 25.9 and 7759.5, up
    ],
)
def test_images_are_resized_as_the_authors_do(size: tuple[int, int], resized: tuple[int, int]) -> None:
    assert resized_size(*size, unit=28) == resized


def test_a_prompt_with_the_models_tokens_is_refused(files: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match=r"the prompt 'a cat <\|Reward\|>' has"):
        reward(files).load("cpu")(IMAGES, ["a cat", "a cat <|Reward|>"], [{}, {}])


def test_a_checkpoint_of_something_else_is_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = load_file(files[0])
    save_file({name: value for name, value in state.items() if "layers.1" not in name}, tmp_path / "short.safetensors")
    with pytest.raises(ValueError, match="does not fit the configuration"):
        reward((tmp_path / "short.safetensors", files[1])).load("cpu")
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="it is not HPSv3's"):
        reward((tmp_path / "other.safetensors", files[1])).load("cpu")


def test_the_published_network_has_so_many_weights() -> None:
    """Count the 7B: 28 layers of 3584, 28 heads of which 4 for keys, 32 blocks of an image tower of 1280."""
    text = 28 * (2 * 3584 * 3584 + 3584 + 2 * (3584 * 512 + 512) + 3 * 3584 * 18944 + 2 * 3584) + 3584
    embeddings = 151_658 * 3584
    block = 1280 * 3840 + 3840 + 1280 * 1280 + 1280 + 2 * 1280 * 5120 + 5120 + 1280 + 4 * 1280
    merger = 2 * 1280 + 5120 * 5120 + 5120 + 5120 * 3584 + 3584
    vision = 3 * 2 * 14 * 14 * 1280 + 32 * block + merger
    head = 3584 * 1024 + 1024 + 1024 * 16 + 16 + 16 * 2 + 2
    assert text + embeddings + vision + head == PARAMETERS
