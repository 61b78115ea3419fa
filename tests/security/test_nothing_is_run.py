"""Code in models, weights and heads is not run, whatever the file name, and the user is told."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ray_ddpo.actors.rewards.vlm_alignment import _read
from ray_ddpo.common.diffusion.lora.adapters import load_lora, read_lora_settings
from ray_ddpo.common.image_models.aesthetic_head import read_head
from ray_ddpo.common.image_models.bert_score import load_bert_score
from ray_ddpo.common.image_models.weight_file import read_weight_file
from ray_ddpo.common.model_files.model_hub import Weights
from ray_ddpo.common.model_files.pretrained import read_model, read_tokenizer
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.deploy.driver.components import build_components
from tests.tiny_clip import save_tiny_clip
from tests.tiny_pipeline import save_tiny_pipeline
from tests.tiny_vlm import save_tiny_encoder, save_tiny_vlm

SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".npy", ".pkl", ".joblib", ".safetensors", "")


class Payload:
    """Leaves a file where it was unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """The file that is there once code has run."""
    return tmp_path / "code-was-run"


def code(mark: Path) -> str:
    """A module that leaves the mark when it is imported, with classes of all names asked for."""
    return f"from pathlib import Path\nPath({str(mark)!r}).touch()\n__getattr__ = lambda name: Path\n"


def test_the_payload_works(mark: Path) -> None:
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.exists()


def by_torch(path: Path, payload: object) -> None:
    torch.save({"state_dict": payload}, path)


def by_pickle(path: Path, payload: object) -> None:
    path.write_bytes(pickle.dumps(payload))


def by_numpy(path: Path, payload: object) -> None:
    with path.open("wb") as file:
        np.save(file, np.array([payload], dtype=object), allow_pickle=True)


READERS: dict[str, Callable[[Path], object]] = {
    "weights": lambda path: read_weight_file(path, "the weights"),
    "aesthetic head": read_head,
    "lora": lambda path: load_lora(torch.nn.Linear(1, 1), path),
    "lora's settings": read_lora_settings,
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", [by_torch, by_pickle, by_numpy])
@pytest.mark.parametrize("reader", READERS)
def test_a_file_that_carries_code_is_refused_whatever_it_is_called(
    tmp_path: Path, mark: Path, write: Callable[[Path, object], None], reader: str
) -> None:
    for suffix in SUFFIXES:
        path = tmp_path / f"weights{suffix}"
        write(path, Payload(mark))
        with pytest.raises(ValueError, match="weights"):
            READERS[reader](path)
        assert not mark.exists(), path


def only_as_pickle(folder: Path, mark: Path, name: str = "pytorch_model.bin") -> None:
    """In the place of its safetensors."""
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    torch.save({"weight": Payload(mark)}, folder / name)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_model_whose_weights_are_pickles_is_refused(tmp_path: Path, tables: dict, mark: Path, part: str) -> None:
    model = save_tiny_pipeline(tmp_path / "model")
    name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
    only_as_pickle(model / part, mark, name)
    with pytest.raises(ValueError, match=r"policy\.model is .*, which cannot be loaded"):
        loaded_policy(tables, model)
    assert not mark.exists()


def loaded_policy(tables: dict, model: Path) -> object:
    recipe = Recipe.parse({**tables, "policy": {**tables["policy"], "model": str(model)}})
    return build_components(recipe).policy.load("cpu", recipe.sampling, "sampler")


@pytest.mark.parametrize(("part", "library"), [("unet", "evil"), ("scheduler", "evil"), ("tokenizer", "os")])
def test_a_model_that_names_code_of_its_own_is_refused(
    tmp_path: Path, tables: dict, mark: Path, part: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny_pipeline(tmp_path / "model")
    for folder in (model, model / part, tmp_path):
        (folder / f"{library}.py").write_text(code(mark))
    monkeypatch.syspath_prepend(str(tmp_path))  # where a command is typed is looked in too
    index = json.loads((model / "model_index.json").read_text())
    index[part] = [library, "Evil"]
    (model / "model_index.json").write_text(json.dumps(index))
    with pytest.raises((ValueError, OSError)):
        loaded_policy(tables, model)
    assert not mark.exists()


def with_code(folder: Path, mark: Path, file: str = "config.json") -> Path:
    """Name classes in the folder's own code, as models that want to be trusted do."""
    config = json.loads((folder / file).read_text())
    names = ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoTokenizer", "AutoProcessor")
    config["auto_map"] = {name: "evil.Evil" for name in names} | {"AutoTokenizer": ["evil.Evil", None]}
    config["model_type"] = "evil"
    (folder / file).write_text(json.dumps(config))
    (folder / "evil.py").write_text(code(mark))
    return folder


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_text_encoder_with_code_is_refused_without_a_question(tmp_path: Path, mark: Path, file: str) -> None:
    folder = with_code(save_tiny_encoder(tmp_path / "encoder"), mark, file)
    if file == "config.json":
        with pytest.raises(ValueError, match="custom code"):
            load_bert_score(str(folder), 2, "cpu", "missing")
    else:
        assert load_bert_score(str(folder), 2, "cpu", "missing")
    assert not mark.exists()


def test_a_text_encoder_that_is_published_as_a_pickle_is_read_as_tensors_alone(tmp_path: Path, mark: Path) -> None:
    from safetensors.torch import load_file

    folder = save_tiny_encoder(tmp_path / "encoder")
    weights = load_file(folder / "model.safetensors")
    only_as_pickle(folder, mark)
    with pytest.raises((ValueError, pickle.UnpicklingError)):
        load_bert_score(str(folder), 2, "cpu", "missing")
    assert not mark.exists()
    torch.save(weights, folder / "pytorch_model.bin")
    assert load_bert_score(str(folder), 2, "cpu", "missing")


def test_a_vision_language_model_that_brings_code_is_refused(tmp_path: Path, mark: Path) -> None:
    folder = save_tiny_vlm(tmp_path / "vlm")
    pickled = shutil.copytree(folder, tmp_path / "pickled")
    only_as_pickle(Path(pickled), mark)
    with pytest.raises(ValueError, match="which cannot be loaded"):
        _read(str(pickled), torch.float32)
    with pytest.raises(ValueError, match="custom code"):
        _read(str(with_code(folder, mark)), torch.float32)
    assert not mark.exists()


def test_a_clip_is_read_from_safetensors_alone(tmp_path: Path, mark: Path) -> None:
    from transformers import CLIPModel, CLIPTokenizer

    folder = save_tiny_clip(tmp_path / "clip")
    with_code(folder, mark, "tokenizer_config.json")
    assert read_tokenizer(CLIPTokenizer, Weights(str(folder), ("tokenizer.json",), "reward.tokenizer"))
    only_as_pickle(folder, mark)
    with pytest.raises(ValueError, match="cannot be loaded"):
        read_model(CLIPModel, str(folder), torch.float32, "it cannot be loaded")
    assert not mark.exists()
