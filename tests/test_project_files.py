"""The workflow, the pre-commit hooks and the citation meet their published schemas and name things that exist."""

import re
import subprocess
import tomllib
from pathlib import Path

import yaml

from tests.deploy.lint import complaint

ROOT = Path(__file__).parents[1]
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"
CITATION = ROOT / "CITATION.cff"


def schema_complaint(schema: str, path: Path) -> str:
    """Return what check-jsonschema reports of a file under one of the schemas that it contains."""
    return complaint("check-jsonschema", "--builtin-schema", schema, path)


def test_the_workflow_meets_githubs_schema_and_limits_every_job(tmp_path: Path) -> None:
    for schema in ("vendor.github-workflows", "custom.github-workflows-require-timeout"):
        assert schema_complaint(schema, WORKFLOW) == ""
    bad = tmp_path / "bad.yml"
    bad.write_text(WORKFLOW.read_text().replace("runs-on:", "runs_on:"))
    assert "runs_on" in schema_complaint("vendor.github-workflows", bad)


def test_the_workflow_runs_every_part_of_the_script_on_both_pythons() -> None:
    jobs = yaml.safe_load(WORKFLOW.read_text())["jobs"]
    usage = re.search(r"\[([a-z|]+)\]", (ROOT / ".ci" / "run").read_text())
    assert usage is not None and usage[1].split("|") == ["quick", *jobs["long"]["strategy"]["matrix"]["part"]]
    assert jobs["quick"]["strategy"]["matrix"]["python"] == ["3.11", "3.12"]
    assert {step["run"] for job in jobs.values() for step in job["steps"] if "run" in step} == {
        ".ci/run quick",
        ".ci/run ${{ matrix.part }}",
        "make site",
    }


def test_the_script_refuses_an_unknown_part() -> None:
    done = subprocess.run([ROOT / ".ci" / "run", "quik"], capture_output=True, text=True)
    assert done.returncode == 2 and "usage: .ci/run [quick|system|thorough]" in done.stderr


def test_each_pre_commit_hook_is_a_step_of_make_check() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert local["repo"] == "local"
    for hook in local["hooks"]:
        assert {"id", "name", "entry", "language", "types_or"} <= hook.keys()
        program, *verb = hook["entry"].removeprefix(".venv/bin/").removesuffix(" --force-exclude").split()
        assert f"$(BIN)/{' '.join([program, *verb])}" in makefile


def test_the_citation_meets_its_schema_and_has_the_packages_version() -> None:
    assert schema_complaint("vendor.citation-file-format", CITATION) == ""
    citation = yaml.safe_load(CITATION.read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    assert "2305.13301" in citation["references"][0]["url"]
