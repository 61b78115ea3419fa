"""LoRA files on the command line: sampled as by plain diffusers, or refused by name with exit code 2."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from ray_ddpo import cli
from tests.accepted_page import assert_accepted, assert_refused
from tests.conftest import small_tables
from tests.lora_forms import (
    dora,
    kohya,
    lora_down,
    no_metadata,
    pairs,
    peft_folder,
    peft_names,
    saved,
    with_text_encoders,
)


@pytest.fixture(scope="module")
def pipeline(tiny_model: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None, requires_safety_checker=False)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    home = tmp_path_factory.mktemp("loras")
    tables = small_tables(tiny_model, home) | {"evaluation": {"images": 2, "batch_size": 2}}
    (home / "small.toml").write_text(tomli_w.dumps(tables))
    return home


def sampled(home: Path, lora: Path, name: str) -> int:
    words = ["--lora", str(lora), "--recipe", str(home / "small.toml"), "--output", str(home / name), "--seed", "3"]
    return cli.main(["sample", *words, "cat"])


def test_sample_gives_plain_diffusers_image_with_a_lora_of_kohyas(
    home: Path, pipeline: StableDiffusionPipeline, tiny_model: Path, capsys: pytest.CaptureFixture
) -> None:
    path = kohya(pipeline, "stable_diffusion", home / "kohya")
    assert sampled(home, path, "shown") == 0
    ours = np.asarray(Image.open(home / "shown/000-cat-seed3.png")).astype(int)
    plain = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None, requires_safety_checker=False)
    plain.scheduler = DDIMScheduler.from_config(plain.scheduler.config)
    plain.load_lora_weights(str(path))
    keys = {"num_inference_steps": 4, "guidance_scale": 3.0, "eta": 1.0}
    shown: Any = plain("cat", generator=torch.Generator().manual_seed(3), **keys)
    theirs = shown.images[0]
    assert np.abs(ours - np.asarray(theirs).astype(int)).max() <= 1 and ours.std() > 1
    output = ["--recipe", str(home / "small.toml"), "--output", str(home / "compared")]
    assert cli.main(["evaluate", str(path), *output]) == 0
    assert str(path) in json.loads((home / "compared/evaluation.json").read_text())["weights"]
    assert_accepted("a LoRA that this program has not trained, in `ddpo sample` and `ddpo evaluate`")


def test_alphas_that_diffusers_makes_one_are_reported(
    home: Path, pipeline: StableDiffusionPipeline, capsys: pytest.CaptureFixture
) -> None:
    tensors = load_file(kohya(pipeline, "stable_diffusion", home / "alphas"))
    name = next(name for name in tensors if name.startswith("lora_unet") and name.endswith(".alpha"))
    path = saved(tensors | {name: torch.tensor(1.0)}, home / "alphas")
    assert sampled(home, path, "alphas") == 0
    assert "has an alpha of 1 and 3 on different layers, of which diffusers applies 3 to all" in capsys.readouterr().err
    assert_accepted("a LoRA of kohya's scripts whose alphas differ among layers")


def broken(pipeline: StableDiffusionPipeline, folder: Path) -> Path:
    tensors = load_file(no_metadata(pipeline, "stable_diffusion", folder))
    next(iter(tensors.values()))[0, 0] = float("nan")
    return saved(tensors, folder)


def pickled(pipeline: StableDiffusionPipeline, folder: Path) -> Path:
    folder.mkdir()
    torch.save({}, folder / "pytorch_lora_weights.bin")
    return folder


def several(pipeline: StableDiffusionPipeline, folder: Path) -> Path:
    shutil.copy(no_metadata(pipeline, "stable_diffusion", folder), folder / "other.safetensors")
    return folder


def dora_of_kohyas(pipeline: StableDiffusionPipeline, folder: Path) -> Path:
    tensors = load_file(kohya(pipeline, "stable_diffusion", folder))
    tensors |= {
        name.replace("lora_up.weight", "dora_scale"): torch.ones(len(value), 1)
        for name, value in tensors.items()
        if name.endswith("lora_up.weight")
    }
    return saved(tensors, folder)


def of_another_width(pipeline: StableDiffusionPipeline, folder: Path) -> Path:
    tensors = load_file(no_metadata(pipeline, "stable_diffusion", folder))
    name = next(name for name in tensors if name.endswith("lora_A.weight"))
    return saved(tensors | {name: torch.ones(4, 6)}, folder)


def of_another_layer(pipeline: StableDiffusionPipeline, folder: Path) -> Path:
    found = pairs(pipeline.unet)
    down, up = next(iter(found.values()))
    more = {"mid_block.attentions.7.transformer_blocks.0.attn1.to_q": (down.clone(), up.clone())}
    return saved(peft_names(found | more, "unet"), folder)


def for_a_second_encoder(pipeline: StableDiffusionPipeline, folder: Path) -> Path:
    tensors = load_file(kohya(pipeline, "stable_diffusion", folder))
    return saved({name.replace("lora_te_", "lora_te2_"): value for name, value in tensors.items()}, folder)


def loha(pipeline: StableDiffusionPipeline, folder: Path) -> Path:
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    return saved({f"{key}.hada_w{side}": torch.ones(4, 4) for side in ("1_a", "1_b", "2_a", "2_b")}, folder)


def whole_network(pipeline: StableDiffusionPipeline, folder: Path) -> Path:
    return saved({name: value for name, value in list(pipeline.unet.state_dict().items())[:9]}, folder)


def loha_of_pefts(pipeline: StableDiffusionPipeline, folder: Path) -> Path:
    peft_folder(pipeline, "stable_diffusion", folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"peft_type": "LOHA"}))
    return folder


def half_a_pair(pipeline: StableDiffusionPipeline, folder: Path) -> Path:
    tensors = load_file(no_metadata(pipeline, "stable_diffusion", folder))
    tensors.pop(next(name for name in tensors if name.endswith("lora_B.weight")))
    return saved(tensors, folder)


REFUSED: dict[str, Callable[[StableDiffusionPipeline, Path], Path]] = {
    "a LoRA with NaN or infinity": broken,
    "a pickled LoRA (`.bin`, `.pt`, `.ckpt`)": pickled,
    "a folder with several safetensors files": several,
    "a DoRA of kohya's form (`dora_scale`), which diffusers would apply without its scale": dora_of_kohyas,
    "a LoRA of another model: a layer has another width": of_another_width,
    "a LoRA for a layer that the network has not": of_another_layer,
    "a LoRA for a text encoder that the model has not": for_a_second_encoder,
    "a LoHa, LoKr or LyCORIS file": loha,
    "a file that holds no LoRA": whole_network,
    "a folder of PEFT's with another kind of adapter": loha_of_pefts,
    "a LoRA with one matrix of a pair": half_a_pair,
}


@pytest.mark.rotated(every=4)
@pytest.mark.parametrize("situation", REFUSED)
def test_what_does_not_fit_is_refused_by_name(
    situation: str, home: Path, pipeline: StableDiffusionPipeline, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = REFUSED[situation](pipeline, tmp_path / "lora")
    assert sampled(home, path, "refused") == 2
    printed = capsys.readouterr().err
    assert_refused(situation, printed)
    assert str(path) in printed and not (home / "refused").exists()


START_REFUSED: dict[str, tuple[Callable[[StableDiffusionPipeline, str, Path], Path], tuple[str, ...]]] = {
    "training begins with a DoRA": (dora, ()),
    "training begins with a LoRA that has a part for the text encoders": (with_text_encoders, ()),
    "training begins with a LoRA of another rank than the recipe has": (lora_down, ("--policy.lora.rank", "8")),
    "training begins with a LoRA of other layers than the recipe has": (
        lora_down,
        ("--policy.lora.target_modules", '["to_q"]'),
    ),
    "training begins with a LoRA, and trains the whole network": (lora_down, ("--policy.train", "full")),
    "training begins with a LoRA that is not there": (lambda *_: Path("nowhere.safetensors"), ()),
}


@pytest.mark.rotated(every=4)
@pytest.mark.parametrize("situation", START_REFUSED)
def test_a_lora_that_training_cannot_begin_with_is_refused_by_its_key(
    situation: str, home: Path, pipeline: StableDiffusionPipeline, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    make, words = START_REFUSED[situation]
    path = make(pipeline, "stable_diffusion", tmp_path / "lora")
    for verb in (("plan",), ("train", "--serial")):
        command = [verb[0], str(home / "small.toml"), *verb[1:], "--policy.lora.path", str(path), *words]
        assert cli.main(command) == 2
        assert_refused(situation, capsys.readouterr().err)
    assert not (home / "runs/tiny/recipe.toml").exists()


def test_export_refuses_what_it_cannot_write(
    home: Path, pipeline: StableDiffusionPipeline, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = no_metadata(pipeline, "stable_diffusion", tmp_path / "lora")
    assert cli.main(["export", str(path), str(tmp_path / "out.safetensors")]) == 2
    assert_refused("`ddpo export` of a LoRA that this program has not trained", capsys.readouterr().err)
    save_file({"a": torch.ones(1)}, tmp_path / "out.safetensors")
    assert cli.main(["export", str(path), str(tmp_path / "out.safetensors")]) == 2
    assert "must be a .safetensors file that is not there yet" in capsys.readouterr().err
