"""`ddpo plan` agrees with a run, and with the published tables."""

import dataclasses
import math
import re
from pathlib import Path

import pytest

from ray_ddpo import cli
from ray_ddpo.common.diffusion.lora.adapters import trained_parameters
from ray_ddpo.common.diffusion.memory.live_bytes import PeakBytes
from ray_ddpo.common.diffusion.memory.sizes import parameter_bytes
from ray_ddpo.common.prompts import Animals
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.schedule import round_tasks
from ray_ddpo.deploy.commands.plan.numbers import Plan, in_bytes, learner_peak, plan_of
from ray_ddpo.deploy.commands.plan.plan import GIGABYTES, largest_micro_batch, largest_shared_micro_batch, plan
from ray_ddpo.deploy.driver.components import build_components
from ray_ddpo.learner.learner import Learner
from ray_ddpo.learner.value_function import ValueNetwork

RECIPES = Path(__file__).parents[2] / "deploy" / "recipes"
pytestmark = pytest.mark.usefixtures("counted_once")


def test_the_plan_of_a_small_recipe_matches_its_components(recipe: Recipe) -> None:
    numbers = plan_of(recipe)
    components = build_components(recipe)
    learner = Learner(components.policy, components.algorithm, recipe)
    assert numbers.broadcast_bytes == learner.weights()[-1].buffer.nbytes
    assert numbers.images == sum(len(task.seeds) for task in round_tasks(recipe, 0, Animals().load()))
    assert (numbers.tasks, numbers.optimizer_steps, numbers.transitions_per_step) == (2, 2, 16)
    assert numbers.forward_passes == 4


def test_a_trajectory_is_as_large_as_planned(recipe: Recipe) -> None:
    from ray_ddpo.actors.sampler import Sampler

    components = build_components(recipe)
    learner = Learner(components.policy, components.algorithm, recipe)
    sampler = Sampler(components.policy, recipe.sampling, recipe.runtime)
    task = round_tasks(recipe, 0, Animals().load())[0]
    _, trajectory, _ = sampler.sample(task, learner.weights()[-1])
    planned = plan_of(recipe).trajectory_bytes * len(task.seeds)
    assert trajectory.num_bytes == pytest.approx(
        planned, rel=0.1
    )  # prompts may repeat within a task, and the empty one is there


@pytest.mark.thorough
def test_stable_diffusion_1_5_has_the_numbers_of_ddpo_pytorch() -> None:
    numbers = plan_of(Recipe.load(RECIPES / "sd15_aesthetic.toml"))
    assert numbers.sizes.network_parameters == 859_520_964
    assert numbers.sizes.trained_parameters == 797_184  # LoRA 4 on the attention's projections
    assert numbers.broadcast_bytes == 4 * 797_184
    assert numbers.images == 24 and numbers.optimizer_steps == 8
    # 51 latents of the path and the final ones, 4 × 64 × 64 float32; a prompt is 118 kB in half precision.
    assert numbers.trajectory_bytes == 52 * 4 * 64 * 64 * 4 + 50 * 12 + 77 * 768 * 2


@pytest.mark.rotated(every=2, group="longest")
def test_the_single_gpu_recipe_fits_the_gpu_it_names() -> None:
    recipe = Recipe.load(RECIPES / "sd15_aesthetic.toml")
    text, numbers = plan(recipe), plan_of(recipe)
    # Half precision: CLIP ViT-L/14's image tower for the aesthetic head; with the text tower 427,616,513 in all.
    assert numbers.reward_worker_bytes == {"reward_workers": 2 * 303_966_208, "evaluation.workers": 2 * 427_616_513}
    together = numbers.learner_bytes + numbers.sampler_bytes + sum(numbers.reward_worker_bytes.values())
    assert 14e9 < together < 40e9  # of the smaller A100
    assert "1 learner, 1 samplers, 1 reward workers, 1 scorers" in text
    assert "1 = learner 0.5 + samplers 0.3 + reward workers 0.1 + scorers 0.1" in text


@pytest.mark.thorough
def test_a_plan_for_gpus_prints_what_fits_on_each_size() -> None:
    recipe = Recipe.load(RECIPES / "sd15_aesthetic.toml")
    numbers = plan_of(recipe)
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in plan(recipe).splitlines())
    alone = [int(size) for size in lines["learner alone: micro-batch"].split()]
    assert len(alone) == len(GIGABYTES) and alone == sorted(alone)
    for gigabytes, size in zip(GIGABYTES, alone, strict=True):
        assert numbers.transitions_per_step % size == 0
        assert numbers.sizes.learner.of(size) < 0.9 * (gigabytes * 2**30 - 600e6)
    # With three others beside it not one pair is left on 8 GB, and checkpointing makes room for many times as many.
    together = lines["all roles on one: micro-batch"].split()
    assert together[0] == "-" and 0 < int(together[2]) < alone[2]
    policy = recipe.policy.model_copy(update={"gradient_checkpointing": True})
    assert largest_micro_batch(plan_of(recipe.model_copy(update={"policy": policy})), 8) > 3 * alone[0]


