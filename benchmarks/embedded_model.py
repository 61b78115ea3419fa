"""make bench: time sampling, scoring and learning on the embedded model beside a bare loop over the same network."""

import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from statistics import median

import torch

from benchmarks.timing import machine, seconds
from ray_ddpo.actors.reward_worker import RewardWorker
from ray_ddpo.actors.rewards.jpeg import jpeg_kilobytes
from ray_ddpo.actors.sampler import Sampler
from ray_ddpo.common.diffusion.lora.adapters import trained_parameters
from ray_ddpo.common.diffusion.rollout import sample_trajectories
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.schedule import round_tasks
from ray_ddpo.common.trajectory import Rollout, TrainBatch, Trajectory, image_fingerprints
from ray_ddpo.deploy.driver.components import Components, build_components
from ray_ddpo.learner.learner import Learner
from ray_ddpo.learner.round_data.round_buffer import RoundBuffer
from ray_ddpo.train import run_training

RECIPE = "deploy/recipes/tiny/jpeg.toml"
REPEATS = 5
TASKS = 4  # of a sampler, one after the other


@dataclass(frozen=True)
class Row:
    """One line of the table: seconds per image or transition of the bare loop and of the program for the same work."""

    what: str
    unit: str
    count: int
    bare: list[float]
    ours: list[float]

    def text(self) -> str:
        bare, ours = median(self.bare), median(self.ours)
        ratio = median(first / second for first, second in zip(self.bare, self.ours, strict=True))
        rate = f"{self.count / ours:8.1f} {self.unit}/s"
        return f"| {self.what:<9} | {bare:7.3f} s | {ours:7.3f} s | {rate:<22} | {ratio:5.2f} |"


def interleaved(bare: Callable[[], object], ours: Callable[[], object]) -> tuple[list[float], list[float]]:
    """Time both functions in turn, after a warm-up of each."""
    bare(), ours()
    pairs = [(seconds(bare), seconds(ours)) for _ in range(REPEATS)]
    return [first for first, _ in pairs], [second for _, second in pairs]


def sampling(components: Components, sampler: Sampler, learner: Learner) -> Row:
    """Time a task and T forward passes of the network with both guidance branches."""
    recipe = components.recipe
    task = round_tasks(recipe, 0, components.prompts.load())[0]
    policy = sampler._policy
    inputs = network_inputs(sampler, recipe.sampling.batch_size)

    @torch.no_grad()
    def bare() -> None:
        for _ in range(recipe.sampling.num_steps):
            policy.network(*inputs, return_dict=False)

    ours = interleaved(bare, lambda: sampler.sample(task, learner.weights()[-1]))
    return Row("sampling", "images", recipe.sampling.batch_size, *ours)


