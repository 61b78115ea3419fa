"""The cache of counted sizes: used by `ddpo plan` alone, and never in the way."""

import json
import shutil
from pathlib import Path

import pytest

from ray_ddpo.common.diffusion.families.stable_diffusion import StableDiffusion
from ray_ddpo.common.diffusion.memory.live_bytes import PeakBytes
from ray_ddpo.common.diffusion.memory.sizes import PolicySizes
from ray_ddpo.common.diffusion.memory.sizes_cache import FOLDER_VARIABLE, cached_sizes, sizes_cache
from tests.tiny_policy import SAMPLING

SIZES = PolicySizes(
    latent_shape=(4, 16, 16),
    stochastic_steps=15,
    conditioning_shape={"prompt_embeds": (16, 96)},
    conditioning_bytes=6144,
    network_parameters=10,
    trained_parameters=2,
    learner=PeakBytes(10.5, 2),
    sampling=PeakBytes(3, 1.25),
    decoding=PeakBytes(4, 1),
    encoding_bytes=7,
)


class Counter:
    """Counts how often sizes are counted."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> PolicySizes:
        self.calls += 1
        return SIZES


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    return tmp_path / "sizes"


def test_sizes_are_counted_once_per_key_and_come_back_equal(folder: Path) -> None:
    count = Counter()
    with sizes_cache():
        assert [cached_sizes("a", count), cached_sizes("a", count), cached_sizes("b", count)] == [SIZES] * 3
    assert count.calls == 2 and len(list(folder.iterdir())) == 2


def test_a_copy_of_a_model_is_counted_again_only_if_its_configuration_differs(
    folder: Path, tiny_model: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    scheduler = copy / "scheduler/scheduler_config.json"
    with sizes_cache():
        found = [StableDiffusion(model=str(model)).sizes(SAMPLING, "cpu") for model in (tiny_model, copy)]
        assert found[0] == found[1] and len(list(folder.iterdir())) == 1
        scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"set_alpha_to_one": True}))
        assert StableDiffusion(model=str(copy)).sizes(SAMPLING, "cpu").stochastic_steps == found[0].stochastic_steps - 1
        assert len(list(folder.iterdir())) == 2


def test_nothing_is_cached_outside_the_block(folder: Path) -> None:
    count = Counter()
    assert cached_sizes("a", count) == cached_sizes("a", count) == SIZES
    assert count.calls == 2 and not folder.exists()


def test_another_version_of_a_library_counts_again(monkeypatch: pytest.MonkeyPatch) -> None:
    count = Counter()
    with sizes_cache():
        cached_sizes("a", count)
        monkeypatch.setattr("importlib.metadata.version", lambda library: "99")
        cached_sizes("a", count)
    assert count.calls == 2


@pytest.mark.parametrize("content", [b"", b"{", b'{"latent_shape": [1]}'])
def test_a_damaged_file_is_counted_and_written_again(folder: Path, content: bytes) -> None:
    count = Counter()
    with sizes_cache():
        cached_sizes("a", count)
        (file,) = folder.iterdir()
        file.write_bytes(content)
        assert cached_sizes("a", count) == cached_sizes("a", count) == SIZES
    assert count.calls == 2


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "file"))
    with sizes_cache():
        assert cached_sizes("a", Counter()) == SIZES