def test_a_plan_for_cpus_has_no_table_of_gpus(recipe: Recipe) -> None:
    assert "GPU memory in GB" not in plan(recipe)


def test_a_pair_is_planned_with_the_weights_of_both_and_one_roles_activations(tables: dict) -> None:
    learner = {**tables["learner"], "world_size": 2, "num_gpus": 0.5}
    samplers = {"count": 2, "num_gpus": 0.4}
    apart = Recipe.parse({**tables, "learner": learner, "samplers": samplers})
    recipe = Recipe.parse({**tables, "learner": {**learner, "colocated": True}, "samplers": samplers})
    numbers, text = plan_of(recipe), plan(recipe)
    rank, sampler = round(numbers.sizes.learner.fixed), round(numbers.sizes.sampling.fixed)
    assert numbers.pair_bytes == max(numbers.learner_bytes + sampler, numbers.sampler_bytes + rank)
    assert numbers.pair_bytes < numbers.learner_bytes + numbers.sampler_bytes
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in text.splitlines())
    assert lines["rank and sampler on one GPU"].startswith(f"{in_bytes(numbers.pair_bytes)} at most")
    assert lines["total memory"].startswith(f"{in_bytes(2 * numbers.pair_bytes)}: 2 learner ranks, 2 samplers")
    assert lines["requested GPUs"].startswith("1.8 = learner ranks 1 + samplers 0.8 + reward workers 0, on 2 or more")
    assert "rank and sampler" not in plan(apart)


def test_the_largest_micro_batch_beside_a_sleeping_sampler(recipe: Recipe) -> None:
    sizes = dataclasses.replace(plan_of(recipe).sizes, learner=PeakBytes(3e9, 1e9), sampling=PeakBytes(2e9, 1e9))
    given = {"sizes": sizes, "transitions_per_step": 24, "ranks": 2, "conditioning_bytes": 0, "reduced_bytes": 0}
    numbers = dataclasses.replace(plan_of(recipe), **given, sampler_bytes=4 * 10**9)
    # 0.9 × (16 × 2**30 − 2 × 0.6e9) − 2e9 of the sampler − 3e9 leaves room for 9.4: the largest divisor of 12 is 6.
    assert largest_shared_micro_batch(numbers, 16) == 6
    assert largest_shared_micro_batch(dataclasses.replace(numbers, sampler_bytes=12 * 10**9), 16) == 0


def test_an_auto_micro_batch_is_planned_as_one_transition(tables: dict) -> None:
    recipe = Recipe.parse({**tables, "learner": {**tables["learner"], "micro_batch_size": "auto"}})
    numbers, text = plan_of(recipe), plan(recipe)
    assert numbers.learner_bytes == numbers.sizes.learner.of(1) + numbers.conditioning_bytes
    assert "in micro-batches found at the start" in text and "so with micro-batches of 1" in text


def test_rewards_with_workers_of_their_own_are_counted_with_them(tables: dict) -> None:
    aesthetic = {"name": "aesthetic", "dtype": "float16", "workers": {"count": 3, "num_gpus": 0.25}}
    rewards = [{"name": "jpeg_compressibility"}, aesthetic]
    one_reward = {key: value for key, value in tables.items() if key != "reward"}
    recipe = Recipe.parse({**one_reward, "rewards": rewards, "reward_workers": {"count": 2}})
    text, numbers = plan(recipe), plan_of(recipe)
    assert numbers.reward_worker_bytes == {"reward_workers": 0, "reward_workers.aesthetic": 2 * 303_966_208}
    assert "reward worker memory (aesthetic)" in text and "1 samplers, 5 reward workers" in text
    assert "0.75 = learner 0 + samplers 0 + reward workers 0.75" in text


@pytest.mark.thorough
def test_each_of_several_ranks_has_its_share_memory_and_gpu() -> None:
    options = ["--learner.world_size", "2", "--learner.num_gpus", "1", "--learner.batch_size", "6"]
    one, two = (Recipe.load(RECIPES / "sd15_aesthetic.toml", options[first:]) for first in (2, 0))
    text, numbers, before = plan(two), plan_of(two), plan_of(one)
    assert numbers.transitions_per_step == before.transitions_per_step == 2 * numbers.transitions_per_rank
    assert numbers.forward_passes == before.forward_passes
    # A rank has its gradients twice, because they are summed in a buffer; with full fine-tuning, a part of them.
    assert numbers.reduced_bytes == 4 * 797_184 == numbers.learner_bytes - before.learner_bytes
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in text.splitlines())
    images, transitions = numbers.images_per_step, numbers.transitions_per_step
    shares = f"{images // 2} of {images} images, {transitions // 2} of {transitions} transitions per optimizer step"
    assert lines["each learner rank"] == shares
    assert lines["gradient all-reduce"] == "3.19 MB per optimizer step, among 2 ranks"
    assert lines["requested GPUs"].startswith("2.5 = learner ranks 2 + samplers 0.3")
    assert "learner rank memory" in lines and ": 2 learner ranks, 1 samplers" in lines["total memory"]
    assert "all roles on one: micro-batch" not in lines and "all roles on one: micro-batch" in plan(one)
    assert "ranks" not in plan(one)
    assert lines["optimizer state"] == "6.38 MB of adamw"


