"""The shipped recipe `tiny/offline_dpo`, on a file that `ddpo preferences` makes of a run of the embedded model."""

import json
from pathlib import Path

import pytest

from ray_ddpo import cli

SMALL = [
    *("--rounds", "2", "--prompts.images_per_prompt", "4", "--rollouts.images_every", "1", "--sampling.num_steps", "8"),
    *("--sampling.timestep_fraction", "0.125", "--sampling.batches_per_round", "2", "--evaluation.images", "2"),
]


@pytest.mark.rotated(every=2, group="longest")
@pytest.mark.thorough
def test_the_recipe_learns_the_pairs_of_a_run_of_the_embedded_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "tiny/dpo", "--name", "kept", "--serial", *SMALL]) == 0
    assert cli.main(["preferences", "runs/kept", "--output", "pairs.parquet"]) == 0
    assert "16 pairs" in capsys.readouterr().out
    assert cli.main(["train", "tiny/offline_dpo", "--serial"]) == 0
    rounds = [json.loads(line) for line in Path("runs/tiny_offline_dpo/metrics.jsonl").read_text().splitlines()]
    accuracy = [each["preference_accuracy"] for each in rounds]
    seconds = sum(each["seconds/round"] for each in rounds)
    with capsys.disabled():
        print(f"\npreference accuracy by round {accuracy}, {seconds:.0f} s of rounds")
    # Half of the pairs at first, because the policy is the reference. The file is seen four times.
    assert accuracy[0] < accuracy[-1] and accuracy[-1] > 0.7
    assert cli.main(["report", "runs/tiny_offline_dpo", "--evaluation.images", "4"]) == 0