def learning(components: Components, sampler: Sampler, learner: Learner) -> Row:
    """Time a round and forward and backward passes over as many transitions in the same micro-batches."""
    recipe = components.recipe
    tasks = round_tasks(recipe, 0, components.prompts.load())
    micro_batch = recipe.learner.micro_batch_size
    policy = learner._policy
    inputs = network_inputs(sampler, micro_batch)
    transitions = recipe.images_per_round * recipe.sampling.trained_steps(recipe.sampling.num_steps)
    parameters = list(trained_parameters(policy.network).values())

    def bare() -> None:
        for _ in range(transitions // micro_batch):
            policy.network(*inputs, return_dict=False)[0].square().mean().backward()
        for parameter in parameters:
            parameter.grad = None

    worker = RewardWorker(components.rewards, recipe.reward_workers, recipe.runtime)

    def sampled() -> tuple[TrainBatch, list[Trajectory]]:
        weights, rollouts = learner.weights()[-1], []
        for task in tasks:
            report, trajectory, images = sampler.sample(replace(task, policy_version=weights.policy_version), weights)
            rollouts.append(Rollout(report, worker.score(images), trajectory, images))
        batch = RoundBuffer(components.algorithm, components.aggregation).train_batch(rollouts)
        return batch, [rollout.trajectory for rollout in rollouts]

    bare_seconds, our_seconds = [], []
    for repeat in range(REPEATS + 1):
        batch, trajectories = sampled()
        times = seconds(bare), seconds(lambda: learner.update(batch, *trajectories))  # noqa: B023
        if repeat:
            bare_seconds.append(times[0])
            our_seconds.append(times[1])
    return Row("learning", "transitions", transitions, bare_seconds, our_seconds)


def scoring(components: Components, sampler: Sampler, learner: Learner) -> Row:
    """Time a task's images through the reward worker and through the reward's own function."""
    task = round_tasks(components.recipe, 0, components.prompts.load())[0]
    images = sampler.sample(task, learner.weights()[-1])[2]
    worker = RewardWorker(components.rewards, components.recipe.reward_workers, components.recipe.runtime)
    times = interleaved(
        lambda: [jpeg_kilobytes(images.pixels) for _ in range(20)], lambda: [worker.score(images) for _ in range(20)]
    )
    return Row("scoring", "images", 20 * len(task.seeds), *times)


def decoding_beside(components: Components, sampler: Sampler) -> str:
    """Time sequential tasks and tasks that are decoded and hashed in a thread while the next one is sampled."""
    recipe, policy = components.recipe, sampler._policy
    task = round_tasks(recipe, 0, components.prompts.load())[0]
    prompts, seeds = [prompt.text for prompt in task.prompts], list(task.seeds)

    def path() -> Trajectory:
        return sample_trajectories(policy, prompts, seeds, recipe.sampling)

    def finish(sampled: Trajectory) -> None:
        image_fingerprints(policy.decode(sampled.final_latents).cpu().numpy())

    def in_turn() -> None:
        for _ in range(TASKS):
            finish(path())

    def beside() -> None:
        with ThreadPoolExecutor(1) as thread:
            finishing = [thread.submit(finish, path()) for _ in range(TASKS)]
        for each in finishing:
            each.result()

    first, second = interleaved(in_turn, beside)
    sampled = path()
    share = median(seconds(lambda: finish(sampled)) for _ in range(REPEATS)) * TASKS / median(first)
    ratio = median(one / other for one, other in zip(first, second, strict=True))
    return (
        f"{TASKS} tasks: {median(first):.2f} s, {100 * share:.1f} % of it decoding and hashing; with that in a thread beside the "
        f"next task's steps {median(second):.2f} s, {ratio:.2f} ×"
    )


def network_inputs(sampler: Sampler, rows: int) -> tuple[torch.Tensor, ...]:
    """Return the inputs of one guided forward pass: two branches per row."""
    policy = sampler._policy
    embeddings = policy.encode([""])["prompt_embeds"]
    latents = torch.randn(2 * rows, *policy.latent_shape)
    return latents, torch.randint(0, 999, (2 * rows,)), embeddings.expand(2 * rows, *embeddings.shape[1:]).clone()


def ray_rounds() -> str:
    """Time rounds on Ray at lag 1, where both sides overlap, and the sum of the times of their parts."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = ["--name", "bench", "--output_dir", folder, "--rounds", "5", "--max_policy_lag", "1"]
        metrics = run_training(Recipe.load(RECIPE, [*overrides, "--runtime.threads", "1"]))
    parts = [metrics[f"seconds/{part}"] for part in ("sample", "score", "learn")]
    spelled = " + ".join(f"{part:.2f}" for part in parts)
    ratio = metrics["seconds/round"] / sum(parts)
    return (
        f"Ray, lag 1, a thread a role: {metrics['seconds/round']:.2f} s a round; parts {spelled} s; ratio {ratio:.2f}"
    )


def main() -> None:
    """Print the table."""
    recipe = Recipe.load(RECIPE)
    components = build_components(recipe)
    sampler = Sampler(components.policy, recipe.sampling, recipe.runtime)
    learner = Learner(components.policy, components.algorithm, recipe)
    print(f"{machine()}; medians of {REPEATS} interleaved repeats; {recipe.runtime.threads} threads, float32\n")
    print("| what      | bare loop | ours      | rate                   | ratio |\n|---|---|---|---|---|")
    for row in (sampling, scoring, learning):
        print(row(components, sampler, learner).text(), flush=True)
    print(f"\n{decoding_beside(components, sampler)}\n\n{ray_rounds()}")


if __name__ == "__main__":
    main()