@pytest.mark.thorough
def test_a_rank_holds_its_shard_of_the_optimizer_state_a_checkpoint_all_of_it() -> None:
    options = [
        "--policy.train",
        "full",
        "--policy.dtype",
        "bfloat16",
        "--learner.world_size",
        "2",
        "--learner.batch_size",
        "6",
    ]
    whole = Recipe.load(RECIPES / "sd15_aesthetic.toml", options)
    divided = Recipe.load(RECIPES / "sd15_aesthetic.toml", [*options, "--learner.shard_optimizer_state", "true"])
    before, after = plan_of(whole), plan_of(divided)
    assert before.reduced_bytes == 2**28 < 4 * 859_520_964
    assert after.optimizer_bytes == before.optimizer_bytes == 8 * 859_520_964
    assert before.learner_bytes - after.learner_bytes == 4 * 859_520_964
    assert (
        "6.88 GB of adamw, 3.44 GB per rank" in plan(divided)
        and "per rank" not in plan(whole).split("of adamw")[1].splitlines()[0]
    )


def test_the_command_prints_the_arithmetic(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["plan", str(RECIPES / "tiny" / "jpeg.toml"), "--sampling.batches_per_round", "2"]) == 0
    printed = capsys.readouterr().out
    assert "32 = 2 tasks × 16" in printed
    assert "128 = 16 images × 8 of 15 steps, in micro-batches of 32" in printed


def test_consecutive_steps_share_latents_also_if_the_last_steps_are_skipped(recipe: Recipe) -> None:
    whole = plan_of(recipe)
    sampling = recipe.sampling.model_copy(update={"skip_last_steps": 1})
    learner = recipe.learner.model_copy(update={"micro_batch_size": 4})
    early = plan_of(recipe.model_copy(update={"sampling": sampling, "learner": learner}))
    channels, height, width = whole.sizes.latent_shape
    assert whole.trajectory_bytes - early.trajectory_bytes == channels * height * width * 4 + 12


def test_only_the_latents_of_an_sde_window_are_transferred(recipe: Recipe) -> None:
    sampling = recipe.sampling.model_copy(update={"sde_window": 2})
    windowed = plan_of(recipe.model_copy(update={"sampling": sampling}))
    channels, height, width = windowed.sizes.latent_shape
    assert windowed.transitions_per_step == 4 * 2
    saved = plan_of(recipe).trajectory_bytes - windowed.trajectory_bytes
    assert saved == 2 * (channels * height * width * 4 + 12)


def test_noised_samples_of_finished_images_are_counted(capsys: pytest.CaptureFixture) -> None:
    options = ["--algorithm", '{name = "rwr", noised_samples = 4}', "--sampling.timestep_fraction", "0.1"]
    assert cli.main(["plan", str(RECIPES / "tiny" / "jpeg.toml"), *options]) == 0
    assert "64 = 16 images × 4 noised samples, in micro-batches of 32" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--learner.micro_batch_size", "7"], "16 images × 8 trained steps = 128 transitions.* = 7 does not divide"),
        (["--algorithm", '{name = "rwr"}'], "16 images × 1 noised samples = 16 transitions.* = 32 does not divide"),
        (
            ["--algorithm", '{name = "grpo"}'],
            "'group' and prompts.images_per_prompt 1: a group needs at least 2 images",
        ),
        (["--algorithm", '{name = "ddpo_sf"}'], "4 optimizer steps a round and max_policy_lag = 0: give .* = 64"),
        (["--algorithm.step_weights", "[1.0, 0.0]"], "step_weights has 2 numbers .* sampling.num_steps = 15 of them"),
        (
            ["--algorithm.kl_coef", "0.1", "--policy.train", "full"],
            "policy.train is 'full' and .* needs reference_means: .* \(kl_coef = 0; of dpo",
        ),
        (["--algorithm.clip_nats", "1"], "clip_range is 0.004 and clip_nats 1.0: give one of the two"),
    ],
)
def test_an_algorithm_that_does_not_fit_the_recipe_is_refused(
    options: list[str], text: str, capsys: pytest.CaptureFixture
) -> None:
    assert cli.main(["plan", str(RECIPES / "tiny" / "jpeg.toml"), *options]) == 2
    assert re.search(text, capsys.readouterr().err)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "images", "batch", "updates"),
    [("ddpo_is", 256, 64, 4), ("ddpo_sf", 256, 256, 1), ("rwr", 10_240, 128, 400), ("rwr_sparse", 10_240, 128, 400)],
)
@pytest.mark.parametrize("reward", ["compressibility", "aesthetic"])
def test_the_papers_recipes_have_its_tables_numbers(
    name: str, images: int, batch: int, updates: int, reward: str
) -> None:
    recipe = Recipe.load(RECIPES / "paper" / f"{name}_{reward}.toml")
    numbers = plan_of(recipe)
    assert (numbers.images, numbers.images_per_step, numbers.optimizer_steps) == (images, batch, updates)
    learner, sampling = recipe.learner, recipe.sampling
    assert (learner.learning_rate, learner.weight_decay, learner.max_grad_norm) == (1e-5, 1e-4, 1.0)
    assert (sampling.num_steps, sampling.guidance_scale, sampling.eta) == (50, 5.0, 1.0)
    assert numbers.sizes.trained_parameters == numbers.sizes.network_parameters  # the whole UNet


