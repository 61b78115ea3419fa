"""Sampler: sample a task's trajectories and images under the task's policy version."""

import os
import socket
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float, UInt8

from ray_ddpo.actors.task_care import PLAIN, Care
from ray_ddpo.common.base_parts import Base, entry_base
from ray_ddpo.common.clips import Pixels, are_clips
from ray_ddpo.common.diffusion.execution import compile_sampling, set_up_execution
from ray_ddpo.common.diffusion.given_trajectories import given_trajectories
from ray_ddpo.common.diffusion.path_kl import PathKL, refuse_without_adapters
from ray_ddpo.common.diffusion.policy import PolicyConfig
from ray_ddpo.common.diffusion.policy_trial import load_checked, try_sampling
from ray_ddpo.common.diffusion.prompt_lengths import print_cut_prompts
from ray_ddpo.common.diffusion.rollout import SharedPrefix, inputs_of, refuse_window_without_noise, sample_trajectories
from ray_ddpo.common.machine import measured_machine
from ray_ddpo.common.policy_weights import PolicyWeights
from ray_ddpo.common.prompts import Prompt, PromptSource
from ray_ddpo.common.recipe.tables import RuntimeTable, SamplingTable
from ray_ddpo.common.runtime import python_stacks, settle
from ray_ddpo.common.schedule import Place, Task
from ray_ddpo.common.trajectory import ImageBatch, TaskReport, Trajectory, image_fingerprints, thumbnails


