"""The lower bounds of pyproject.toml are tested versions: those of constraints.txt, or of `make oldest`."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]


def test_every_lower_bound_is_a_tested_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [text for texts in project["optional-dependencies"].values() for text in texts]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    tested = {
        name.lower(): Version(version) for name, _, version in (line.partition("==") for line in lines) if version
    }
    oldest = {
        name: Version(version)
        for name, version in re.findall(r'"([a-z_]+)==([0-9.]+)"', (ROOT / "Makefile").read_text())
    }
    for requirement in map(Requirement, project["dependencies"] + extras):
        for bound in requirement.specifier:
            version = Version(bound.version)
            ran = oldest.get(requirement.name, tested[requirement.name.lower()])
            assert bound.operator == ">=" and version.release[:2] == ran.release[: len(version.release[:2])], (
                requirement
            )
