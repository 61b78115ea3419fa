"""Run the program for the comparison: one round, or the bare loop, for each input line. See `round_process.py`.

Usage: python -m benchmarks.our_rounds JOB.json. The job has "recipe" (a path) and "overrides".
"""

import json
import os
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from ray_ddpo.actors.reward_worker import RewardWorker
from ray_ddpo.actors.sampler import Sampler
from ray_ddpo.common.diffusion.lora.adapters import trained_parameters
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.schedule import round_tasks
from ray_ddpo.common.trajectory import Rollout
from ray_ddpo.deploy.driver.components import Components, components_of
from ray_ddpo.learner.learner import Learner
from ray_ddpo.learner.round_data.round_buffer import RoundBuffer

LIBRARIES = ("torch", "diffusers", "transformers", "peft")


class OurRounds:
    """Sampler, reward worker and learner of a recipe in this process."""

    def __init__(self, components: Components) -> None:
        recipe = components.recipe
        self._components, self._recipe, self._next = components, recipe, 0
        self._sampler = Sampler(components.policy, recipe.sampling, recipe.runtime)
        self._worker = RewardWorker(components.rewards, recipe.reward_workers, recipe.runtime)
        self._learner = Learner(components.policy, components.algorithm, recipe)
        self._buffer = RoundBuffer(components.algorithm, components.aggregation, recipe.prompts.images_per_prompt)
        self._cuda = self._sampler._policy.device.startswith("cuda")

    def now(self) -> float:
        """Return the clock after the device has finished its work."""
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def round(self) -> dict[str, float]:
        """Run one round: prompts → sampler → reward → advantages → learner → weights."""
        weights, results, rollouts, started = self._learner.weights()[-1], [], [], self.now()
        for task in round_tasks(self._recipe, self._next, self._components.prompts.load()):
            results.append(self._sampler.sample(task, weights))
        sampled = self.now()
        for report, trajectory, images in results:
            rollouts.append(Rollout(report, self._worker.score(images), trajectory, None))
        scored = self.now()
        batch = self._buffer.train_batch(rollouts)
        self._learner.update(batch, *(rollout.trajectory for rollout in rollouts))
        ended = self.now()
        self._next += 1
        rewards = np.concatenate([values for one in rollouts for values in one.scores.rewards.values()])
        times = {"sampling": sampled - started, "scoring": scored - sampled, "learning": ended - scored}
        return {**times, "round": ended - started, "reward": float(rewards.mean())}

    def bare(self) -> dict[str, float]:
        """Return the network's seconds for a round's rows in the same batches, extrapolated from one task."""
        sampling, tasks = self._recipe.sampling, self._recipe.sampling.batches_per_round
        policy, learning = self._sampler._policy, self._learner._policy
        inputs = self._inputs(sampling.batch_size)
        with torch.no_grad():
            policy._predict(*inputs)  # warm-up: other processes used the caches until now
            started = self.now()
            for _ in range(sampling.num_steps):
                policy._predict(*inputs)
        sampled = self.now()
        rows = sampling.batch_size * sampling.trained_steps(len(policy.stochastic_steps))
        size = min(self._learner._micro_batch_size, rows)
        inputs = self._inputs(size)
        learning._predict(*inputs).square().mean().backward()
        begun = self.now()
        for _ in range(rows // size):
            learning._predict(*inputs).square().mean().backward()
        learned = self.now() - begun
        if (
            "proximal_log_probs" in self._components.algorithm.columns
        ):  # one more pass over all optimizer steps but the first
            begun = self.now()
            with torch.no_grad():
                for _ in range(rows // size):
                    learning._predict(*inputs)
            learned += (1 - self._recipe.learner.images_per_step / self._recipe.images_per_round) * (self.now() - begun)
        for parameter in trained_parameters(learning.network).values():
            parameter.grad = None
        whole = rows / (rows // size * size)  # extrapolate to the rows of the last, partial micro-batch
        return {"sampling": tasks * (sampled - started), "learning": tasks * whole * learned}

    def _inputs(self, images: int) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Return the network's inputs for this many images, with both branches if guidance is on."""
        policy = self._sampler._policy
        rows = policy.branches * images
        latents = torch.randn(rows, *policy.latent_shape, device=policy.device)
        timesteps = torch.randint(0, policy.num_train_timesteps, (rows,), device=policy.device)
        embeddings = policy.encode([""])["prompt_embeds"]
        return latents, timesteps, {"prompt_embeds": embeddings.repeat(rows, 1, 1)}

    def weights(self) -> dict[str, np.ndarray]:
        """Return the newest weights by their names in the network."""
        return self._learner.weights()[-1].arrays()

    def save(self, path: str) -> None:
        """Save the newest weights."""
        save_file(self.weights(), path)

    def peak_bytes(self) -> int:
        """Return the peak memory of sampler and learner together: on the GPU, or resident in this process."""
        if self._cuda:
            return torch.cuda.max_memory_allocated()
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def answer(rounds: OurRounds, asked: dict[str, Any]) -> dict[str, float]:
    """Run the work that one input line asks for."""
    if asked.get("bare"):
        return rounds.bare()
    result = rounds.round()
    if asked.get("save"):
        rounds.save(asked["save"])
    return {**result, "peak_bytes": rounds.peak_bytes()}


def main(path: Path) -> None:
    """Load, report readiness, and answer each line."""
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    job = json.loads(path.read_text(encoding="utf-8"))
    rounds = OurRounds(components_of(Recipe.load(job["recipe"], job["overrides"])))
    print(json.dumps({"ready": True, "versions": {name: version(name) for name in LIBRARIES}}), file=answers)
    for line in sys.stdin:
        print(json.dumps(answer(rounds, json.loads(line))), file=answers)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