def test_ddpo_pytorchs_recipe_has_four_updates_of_64_images_a_round() -> None:
    numbers = plan_of(Recipe.load(RECIPES / "ddpo_pytorch_compressibility.toml"))
    assert (numbers.images, numbers.images_per_step, numbers.optimizer_steps) == (256, 64, 4)


@pytest.mark.rotated(every=2, group="longest")
def test_the_copy_of_the_network_is_counted_if_numerics_differ(tables: dict) -> None:
    own = {"algorithm": {**tables["algorithm"], "off_policy": {"ratio": "proximal"}}}
    alike, half, merged = (
        Recipe.parse({**tables, **own, "policy": {**tables["policy"], **keys}})
        for keys in ({}, {"sampler_dtype": "bfloat16"}, {"sampler_dtype": "bfloat16", "merge_adapters": True})
    )
    without, numbers, with_merged = map(plan_of, (alike, half, merged))
    copies = []
    for each in (half, merged):
        components = build_components(each)
        copies.append(Learner(components.policy, components.algorithm, each)._arrival_check._copy)
    apart, copy = copies
    assert apart is not None and copy is not None and copy.merged is not None
    held, held_merged = (parameter_bytes(each.network) for each in (apart, copy))
    assert without.copy_bytes == 0 < numbers.copy_bytes == held
    # Adapters that are merged stay float32. Beside merged weights, those of the layers with adapters are kept.
    adapters = sum(value.numel() for value in trained_parameters(copy.network).values())
    beside = sum(kept.nbytes for kept in copy.merged._pretrained)
    assert with_merged.copy_bytes == held_merged + beside and beside > 0 and held_merged == held + 2 * adapters
    # On a CPU the host's memory is the learner's; on a GPU it holds the copy only while a round is checked.
    assert numbers.learner_bytes == without.learner_bytes + held
    on_gpu = half.model_copy(update={"learner": half.learner.model_copy(update={"num_gpus": 1})})
    sizes = dataclasses.replace(numbers.sizes, learner=PeakBytes(100, 10), sampling=PeakBytes(70, 2))
    assert half.sampling.batch_size == 4
    assert [learner_peak(on_gpu, sizes, micro_batch, copy=50) for micro_batch in (1, 64)] == [
        100 + 50 + 4 * 2,
        100 + 640,
    ]
    assert "host's memory" in plan(half) and "host's memory" not in plan(alike)


def test_the_value_function_and_refilled_images_are_counted(tables: dict) -> None:
    def planned(**algorithm: object) -> Plan:
        return plan_of(Recipe.parse({**tables, "algorithm": algorithm}))

    tables["prompts"]["images_per_prompt"] = 2

    plain, valued = planned(name="dpok"), planned(name="dpok", value={"batch_size": 300})
    recipe = Recipe.parse({**tables, "algorithm": {"name": "dpok"}})
    elements = math.prod(plain.sizes.latent_shape)
    network = ValueNetwork(elements, recipe.sampling.num_steps)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert valued.value_bytes == 4 * (4 * parameters + 2 * 300 * elements)
    assert plain.value_bytes == 0 and valued.learner_bytes == plain.learner_bytes + valued.value_bytes
    assert "for the value function" in plan(Recipe.parse({**tables, "algorithm": {"name": "dpok", "value": {}}}))
    refilled = planned(name="grpo", selection={"refill": 2})
    once = refilled.trajectory_bytes * refilled.images
    assert refilled.round_bytes == planned(name="grpo").round_bytes + 2 * once
