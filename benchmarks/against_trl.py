"""make bench-trl: time rounds of the program and of TRL's DDPOTrainer on the same model, recipe and number of images.

Each side runs in a separate process. The processes take turns: while one computes a round, the others sleep. Every
measurement is appended to the CSV at once; `--table` prints the CSV as a table.
"""

import argparse
import csv
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks.embedded_model import RECIPE
from benchmarks.round_process import RoundProcess, our_process, trl_process
from benchmarks.timing import machine
from ray_ddpo.common.diffusion.policy import EMBEDDED_MODELS
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.deploy.driver.components import Components, build_components
from tests.parity.sides import trl_config

TRL = "TRL"
FOLDER = Path("runs/bench")
REPEATS = 3
THREADS = 2
SAME = {  # for both sides
    "sampling.num_steps": "20",
    "sampling.guidance_scale": "5",
    "sampling.batch_size": "8",
    "sampling.batches_per_round": "4",
    "sampling.timestep_fraction": "1.0",
    "sampling.skip_last_steps": "0",
    "algorithm.clip_range": "1e-4",
    "algorithm.advantages.min_count": "16",
    "learner.batch_size": "8",
    "learner.learning_rate": "3e-4",
    "learner.micro_batch_size": "32",  # transitions, for our side only: train_batch_size decides TRL's forward pass
    "runtime.threads": str(THREADS),
}
SETTINGS: dict[str, dict[str, str]] = {
    "float32, eager": {},
    "float32, compiled": {"policy.compile": "both"},
    # As `ddpo doctor` recommends: in bfloat16 the last but one step exceeds the learner's tolerance.
    "bfloat16 compiled sampler": {
        "policy.compile": "both",
        "policy.sampler_dtype": "bfloat16",
        "policy.merge_adapters": "true",
        "algorithm.off_policy.ratio": "proximal",
        "sampling.skip_last_steps": "2",
        "learner.micro_batch_size": "36",
    },
}
COLUMNS = ("side", "repeat", "sampling", "scoring", "learning", "round", "bare_sampling", "bare_learning")
COLUMNS = (*COLUMNS, "peak_bytes", "machine", "versions")
Row = dict[str, Any]


def words(*tables: dict[str, str]) -> list[str]:
    """Return overrides as command-line words. Later tables replace values of earlier ones."""
    joined = {key: value for table in tables for key, value in table.items()}
    return [word for key, value in joined.items() for word in (f"--{key}", value)]


def trl_job(components: Components) -> dict[str, Any]:
    """Return the job for TRL's process: the model's folder, TRL's keys and our prompts."""
    recipe, device = components.recipe, components.recipe.runtime.device
    return {
        "model": str(EMBEDDED_MODELS.get(components.policy.model, components.policy.model)),
        "config": {**trl_config(components), "seed": recipe.seed},
        "prompts": components.prompts.listed(),
        "device": "cpu" if device == "auto" else device,
        "threads": recipe.runtime.threads,
    }


def measured(settings: list[str], repeats: int, same: dict[str, str], folder: Path) -> Iterator[Row]:
    """Yield rows as they are measured. Repeat 0 is the first round, which includes compilation."""
    job = trl_job(build_components(Recipe.load(RECIPE, words(same))))
    with ExitStack() as open_sides:
        sides = {TRL: open_sides.enter_context(trl_process(job, folder))}
        versions = {TRL: sides[TRL].answer()["versions"]}
        for name in settings:
            place = name.replace(",", "").replace(" ", "-")
            process = our_process(RECIPE, words(same, SETTINGS[name]), folder, place)
            sides[name] = open_sides.enter_context(process)
            versions[name] = sides[name].answer()["versions"]
        facts = {name: {"side": name, "machine": machine(), "versions": spelled(versions[name])} for name in sides}
        for repeat in range(repeats + 1):
            for name, side in sides.items():
                yield {**facts[name], "repeat": repeat, **one_round(side, name != TRL, first=not repeat)}


