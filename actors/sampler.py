"""Sampler: draws a task's trajectories and pictures under the policy version that the task asks for."""

import os
import socket
import time

from common.diffusion.policy import PolicyConfig
from common.diffusion.policy_trial import load_checked, try_sampling
from common.diffusion.rollout import draw, refuse_window_without_noise
from common.lora_weights import LoraWeights
from common.prompts import Prompt
from common.recipe_tables import RuntimeTable, SamplingTable
from common.runtime import python_stacks, settle
from common.schedule import Place, Task
from common.trajectory import ImageBatch, TaskReport, Trajectory, image_fingerprints


class Sampler:
    """Holds one copy of the policy, and swaps weights between tasks, never within one."""

    def __init__(
        self,
        policy: PolicyConfig,
        sampling: SamplingTable,
        runtime: RuntimeTable,
        tried_on: tuple[Prompt, ...] = (),
    ) -> None:
        """`tried_on`: prompts that a family of the user's own is tried on; none: it is not tried."""
        device = settle(runtime)
        self._policy = load_checked(policy, device, sampling, "sampler")
        try_sampling(policy, self._policy, [prompt.text for prompt in tried_on])
        refuse_window_without_noise(self._policy, sampling)
        if policy.is_compiled("sampler"):
            self._policy.compile(sampling.batch_size)
        self._sampling = sampling
        self._fingerprint = ""
        self._modules_bound = 0
        self._forgotten: set[Place] = set()
        self._called = f"Sampler of {policy.model} on {device}"

    def __repr__(self) -> str:
        """As the dashboard's page of actors has it, beside run, role and number."""
        return self._called

    def ready(self) -> bool:
        """True, once the policy is loaded."""
        return True

    def stacks(self) -> str:
        """What this process is doing; answered from a thread of its own while a task is drawn."""
        return python_stacks()

    def forget(self, place: Place) -> None:
        """Leave this task out if it has not been begun: another sampler draws it. Comes in while a task is drawn."""
        self._forgotten.add(place)

    def draw(
        self, task: Task, weights: LoraWeights
    ) -> tuple[TaskReport, Trajectory | None, ImageBatch] | tuple[None, None, None]:
        """One task, in three parts, so that each can go to whom it concerns; nothing where it was to be forgotten.

        No trajectory where nothing is learned from it: it would only fill the store on its way.
        ValueError: these are not the weights that the task asks for.
        """
        if task.place in self._forgotten:
            self._forgotten.remove(task.place)
            return None, None, None
        start = time.perf_counter()
        self._swap(task, weights)
        prompts, seeds = [prompt.text for prompt in task.prompts], list(task.seeds)
        trajectory = draw(self._policy, prompts, seeds, self._sampling, task.window)
        pixels = self._policy.decode(trajectory.final_latents).cpu().numpy()
        seconds = time.perf_counter() - start
        report = TaskReport(
            task,
            self._fingerprint,
            self._modules_bound,
            trajectory.num_bytes if task.trains else 0,
            seconds,
            image_fingerprints(pixels),
            f"{socket.gethostname()}/{os.getpid()}",
        )
        return report, trajectory if task.trains else None, ImageBatch(pixels, task.prompts)

    def _swap(self, task: Task, weights: LoraWeights) -> None:
        if weights.policy_version != task.policy_version:
            raise ValueError(
                f"task {task.index} of round {task.round} asks for policy version {task.policy_version}, "
                f"and came with weights of version {weights.policy_version}"
            )
        if weights.fingerprint != self._fingerprint:
            self._modules_bound = self._policy.lay_in(weights)
            self._fingerprint = weights.fingerprint
