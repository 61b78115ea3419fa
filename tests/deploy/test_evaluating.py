"""Evaluation beside training in one process changes no bits, is equal after a resume, and drives the guard."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.storage import Storage
from ray_ddpo.deploy.driver.supervision import Stopped
from ray_ddpo.deploy.evaluation.eval_log import EvalLog
from ray_ddpo.learner.checkpoints.checkpoint import load_checkpoint, newest_checkpoint
from ray_ddpo.train import run_training

EVALUATION = {
    "every": 2,
    "prompts": ["cat", "dog"],
    "images": 6,
    "batch_size": 4,
    "saved_images": 2,
    "ema_decay": 0.5,
    "scorers": [{"name": "brightness"}, {"name": "jpeg_incompressibility"}],
}


@pytest.fixture
def tables(tables: dict) -> dict:
    """Shorter rounds than elsewhere, and five of them."""
    sampling = {**tables["sampling"], "batches_per_round": 1}
    return {**tables, "sampling": sampling, "rounds": 5, "checkpoint": {"every": 2}}


def run_of(tables: dict, name: str, **changes: object) -> Path:
    recipe = Recipe.parse({**tables, "name": name, **changes})
    run_training(recipe, serial=True)
    return Path(recipe.run_path())


def fingerprint(run: Path) -> str:
    newest = newest_checkpoint(Storage(run / "checkpoints"))
    assert newest is not None
    return load_checkpoint(newest).learner.trained.fingerprint


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def figures(run: Path) -> list[dict]:
    return EvalLog(Storage(run)).entries()


@pytest.mark.parametrize(("lag", "read_in"), [pytest.param(0, [0, 2, 4], marks=pytest.mark.thorough), (2, [2, 4])])
def test_on_or_off_the_weights_are_the_same_bits(tables: dict, lag: int, read_in: list[int]) -> None:
    off = run_of(tables, "off", max_policy_lag=lag)
    on = run_of(tables, "on", max_policy_lag=lag, evaluation=EVALUATION, guard={"max_kl_nats": 1e-9})
    assert fingerprint(on) == fingerprint(off)
    assert (on / "lora").exists() and not (off / "evaluations.jsonl").exists()
    assert [each["policy_version"] for each in figures(on)] == [0, 2, 4, 5]
    assert [row["round"] for row in rows(on) if "evaluation/policy_version" in row] == read_in
    assert rows(on)[-1]["evaluation/policy_version"] == 5
    learned = ["reward/mean", "loss", "kl_nats", "ratio/max_abs_log"]
    of_on, of_off = ([[row[name] for name in learned] for row in rows(run)] for run in (on, off))
    assert of_on == of_off


def test_its_log_compares_the_version_with_the_pretrained_model(tables: dict) -> None:
    run = run_of(tables, "run", evaluation=EVALUATION, guard={"best_by": "brightness"})
    first, *_, last = figures(run)
    log = EvalLog(Storage(run))
    before, after = log.scores(0), log.scores(5)
    assert set(last["scores"]) == {"jpeg_compressibility", "brightness", "jpeg_incompressibility", "reward"}
    for name, values in last["scores"].items():
        assert values["mean"] == pytest.approx(after[name].mean())
        assert values["change"] == pytest.approx((after[name] - before[name]).mean())
        assert values["standard_error"] == pytest.approx((after[name] - before[name]).std(ddof=1) / 6**0.5)
        assert first["scores"][name]["change"] == 0
    assert last["scores"]["reward"]["mean"] == last["scores"]["jpeg_compressibility"]["mean"]
    assert last["scores"]["brightness"]["mean"] != last["scores"]["brightness"]["average_mean"]
    table = log.read(5)
    assert table["variant"].to_pylist() == ["current"] * 6 + ["average"] * 6
    assert [pixels is not None for pixels in table["pixels"].to_pylist()] == [
        True,
        True,
        False,
        False,
        False,
        False,
    ] * 2
    assert last["kl_reference_nats"] > 0 and first["kl_reference_nats"] is None
    assert rows(run)[-1]["evaluation/brightness/mean"] == last["scores"]["brightness"]["mean"]
    means = {each["policy_version"]: each["scores"]["brightness"]["mean"] for each in figures(run)}
    best = json.loads((run / "best" / "best.json").read_text())  # no alarm: the highest
    assert best["policy_version"] == max(means, key=lambda version: means[version])
    assert best["score"] == max(means.values()) and rows(run)[-1]["guard/best_version"] == best["policy_version"]


@pytest.mark.thorough
def test_a_resumed_run_has_the_same_evaluations(tables: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    how = {"max_policy_lag": 1, "evaluation": EVALUATION}
    calm = run_of(tables, "calm", **how)
    stop_after(3, monkeypatch)
    with pytest.raises(Stopped):
        run_of(tables, "stopped", **how)
    monkeypatch.undo()
    recipe = Recipe.parse({**tables, "name": "stopped", **how})
    run_training(recipe, resume=True, serial=True)
    run = Path(recipe.run_path())
    assert figures(run) == figures(calm)
    of_calm, of_run = ([row.get("evaluation/reward/mean") for row in rows(each)] for each in (calm, run))
    assert of_run == of_calm and len(of_run) == 5


def stop_after(rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal that is seen once so many rounds are done."""
    from ray_ddpo.deploy.driver.supervision import Supervision

    check: Callable = Supervision.check
    folder: list[Path] = []

    def seen(self: Supervision) -> None:
        path = self._folder.storage.local_path
        assert path is not None
        folder.append(path)
        metrics = path / "metrics.jsonl"
        if metrics.exists() and len(metrics.read_text().splitlines()) >= rounds:
            raise Stopped("stopped by the test", 143)
        check(self)

    monkeypatch.setattr(Supervision, "check", seen)


