"""make overlap: compare seconds per round with the ideal by lag and parts, hidden scoring, scaling, shared devices."""

import argparse
import json
import sys
import tempfile
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from statistics import mean

from benchmarks.embedded_model import RECIPE
from benchmarks.stand_in_run import Proportion, ideal_seconds, local_ray, run
from benchmarks.timing import machine
from ray_ddpo.common.balance import Kind, RoundLoad, expected
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.train import run_training

LAGS = (0, 1, 2)
ROUNDS = 12  # measured: a multiple of every lag + 1, because rounds that overlap end in groups
PROPORTIONS = (
    Proportion("sampling takes longest", 4, 2, 16, sample=0.5, score=0.05, update=0.6),
    Proportion("learning takes longest", 4, 2, 16, sample=0.25, score=0.05, update=2.0),
    Proportion("scoring takes longest", 4, 2, 16, sample=0.25, score=0.25, update=0.6),
    Proportion("all alike", 4, 2, 16, sample=0.5, score=0.2, update=2.0),
    Proportion("large tasks, slow rewards", 4, 4, 4, sample=1.0, score=0.8, update=0.4),
)
PARTS = (
    Proportion("sampling takes longest", 4, 2, 16, sample=0.5, score=0.05, update=0.6, parts=4),
    Proportion("learning takes longest", 4, 2, 16, sample=0.25, score=0.05, update=2.0, parts=4),
    Proportion("all alike", 4, 2, 16, sample=0.5, score=0.2, update=2.0, parts=4),
)
REWARDS = Proportion("rewards", 4, 2, 16, sample=0.5, score=0.0, update=0.6)
SCORING = (0.05, 0.1, 0.2)  # seconds a task
SAMPLERS = (1, 4, 16, 64)
WORKERS = (2, 4, 8)  # devices, each with a sampler and a learner rank
FORWARD_AND_BACKWARD = 2.13  # times the work of a denoising step, for learning from it without checkpointing
# Tasks of 0.5 s, in the proportion of LoRA training with guidance where all steps are trained on, 1 : 2.13.
FOUR = RoundLoad(tasks=12, sample=0.5, learn=12 * 0.5 * 2.13, score=0.05, reward_workers=2, images_per_step=12)
EIGHT = replace(FOUR, tasks=16, learn=16 * 0.5 * 2.13, images_per_step=64)
WAVES = replace(FOUR, tasks=8, learn=2.0)  # eight tasks on three samplers
BALANCES: tuple[tuple[RoundLoad, int, int, Kind], ...] = (
    (replace(FOUR, lag=1), 3, 1, "dedicated"),
    (replace(FOUR, lag=1), 2, 2, "dedicated"),
    (replace(FOUR, lag=1), 1, 3, "dedicated"),
    (FOUR, 3, 1, "dedicated"),
    (FOUR, 4, 4, "colocated"),
    (EIGHT, 7, 1, "dedicated"),
    (EIGHT, 8, 8, "colocated"),
    (WAVES, 3, 1, "dedicated"),
    (replace(WAVES, lag=1), 3, 1, "dedicated"),
)
BALANCE_ROUNDS = 6
SECTIONS = ("proportions", "parts", "balance", "rewards", "scaling", "colocated", "model")
MODEL_ROUNDS = 9
MODEL_TASKS = 2


