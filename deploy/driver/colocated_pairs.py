"""Pairs: a learner rank and a sampler on each GPU, kept together by a placement group of Ray."""

import contextlib
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ray_ddpo.common.recipe.colocation import LITTLE, pair_resources
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.deploy.driver.cluster import attaches

POLL_SECONDS = 0.5

Options = dict[str, Any]  # of a Ray actor


class Pairs:
    """A placement group with one bundle per pair: what a rank and its sampler ask for together.

    A bundle has one GPU's share of more than half, so no two bundles are on one GPU. Rank r is in bundle r for the whole
    run. A sampler takes a bundle that no other sampler has, so one that replaces a dead sampler comes to the dead one's
    GPU. Ray moves the bundles of a lost node to another node that has room, and actors wait for their bundle meanwhile.
    The group is placed as a whole, and ends with the driver at the latest.
    """

    def __init__(self, recipe: Recipe) -> None:
        """Ask for the group. An autoscaler sees what its bundles lack."""
        self._bundle = pair_resources(recipe.learner, recipe.samplers)
        self._count = recipe.learner.world_size
        self._group = placement_group([self._bundle] * self._count, strategy="PACK")
        self._held: dict[int, int] = {}  # bundles by the number of the sampler that has it

    def wait(self, seconds: float, check: Callable[[], None]) -> None:
        """Wait until the group has its place.

        Args:
            seconds: the longest wait.
            check: called about twice a second; may raise.

        Raises:
            ValueError: it has none in time.
        """
        deadline = time.monotonic() + seconds
        with contextlib.ExitStack() as unless_placed:
            unless_placed.callback(self.close)
            while not self._group.wait(POLL_SECONDS):
                check()
                if time.monotonic() > deadline:
                    raise ValueError(
                        f"learner.colocated: after runtime.ready_seconds = {seconds:g} there is no place for "
                        f"{_in_words(self._count, self._bundle)}; the cluster has {ray.cluster_resources()}, of it free "
                        f"{ray.available_resources()}"
                    )
            unless_placed.pop_all()

    def of_rank(self, rank: int) -> Options:
        """Return the options that place a rank in its bundle."""
        return self._in_bundle(rank)

    def of_sampler(self, number: int) -> Options:
        """Return the options that place a sampler in the first bundle without one."""
        self._held[number] = min(set(range(self._count)) - set(self._held.values()))
        return self._in_bundle(self._held[number])

    def free(self, number: int) -> None:
        """Take note that a sampler is gone."""
        del self._held[number]

    def _in_bundle(self, bundle: int) -> Options:
        return {"scheduling_strategy": PlacementGroupSchedulingStrategy(self._group, bundle)}

    def close(self) -> None:
        """Give the bundles back."""
        remove_placement_group(self._group)


def refuse_too_many_pairs(recipe: Recipe) -> None:
    """Raise ValueError if a cluster started here is too small for all pairs. Others may still grow."""
    if attaches():
        return
    bundle, count = pair_resources(recipe.learner, recipe.samplers), recipe.learner.world_size
    have = ray.cluster_resources()
    needed = {name: count * (1 if name == "GPU" else amount) for name, amount in bundle.items()}
    lacking = [name for name, amount in needed.items() if amount > have.get(name, 0) + LITTLE]
    if lacking:
        has = ", ".join(f"{name} {have.get(name, 0):g}" for name in lacking)
        raise ValueError(
            f"learner.colocated: {_in_words(count, bundle)}, each on a GPU of its own, do not fit: the whole cluster has "
            f"{has}: lower learner.world_size and samplers.count, or set RAY_ADDRESS to a cluster that is large enough"
        )


def _in_words(count: int, bundle: dict[str, float]) -> str:
    each = ", ".join(f"{name} {amount:g}" for name, amount in bundle.items())
    return f"{count} pairs of a learner rank and a sampler ({each} each)"