@pytest.mark.thorough
def test_evaluations_start_again_if_the_images_differ(tables: dict, capsys: pytest.CaptureFixture) -> None:
    run = run_of(tables, "run", evaluation=EVALUATION)
    assert len(figures(run)) == 4
    more = {**tables, "name": "run", "rounds": 6, "evaluation": {**EVALUATION, "seed": 7}}
    run_training(Recipe.parse(more), resume=True, serial=True)
    assert [each["policy_version"] for each in figures(run)] == [0, 6]
    assert "evaluations start again" in capsys.readouterr().err


GUARD = {"max_kl_nats": 1e-9, "on_alarm": "stop"}


@pytest.mark.thorough
def test_the_guard_ends_a_run_and_a_resume_does_not_go_on(tables: dict, capsys: pytest.CaptureFixture) -> None:
    run = run_of(tables, "run", evaluation=EVALUATION, guard=GUARD)
    assert [each["policy_version"] for each in figures(run)] == [0, 2]
    assert len(rows(run)) == 3 and rows(run)[-1]["guard/alarms"] == 1
    ended = json.loads((run / "guard.json").read_text())
    assert ended["policy_version"] == 2 and ended["weights_of"] is None and "nats a step" in ended["alarms"][0]
    assert "guard: version 2: the policy is" in capsys.readouterr().err
    stopped = fingerprint(run)
    recipe = {**tables, "name": "run", "evaluation": EVALUATION}
    run_training(Recipe.parse({**recipe, "guard": GUARD}), resume=True, serial=True)
    assert fingerprint(run) == stopped and len(rows(run)) == 3
    run_training(Recipe.parse(recipe), resume=True, serial=True)  # told to go on, it does
    assert len(rows(run)) == 5 and not (run / "guard.json").exists()
    assert fingerprint(run) == fingerprint(run_of(tables, "calm"))


@pytest.mark.thorough
def test_patience_waits_for_more_alarms(tables: dict) -> None:
    run = run_of(tables, "run", evaluation=EVALUATION, guard={**GUARD, "patience": 2}, rounds=6)
    assert [each["policy_version"] for each in figures(run)] == [0, 2, 4]


def test_the_best_version_is_kept_and_rolled_back_to(tables: dict) -> None:
    run = run_of(tables, "run", evaluation=EVALUATION, guard={**GUARD, "on_alarm": "roll_back"})
    best = json.loads((run / "best" / "best.json").read_text())
    assert best["policy_version"] == 0  # version 2 has an alarm
    name = "lora/pytorch_lora_weights.safetensors"
    assert (run / name).read_bytes() == (run / "best" / name).read_bytes()
    assert json.loads((run / "guard.json").read_text())["weights_of"] == 0


@pytest.mark.parametrize(
    ("guard", "evaluation", "says"),
    [
        ({"best_by": "beauty"}, EVALUATION, "guard.best_by is 'beauty'"),
        ({"on_alarm": "stop"}, {}, "evaluation.every 0"),
        ({"on_alarm": "panic"}, EVALUATION, "continue"),
    ],
)
def test_what_the_guard_cannot_do_is_said_early(tables: dict, guard: dict, evaluation: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Recipe.parse({**tables, "guard": guard, "evaluation": evaluation})
