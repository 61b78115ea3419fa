"""A fully trained network loads if its files have every weight of this network, and no other."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ray_ddpo.common.diffusion.trained_weights import WEIGHTS_NAME
from tests.accepted_page import assert_refused
from tests.tiny_policy import tiny_policy

State = dict[str, torch.Tensor]
INCOMPLETE = "a trained network whose files lack a weight, have one more, or one of another size"
ANOTHER = "a trained network of another class or configuration than the model"
WEIGHT = "conv_out.bias"


def test_files_that_are_not_this_network_are_refused_and_change_nothing(tiny_model: Path, tmp_path: Path) -> None:
    policy = tiny_policy(tiny_model, train="full")
    folder = policy.save(tmp_path)
    state, config = load_file(folder / WEIGHTS_NAME), json.loads((folder / "config.json").read_text())
    before = {name: value.clone() for name, value in policy.network.state_dict().items()}
    files: dict[Callable[[State], State], str] = {
        lambda state: {name: value for name, value in state.items() if name != WEIGHT}: INCOMPLETE,
        lambda state: state | {"more": state[WEIGHT].clone()}: INCOMPLETE,
        lambda state: state | {WEIGHT: torch.zeros(3)}: INCOMPLETE,
        lambda state: {f"module.{name}": value for name, value in state.items()}: INCOMPLETE,
    }
    for change, situation in files.items():
        save_file(change(dict(state)), folder / WEIGHTS_NAME)
        with pytest.raises(ValueError) as error:
            policy.restore(folder)
        assert_refused(situation, str(error.value))
    save_file({name: value + 1 for name, value in state.items()}, folder / WEIGHTS_NAME)
    for keys in ({"_class_name": "SD3Transformer2DModel"}, {"attention_head_dim": 4}):
        (folder / "config.json").write_text(json.dumps(config | keys))
        with pytest.raises(ValueError) as error:
            policy.restore(folder)
        assert_refused(ANOTHER, str(error.value))
    assert all(torch.equal(value, before[name]) for name, value in policy.network.state_dict().items())
    (folder / "config.json").write_text(json.dumps(config))
    policy.restore(folder)
    assert all(torch.equal(value, before[name] + 1) for name, value in policy.network.state_dict().items())
