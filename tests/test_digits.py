"""Test the example family docs/digits: its parts, and its page's commands as they stand."""

import json
import shutil
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import digit_rewards
import numpy as np
import pytest
import torch
from digit_transformer import DigitTransformer
from digits import Digits
from digits_policy import digit_of, images_of
from pretrain_digits import FONTS, SIZE, flow_matching_loss, pretrain, rendered

from ray_ddpo import cli
from ray_ddpo.common.diffusion.lora.adapters import trained_parameters
from ray_ddpo.common.diffusion.memory.live_bytes import peak_bytes
from ray_ddpo.common.diffusion.memory.sizes import parameter_bytes
from ray_ddpo.common.diffusion.policy import select_rows
from ray_ddpo.common.diffusion.rollout import sample_trajectories
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.deploy.commands.weights.run_weights import run_weights
from ray_ddpo.deploy.driver.components import build_components
from tests.system.forked_workers import forked_program
from tests.test_documentation import ROOT, blocks
from tests.tiny_families import save_tiny_digits
from tests.tiny_policy import SAMPLING

EXAMPLE = ROOT / "docs" / "digits"
PAGE = ROOT / "docs" / "extending.md"
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.mark.parametrize(("prompt", "digit"), [("seven", 7), ("a 3", 3), ("The digit Nine.", 9), ("0", 0)])
def test_a_prompt_names_its_digit_as_a_word_or_a_numeral(prompt: str, digit: int) -> None:
    assert digit_of(prompt) == digit


@pytest.mark.parametrize(("prompt", "named"), [("a cat", 0), ("", 0), ("one or two", 2), ("12", 2)])
def test_a_prompt_without_exactly_one_digit_is_refused(prompt: str, named: int) -> None:
    with pytest.raises(ValueError, match=f"the prompt {prompt!r} names {named} digits: it must name one"):
        digit_of(prompt)


def test_images_are_white_on_black_squares() -> None:
    images = images_of(torch.tensor([[[[-1.0, 1.0], [0.0, 9.0]]]]), zoom=2)
    assert images[0, :, :, 0].tolist() == [[0, 0, 255, 255]] * 2 + [[128, 128, 255, 255]] * 2
    assert torch.equal(images[..., 0], images[..., 2])


def test_printed_digits_are_recognized_and_have_their_ink() -> None:
    printed = torch.from_numpy(np.stack([rendered(digit, FONTS[2], 14, 5, (0.5, 0)) for digit in range(10)]))
    images = images_of(printed.unsqueeze(1), zoom=4).numpy()
    assert digit_rewards.reads(images, WORDS, []).tolist() == [1] * 10
    assert digit_rewards.reads(images, [*WORDS[1:], "zero"], []).tolist() == [0] * 10
    half = np.zeros((1, SIZE, SIZE, 3), np.uint8)
    half[:, : SIZE // 2] = 255
    assert digit_rewards.ink(half, ["one"], [{}]).tolist() == [0.5]


def test_the_pretraining_loss_is_zero_at_the_true_velocity() -> None:
    clean = torch.zeros(2, 1, SIZE, SIZE)  # x_σ = σ ε, so that ε − x0 = x_σ / σ
    assert flow_matching_loss(lambda x, t, digit: x / (t / 1000).view(-1, 1, 1, 1), clean, torch.zeros(2, 10)) < 1e-6  # type: ignore[arg-type]
    assert flow_matching_loss(lambda x, t, digit: 0 * x, clean, torch.zeros(2, 10)) > 0.5  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "keys", [{"dtype": "float16"}, {"sampler_dtype": "bfloat16"}, {"gradient_checkpointing": True}]
)
def test_keys_that_the_small_network_does_not_support_are_refused(keys: dict, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="are for large networks"):
        Digits(model=str(save_tiny_digits(tmp_path)), **keys).check()


def test_peak_memory_of_sampler_and_learner_is_predicted(tmp_path: Path) -> None:
    DigitTransformer().save_pretrained(tmp_path)
    config = Digits(model=str(tmp_path))
    sizes, policy = config.sizes(SAMPLING, "cpu"), config.load("cpu", SAMPLING, "sampler")

    def task() -> None:
        policy.decode(sample_trajectories(policy, ["one"] * 3, [1, 2, 3], SAMPLING).final_latents)

    assert sizes.sampler_bytes(3) == pytest.approx(parameter_bytes(policy.network) + peak_bytes(task), rel=0.05)
    assert sizes.stochastic_steps == len(policy.stochastic_steps)
    assert sizes.conditioning_shape == {name: tuple(row.shape[1:]) for name, row in policy.encode(["one"]).items()}
    learner = config.load("cpu", SAMPLING, "learner")
    trained = trained_parameters(learner.network).values()
    rows = select_rows(policy.encode(["one"]), torch.zeros(2, dtype=torch.long))

    def step() -> None:
        for value in trained:
            value.grad = torch.zeros_like(value)
        transition = learner.transition(torch.zeros(2, *learner.latent_shape), torch.tensor([0, 1]), rows)
        transition.log_prob(torch.zeros(2, *learner.latent_shape)).sum().backward()

    held = parameter_bytes(learner.network) + sum(2 * value.nbytes for value in trained)
    assert sizes.learner.of(2) == pytest.approx(held + peak_bytes(step), rel=0.05)


