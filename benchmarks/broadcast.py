"""make broadcast: time weights from the driver to 16 actors on 4 nodes; count each node's transfers."""

import argparse
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import ray
from ray._private.internal_api import node_stats

from benchmarks.timing import machine
from ray_ddpo.common.policy_weights import PolicyWeights, pack
from tests.system.nodes import local_nodes

MEGABYTES = (3, 50)
NODES = 4
ACTORS_PER_NODE = 4
VERSIONS = 10
STORE_BYTES = 400_000_000


@dataclass(frozen=True)
class Arrival:
    """The time at which an actor had read a version, by this machine's clock."""

    node: str
    began: float
    seconds: float  # Unix time


@dataclass(frozen=True)
class Broadcast:
    """Times of one version in milliseconds, from before the driver put the version into its store."""

    put: float
    last_node: float  # until the first actor of every node had it in its hands
    last_actor: float  # until the last of all actors had read it
    later_on_a_node: float  # from a node's first actor to its last, the longest of all nodes
    copies: list[float]  # for each node: bytes that its store took in, over the version's bytes


class Reader:
    """An actor that takes weights as a sampler does and reads every number once."""

    def ready(self) -> str:
        return ray.get_runtime_context().get_node_id()

    def read(self, weights: PolicyWeights) -> Arrival:
        began = time.time()
        assert float(weights.buffer.sum(dtype=np.float64)) == weights.policy_version * weights.buffer.size
        return Arrival(ray.get_runtime_context().get_node_id(), began, time.time())


@contextmanager
def readers(nodes: int, actors_per_node: int) -> Iterator[list[Any]]:
    """Yield `actors_per_node` actors on each node but the driver's."""
    with local_nodes() as cluster:
        for _ in range(nodes):
            cluster.add_node(num_cpus=actors_per_node, object_store_memory=STORE_BYTES)
        ray.init(address=cluster.address, log_to_driver=False)
        try:
            remote = ray.remote(num_cpus=1)(Reader)
            actors = [remote.remote() for _ in range(nodes * actors_per_node)]
            places = ray.get([actor.ready.remote() for actor in actors])
            assert {places.count(place) for place in places} == {actors_per_node}
            yield actors
        finally:
            ray.shutdown()


def stored_bytes() -> dict[str, int]:
    """Return, by node, the bytes that each node's object store has received since its start."""
    taken = {}
    for node in ray.nodes():
        stats = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], include_memory_info=False)
        taken[node["NodeID"]] = stats.store_stats.cumulative_created_bytes
    return taken


def broadcast(actors: list[Any], weights: PolicyWeights) -> Broadcast:
    """Publish a version as the driver does: once into its store, then by reference to all actors."""
    before = stored_bytes()
    started = time.time()
    reference = ray.put(weights)
    put = time.time()
    arrivals = ray.get([actor.read.remote(reference) for actor in actors])
    after = stored_bytes()
    nodes = {arrival.node for arrival in arrivals}
    copies = [(after[node] - before[node]) / weights.buffer.nbytes for node in nodes]
    return summary((started, put), arrivals, copies)


def summary(start: tuple[float, float], arrivals: list[Arrival], copies: list[float]) -> Broadcast:
    """Convert start, put and arrival times into milliseconds."""
    began, put = start
    by_node: dict[str, list[Arrival]] = defaultdict(list)
    for arrival in arrivals:
        by_node[arrival.node].append(arrival)
    begun = [sorted(arrival.began for arrival in there) for there in by_node.values()]
    return Broadcast(
        1000 * (put - began),
        1000 * (max(first for first, *_ in begun) - began),
        1000 * (max(arrival.seconds for arrival in arrivals) - began),
        1000 * max(moments[-1] - moments[0] for moments in begun),
        copies,
    )


def row(megabytes: int, measured: list[Broadcast]) -> str:
    """Return one table line: medians, and the slowest version."""
    last = [each.last_actor for each in measured]
    figures = [median(getattr(each, name) for each in measured) for name in ("put", "last_node", "later_on_a_node")]
    copies = [copy for each in measured for copy in each.copies]
    parts = " | ".join(f"{figure:.1f}" for figure in (*figures, median(last), max(last)))
    return f"| {megabytes} MB | {parts} | {min(copies):.3f} … {max(copies):.3f} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--versions", type=int, default=VERSIONS)
    parser.add_argument("--megabytes", type=int, nargs="+", default=list(MEGABYTES))
    parser.add_argument("--nodes", type=int, default=NODES)
    options = parser.parse_args()
    who = f"{options.nodes * ACTORS_PER_NODE} actors on {options.nodes} nodes"
    print(f"{machine()}; {who}; milliseconds, medians of {options.versions} versions\n")
    head = ("put", "first actor of every node has it", "a node's other actors after its first")
    print(f"| weights | {' | '.join(head)} | last actor has read it | slowest version | copies a node took in |")
    print("|---|---|---|---|---|---|---|")
    with readers(options.nodes, ACTORS_PER_NODE) as actors:
        for megabytes in options.megabytes:
            size = megabytes * 1_000_000 // 4
            measured = []
            for version in range(options.versions + 1):
                weights = pack(version, {"adapter": np.full(size, version, np.float32)})
                measured.append(broadcast(actors, weights))
            print(row(megabytes, measured[1:]), flush=True)  # with the first, connections between nodes are made


if __name__ == "__main__":
    main()
