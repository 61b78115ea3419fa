"""ddpo push: publish a run's weights with a model card on the Hugging Face hub, or write the same files to a folder."""

import itertools
import json
import tempfile
from pathlib import Path

import tomli_w

from ray_ddpo.actors.evaluation.eval_set import build_eval_set
from ray_ddpo.common.diffusion.lora.files import FILE_NAME, PEFT_CONFIG, PEFT_NAME, SECOND_NAME
from ray_ddpo.common.model_files.weight_files import network_folder
from ray_ddpo.common.print_line import print_line
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.reading import read_json, read_text
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.deploy.commands.model_card.card import Published, model_card
from ray_ddpo.deploy.commands.report.images import before_after_image, reward_curve
from ray_ddpo.deploy.commands.report.report import compare, logged_rounds, report, report_stats
from ray_ddpo.deploy.commands.weights.given_base import check_base
from ray_ddpo.deploy.commands.weights.run_weights import RunWeights, best_weights, run_weights
from ray_ddpo.deploy.driver.components import SCORING, build_components, components_of
from ray_ddpo.deploy.evaluation.eval_log import ENTRIES
from ray_ddpo.deploy.hub import Files, license_of, prepare, upload

BEFORE_AFTER, CURVE, SUMMARY = "before_after.png", "reward_curve.png", "summary.json"
FROM_REPORT = (BEFORE_AFTER, CURVE, SUMMARY)  # files of `ddpo report` that are published
PRIVATE = ("output_dir", "push")  # recipe keys that are not published: a path of this machine, and hub settings


def push(run: str, overrides: list[str], dry_run: str | None = None) -> str:
    """Publish a run as the recipe's `[push]` says; return a summary for the terminal.

    Args:
        run: the run's folder.
        overrides: of the recipe.
        dry_run: a folder to write the same files to, without network access.

    Raises:
        ValueError: the folder holds no finished run, or the run may not be published.
        NotPushed: the hub does not answer.
    """
    folder = RunFolder(run)
    recipe = folder.load_recipe(overrides)
    license_of(recipe)
    if dry_run is None:
        prepare(recipe)  # before images are sampled, which takes minutes
    elif Path(dry_run).exists() and (not Path(dry_run).is_dir() or any(Path(dry_run).iterdir())):
        raise ValueError(
            f"{dry_run} is there and not an empty folder: what would be pushed would be mixed with what is in it"
        )
    weights = best_weights(folder) if recipe.push.version == "best" else run_weights(folder)
    with weights.here() as path:
        files = _files(folder, recipe, weights, _report_files(folder, recipe, overrides, weights)) | _weights(path)
        if dry_run is not None:
            for place, file in files.items():
                (Path(dry_run) / place).parent.mkdir(parents=True, exist_ok=True)
                (Path(dry_run) / place).write_bytes(file if isinstance(file, bytes) else file.read_bytes())
            return "\n".join(["would be pushed:", *(f"  {Path(dry_run) / place}" for place in sorted(files))])
        message = f"{recipe.name}: version {weights.policy_version}, fingerprint {weights.fingerprint[:12]}"
        return f"pushed {len(files)} files: {upload(recipe.push, files, message)}"


def _report_files(folder: RunFolder, recipe: Recipe, overrides: list[str], weights: RunWeights) -> dict[str, bytes]:
    """Return images and summary of these weights from the run's report. If there is no such report, make it now."""
    if weights.location == folder.location and not _is_of(folder, weights):
        print_line(f"{folder.location} has no report of these weights: it is made now")
        report(folder.location, overrides)
    if _is_of(folder, weights):
        return {name: folder.report.read(name) for name in FROM_REPORT}
    print_line("the report is not of these weights: their images are sampled now")
    rounds = logged_rounds(folder)
    comparison = compare(
        build_components(recipe, used=SCORING), weights.location, lambda base: check_base(folder, base, overrides)
    )
    stats = report_stats(comparison, recipe, rounds, weights)
    with tempfile.TemporaryDirectory() as scratch:
        before_after_image(comparison, Path(scratch) / BEFORE_AFTER)
        reward_curve(rounds, Path(scratch) / CURVE)
        charts = {name: (Path(scratch) / name).read_bytes() for name in (BEFORE_AFTER, CURVE)}
    return {**charts, SUMMARY: json.dumps(stats).encode()}


def _is_of(folder: RunFolder, weights: RunWeights) -> bool:
    if not all(folder.report.exists(name) for name in FROM_REPORT):
        return False
    return read_json(folder.report, SUMMARY).get("fingerprint") == weights.fingerprint


def _files(folder: RunFolder, recipe: Recipe, weights: RunWeights, report_files: dict[str, bytes]) -> Files:
    """Return all files except the weights, by path in the repository."""
    components = components_of(recipe)
    stats = {name: value for name, value in json.loads(report_files[SUMMARY]).items() if name != "seconds_report"}
    recipe_text = _recipe_text(folder)
    files: Files = {
        **report_files,
        SUMMARY: json.dumps(stats, indent=1).encode(),
        folder.recipe: recipe_text.encode(),
        **{name: folder.storage.read(name) for name in (folder.metrics, ENTRIES) if folder.storage.exists(name)},
    }
    prompt = build_eval_set(recipe.evaluation, components.prompts).prompts[0].text
    beside = sorted(files.keys() - {BEFORE_AFTER, CURVE})
    published = Published(
        folder, recipe, components.policy, weights, stats, logged_rounds(folder), recipe_text, prompt, beside
    )
    return {"README.md": str(model_card(published)).encode(), **files}


def _recipe_text(folder: RunFolder) -> str:
    """Return the run's recipe with the versions at its head, without private keys."""
    text = read_text(folder.storage, folder.recipe)
    head = "".join(itertools.takewhile(lambda line: line.startswith("#"), text.splitlines(keepends=True)))
    tables = {key: value for key, value in folder.recipe_tables().items() if key not in PRIVATE}
    if "start_from" in tables:
        tables["start_from"]["run"] = RunFolder(tables["start_from"]["run"]).storage.name  # without the path
    return head + tomli_w.dumps(tables)


def _weights(path: Path) -> Files:
    """Return the weight files where diffusers expects them: a LoRA at the top, a full network in its folder."""
    network = network_folder(path)
    if network:
        return {f"{network.name}/{file.name}": file for file in sorted(network.iterdir())}
    # Of networks that diffusers loads no LoRA into, and of a second network.
    others = {name: path / "lora" / name for name in (PEFT_NAME, PEFT_CONFIG, SECOND_NAME)}
    return {FILE_NAME: path / "lora" / FILE_NAME, **{name: file for name, file in others.items() if file.is_file()}}
