"""Model folders that cannot be loaded are refused in one line that names the part and the remedy."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch

from tests.accepted_page import assert_refused
from tests.loaded_models import (
    PARTS,
    assert_same_parts,
    early_refusal,
    load,
    refusal,
)
from tests.model_copies import change_json, change_weights, copied, renamed, save_variant, weights_file, without
from tests.tiny_families import MAKERS

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: maker(tmp_path_factory.mktemp(name)) for name, maker in MAKERS.items()}


SLOW = dict.fromkeys(("sdxl", "sd3", "flux"), pytest.mark.thorough)
FAULTS: list[tuple[str, Callable[[str, dict], dict]]] = [
    ("weights of a part are missing", lambda part, state: without(_first(state))(state)),
    ("all names of a part's weights begin with something else", lambda part, state: renamed("", "module.")(state)),
    ("weights of a part are of another size", lambda part, state: {**state, _first(state): torch.zeros(3, 5)}),
]


def _first(state: dict) -> str:
    return next(name for name in sorted(state) if name.endswith("weight") and "encoder.embed_tokens" not in name)


@pytest.mark.parametrize("family", [pytest.param(name, marks=SLOW.get(name, ())) for name in PARTS])
def test_weights_of_another_part_are_refused_with_the_first_and_their_number(
    family: str, models: dict[str, Path], tmp_path: Path
) -> None:
    for part in PARTS[family]:
        for number, (situation, change) in enumerate(FAULTS):
            model = copied(models[family], tmp_path / f"{part}-{number}")
            change_weights(model, part, lambda state, change=change, part=part: change(part, state))
            said = refusal(family, model)
            assert_refused(situation, said)
            assert f"its {part}, " in said and str(model) in said
        model = copied(models[family], tmp_path / f"{part}-nan")
        change_weights(
            model, part, lambda state: {**state, _first(state): torch.full_like(state[_first(state)], torch.nan)}
        )
        assert_refused("NaN or infinity in a part's weights", refusal(family, model))


def test_a_lora_that_was_not_unloaded_before_saving_is_named(models: dict[str, Path], tmp_path: Path) -> None:
    for part, name in (("unet", "to_q."), ("text_encoder", "q_proj.")):
        model = copied(models["stable_diffusion"], tmp_path / part)
        change_weights(model, part, renamed(name, f"{name}base_layer."))
        assert_refused(
            "a LoRA was fused into a part and not unloaded before saving", refusal("stable_diffusion", model)
        )


def test_weights_that_the_configuration_has_no_place_for_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    model = copied(models["sd3"], tmp_path / "model")
    change_json(model / "transformer" / "config.json", qk_norm=None)
    assert_refused("a network or decoder has weights that its configuration has no place for", refusal("sd3", model))


@pytest.mark.parametrize("family", PARTS)
def test_a_folder_of_another_family_is_refused_with_the_name_to_give(family: str, models: dict[str, Path]) -> None:
    for other in set(PARTS) - {family}:
        said = early_refusal(family, models[other])
        assert_refused("a folder of another family", said)
        assert said.endswith(f'policy.name must be "{other}"')


PIPELINES = [
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionControlNetPipeline",
    "KandinskyV22Pipeline",
    "PixArtAlphaPipeline",
    "FluxFillPipeline",
    "LatentConsistencyModelPipeline",
    ["pipeline", "MyPipeline"],
    None,
]


def test_a_pipeline_that_no_family_trains_is_refused_by_its_class(models: dict[str, Path], tmp_path: Path) -> None:
    model = copied(models["stable_diffusion"], tmp_path / "model")
    for name in PIPELINES:
        change_json(model / "model_index.json", _class_name=name)
        said = early_refusal("stable_diffusion", model)
        if isinstance(name, str):
            assert_refused("a pipeline that no family trains", said)
            assert name in said
        else:
            assert_refused("a model_index.json that names no pipeline of diffusers", said)


def test_the_refiner_of_sdxl_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    model = copied(models["sdxl"], tmp_path / "model")
    keys = {"text_encoder": [None, None], "tokenizer": [None, None], "requires_aesthetics_score": True}
    for name in ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"):
        change_json(model / "model_index.json", _class_name=name, **keys)
        assert_refused("the refiner of an SDXL", early_refusal("sdxl", model))


def test_a_network_that_is_given_an_image_too_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    for family in ("stable_diffusion", "flux"):
        model = copied(models[family], tmp_path / family)
        network = PARTS[family][0]
        channels = json.loads((model / network / "config.json").read_text())["in_channels"]
        change_json(model / network / "config.json", in_channels=channels * 2 + 1)
        situation = "a network that takes other channels than its decoder gives, as inpainting models"
        assert_refused(situation, early_refusal(family, model))


CLASSES = [
    ("stable_diffusion", "vae", "AsymmetricAutoencoderKL"),
    ("stable_diffusion", "vae", "ConsistencyDecoderVAE"),
    ("stable_diffusion", "unet", "UNetMotionModel"),
    ("stable_diffusion", "text_encoder", "CLIPTextModelWithProjection"),
    ("sdxl", "text_encoder_2", "CLIPTextModel"),
    ("sdxl", "text_encoder", "T5EncoderModel"),
    ("sd3", "text_encoder_3", "UMT5EncoderModel"),
    ("flux", "transformer", "FluxControlNetModel"),
    ("flux", "tokenizer_2", "LlamaTokenizer"),
]


@pytest.mark.parametrize(("family", "part", "name"), CLASSES)
def test_a_part_of_another_class_is_refused_by_part_and_class(
    family: str, part: str, name: str, models: dict[str, Path], tmp_path: Path
) -> None:
    model = copied(models[family], tmp_path / "model")
    library = json.loads((model / "model_index.json").read_text())[part][0]
    change_json(model / "model_index.json", **{part: [library, name]})
    said = early_refusal(family, model)
    assert_refused("a part of another class than the family knows", said)
    assert f"its {part} is " in said and name in said


def test_a_part_whose_own_configuration_is_of_another_class_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    for part, keys in (("unet", {"_class_name": "UNetMotionModel"}), ("text_encoder", {"model_type": "xlm-roberta"})):
        model = copied(models["stable_diffusion"], tmp_path / part)
        change_json(model / part / "config.json", **keys)
        said = early_refusal("stable_diffusion", model)
        assert_refused("a part's own configuration is that of another class", said)


def test_pickles_alone_are_refused_with_the_command_that_converts_them(models: dict[str, Path], tmp_path: Path) -> None:
    model = copied(models["stable_diffusion"], tmp_path / "model")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    for part in PARTS["stable_diffusion"]:
        weights_file(model, part).unlink()
        name = "pytorch_model.fp16.bin" if part == "text_encoder" else "diffusion_pytorch_model.fp16.bin"
        torch.save(getattr(pipeline, part).state_dict(), model / part / name)
    said = early_refusal("stable_diffusion", model)
    assert_refused("only .bin files", said)
    program = said.split('`python -c "')[1].split('"`')[0].replace("'MODEL'", f"'{tmp_path / 'MODEL'}'")
    exec(program, {})  # as a reader types it
    assert_same_parts(load("stable_diffusion", tmp_path / "MODEL"), pipeline)


WRONG_FILES = [
    ("a file that is empty", b""),
    ("a git-LFS pointer instead of a file", LFS.encode()),
    ("a web page instead of a file", b"<!DOCTYPE html><html>Log in</html>"),
    ("a pickle that is called .safetensors", b"PK\x03\x04pickle"),
    ("a file that is cut off", None),
]


def test_a_file_that_is_not_what_its_name_says_is_refused_by_name(models: dict[str, Path], tmp_path: Path) -> None:
    files = ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", "vae/config.json"]
    files += ["tokenizer/tokenizer.json", "scheduler/scheduler_config.json", "model_index.json"]
    for situation, content in WRONG_FILES:
        for name in files:
            if name.endswith(".json") and b"PK" in (content or b""):
                continue
            model = copied(models["stable_diffusion"], tmp_path / "model")
            path = model / name
            path.write_bytes(path.read_bytes()[:-20] if content is None else content)
            said = refusal("stable_diffusion", model)
            assert_refused(situation, said)
            assert str(path) in said
            shutil.rmtree(model)


def test_what_is_missing_in_a_local_folder_is_named_and_the_hub_is_not_asked(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> bool:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("ray_ddpo.common.model_files.model_hub.hub_answers", fail)
    original = models["stable_diffusion"]
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        model = copied(original, tmp_path / part)
        shutil.rmtree(model / part)
        assert_refused("a part's folder is missing", early_refusal("stable_diffusion", model))
    model = copied(original, tmp_path / "vocabulary")
    for name in ("tokenizer.json", "vocab.json"):
        (model / "tokenizer" / name).unlink(missing_ok=True)
    assert_refused("a tokenizer without a vocabulary", early_refusal("stable_diffusion", model))
    model = copied(original, tmp_path / "misnamed")
    weights_file(model, "vae").rename(model / "vae" / "sd-vae.safetensors")
    assert_refused("weights under another name", early_refusal("stable_diffusion", model))
    model = copied(original, tmp_path / "shards")
    save_variant(model, "unet", "fp16", shards=True)
    next((model / "unet").glob("*00001-of-00002.safetensors")).unlink()
    assert_refused("one of several files of weights is missing", early_refusal("stable_diffusion", model))
    for number, keys in enumerate(({"weight_map": {}}, {"metadata": None})):
        model = copied(original, tmp_path / f"index {number}")
        save_variant(model, "unet", "fp16", shards=True)
        change_json(next((model / "unet").glob("*.index*.json")), **keys)
        said = early_refusal("stable_diffusion", model)
        assert_refused("an index of weights that names no file, or lacks its `metadata`", said)
    model = copied(original, tmp_path / "adapter")
    (model / "text_encoder" / "adapter_config.json").write_text("{}")
    assert_refused("a text encoder with a LoRA beside its weights", early_refusal("stable_diffusion", model))
