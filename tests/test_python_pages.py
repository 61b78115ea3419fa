"""The notebook's cells and the program on the page about TRL run as they stand."""

import json
import re
import runpy
from pathlib import Path

import pytest

from ray_ddpo import Recipe, Run

DOCS = Path(__file__).parents[1] / "docs"
NOTEBOOK = json.loads((DOCS / "train_in_a_notebook.ipynb").read_text(encoding="utf-8"))
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_stores_no_outputs_and_is_short() -> None:
    assert 5 <= len(CODE) <= 8 and NOTEBOOK["nbformat"] == 4
    assert all(cell["id"] for cell in NOTEBOOK["cells"])
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in NOTEBOOK["cells"])


@pytest.mark.rotated(every=2, group="longest")
@pytest.mark.thorough
def test_the_notebooks_cells_train_the_embedded_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    space: dict = {"__name__": "__main__"}
    for number, cell in enumerate(CODE):
        exec(compile(cell, f"cell {number}", "exec"), space)
    run: Run = space["run"]
    assert len(run.metrics) == 2 and len(run.images(1)) == 16
    assert (tmp_path / "runs/notebook/report/report.html").is_file() and Path(run.lora).is_dir()


def of_both() -> tuple[str, str]:
    """Return TRL's program and ours, which does the same."""
    page = (DOCS / "coming_from_trl.md").read_text(encoding="utf-8")
    theirs, ours = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    return theirs, ours


def test_both_programs_are_python_and_say_the_same_numbers() -> None:
    theirs, ours = of_both()
    assert compile(theirs, "theirs", "exec") and compile(ours, "ours", "exec")
    assert "DDPOTrainer" in theirs and "from ray_ddpo import Recipe, train" in ours
    space: dict = {"__name__": "theirs"}
    exec(ours.partition("if __name__")[0], space)
    recipe: Recipe = space["recipe"]
    assert (recipe.rounds, recipe.sampling.batch_size, recipe.learner.batch_size) == (200, 6, 3)


@pytest.mark.thorough
def test_our_program_trains_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    """Run the program with a tiny pipeline in the place of Stable Diffusion, two rounds, few steps, and no GPU."""
    ours = of_both()[1]
    without = {"num_gpus": 0}
    on_a_cpu = {
        "policy": {"dtype": "float32"},
        "samplers": without,
        "reward_workers": without,
        "evaluation": {"every": 0, "prompts": ["cat"], "images": 2, "scorers": []},
    }
    smaller = {
        '"stable-diffusion-v1-5/stable-diffusion-v1-5"': f"{str(tiny_model)!r}, serial=True",
        "rounds=200,": f"rounds=2, **{on_a_cpu},",
        '"num_steps": 50': '"num_steps": 4',
        '"learning_rate": 3e-4': '"learning_rate": 3e-4, "num_gpus": 0',
    }
    for before, after in smaller.items():
        assert ours.count(before) == 1
        ours = ours.replace(before, after)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "program.py").write_text(ours)
    run: Run = runpy.run_path("program.py", run_name="__main__")["run"]
    assert len(run.metrics) == 2 and Path(run.lora).is_dir()
