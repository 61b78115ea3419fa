"""The card itself: what the template is given, the metadata above it, and one text out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import ModelCard

from ray_ddpo.common.diffusion.loading.diffusers_config import DiffusersConfig
from ray_ddpo.common.diffusion.lora.adapters import LoraSettings
from ray_ddpo.common.diffusion.lora.files import FILE_NAME
from ray_ddpo.common.diffusion.lora.kohya import READERS
from ray_ddpo.common.diffusion.policy import EMBEDDED_MODELS, PolicyConfig
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.reading import read_text
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.deploy.commands.model_card.code import loading
from ray_ddpo.deploy.commands.report.evaluation import alarm_rows, evaluated_versions, guard_sentences
from ray_ddpo.deploy.commands.report.numbers import number, tick
from ray_ddpo.deploy.commands.report.page import versions
from ray_ddpo.deploy.commands.report.report import changes
from ray_ddpo.deploy.commands.weights.run_weights import RunWeights
from ray_ddpo.deploy.evaluation.eval_log import REPORTED, EvalLog
from ray_ddpo.deploy.hub import base_model, license_of, metadata

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Published:
    """What is told of a run whose weights are published."""

    folder: RunFolder
    recipe: Recipe
    policy: PolicyConfig
    weights: RunWeights
    figures: dict[str, Any]  # of summary.json
    rounds: list[dict[str, float]]
    recipe_text: str
    prompt: str  # an example
    files: list[str]  # that lie beside the card


def model_card(run: Published) -> ModelCard:
    """The README of the repository. The same run gives the same text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=False,  # it is Markdown: `cell` and `line` see to what is told
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"number": number, "cell": cell, "line": line}
    body = environment.get_template("card.md.jinja").render(**_told(run))
    return ModelCard(f"---\n{metadata(run.recipe).to_yaml()}\n---\n\n{body}")


def line(text: object) -> str:
    """Text of a run in a paragraph: it begins no block, no tag and no link."""
    flat = " ".join(str(text).split())
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>#|" else letter for letter in flat)


def cell(text: object) -> str:
    """Text of a run in a table's cell."""
    return line(text) or "–"


def _told(run: Published) -> dict[str, Any]:
    recipe, base = run.recipe, base_model(run.recipe)
    model = f"[{base}](https://huggingface.co/{base})" if base else line(run.policy.model)
    if run.policy.model in EMBEDDED_MODELS:
        model += ", the small Stable Diffusion that ships with ray-ddpo"
    return {
        "recipe": recipe,
        "what": "The whole network" if run.policy.train == "full" else "LoRA weights",
        "model_named": model,
        "sentences": changes(run.figures),
        "code": loading(recipe, run.policy, base, run.prompt),
        "programs": _programs(run.policy),
        "facts": _facts(run),
        "rewards": _rewards(recipe, run.figures["scorers"]),
        "figures": run.figures,
        "guard": _guard(run),
        "alarms": alarm_rows(evaluated_versions(run.folder)),
        "recipe_text": run.recipe_text.strip(),
        "beside": ", ".join(f"`{name}`" for name in run.files),
        "license": license_of(recipe),
        "model_license": recipe.push.license is None,
    }


def _facts(run: Published) -> list[tuple[str, str]]:
    recipe, lora = run.recipe, getattr(run.policy, "lora", None)
    sampling, rounds = recipe.sampling, run.rounds
    images = sum(metrics["images"] for metrics in rounds)
    adapter = _adapter(lora) if lora and run.policy.train == "lora" else "whole network"
    facts = [
        ("base model", base_model(recipe) or run.policy.model),
        ("trained", adapter),
        ("algorithm", recipe.algorithm.name),
        ("rounds", f"{len(rounds)} of {recipe.rounds}, {images:,.0f} images learned from"),
        ("prompts", recipe.prompts.name),
        ("sampling", f"{sampling.num_steps} steps, eta {sampling.eta:g}, guidance {sampling.guidance_scale:g}"),
        ("learning rate", f"{recipe.learner.learning_rate:g}"),
        ("version", f"after round {run.weights.policy_version}"),
        ("fingerprint", run.weights.fingerprint),
    ]
    return [*facts, *versions(read_text(run.folder.storage, run.folder.recipe))]


def _programs(policy: PolicyConfig) -> list[tuple[str, str, str]]:
    """Which program reads a LoRA's file, and at which strength it has the trained effect."""
    if policy.train == "full" or not isinstance(policy, DiffusersConfig):
        return []
    kohya = "what ddpo export writes of it"
    is_unet, others = policy.network_name == "unet", [("kohya's scripts, AUTOMATIC1111, Forge", kohya, "1")]
    others = others if policy.network_class in READERS else []
    comfy = ("ComfyUI", kohya if is_unet else FILE_NAME, "1")
    return [("diffusers", FILE_NAME, "1, its default"), comfy, *others]


def _adapter(lora: LoraSettings) -> str:
    if lora.path is not None:
        return f"LoRA that began as {Path(lora.path).name}"
    return f"LoRA of rank {lora.rank}, trained with alpha {lora.alpha}"


def _rewards(recipe: Recipe, scorers: dict[str, Any]) -> list[tuple[str, str]]:
    """Those of summary.json, and what part they had."""
    part = {table.called: f"trained on, weight {tick(table.weight)}" for table in recipe.all_rewards}
    return [(name, part.get(name, "only looked at")) for name in scorers]


def _guard(run: Published) -> list[str]:
    """What evaluations said, and whose weights these are."""
    if not run.recipe.evaluation.every:
        return ["The policy was not evaluated while it trained (evaluation.every is 0), so nothing was guarded."]
    sentences, best = guard_sentences(run.folder), run.folder.best_version()
    if not any(figures["alarms"] for figures in EvalLog(run.folder.storage).entries(REPORTED)):
        sentences.append("The guard has found nothing.")
    if best is not None:
        version, by = best["policy_version"], best["best_by"]
        ours = (
            "these weights"
            if version == run.weights.policy_version
            else f"and these are of version {run.weights.policy_version}"
        )
        sentences.append(
            f"Version {version} was the best on held-out images without an alarm (mean {by} {number(best['score'])}): {ours}."
        )
    return sentences
