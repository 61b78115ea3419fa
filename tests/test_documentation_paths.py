"""Check that every file, module, recipe key and metric that the documentation names exists."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.registry import component_class, import_object
from ray_ddpo.deploy.driver.registries import REGISTRIES
from tests.test_documentation import PAGES, ROOT, blocks
from tests.test_metrics_page import rows

ALL_PAGES = [*PAGES, ROOT / "deploy" / "cluster" / "README.md"]
FOLDERS = ("common", "actors", "learner", "deploy", "ray_ddpo", "benchmarks", "tests", "docs")
EXAMPLES = {"actors/rewards/warmth.py"}  # a file that the reader writes
RUN_FILES = {"recipe.toml", "digits.toml", "shapes.toml", "control.toml"}
SPAN = re.compile(r"`([^`\n]+)`")


def spans(page: Path) -> list[str]:
    """Return the code spans of a page, outside of code blocks."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return list(dict.fromkeys(SPAN.findall(text)))


def exists(path: str, page: Path) -> bool:
    """Return whether a path, which may hold * and …, names something in the repository."""
    pattern = path.replace("…", "*").rstrip("/")
    bases = (ROOT, page.parent)
    recipes = (ROOT / "deploy" / "recipes").rglob(pattern)
    return next(recipes, None) is not None or any(next(base.glob(pattern), None) is not None for base in bases)


def fields_of(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the pydantic models in a type, such as those of `tuple[Table, ...] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from fields_of(part)


def with_components(tables: list[type[BaseModel]]) -> list[type[BaseModel]]:
    """Return the tables with the classes of every component that they may name."""
    registries = [
        import_object(REGISTRIES[table.__name__], "registry") for table in tables if table.__name__ in REGISTRIES
    ]
    return tables + [component_class(registry, name, "name") for registry in registries for name in registry]


def is_key(keys: list[str]) -> bool:
    """Return whether `[section, key, …]` is a key of a recipe, or of a component that a section may name."""
    models: list[type[BaseModel]] = [Recipe]
    for key in keys:
        found = [model.model_fields[key].annotation for model in models if key in model.model_fields]
        if not found:
            return False
        if dict[str, float] in found:  # custom resources
            return True
        models = with_components([model for annotation in found for model in fields_of(annotation)])
    return True


@pytest.mark.parametrize("key", ["learner.ranks", "sampling.window", "aggregation.join", "algorithm.off_policy.rate"])
def test_a_key_that_does_not_exist_is_found(key: str) -> None:
    assert not is_key(key.split("."))


def dotted_keys(text: str) -> Iterator[str]:
    """Yield the keys of recipes in a code span: `section.key`, `--section.key VALUE` or `section.key = value`."""
    found = re.match(r"(?:--)?([a-z_]+(?:\.[a-z_0-9]+)+)(?:$| = | \S+$)", text)
    if found and found[1].partition(".")[0] in Recipe.model_fields and not found[1].endswith((".json", ".py", ".toml")):
        yield found[1]


def table_keys(table: dict[str, Any], before: tuple[str, ...] = ()) -> Iterator[list[str]]:
    """Yield every key of a TOML document with the tables around it."""
    for key, value in table.items():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, dict) and each:
                yield from table_keys(each, (*before, key))
            else:
                yield [*before, key]


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    named = [span for span in spans(page) if re.fullmatch(rf"({'|'.join(FOLDERS)})/[\w./*…-]*", span)]
    named += [span for span in spans(page) if re.fullmatch(r"((tiny|paper|families)/)?[\w…]+\.toml", span)]
    known = EXAMPLES | RUN_FILES | {row.metric for row in rows()}
    assert [path for path in named if path not in known and not exists(path, page)] == []


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_every_module_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"\b(?:ray_ddpo|benchmarks)(?:\.[a-z_]\w*)+", text)) - {"ray_ddpo.common.diffusion.policy"}
    named = {name for name in named if not name.endswith((".json", ".py", ".toml", ".warmth"))}
    files = {name: ROOT / name.removeprefix("ray_ddpo.").replace(".", "/") for name in named}
    lost = [name for name, path in files.items() if not (path.with_suffix(".py").exists() or path.is_dir())]
    assert [name for name in lost if not (ROOT / "ray_ddpo" / f"{name.partition('.')[2]}.py").exists()] == []


@pytest.mark.rotated(every=4)
@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_every_recipe_key_that_a_page_names_exists(page: Path) -> None:
    named = [key.split(".") for span in spans(page) for key in dotted_keys(span)]
    for block in blocks(page, "toml"):
        named += table_keys(tomllib.loads(block))
    assert [".".join(keys) for keys in named if not is_key(keys)] == []


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_every_metric_that_a_page_names_has_a_row(page: Path) -> None:
    table = rows()
    first = {row.metric.partition("/")[0] for row in table if "/" in row.metric} - {"images"}
    named = [span for span in spans(page) if re.fullmatch(rf"({'|'.join(first)})/[\w/<>]*\w>?", span)]
    places = {"reward/<name>", "evaluation/evaluation"}  # a column of the ledger
    lost = [span for span in named if not any(row.metric == span or row.describes(span) for row in table)]
    assert [span for span in lost if span not in places] == []


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_every_heading_that_a_page_links_to_exists(page: Path) -> None:
    def anchors(text: str) -> set[str]:
        headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}

    links = re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text(encoding="utf-8"))
    targets = [(page.parent / name if name else page, anchor) for name, anchor in links]
    assert [f"{path.name}#{anchor}" for path, anchor in targets if anchor not in anchors(path.read_text())] == []