def scaled(samplers: int) -> Proportion:
    """Return a proportion with two tasks per sampler and round."""
    tasks = 2 * samplers
    return Proportion(f"{samplers}", samplers, max(1, samplers // 8), tasks, sample=1.0, score=0.05, update=0.5)


def proportions(rounds: int) -> None:
    """Print the table of stand-ins at each lag."""
    print(
        "\n| proportion | S/N | R/M | U | lag | ideal | measured | measured / ideal |\n|---|---|---|---|---|---|---|---|"
    )
    for proportion in PROPORTIONS:
        sides = f"{proportion.sampling:.2f} | {proportion.scoring:.2f} | {proportion.update:.2f}"
        for lag in LAGS:
            seconds, ideal = run(proportion, lag, lag + 2, rounds).seconds, proportion.ideal(lag)
            row = f"{ideal:.2f} s | {seconds:.2f} s | {seconds / ideal:.3f}"
            print(f"| {proportion.name} | {sides} | {lag} | {row} |", flush=True)


def in_parts(rounds: int) -> None:
    """Print the table of rounds that are trained on in parts, at lag 0."""
    print("\n| proportion | S/N | R/M | U | parts | ideal in one part | ideal | measured | measured / ideal |")
    print("|---|---|---|---|---|---|---|---|---|")
    for proportion in PARTS:
        sides = f"{proportion.sampling:.2f} | {proportion.scoring:.2f} | {proportion.update:.2f} | {proportion.parts}"
        seconds, ideal = run(proportion, 0, 2, rounds).seconds, proportion.ideal(0)
        whole = replace(proportion, parts=1).ideal(0)
        row = f"{whole:.2f} s | {ideal:.2f} s | {seconds:.2f} s | {seconds / ideal:.3f}"
        print(f"| {proportion.name} | {sides} | {row} |", flush=True)


def balance(rounds: int) -> None:
    """Print expected and measured seconds and idle shares of several layouts."""
    print(
        "\n| layout | tasks | lag | expected | measured | measured / expected | samplers idle | learner idle |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    for load, samplers, ranks, kind in BALANCES:
        layout = expected(load, samplers, ranks, kind)
        measured = run(proportion_of(load, samplers, ranks, kind), load.lag, load.lag + 2, rounds)
        ratio = f"{layout.seconds:.2f} s | {measured.seconds:.2f} s | {measured.seconds / layout.seconds:.3f}"
        idle = f"{layout.idle_samplers:.0%}, {measured.idle_samplers:.0%} | "
        idle += f"{layout.idle_ranks:.0%}, {measured.idle_learner:.0%}"
        print(f"| {layout.in_words} | {load.tasks} | {load.lag} | {ratio} | {idle} |", flush=True)


def proportion_of(load: RoundLoad, samplers: int, ranks: int, kind: Kind) -> Proportion:
    """Return the stand-ins of a layout. Colocated ones take turns too, because the lag is 0."""
    times = {"sample": load.sample, "score": load.score, "update": load.learn / ranks}
    shared = kind == "colocated"
    return Proportion("", samplers, load.reward_workers, load.tasks, **times, ranks=ranks, colocated=shared)


def rewards(rounds: int) -> None:
    """Print how much scoring is hidden behind sampling and learning, for rewards of several speeds."""
    print(
        "\n| scoring a task | R/M | lag | round | round if scoring took no time | hidden |\n|---|---|---|---|---|---|"
    )
    for lag in LAGS[:2]:
        free = run(replace(REWARDS, score=0.0), lag, lag + 2, rounds).seconds
        for score in SCORING:
            proportion = replace(REWARDS, score=score)
            seconds = run(proportion, lag, lag + 2, rounds).seconds
            hidden = 1 - (seconds - free) / proportion.scoring
            row = f"{proportion.scoring:.2f} s | {lag} | {seconds:.2f} s | {free:.2f} s | {hidden:.0%}"
            print(f"| {score:g} s | {row} |", flush=True)


def scaling(counts: tuple[int, ...], rounds: int) -> None:
    """Print the table of growing numbers of stand-in samplers, at lag 1."""
    print("\n| samplers | tasks a round | images/s | efficiency | seconds a round (ideal) | cores of the driver |")
    print("|---|---|---|---|---|---|")
    one = 0.0
    for samplers in counts:
        proportion = scaled(samplers)
        measured = run(proportion, 1, 3, rounds)
        one = one or measured.images_per_second / samplers
        efficiency = measured.images_per_second / (samplers * one)
        rates = f"{measured.images_per_second:.1f} | {efficiency:.3f}"
        seconds = f"{measured.seconds:.2f} ({proportion.ideal(1):.2f})"
        print(f"| {samplers} | {proportion.tasks} | {rates} | {seconds} | {measured.driver_cores:.2f} |", flush=True)


def pairs(workers: int) -> Proportion:
    """Return a proportion with four tasks per device and round, whose learning takes as long as a U-Net's."""
    sampling = 4 * 0.5
    update = FORWARD_AND_BACKWARD * sampling
    return Proportion(
        f"{workers}", workers, max(1, workers // 2), 4 * workers, 0.5, 0.05, update, ranks=workers, colocated=True
    )


def colocated(counts: tuple[int, ...], rounds: int) -> None:
    """Print how busy devices are that a sampler and a learner rank share in turns, at lag 0."""
    print("\n| devices | S/N, r, U | ideal | measured | sampling | learning | busy, least busy device | both at once |")
    print("|---|---|---|---|---|---|---|---|")
    for workers in counts:
        proportion = pairs(workers)
        measured = run(proportion, 0, 2, rounds)
        least = min(measured.devices, key=lambda device: device.busy)
        both = max(device.both for device in measured.devices)
        sides = f"{proportion.sampling:.2f}, {proportion.tail:.2f}, {proportion.update:.2f}"
        shares = f"{least.sampling:.1%} | {least.learning:.1%} | {least.busy:.1%} | {both:.1%}"
        print(
            f"| {workers} | {sides} | {proportion.ideal(0):.2f} s | {measured.seconds:.2f} s | {shares} |", flush=True
        )


def embedded_model(rounds: int) -> None:
    """Print the table of the real model, with S, R and U as that run measured them."""
    print("\n| lag | S | R | U | ideal | seconds/round | measured / ideal |\n|---|---|---|---|---|---|---|")
    for lag in LAGS:
        with tempfile.TemporaryDirectory() as folder:
            placed = {"name": "overlap", "output_dir": folder, "rounds": rounds, "max_policy_lag": lag}
            changed = {"sampling.batches_per_round": MODEL_TASKS, "runtime.threads": 1, "checkpoint.every": rounds}
            words = [word for key, value in (placed | changed).items() for word in (f"--{key}", str(value))]
            with redirect_stdout(sys.stderr):  # standard output has the tables alone
                run_training(Recipe.load(RECIPE, words))
            lines = (Path(folder) / "overlap" / "metrics.jsonl").read_text().splitlines()
        print(model_row(lag, [json.loads(line) for line in lines]), flush=True)


def model_row(lag: int, metrics: list[dict[str, float]]) -> str:
    """Return one line of means over steady rounds: without the first lag + 1 and the last lag rounds."""
    steady = metrics[lag + 1 : len(metrics) - lag]
    parts = ("sample", "score", "learn", "round")
    sample, score, learn, measured = (mean(each[f"seconds/{part}"] for each in steady) for part in parts)
    ideal = ideal_seconds((sample, score, learn), score / MODEL_TASKS, lag)
    row = f"{sample:.2f} | {score:.3f} | {learn:.2f} | {ideal:.2f} s | {measured:.2f} s | {measured / ideal:.3f}"
    return f"| {lag} | {row} |"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--samplers", type=int, nargs="+", default=list(SAMPLERS))
    parser.add_argument("--only", choices=SECTIONS)
    parser.add_argument("--devices", type=int, nargs="+", default=list(WORKERS))
    options = parser.parse_args()
    print(machine())
    with local_ray():
        if options.only in (None, "proportions"):
            proportions(options.rounds)
        if options.only in (None, "parts"):
            in_parts(options.rounds)
        if options.only in (None, "balance"):
            balance(min(options.rounds, BALANCE_ROUNDS))
        if options.only in (None, "rewards"):
            rewards(options.rounds)
        if options.only in (None, "scaling"):
            scaling(tuple(options.samplers), options.rounds)
        if options.only in (None, "colocated"):
            colocated(tuple(options.devices), options.rounds)
        if options.only in (None, "model"):
            embedded_model(MODEL_ROUNDS)


if __name__ == "__main__":
    main()
