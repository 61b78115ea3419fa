"""Both sides of the comparison: TRL in a separate process and environment, our program in this process."""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from ray_ddpo.deploy.driver.components import Components
from ray_ddpo.learner.algorithms.ddpo_is import DDPOImportanceSampling
from tests.gradients import relative_error
from tests.parity.our_side import Seen, Watched, described
from tests.rounds import learner_of

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-parity/bin/python"
MIXED_PRECISION = {"float32": "no", "bfloat16": "bf16"}


@dataclass(frozen=True)
class BothSides:
    """What each side saw, under the same names, and the adapters that both began with."""

    trl: Seen
    ours: Seen
    start: Seen

    def all_of(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the arrays called `name`, TRL's and ours, of all rounds."""
        keys = sorted(key for key in self.trl if key.partition("/")[2] == name)
        trl, ours = (np.stack([side[key] for key in keys]).astype(np.float64) for side in (self.trl, self.ours))
        return trl, ours

    def largest_difference(self, name: str) -> float:
        trl, ours = self.all_of(name)
        return float(np.abs(trl - ours).max())

    def gradient_errors(self) -> list[float]:
        """Return ‖ours − TRL's‖ / ‖TRL's‖ of each optimizer step's gradient."""
        return [relative_error(ours, trl) for trl, ours in self._steps("gradient")]

    def movement_errors(self) -> list[float]:
        """Return the same of the adapters' change since the start, after each optimizer step."""
        return [relative_error(self._moved(ours), self._moved(trl)) for trl, ours in self._steps("weights")]

    def _steps(self, kind: str) -> list[tuple[Seen, Seen]]:
        prefixes = sorted({key.partition(f"/{kind}/")[0] for key in self.trl if f"/{kind}/" in key})
        return [
            (self._named(self.trl, f"{prefix}/{kind}"), self._named(self.ours, f"{prefix}/{kind}"))
            for prefix in prefixes
        ]

    def _named(self, side: Seen, prefix: str) -> Seen:
        return {name: side[f"{prefix}/{name}"] for name in self.start}

    def _moved(self, weights: Seen) -> Seen:
        return {name: weights[name].astype(np.float64) - self.start[name] for name in self.start}


def trl_config(components: Components) -> dict[str, Any]:
    """Return the recipe as TRL's configuration."""
    sampling, learner, algorithm = components.recipe.sampling, components.recipe.learner, components.algorithm
    assert isinstance(algorithm, DDPOImportanceSampling)
    advantages = algorithm.advantages
    return {
        "mixed_precision": MIXED_PRECISION[components.policy.dtype],
        "sample_num_steps": sampling.num_steps,
        "sample_eta": sampling.eta,
        "sample_guidance_scale": sampling.guidance_scale,
        "sample_batch_size": sampling.batch_size,
        "sample_num_batches_per_epoch": sampling.batches_per_round,
        "train_batch_size": learner.batch_size,
        "train_gradient_accumulation_steps": learner.gradient_accumulation_steps,
        "train_num_inner_epochs": learner.inner_epochs,
        "train_learning_rate": learner.learning_rate,
        "train_adam_beta1": learner.adam_beta1,
        "train_adam_beta2": learner.adam_beta2,
        "train_adam_weight_decay": learner.weight_decay,
        "train_adam_epsilon": learner.adam_epsilon,
        "train_max_grad_norm": learner.max_grad_norm,
        "train_clip_range": algorithm.clip_range,
        "train_adv_clip_max": algorithm.advantage_clip,
        "per_prompt_stat_tracking": advantages.kind == "per_prompt",
        "per_prompt_stat_tracking_buffer_size": advantages.buffer_size,
        "per_prompt_stat_tracking_min_count": advantages.min_count,
    }


def run_ours(components: Components, rewards: list[np.ndarray]) -> Seen:
    return Watched(components, learner_of(components)).run(rewards)


def run_both(components: Components, rewards: list[np.ndarray], folder: Path) -> BothSides:
    """Run the recipe's rounds on both sides with these rewards, from the same non-zero adapters."""
    folder.mkdir()
    job = {"model": components.policy.model, "config": trl_config(components), "rounds": described(components, rewards)}
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    start = learner_of(components).weights()[-1].arrays()
    save_file(start, folder / "adapters.safetensors")
    run_trl(folder)
    return BothSides(load_file(folder / "result.safetensors"), run_ours(components, rewards), start)


def run_trl(folder: Path) -> None:
    assert PYTHON.is_file(), f"TRL lives in {PYTHON.parents[1]}, which `make parity` makes"
    script = str(ROOT / "tests/parity/trl_side.py")
    done = subprocess.run([str(PYTHON), script, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
