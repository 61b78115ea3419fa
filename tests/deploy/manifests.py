"""The machines and the run that the files in deploy/ describe, in one form."""

import json
import re
import shlex
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.tables import RoleTable
from ray_ddpo.deploy.commands.command_line import read

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy" / "cluster"
README = (DEPLOY / "README.md").read_text(encoding="utf-8")
PINNED = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
STANDARD = {"CPU", "GPU", "memory"}


def document(name: str) -> dict[str, Any]:
    """A YAML file of deploy/ that holds one document."""
    return yaml.safe_load((DEPLOY / name).read_text(encoding="utf-8"))


def values(tree: Any, key: str) -> list[Any]:
    """All values under a key, however deep."""
    if isinstance(tree, list):
        return [value for branch in tree for value in values(branch, key)]
    if not isinstance(tree, dict):
        return []
    return [value for name, value in tree.items() if name == key] + values(list(tree.values()), key)


@dataclass(frozen=True)
class Machine:
    """One kind of node, as Ray's autoscaler knows it."""

    resources: dict[str, float]
    market: str | None
    fewest: int
    most: int

    def holds(self, *roles: RoleTable) -> bool:
        """Whether one actor of each of these roles has a place on one node."""
        for resource in {"CPU", "GPU", *(name for role in roles for name in role.resources)}:
            if sum(asked(role).get(resource, 0) for role in roles) > self.resources.get(resource, 0) + 1e-9:
                return False
        return all(
            f"accelerator_type:{role.accelerator_type}" in self.resources for role in roles if role.accelerator_type
        )


def asked(role: RoleTable) -> dict[str, float]:
    """What an actor of a role asks for, by Ray's names."""
    return {"CPU": role.num_cpus, "GPU": role.num_gpus, **role.resources}


def machines_of_kuberay() -> dict[str, Machine]:
    """As Ray's own reader of a RayCluster has it."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    cluster = document("kuberay/ray_cluster.yaml")
    cluster["metadata"]["namespace"] = "default"
    return _machines(_derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"])


def machines_of_the_launcher() -> dict[str, Machine]:
    return _machines(document("ray_cluster.yaml")["available_node_types"])


def _machines(node_types: dict[str, Any]) -> dict[str, Machine]:
    return {
        name: Machine(
            node["resources"],
            node.get("labels", {}).get("ray.io/market-type"),
            node.get("min_workers", 0),
            node.get("max_workers", 0),
        )
        for name, node in node_types.items()
    }


def machines_of_the_readme() -> dict[str, dict[str, float]]:
    """The custom resources that its `ray start` lines give."""
    texts = re.findall(r"--resources='(\{.*?\})'", README)
    return {text: json.loads(text) for text in texts}


def run_of_the_job() -> Recipe:
    """What the RayJob's entrypoint trains; the image has the repository in /app."""
    words = shlex.split(document("kuberay/ray_job.yaml")["spec"]["entrypoint"])
    assert words[0] == "ddpo"
    options = read(words[1:])
    assert options.resume == "auto"
    assert options.recipe.startswith("/app/")
    return Recipe.load(ROOT / options.recipe.removeprefix("/app/"), options.overrides)


def run_of_the_readme() -> Recipe:
    """What its command for several machines submits."""
    command = next(
        text for text in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) if "s3://BUCKET/runs \\\n" in text
    )
    script, recipe, output_dir, *overrides = shlex.split(command.replace("\\\n", " "))
    assert (ROOT / script).is_file()
    return Recipe.load(ROOT / recipe, ["--output_dir", output_dir, *overrides])


def run_of_the_readmes_tables() -> Recipe:
    """Its tables, over the recipe that they are shown for."""
    (text,) = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
    tables = tomllib.loads((ROOT / "deploy" / "recipes" / "sd15_aesthetic.toml").read_text())
    for name, value in tomllib.loads(text).items():
        tables[name] = {**tables.get(name, {}), **value} if isinstance(value, dict) else value
    return Recipe.parse(tables)