def one_round(side: RoundProcess, bare: bool, first: bool = False) -> Row:
    """Measure one round. For our sides, add the mean of the bare loop's times right before and right after the round.

    The two bare measurements cancel drift of the machine's speed. They start after the first round, because compilation
    belongs to the first round.
    """
    alone = [side.ask(bare=True)] if bare and not first else []
    row = side.ask()
    if bare:
        alone.append(side.ask(bare=True))
        row |= {f"bare_{part}": mean(each[part] for each in alone) for part in alone[0]}
    return row


def spelled(versions: dict[str, str]) -> str:
    """Return the libraries with their versions as text."""
    return ", ".join(f"{name} {number}" for name, number in versions.items())


def write_rows(rows: Iterator[Row], path: Path) -> None:
    """Append each row to the CSV and print it to standard error as it arrives."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}
            )
            file.flush()
            print(f"{row['side']:<28} round {row['repeat']}: {row['round']:.2f} s", file=sys.stderr, flush=True)


def read_rows(path: Path) -> list[Row]:
    """Read the CSV's rows, with numbers as floats."""
    with path.open(newline="") as file:
        texts = list(csv.DictReader(file))
    plain = ("side", "machine", "versions")
    return [{name: value if name in plain else float(value) for name, value in row.items() if value} for row in texts]


def table(rows: list[Row]) -> str:
    """Return a Markdown table of the sides: medians over all rounds but the first, and of paired ratios."""
    lines = [
        "| | sampling | learning | round | TRL's / this: sampling | learning | round | bare / this: sampling | learning "
        "| first round | peak memory |",
        f"|{'---|' * 11}",
    ]
    trl = counted(rows, TRL)
    for name in dict.fromkeys(row["side"] for row in rows):
        of_side = counted(rows, name)
        (first,) = (row for row in rows if row["side"] == name and not row["repeat"])
        first_round = f"{first['round']:.1f} s"
        if not of_side:
            continue
        times = [f"{median(row[part] for row in of_side):.2f} s" for part in ("sampling", "learning", "round")]
        against = [ratio(trl, of_side, part, part) for part in ("sampling", "learning", "round")]
        bare = [ratio(of_side, of_side, f"bare_{part}", part) for part in ("sampling", "learning")]
        memory = f"{max(row['peak_bytes'] for row in (first, *of_side)) / 1e6:,.0f} MB"
        lines.append(f"| {' | '.join((name, *times, *against, *bare, first_round, memory))} |")
    return "\n".join(lines)


def counted(rows: list[Row], side: str) -> list[Row]:
    """Return a side's rows without its first round, in order."""
    return [row for row in rows if row["side"] == side and row["repeat"]]


def ratio(theirs: list[Row], ours: list[Row], of_theirs: str, of_ours: str) -> str:
    """Return the median ratio over rows of the same repeat, or a dash if there is none.

    Rows of one repeat share the other load on the machine.
    """
    pairs = [(first.get(of_theirs), second[of_ours]) for first, second in zip(theirs, ours, strict=False)]
    known = [first / second for first, second in pairs if first is not None]
    return f"{median(known):.2f}" if known else "–"


def caption(rows: list[Row]) -> str:
    """Return the machine, the number of rounds and the library versions of the measurements."""
    repeats = int(max(row["repeat"] for row in rows))
    versions = {row["side"]: row["versions"] for row in rows}
    return (
        f"{rows[0]['machine']}, {THREADS} threads, medians of {repeats} interleaved rounds; TRL's side: {versions[TRL]}"
    )


def main() -> None:
    """Measure unless only the table is requested, and print the table. Unknown options override both sides' recipe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="NAME")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--table", action="store_true", help="of the results that are there")
    options, overrides = parser.parse_known_args()
    path = options.folder / "against_trl.csv"
    if not options.table:
        options.folder.mkdir(parents=True, exist_ok=True)
        given = {key.removeprefix("--"): value for key, value in zip(overrides[::2], overrides[1::2], strict=True)}
        write_rows(measured(options.settings, options.repeats, SAME | given, options.folder / "sides"), path)
    rows = read_rows(path)
    print(f"{table(rows)}\n\n{caption(rows)}")


if __name__ == "__main__":
    main()
