"""LoRA files with rare settings as the start of training: exact, or refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ray_ddpo.common.diffusion.lora.adapters import LoraSettings
from ray_ddpo.common.diffusion.lora.files import FILE_NAME, METADATA
from tests.accepted_page import assert_accepted, assert_refused
from tests.tiny_policy import tiny_policy

SETTINGS = {"r": 4, "lora_alpha": 4, "target_modules": ["to_k", "to_out.0", "to_q", "to_v"]}


@pytest.fixture(scope="module")
def tensors(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("trained")
    tiny_policy(tiny_model).save(folder)
    return load_file(folder / "lora" / FILE_NAME)


def written(folder: Path, tensors: dict[str, torch.Tensor], **settings: Any) -> LoraSettings:
    header = {f"unet.{key}": value for key, value in (SETTINGS | settings).items()}
    save_file(tensors, folder / "lora.safetensors", {METADATA: json.dumps(header)})
    return LoraSettings(path=str(folder / "lora.safetensors"))


def with_header(folder: Path, tensors: dict[str, torch.Tensor], header: dict[str, Any]) -> LoraSettings:
    save_file(tensors, folder / "lora.safetensors", {METADATA: json.dumps(header)})
    return LoraSettings(path=str(folder / "lora.safetensors"))


def test_dropout_of_a_file_is_off(tiny_model: Path, tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    for role in ("sampler", "learner"):
        policy = tiny_policy(tiny_model, role, lora=written(tmp_path, tensors, lora_dropout=0.5))
        dropout = [module for module in policy.network.modules() if isinstance(module, torch.nn.Dropout) and module.p]
        assert dropout and not any(module.training for module in policy.network.modules())
    assert_accepted("adapters with dropout in `policy.lora.path`")


def test_what_cannot_be_trained_is_refused_by_name(
    tiny_model: Path, tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    biases = {
        name.replace(".weight", ".bias"): value[:, 0].clone() for name, value in tensors.items() if "lora_B" in name
    }
    peft = tmp_path / "peft"
    peft.mkdir()
    named = {f"base_model.model.{name.removeprefix('unet.')}": value for name, value in tensors.items()}
    save_file(named, peft / "adapter_model.safetensors")
    config = {**SETTINGS, "peft_type": "LORA", "init_lora_weights": "pissa"}
    (peft / "adapter_config.json").write_text(json.dumps(config))
    for situation, make in {
        "adapters with biases (`lora_bias`) in `policy.lora.path`": lambda: written(
            tmp_path, tensors | biases, lora_bias=True
        ),
        "alpha or rank 0 in a LoRA's header": lambda: written(tmp_path, tensors, lora_alpha=0),
        "PiSSA, OLoRA and others that change the network's own weights (`init_lora_weights`)": lambda: LoraSettings(
            path=str(peft)
        ),
        "settings in a LoRA's header without the part's prefix": lambda: with_header(
            tmp_path, tensors, SETTINGS | {"lora_alpha": 8}
        ),
        "settings in a LoRA's header without target modules": lambda: written(tmp_path, tensors, target_modules=None),
        "a LoRA with `modules_to_save`": lambda: written(tmp_path, tensors, modules_to_save=["conv_in"]),
    }.items():
        with pytest.raises(ValueError) as error:
            tiny_policy(tiny_model, lora=make())
        assert_refused(situation, str(error.value))
