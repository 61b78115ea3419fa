"""Linters and published schemas accept the files in deploy/, and each of them rejects a bad file."""

import json
import re
from pathlib import Path

import pytest
import yaml

from tests.deploy.lint import complaint
from tests.deploy.manifests import DEPLOY, ROOT, document

SCRIPTS = sorted(path for folder in (DEPLOY, ROOT / ".ci") for path in folder.iterdir() if path.is_file())
SCRIPTS = [path for path in SCRIPTS if path.read_bytes().startswith(b"#!/usr/bin/env bash")]
YAML_RULES = """
extends: default
rules:
  line-length: {max: 130}
  document-start: disable
  comments: {min-spaces-from-content: 1}
"""


def test_hadolint_has_nothing_to_say_of_the_dockerfile() -> None:
    assert complaint("hadolint", DEPLOY / "Dockerfile") == ""
    text = (DEPLOY / "Dockerfile").read_text()
    assert "DL3042" in complaint("hadolint", "-", text=text.replace("--no-cache-dir", ""))
    assert "DL3002" in complaint("hadolint", "-", text=text.replace("USER 1000:1000", "USER root"))


def test_shellcheck_has_nothing_to_say_of_the_scripts() -> None:
    assert {path.name for path in SCRIPTS} >= {"submit.sh", "run", "gpu"}
    assert complaint("shellcheck", *SCRIPTS) == ""
    text = (DEPLOY / "submit.sh").read_text()
    assert "SC2068" in complaint("shellcheck", "-", text=text.replace('"$@"', "$@"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_ends_at_the_first_thing_that_fails(script: Path) -> None:
    assert "\nset -euo pipefail\n" in script.read_text()


def test_yamllint_has_nothing_to_say_of_the_yaml_files(tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text(YAML_RULES)
    assert complaint("yamllint", "--strict", "--config-file", rules, DEPLOY) == ""
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: 1\na: 2\n")
    assert "duplication of key" in complaint("yamllint", "--strict", "--config-file", rules, bad)


def test_the_compose_file_meets_the_specification(tmp_path: Path) -> None:
    schema = ("--builtin-schema", "vendor.compose-spec")
    assert complaint("check-jsonschema", *schema, DEPLOY / "compose.yaml") == ""
    compose = document("compose.yaml")
    service = next(iter(compose["services"].values()))
    for key, value in (("port", ["80:80"]), ("ports", "80:80"), ("shm_sized", "8gb")):
        bad = tmp_path / "bad.yaml"
        bad.write_text(json.dumps({**compose, "services": {"ray": {**service, key: value}}}))
        assert key in complaint("check-jsonschema", *schema, bad)


def test_the_variables_of_the_compose_file_are_asked_for_and_never_given() -> None:
    text = (DEPLOY / "compose.yaml").read_text()
    given = {name: rest[:2] for name, rest in re.findall(r"\$\{(\w+)([^}]*)\}", text)}
    assert set(given.values()) <= {":?", ":-"} and given["RAY_AUTH_TOKEN"] == ":?"


def test_kubernetes_knows_every_field_of_pods_and_claims(tmp_path: Path) -> None:
    spec = document("kuberay/ray_cluster.yaml")["spec"]
    groups = (spec["headGroupSpec"], *spec["workerGroupSpecs"])
    for number, group in enumerate(groups):
        template = group["template"]
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"pod-{number}"}, **template}
        (tmp_path / f"{number}.yaml").write_text(yaml.safe_dump(pod))
    files = [*sorted(tmp_path.glob("*.yaml")), DEPLOY / "kuberay" / "shared_storage.yaml"]
    assert len(files) == len(groups) + 1
    assert complaint("kubernetes-validate", "--strict", *files) == ""
    bad = tmp_path / "bad.yaml"
    bad.write_text(files[0].read_text().replace("restartPolicy", "restartpolicy"))
    assert "restartpolicy" in complaint("kubernetes-validate", "--strict", bad)
