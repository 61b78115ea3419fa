"""Named weights come from a file of any format, and nothing in the file is run."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ray_ddpo.common.diffusion.lora.files import files_of_lora
from ray_ddpo.common.image_models.weight_file import named_weights, read_weight_file
from ray_ddpo.common.model_files.model_hub import file_of, missing_files

WEIGHTS = {"weight": torch.tensor([1.0, 2.0])}


def test_named_weights_are_read_from_either_format_and_from_a_checkpoint(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "a.safetensors")
    torch.save(WEIGHTS, tmp_path / "b.pth")
    torch.save({"epoch": 3, "state_dict": WEIGHTS}, tmp_path / "c.pt")
    for path in sorted(tmp_path.iterdir()):
        assert named_weights(path, "the head")["weight"].tolist() == [1, 2]


class Payload:
    """An object that would run code when unpickled."""

    def __reduce__(self) -> tuple:
        return exec, ("raise SystemExit('unpickled')",)


def test_a_file_that_carries_code_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"state_dict": Payload()}, tmp_path / "weights.pt")
    said = "the checkpoint .*weights.pt cannot be read: it must be a .safetensors file, or a .pt file of weights only"
    with pytest.raises(ValueError, match=said):
        named_weights(tmp_path / "weights.pt", "the checkpoint", ".pt")


def test_what_is_not_there_or_holds_no_named_weights_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the head .*nowhere.pth is not there: give the path of its weights"):
        named_weights(tmp_path / "nowhere.pth", "the head")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="the head .*list.pth holds list: it must hold named weights"):
        named_weights(tmp_path / "list.pth", "the head")
    torch.save({"state_dict": {"weight": 1}}, tmp_path / "number.pth")
    with pytest.raises(ValueError, match="holds dict: it must hold named weights"):
        named_weights(tmp_path / "number.pth", "the head")


def test_a_home_of_no_user_is_a_file_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="the head ~no_user_of_this_name/head.pth is not there"):
        read_weight_file("~no_user_of_this_name/head.pth", "the head")
    with pytest.raises(ValueError, match="policy.lora.path is '~no_user_of_this_name/lora': .* is no run with a LoRA"):
        files_of_lora("~no_user_of_this_name/lora")
    assert missing_files(file_of("~no_user_of_this_name/head.pth", "", "", "reward.head")) == ["head.pth"]
