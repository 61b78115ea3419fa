"""make verification: write docs/verification.md, the table of what was run of each recipe and model family.

The runs are in benchmarks/verification.toml. Recipes and families without an entry have the level "plan".
"""

import tomllib
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from ray_ddpo.common.diffusion import POLICIES

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "deploy" / "recipes"
DATA = Path(__file__).with_suffix(".toml")
PAGE = ROOT / "docs" / "verification.md"
LEVELS = {
    "full": "trained on the published weights",
    "size": "run with the true architecture and random weights",
    "tiny": "run with the true classes and tiny weights, among them the embedded model's",
    "plan": "planned only: `ddpo plan` accepts the recipe; nothing was trained",
}
HEAD = """# Verification levels

After reading this page you know what was run of each recipe and model family, when, and how to run it again.

| level | meaning |
|---|---|
{levels}

The commit is that of the run; later commits changed the code. CPU runs took place on 2 cores (x86_64).
`make size-check` trains Stable Diffusion 1.5 at 512 × 512 with random weights for two rounds through Ray, on CPUs.
"""


@dataclass(frozen=True)
class Verification:
    """One row: a recipe or family, its level, and the run that shows the level."""

    kind: str  # "family" or "recipe"
    name: str
    level: str
    run: str
    date: date
    commit: str
    command: str


def subjects() -> list[str]:
    """Return every shipped recipe and registered model family, as `covers` names them."""
    names = sorted(path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob("*.toml"))
    return [*(f"family {name}" for name in POLICIES), *(f"recipe {name}" for name in names)]


def verifications(data: dict[str, Any]) -> list[Verification]:
    """Return one row for each subject.

    Raises:
        ValueError: An entry covers an unknown subject or has an unknown level.
    """
    known, entries = subjects(), data["entry"]
    for entry in entries:
        unknown = sorted(set(entry["covers"]) - set(known))
        if unknown or entry["level"] not in LEVELS:
            raise ValueError(f"benchmarks/verification.toml: unknown subject {unknown} or level {entry['level']!r}")
    rows = []
    for subject in known:
        kind, name = subject.split()
        plan = {**data["plan"], "level": "plan", "command": "ddpo plan RECIPE"}
        entry = next((entry for entry in entries if subject in entry["covers"]), plan)
        command = entry["command"].replace("RECIPE", name)
        rows.append(
            Verification(
                kind=kind,
                name=name,
                level=entry["level"],
                run=entry["run"],
                date=entry["date"],
                commit=entry["commit"],
                command=command,
            )
        )
    return rows


def table(rows: list[Verification]) -> list[str]:
    """Return the lines of a Markdown table, highest levels first."""
    order = list(LEVELS)
    lines = ["| name | level | what was run | date | commit | command |", "|---|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: order.index(row.level)):
        lines.append(f"| `{row.name}` | {row.level} | {row.run} | {row.date} | {row.commit} | `{row.command}` |")
    return lines


def page() -> str:
    """Return the page's text."""
    rows = verifications(tomllib.loads(DATA.read_text(encoding="utf-8")))
    levels = "\n".join(f"| {level} | {meaning} |" for level, meaning in LEVELS.items())
    families = [row for row in rows if row.kind == "family"]
    recipes = [row for row in rows if row.kind == "recipe"]
    parts = [
        HEAD.format(levels=levels),
        "## Model families",
        "",
        *table(families),
        "",
        "## Recipes",
        "",
        *table(recipes),
    ]
    counts = {level: sum(row.level == level for row in rows) for level in LEVELS}
    total = ", ".join(f"{count} {level}" for level, count in counts.items())
    return "\n".join([*parts, "", f"In all: {total}."]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE.relative_to(ROOT))
