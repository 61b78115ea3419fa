"""Models of transformers load in the requested precision, quietly, and never with random weights."""

from pathlib import Path

import pytest
import torch

from ray_ddpo.common.model_files.model_hub import Weights
from ray_ddpo.common.model_files.pretrained import loaded, read_model, read_tokenizer, torch_dtype, weight_bytes
from tests.tiny_clip import save_tiny_clip


def test_automatic_precision_is_half_on_cuda_and_full_elsewhere() -> None:
    assert torch_dtype("auto", "cuda:1") == torch.float16 and torch_dtype("auto", "cpu") == torch.float32
    assert torch_dtype("bfloat16", "cuda") == torch.bfloat16
    assert [weight_bytes(10, precision) for precision in ("auto", "float32", "bfloat16")] == [20, 40, 20]


def test_a_model_is_frozen_in_its_precision_and_unneeded_weights_are_silent(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers import CLIPVisionModelWithProjection
    from transformers.utils import logging

    folder, before = save_tiny_clip(tmp_path), logging.get_verbosity()
    capfd.readouterr()
    tower = read_model(CLIPVisionModelWithProjection, str(folder), torch.bfloat16, "missing")
    assert {parameter.dtype for parameter in tower.parameters()} == {torch.bfloat16}
    assert not tower.training and not any(parameter.requires_grad for parameter in tower.parameters())
    assert capfd.readouterr() == ("", "") and logging.get_verbosity() == before


def test_weights_that_are_given_are_checked_as_those_of_a_file(tmp_path: Path) -> None:
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(save_tiny_clip(tmp_path))
    state = dict(model.state_dict())
    assert torch.equal(
        loaded(CLIPModel, None, "x", config=model.config, state_dict=state).logit_scale, model.logit_scale
    )
    del state["visual_projection.weight"], state["logit_scale"]
    with pytest.raises(ValueError, match="^x .weights are missing: logit_scale, 2 in all"):
        loaded(CLIPModel, None, "x", config=model.config, state_dict=state)


def test_a_folder_without_a_vocabulary_has_no_tokenizer(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    assert len(CLIPTokenizer.from_pretrained(tmp_path)) < 5  # what transformers makes of nothing
    with pytest.raises(ValueError, match="reward.tokenizer is .*that has tokenizer.json; .*No such file"):
        read_tokenizer(CLIPTokenizer, Weights(str(tmp_path), ("tokenizer.json",), "reward.tokenizer"))