class Sampler:
    """A sampler with one copy of the policy. Weights are loaded between tasks, never within one."""

    def __init__(
        self,
        policy: PolicyConfig,
        sampling: SamplingTable,
        runtime: RuntimeTable,
        tried_on: tuple[Prompt, ...] = (),
        checked: Sequence[str] = (),
        source: PromptSource | None = None,
    ) -> None:
        """Load the policy.

        Args:
            tried_on: prompts to try a user's model family on. Without any, the family is not tried.
            checked: prompts to check for their length. A line is printed if text encoders truncate any.
            source: the prompt source, if it gives images, which training tasks encode in place of denoising.
        """
        self._called = f"Sampler of {policy.model}"
        device = settle(runtime)
        self._policy = load_checked(policy, device, sampling, "sampler")
        tried = try_sampling(policy, self._policy, [prompt.text for prompt in tried_on])
        self._image_size = self._policy.image_size() or tried
        print_cut_prompts(self._policy.text_readers(), checked, sampling, self._policy.guided_above)
        refuse_window_without_noise(self._policy, sampling)
        if sampling.kl_reward:
            refuse_without_adapters(self._policy)
        set_up_execution(policy, self._policy, "sampler", sampling.batch_size)
        compile_sampling(policy, self._policy, sampling)
        self._base = policy.loaded_base("sampler")
        self._images = source.load_images() if source else None
        if source:
            self._base = self._base | entry_base(source, "prompts", source.needs())
        self._dtype = str(policy.dtype_of("sampler")).removeprefix("torch.")
        self._sampling = sampling
        self._machine = measured_machine(device, policy.dtype_of("sampler"))
        self._fingerprint = ""
        self._num_loaded_params = 0
        self._forgotten: set[Place] = set()
        self._called = f"Sampler of {policy.model} on {device}"

    def __repr__(self) -> str:
        """Return the name on the dashboard's page of actors, beside run, role and number."""
        return self._called

    def ready(self) -> Base:
        """Return the fingerprints of the loaded files. The call returns when everything is loaded."""
        return self.loaded_parts()

    def loaded_parts(self) -> Base:
        """Return the fingerprints of the files that the policy was loaded from."""
        return self._base

    def stacks(self) -> str:
        """Return the stacks of this process's threads. Answered from a separate thread while a task is sampled."""
        return python_stacks()

    def sleep(self) -> None:
        """Return the memory of activations to the GPU, which is the learner's next. Weights stay; a task wakes it."""
        self._policy.sleep()

    def forget(self, place: Place) -> None:
        """Skip this task unless it was begun, because another sampler runs it. Callable while a task is sampled."""
        self._forgotten.add(place)

    def sample(
        self,
        task: Task,
        weights: PolicyWeights,
        care: Care = PLAIN,
        note: Callable[[int], None] | None = None,
    ) -> tuple[TaskReport, Trajectory | None, ImageBatch] | tuple[None, None, None]:
        """Sample a task.

        Args:
            care: special care after samplers died over this task.
            note: called with an image's row before that image is processed alone.

        Returns:
            Report, trajectory and images, separately, so that each can be sent where it is needed. The trajectory is
            None if the task is not for training. All are None if the task was to be forgotten.

        Raises:
            ValueError: the weights are not of the task's version.
        """
        if task.place in self._forgotten:
            self._forgotten.remove(task.place)
            return None, None, None
        start = time.perf_counter()
        self._load_weights(task, weights)
        if care.one_by_one == "all":
            self._try_out(task, care, note)
            return None, None, None
        path_kl = PathKL(self._policy) if task.trains and self._sampling.kl_reward else None
        trajectory = self._denoise(task, care, path_kl, given := self._given(task))
        pixels, undecoded = self._decode(trajectory.final_latents, care, note) if given is None else (given, set())
        dropped = self._not_finite(trajectory, undecoded, task) | care.left_out
        if dropped:
            pixels = pixels.copy()
            pixels[list(dropped)] = 0
        seconds = time.perf_counter() - start
        report = TaskReport(
            task,
            self._fingerprint,
            self._num_loaded_params,
            trajectory.num_bytes if task.trains else 0,
            seconds,
            tuple("" if row in dropped else found for row, found in enumerate(image_fingerprints(pixels))),
            f"{socket.gethostname()}/{os.getpid()}",
            self._machine,
            dropped,
            path_kl.nats() if path_kl else (),
            tuple(each.tobytes() for each in thumbnails(pixels)) if task.trains and self._sampling.thumbnails else (),
        )
        return report, trajectory if task.trains else None, self._batch(pixels, task)

    def _batch(self, pixels: Pixels, task: Task) -> ImageBatch:
        """Return the images, or the clips with their frame rate."""
        return ImageBatch(pixels, task.prompts, self._policy.frame_rate if are_clips(pixels) else None)

    def _given(self, task: Task) -> UInt8[np.ndarray, "B H W 3"] | None:
        """Return the images of a task whose prompts give them; None if its images are to be sampled."""
        if self._images is None or not task.trains:
            return None
        assert self._image_size is not None, "a family that encodes images knows their size"
        return self._images.pixels(task.prompts, self._image_size)

    def _denoise(
        self, task: Task, care: Care, path_kl: PathKL | None, given: UInt8[np.ndarray, "B H W 3"] | None
    ) -> Trajectory:
        """Sample the task's trajectories. Another image replaces one that is left out, so that shapes stay equal."""
        rows = list(range(len(task.seeds)))
        sampled = [row for row in rows if row not in care.not_sampled]
        if not sampled:
            raise ValueError(f"every image of {task.title} ends the process of the sampler that samples it")
        rows = [sampled[0] if row in care.not_sampled else row for row in rows]
        return self._trajectories(task, rows, path_kl, given)

    def _trajectories(
        self,
        task: Task,
        rows: list[int],
        path_kl: PathKL | None = None,
        given: UInt8[np.ndarray, "B H W 3"] | None = None,
    ) -> Trajectory:
        """Sample these rows of the task, or encode their given images."""
        prompts, seeds = [task.prompts[row].text for row in rows], [task.seeds[row] for row in rows]
        if given is not None:
            return given_trajectories(self._policy, prompts, seeds, self._sampling, given[rows])
        prefix = None
        if task.prefix_seeds is not None:
            groups = len(set(task.prefix_seeds)) if len(rows) == len(task.seeds) else 1
            prefix = SharedPrefix(tuple(task.prefix_seeds[row] for row in rows), groups)
        sampling = task.sampling or self._sampling
        inputs = inputs_of(self._policy, [task.prompts[row] for row in rows])
        return sample_trajectories(self._policy, prompts, seeds, sampling, task.window, prefix, path_kl, inputs)

    def _try_out(self, task: Task, care: Care, note: Callable[[int], None] | None) -> None:
        """Sample and decode the task's images one by one, only to find out whether this process survives."""
        given = self._given(task)
        for row in range(len(task.seeds)):
            if row in care.left_out:
                continue
            if note:
                note(row)
            trajectory = self._trajectories(task, [row], given=given)
            if given is None:
                self._policy.decode(trajectory.final_latents).cpu()

    def _decode(
        self, latents: Float[torch.Tensor, "B C *S"], care: Care, note: Callable[[int], None] | None
    ) -> tuple[UInt8[np.ndarray, "B *F H2 W2 3"], set[int]]:
        """Decode final latents.

        Returns:
            The images, and the rows whose pixels were not finite. An image that is left out is replaced by another one.
        """
        rows = [row for row in range(len(latents)) if row not in care.left_out]
        if not rows:
            # In a replay the size may be unknown, because the family was not tried. A replay ignores these images.
            frames = (self._policy.num_frames,) if latents.ndim == 5 else ()
            size = self._image_size or latents.shape[-2:]
            return np.zeros((len(latents), *frames, *size, 3), np.uint8), set()
        if care.one_by_one == "nothing":
            standing_in = [row if row in rows else rows[0] for row in range(len(latents))]
            kept = latents if len(rows) == len(latents) else latents[standing_in]
            return self._policy.decode(kept).cpu().numpy(), set(self._policy.not_finite)
        alone, undecoded = {}, set()
        for row in rows:
            if note:
                note(row)
            alone[row] = self._policy.decode(latents[row : row + 1]).cpu().numpy()[0]
            undecoded |= {row} if self._policy.not_finite else set()
        return np.stack([alone.get(row, alone[rows[0]]) for row in range(len(latents))]), undecoded

    def _not_finite(self, trajectory: Trajectory, undecoded: set[int], task: Task) -> dict[int, str]:
        """Return the rows whose latents or pixels are not finite, with the reason."""
        sampled = [trajectory.final_latents.flatten(1), trajectory.log_probs]
        finite = torch.stack([each.isfinite().all(1) for each in sampled]).all(0).tolist()
        learned = f"version {task.policy_version} was trained with too high a learner.learning_rate"
        cause = learned if task.policy_version else f"the model overflows in policy.dtype = {self._dtype!r}"
        reasons = {row: f"its pixels are not finite: the decoder overflows in {self._dtype}" for row in undecoded}
        unsampled = f"its latents are not finite: most likely {cause}"
        return reasons | {row: unsampled for row, is_finite in enumerate(finite) if not is_finite}

    def _load_weights(self, task: Task, weights: PolicyWeights) -> None:
        """Load the task's weights, unless they are loaded already."""
        if weights.policy_version != task.policy_version:
            raise ValueError(
                f"task {task.index} of round {task.round} asks for policy version {task.policy_version}, "
                f"and came with weights of version {weights.policy_version}"
            )
        if weights.fingerprint != self._fingerprint:
            self._num_loaded_params = self._policy.load_weights(weights)
            self._fingerprint = weights.fingerprint
