"""The layout that a recipe's num_gpus and counts make on GPUs, and the keys that make another one (no torch)."""

import math
from typing import Any, Literal

from ray_ddpo.common.balance import Kind, Layout
from ray_ddpo.common.metrics.diagnoses import Roles
from ray_ddpo.common.recipe.colocation import LITTLE
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.reward_pools import all_pools, reward_pools

# Above 0.5 no two ranks share a GPU, so that they may use NCCL. The rest of the GPU is the sampler's.
RANK_SHARE = 0.55
# Of a GPU, for all reward workers together. A sampler keeps more than half of what a rank leaves, so that no two samplers
# fit beside one rank. On a single GPU there are no two.
MOST_SHARED = 0.2
MOST_SHARED_ALONE = 0.35

Keys = dict[str, dict[str, Any]]  # by table and key


def device_of(recipe: Recipe) -> Literal["cpu", "cuda"]:
    """Return where the policy computes: on a GPU if the recipe asks for one."""
    return "cuda" if recipe.learner.num_gpus or recipe.samplers.num_gpus else "cpu"


def gpus_of(recipe: Recipe) -> int:
    """Return the number of whole GPUs that hold all actors of a recipe.

    The driver starts ranks first and samplers last. Ray puts each on the fullest GPU that has room for its share. The
    sum of shares may be less: five ranks of 0.8 GPUs need five.
    """
    room: list[float] = []  # of each GPU in use
    for share in _shares(recipe):
        if share > 1:
            room += [0.0] * math.ceil(share - LITTLE)
            continue
        fitting = [gpu for gpu, left in enumerate(room) if left >= share - LITTLE]
        if fitting:
            room[min(fitting, key=lambda gpu: room[gpu])] -= share
        elif share:
            room.append(1 - share)
    return len(room)


def _shares(recipe: Recipe) -> list[float]:
    """Return the share of each actor, or of each colocated pair, in the order in which they are placed."""
    learner, samplers = recipe.learner, recipe.samplers
    workers = [pool.table.num_gpus for pool in all_pools(recipe) for _ in range(pool.table.count)]
    if learner.colocated:
        return [learner.num_gpus + samplers.num_gpus] * learner.world_size + workers
    return [learner.num_gpus] * learner.world_size + workers + [samplers.num_gpus] * samplers.count


def kind_of(recipe: Recipe) -> Kind:
    """Return whether samplers and learner work side by side, or in turns on GPUs that they share."""
    if recipe.learner.colocated:
        return "colocated"
    shares_a_gpu = recipe.learner.num_gpus + recipe.samplers.num_gpus <= 1 + LITTLE
    together = gpus_of(recipe) <= max(recipe.learner.world_size, recipe.samplers.count)
    return "colocated" if recipe.learner.num_gpus and shares_a_gpu and together else "dedicated"


def reward_share(recipe: Recipe) -> float:
    """Return the sum of the GPUs that reward workers and scorers ask for."""
    return sum(pool.table.count * pool.table.num_gpus for pool in all_pools(recipe))


def reward_gpus(recipe: Recipe, gpus: int) -> int:
    """Return the whole ones of `gpus` GPUs that only reward workers and scorers use; 0 if they fit beside a rank."""
    shared = reward_share(recipe)
    most = MOST_SHARED_ALONE if gpus == 1 else MOST_SHARED
    return 0 if shared <= most + LITTLE else math.ceil(shared - LITTLE)


def keys_of(layout: Layout, shared: float) -> Keys:
    """Return the keys of a recipe with this layout, whose reward workers take `shared` of a rank's GPU.

    The driver starts ranks first and samplers last, and Ray puts each actor on the fullest GPU that has room. So ranks
    get a GPU each, reward workers join one of them, and samplers fit wherever the reward workers went.
    """
    is_colocated = layout.kind == "colocated"
    paired = {"colocated": is_colocated and layout.ranks > 1}
    rank = RANK_SHARE if is_colocated else 1 - shared
    sampler = 1 - RANK_SHARE - shared if is_colocated else 1
    return {
        "samplers": {"count": layout.samplers, "num_gpus": _share(sampler)},
        "learner": {"world_size": layout.ranks, "num_gpus": _share(rank), **paired},
    }


def roles_of(recipe: Recipe, transitions_per_image: int | None = None) -> Roles:
    """Return a recipe's roles and the structure of its rounds, as `bottleneck` compares them with measured seconds.

    Args:
        recipe: the recipe.
        transitions_per_image: of an inner epoch. None: as many as the recipe's trained steps.
    """
    learner, size, gpus = recipe.learner, recipe.learner.micro_batch_size, gpus_of(recipe)
    return Roles(
        kind=kind_of(recipe),
        samplers=recipe.samplers.count,
        ranks=learner.world_size,
        reward_workers=sum(pool.table.count for pool in reward_pools(recipe)),
        gpus=max(0, gpus - reward_gpus(recipe, gpus)),
        tasks=recipe.sampling.batches_per_round,
        lag=recipe.max_policy_lag,
        parts=learner.parts_per_round,
        images_per_step=learner.images_per_step,
        transitions_per_image=transitions_per_image or recipe.sampling.trained_steps(recipe.sampling.num_steps),
        micro_batch_size=None if size == "auto" else size,
    )


def _share(share: float) -> float:
    """Return a share as Ray counts it, a whole number as such."""
    rounded = round(share, 4)
    return int(rounded) if rounded == int(rounded) else rounded