def at_any_depth(block: str, source: str) -> bool:
    return any(textwrap.indent(block, " " * depth) in source for depth in (0, 4, 8))


def test_the_pages_quotes_are_in_the_example() -> None:
    section = PAGE.read_text().partition("## A model family")[2].partition("\n## ")[0]
    quoted = [block for block in blocks(PAGE, "python") if block in section]
    sources = [path.read_text() for folder in (EXAMPLE, ROOT / "docs" / "shapes") for path in folder.glob("*.py")]
    assert len(quoted) >= 5
    lost = [block for block in quoted if not any(at_any_depth(block, source) for source in sources)]
    assert lost == []
    recipe = tomllib.loads((EXAMPLE / "digits.toml").read_text())
    (named,) = [block for block in blocks(PAGE, "toml") if "digits:Digits" in block]
    assert tomllib.loads(named).items() <= recipe.items()


@pytest.fixture
def beside_the_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of the folder in which commands are run."""
    for file in (file for file in EXAMPLE.iterdir() if file.is_file()):
        shutil.copy(file, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # a command adds where it is typed
    return tmp_path


@pytest.mark.rotated(every=2)
@pytest.mark.parametrize("train", ["lora", "full"])
def test_the_example_is_pretrained_trained_reported_and_sampled(
    train: str, beside_the_example: Path, capsys: pytest.CaptureFixture
) -> None:
    pretrain(steps=2, images=20).save_pretrained("runs/pretrained")
    build_components(Recipe.load("digits.toml"))  # the recipe as it stands
    smaller = "--rounds 1 --sampling.batches_per_round 1 --learner.batch_size 32 --sampling.num_steps 4 --evaluation.images 10"
    run = beside_the_example / "runs" / "digits"
    assert cli.main(["train", "digits.toml", "--serial", "--policy.train", train, *smaller.split()]) == 0
    assert f"{run}/{'lora' if train == 'lora' else 'transformer'}" in capsys.readouterr().out
    publish = ["push", str(run), "zoo/digits", "--dry-run", "published", "--push.license", "mit"]
    for command in (["report", str(run)], publish, *([["plan", "digits.toml"]] if train == "lora" else [])):
        assert cli.main(command) == 0, command
    assert "use ddpo sample for these weights" in Path("published/README.md").read_text()
    assert "reads" in json.loads((run / "report" / "summary.json").read_text())["scorers"]
    assert cli.main(["sample", "--lora", str(run), "seven", "a 3"]) == 0
    assert len(list((run / "samples").glob("*.png"))) == 2
    assert cli.main(["sample", "--lora", str(run), "a cat"]) == 2
    assert "names 0 digits" in capsys.readouterr().err
    with run_weights(RunFolder(run)).here():  # the files hold the weights of the last checkpoint
        pass


@pytest.mark.rotated(every=2, group="longest")
@pytest.mark.thorough
def test_the_pages_commands_run_as_they_stand_and_ink_increases(beside_the_example: Path, cluster_folder: str) -> None:
    (block,) = [block for block in blocks(PAGE, "bash") if block.startswith("cd docs/digits\n")]
    environment = forked_program(Path(cluster_folder))
    alone = "ddpo train digits.toml --serial --name alone"
    for command in [*block.splitlines()[1:], alone]:
        done = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True, timeout=1000)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    summary = json.loads(Path("runs/digits/report/summary.json").read_text())
    assert summary["reward_after"] - summary["reward_before"] > 2 * summary["paired_standard_error"] > 0
    assert summary["scorers"]["reads"]["before"] > 0.7 and summary["scorers"]["reads"]["kept"] > 0.7
    on_ray, in_one_process = (run_weights(RunFolder(f"runs/{name}")).fingerprint for name in ("digits", "alone"))
    assert on_ray == in_one_process
    assert len(list(Path("runs/digits/samples").glob("*.png"))) == 2
