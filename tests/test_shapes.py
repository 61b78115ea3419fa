"""Test docs/shapes, a plain network with class labels: every command, in a folder outside the project."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pretrain_shapes import pretrain, rendered
from shapes import CLASSES, Shapes

from ray_ddpo import cli
from ray_ddpo.common.diffusion.memory.sizes import parameter_bytes
from ray_ddpo.common.diffusion.policy import PolicyConfig
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.deploy.commands.weights.run_weights import run_weights
from tests.failure_page import assert_documented
from tests.test_documentation import ROOT
from tests.tiny_families import save_tiny_shapes
from tests.tiny_policy import SAMPLING

EXAMPLE = ROOT / "docs" / "shapes"
SMALL = [
    *("--rounds", "2", "--sampling.num_steps", "4", "--sampling.batch_size", "8", "--sampling.batches_per_round", "2"),
    *("--learner.batch_size", "16", "--learner.micro_batch_size", "8", "--evaluation.images", "4"),
]
# Runs the verbs given one after the other in one process, on one cluster, as a shell would in this folder.
VERBS = """
import json, sys
import ray
from ray_ddpo import cli
ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
codes = [cli.main(verb) for verb in json.loads(sys.argv[1])]
print("codes", json.dumps(codes))
"""


def test_the_family_has_about_a_hundred_lines_beyond_its_network() -> None:
    assert len((EXAMPLE / "shapes.py").read_text().splitlines()) <= 105


def test_each_class_has_one_shape_and_is_learned() -> None:
    images = rendered(torch.arange(len(CLASSES)))
    assert images.shape == (4, 3, 16, 16) and images.min() == -1 and images.max() > -0.5
    assert len(pretrain(steps=1).state_dict()) == 17


def test_sizes_are_counted_without_weights(tmp_path: Path) -> None:
    config: PolicyConfig = Shapes(model=str(save_tiny_shapes(tmp_path)))
    sizes, policy = config.sizes(SAMPLING, "cpu"), config.load("cpu", SAMPLING, "sampler")
    assert sizes.conditioning_dtypes == {"label": torch.int64, "negative_label": torch.int64}
    assert sizes.conditioning_bytes == 8
    assert sizes.sampler_bytes(1) > sizes.encoding_bytes == parameter_bytes(policy.network)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for file in (file for file in EXAMPLE.iterdir() if file.is_file()):
        shutil.copy(file, tmp_path)
    save_tiny_shapes(tmp_path)
    return tmp_path


def in_folder(folder: Path, *command: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "RAY_ADDRESS")}
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=900
    )


def train(name: str, kind: str, *options: str) -> list[str]:
    return ["train", "shapes.toml", *SMALL, "--name", name, "--policy.train", kind, *options]


@pytest.mark.system
def test_a_plain_network_with_labels_runs_every_verb_with_the_same_bits(folder: Path) -> None:
    runs = [name for kind in ("lora", "full") for name in (kind, f"{kind}-alone")]
    # One run begins on Ray and is resumed in one process, the other the other way round.
    verbs = [
        train("lora", "lora", "--rounds", "1"),
        train("lora", "lora", "--resume", "auto", "--serial"),
        train("full", "full", "--rounds", "1", "--serial"),
        train("full", "full", "--resume", "auto"),
    ]
    verbs += [train(f"{kind}-alone", kind, "--serial") for kind in ("lora", "full")]
    for kind in ("lora", "full"):
        run = f"runs/{kind}"
        verbs += [
            ["plan", "shapes.toml", "--policy.train", kind],
            ["report", run],
            ["sample", "--lora", run, "--output", f"samples-{kind}", "disc", "ring"],
            ["evaluate", run, "--output", f"evaluation-{kind}", "--evaluation.images", "4"],
            ["push", run, "zoo/shapes", "--dry-run", f"published-{kind}", "--push.license", "mit"],
        ]
    done = in_folder(folder, "-c", VERBS, json.dumps(verbs))
    assert done.returncode == 0 and "codes" in done.stdout, f"{done.stdout}\n{done.stderr}"
    codes = json.loads(done.stdout.rpartition("codes")[2])
    assert codes == [0] * len(verbs), f"{list(zip(verbs, codes, strict=True))}\n{done.stdout}\n{done.stderr}"
    found = {name: run_weights(RunFolder(folder / "runs" / name)).fingerprint for name in runs}
    assert found["lora"] == found["lora-alone"] != found["full"] == found["full-alone"]
    assert (folder / "published-full" / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    assert (folder / "published-lora" / "pytorch_lora_weights.safetensors").is_file()
    assert len(list((folder / "samples-full").glob("*.png"))) == len(list((folder / "samples-lora").glob("*.png"))) == 2


@pytest.mark.system
@pytest.mark.parametrize(
    ("situation", "old", "new", "options"),
    [
        ("a family's `decode` returns no uint8 images", "    return images_of(latents)", "    return latents", []),
        (
            "a family's `transition` takes other arguments",
            ", stochastic: bool = True\n    ) ->",
            ") ->",
            [],
        ),
        ("a LoRA's target module is no layer of the network", '"enter", "down"', '"to_q", "down"', []),
        ("a family's module cannot be imported", "CLASSES = (", "CLASSES = UNKNOWN(", []),
    ],
)
def test_a_mistake_in_a_family_ends_a_run_before_its_first_round(
    situation: str,
    old: str,
    new: str,
    options: list[str],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    family = (folder / "shapes.py").read_text()
    assert old in family
    (folder / "shapes.py").write_text(family.replace(old, new))
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    for module in [file.stem for file in folder.glob("*.py") if file.stem in sys.modules]:
        monkeypatch.delitem(sys.modules, module)
    exit_code = cli.main(train("broken", "lora", "--serial", *options))
    assert_documented(situation, exit_code, "".join(capfd.readouterr()))
    assert not (folder / "runs" / "broken" / "metrics.jsonl").exists()
