"""Fingerprints of everything a run depends on: of contents alone, part by part."""

import sys
from pathlib import Path

import pytest
import torch

from ray_ddpo.actors.rewards.aesthetic import Aesthetic
from ray_ddpo.actors.rewards.function import FunctionReward
from ray_ddpo.common.base_parts import BasePart, LoadedBase, entry_base
from ray_ddpo.common.diffusion.families.stable_diffusion import StableDiffusion
from ray_ddpo.common.model_files.model_hub import Weights
from ray_ddpo.common.prompts import File
from ray_ddpo.common.user_code.sources import user_sources
from tests.altered_files import altered
from tests.tiny_pipeline import save_tiny_pipeline

SAMPLER = {"policy.model"} | {
    f"policy.model/{part}" for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("model") / "a")


def test_a_sampler_has_every_part_and_a_learner_network_and_schedule(model: Path) -> None:
    policy = StableDiffusion(model=str(model))
    sampler, learner = policy.loaded_base("sampler"), policy.loaded_base("learner")
    assert sampler.keys() == SAMPLER
    assert learner.keys() == {"policy.model", "policy.model/unet", "policy.model/scheduler"}
    assert all(sampler[name] == part for name, part in learner.items())


@pytest.mark.parametrize("file", ["unet/*.safetensors", "vae/*.safetensors", "text_encoder/*.safetensors"])
def test_a_changed_tensor_is_found_under_the_same_size_and_time(model: Path, file: str) -> None:
    policy = StableDiffusion(model=str(model))
    before = policy.loaded_base("sampler")
    with altered(next(model.glob(file))):
        now = policy.loaded_base("sampler")
    assert {name for name in before if before[name].sha256 != now[name].sha256} == {
        f"policy.model/{file.split('/')[0]}"
    }
    assert policy.loaded_base("sampler") == before


def test_a_copy_has_the_same_fingerprints_whatever_unused_files_it_has(model: Path, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(model, tmp_path / "elsewhere"))
    (copy / "unet/diffusion_pytorch_model.fp16.safetensors").write_bytes(b"another variant")
    (copy / "README.md").write_text("a card")
    first, second = (StableDiffusion(model=str(folder)).loaded_base("sampler") for folder in (model, copy))
    assert {name: part.sha256 for name, part in first.items()} == {name: part.sha256 for name, part in second.items()}
    assert first["policy.model/unet"].path != second["policy.model/unet"].path


def test_a_file_that_was_downloaded_is_found_in_the_hubs_cache(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    snapshot = tmp_path / "models--zoo--animals/snapshots/abc"
    snapshot.parent.mkdir(parents=True)
    (tmp_path / "models--zoo--animals/refs").mkdir()
    (tmp_path / "models--zoo--animals/refs/main").write_text("abc")
    snapshot.symlink_to(model, target_is_directory=True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    local, hub = (StableDiffusion(model=name).loaded_base("sampler") for name in (str(model), "zoo/animals"))
    assert {name: part.sha256 for name, part in local.items()} == {name: part.sha256 for name, part in hub.items()}


def test_a_rewards_files_and_a_prompt_file_have_the_key_that_names_them(model: Path, tmp_path: Path) -> None:
    head, prompts = tmp_path / "head[1].pth", tmp_path / "prompts.txt"
    torch.save({"a": torch.ones(1)}, head)
    prompts.write_text("a cat\n")
    reward = Aesthetic(clip=str(model / "text_encoder"), head=str(head))
    found = entry_base(reward, "reward", reward.needs(), "pretty")
    assert found.keys() == {"reward.clip of pretty", "reward.head of pretty"}
    assert found["reward.head of pretty"].path == str(head)
    source = File(path=str(prompts))
    before = entry_base(source, "prompts", source.needs())["prompts.path"]
    prompts.write_text("a dog\n")
    assert entry_base(source, "prompts", source.needs())["prompts.path"].sha256 != before.sha256


def test_any_files_of_a_users_own_weights_are_read_by_their_patterns(tmp_path: Path) -> None:
    (tmp_path / "net.pt").write_bytes(b"1")
    reward = FunctionReward(path="tests.user_functions:brightness")
    found = entry_base(reward, "reward", (Weights(str(tmp_path), ("*.pt",), "reward.model"),))
    assert found["reward.model"].path == str(tmp_path / "net.pt")


def test_a_users_module_has_the_modules_that_it_imports_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/__init__.py").write_text("")
    (tmp_path / "mine/score.py").write_text(
        "import numpy\nimport ray_ddpo.common.run_storage.png\nfrom . import parts\n"
    )
    (tmp_path / "mine/parts.py").write_text("def f():\n    from beside_mine import g\n    import mine.score\n")
    (tmp_path / "beside_mine.py").write_text("raise RuntimeError('nobody imports it to look at it')\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert sorted(user_sources("mine.score")) == ["beside_mine", "mine", "mine.parts", "mine.score"]
    assert user_sources("numpy") == user_sources("ray_ddpo.actors.sampler") == user_sources("nowhere_at_all") == {}
    reward = FunctionReward(path="mine.score:f")
    assert sorted(entry_base(reward, "reward", label="function")) == [
        "reward.path of function",
        "reward.path of function/beside_mine",
        "reward.path of function/mine",
        "reward.path of function/mine.parts",
    ]


def part(letter: str, host: str = "a") -> BasePart:
    return BasePart(path=f"/models/{letter}", host=host, sha256=letter * 64)


def test_two_processes_that_have_loaded_different_files_are_named() -> None:
    base = LoadedBase()
    base.take("learner", {"policy.model/unet": part("1"), "policy.model/scheduler": part("2")})
    base.take("sampler 0", {"policy.model/unet": part("1", "b"), "policy.model/vae": part("3", "b")})
    with pytest.raises(
        ValueError, match="sampler 1 has loaded another policy.model/vae than sampler 0: 4{12} .*on c.*3{12}"
    ):
        base.take("sampler 1", {"policy.model/vae": part("4", "c")})
    assert sorted(base.parts) == ["policy.model/scheduler", "policy.model/unet", "policy.model/vae"]


def test_what_was_before_is_compared_and_kept_where_nobody_loads_it() -> None:
    base = LoadedBase(
        {"policy.model/unet": part("1"), "reward.head of x": part("2"), "policy.model/vae": part("5")},
        lambda said: " and ".join(said),
    )
    base.take("learner", {"policy.model/unet": part("1", "elsewhere")})
    assert base.parts["policy.model/unet"].host == "elsewhere" and "reward.head of x" in base.parts
    with pytest.raises(ValueError, match=r"policy.model/vae \(loaded by sampler 0\)"):
        base.take("sampler 0", {"policy.model/vae": part("3")})
