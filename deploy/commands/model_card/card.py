"""Render the model card of a run: the template's values, the metadata, and a program that loads the weights.

The template is rendered here, because `ModelCard.from_template` takes no filters, and writes nothing for a value that
is missing.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import ModelCard

from ray_ddpo.common.diffusion.loading.diffusers_config import DiffusersConfig
from ray_ddpo.common.diffusion.loading.single_file import names_a_file
from ray_ddpo.common.diffusion.lora.adapters import LoraSettings
from ray_ddpo.common.diffusion.lora.files import FILE_NAME, PEFT_NAME, SECOND_NAME
from ray_ddpo.common.diffusion.lora.kohya import READERS
from ray_ddpo.common.diffusion.policy import EMBEDDED_MODELS, PolicyConfig
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.tables import SamplingTable
from ray_ddpo.common.run_storage.reading import read_text
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.deploy.commands.report.evaluation import alarm_rows, evaluated_versions, guard_sentences
from ray_ddpo.deploy.commands.report.numbers import number, tick
from ray_ddpo.deploy.commands.report.page import versions
from ray_ddpo.deploy.commands.report.report import changes
from ray_ddpo.deploy.commands.weights.run_weights import RunWeights
from ray_ddpo.deploy.evaluation.eval_log import REPORTED, EvalLog
from ray_ddpo.deploy.hub import base_model, license_of, metadata

INPUT_ARGUMENTS = {"image": "image", "mask": "mask_image"}  # of diffusers' pipelines
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Published:
    """A run whose weights are published, as the card describes it."""

    folder: RunFolder
    recipe: Recipe
    policy: PolicyConfig
    weights: RunWeights
    stats: dict[str, Any]  # of summary.json
    rounds: list[dict[str, float]]
    recipe_text: str
    prompt: str  # for the example
    files: list[str]  # beside the card


def model_card(run: Published) -> ModelCard:
    """Return the README of the repository. The same run gives the same text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=False,  # the output is Markdown: `cell` and `line` escape values of the run
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"number": number, "cell": cell, "line": line}
    body = environment.get_template("card.md.jinja").render(**_context(run))
    return ModelCard(f"---\n{metadata(run.recipe).to_yaml()}\n---\n\n{body}")


def line(text: object) -> str:
    """Escape a run's text for a paragraph, so that it starts no block, tag or link."""
    flat = " ".join(str(text).split())
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>#|" else letter for letter in flat)


def cell(text: object) -> str:
    """Escape a run's text for a table cell."""
    return line(text) or "–"


def _context(run: Published) -> dict[str, Any]:
    """Return the values of the template's names."""
    recipe, base = run.recipe, base_model(run.recipe)
    model = f"[{base}](https://huggingface.co/{base})" if base else line(run.policy.model)
    if run.policy.model in EMBEDDED_MODELS:
        model += ", the small Stable Diffusion that ships with ray-ddpo"
    return {
        "recipe": recipe,
        "what": "The full network" if run.policy.train == "full" else "LoRA weights",
        "model_named": model,
        "sentences": changes(run.stats),
        "code": loading(recipe, run.policy, base, run.prompt),
        "programs": _programs(run.policy),
        "facts": _facts(run),
        "rewards": _rewards(recipe, run.stats["scorers"]),
        "stats": run.stats,
        "made": _made(run.policy),
        "guard": _guard(run),
        "alarms": alarm_rows(evaluated_versions(run.folder)),
        "recipe_text": run.recipe_text.strip(),
        "beside": ", ".join(f"`{name}`" for name in run.files),
        "license": license_of(recipe),
        "model_license": recipe.push.license is None,
    }


def _made(policy: PolicyConfig) -> str:
    return "clips" if policy.has_frames else "images"


def _facts(run: Published) -> list[tuple[str, str]]:
    """Return the rows of the table of key facts."""
    recipe, lora = run.recipe, getattr(run.policy, "lora", None)
    sampling, rounds = recipe.sampling, run.rounds
    images = sum(metrics["images"] for metrics in rounds)
    adapter = _adapter(lora) if lora and run.policy.train == "lora" else "full network"
    facts = [
        ("base model", base_model(recipe) or run.policy.model),
        ("trained", adapter),
        ("algorithm", recipe.algorithm.name),
        ("rounds", f"{len(rounds)} of {recipe.rounds}, {images:,.0f} {_made(run.policy)} trained on"),
        ("prompts", recipe.prompts.name),
        ("sampling", f"{sampling.num_steps} steps, {_noise(sampling)}, guidance {sampling.guidance_scale:g}"),
        ("learning rate", f"{recipe.learner.learning_rate:g}"),
        ("version", f"after round {run.weights.policy_version}"),
        ("fingerprint", run.weights.fingerprint),
    ]
    return [*facts, *versions(read_text(run.folder.storage, run.folder.recipe))]


def _noise(sampling: SamplingTable) -> str:
    if sampling.deterministic:
        return "deterministic"
    return f"eta {sampling.eta:g}" + (f" of {sampling.sde!r}" if sampling.sde else "")


def _programs(policy: PolicyConfig) -> list[tuple[str, str, str]]:
    """Return which program reads a LoRA's file, and the strength at which the LoRA acts as trained."""
    if policy.train == "full" or not isinstance(policy, DiffusersConfig):
        return []
    if not policy.takes_diffusers_lora:
        return [("PEFT", PEFT_NAME, "1")]
    kohya = "the output of ddpo export"
    if policy.joined_parts:
        return [("diffusers", f"{FILE_NAME} and {SECOND_NAME}", "1, its default")]
    is_unet, others = policy.network_name == "unet", [("kohya's scripts, AUTOMATIC1111, Forge", kohya, "1")]
    others = others if policy.network_class in READERS else []
    comfy = ("ComfyUI", kohya if is_unet else FILE_NAME, "1")
    return [("diffusers", FILE_NAME, "1, its default"), comfy, *others]


def _adapter(lora: LoraSettings) -> str:
    if lora.path is not None:
        return f"LoRA that began as {Path(lora.path).name}"
    return f"LoRA of rank {lora.rank}, trained with alpha {lora.alpha}"


def _rewards(recipe: Recipe, scorers: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the rewards and scorers of summary.json with their part in training."""
    part = {table.called: f"trained on, weight {tick(table.weight)}" for table in recipe.all_rewards}
    return [(name, part.get(name, "only looked at")) for name in scorers]


def _guard(run: Published) -> list[str]:
    """Say what the guard found during training, and which version these weights are."""
    if not run.recipe.evaluation.every:
        return [
            "The policy was not evaluated during training (evaluation.every is 0), so the guard had nothing to check."
        ]
    sentences, best = guard_sentences(run.folder), run.folder.best_version()
    if not any(entry["alarms"] for entry in EvalLog(run.folder.storage).entries(REPORTED)):
        sentences.append("The guard has found nothing.")
    if best is not None:
        version, by = best["policy_version"], best["best_by"]
        ours = (
            "these weights"
            if version == run.weights.policy_version
            else f"and these are of version {run.weights.policy_version}"
        )
        sentences.append(
            f"Version {version} was the best on held-out images without an alarm "
            f"(mean {by} {number(best['score'])}): {ours}."
        )
    return sentences


def loading(recipe: Recipe, policy: PolicyConfig, base: str | None, prompt: str) -> str:
    """Return a Python program that samples an image with the run's weights. Its first line installs what it needs."""
    if not isinstance(policy, DiffusersConfig):
        return f"# {type(policy).__name__} has no pipeline in diffusers: use ddpo sample for these weights"
    push, full, part = recipe.push, policy.train == "full", policy.trained_part
    revision = f", revision={push.revision!r}" if push.revision else ""
    names = [policy.pipeline_class, *([policy.network_class] if full else [])]
    names += [policy.scheduler_class] if policy.scheduler_class else []
    lines = [f"# pip install {' '.join(_packages(policy))}", "import torch"]
    lines += [f"from diffusers import {', '.join(sorted(names))}"]
    lines += ["from diffusers.utils import export_to_video"] if policy.has_frames else []
    lines += ["from PIL import Image  # of the size of the output", ""] if policy.reads_inputs else [""]
    network = ""
    if full:
        folder = policy.network_name
        lines.append(f'{part} = {policy.network_class}.from_pretrained({push.repo!r}, subfolder="{folder}"{revision})')
        network = f", {part}={part}"
    left_out = "".join(f", {name}=None" for name in policy.loading if name in policy.switches)
    call = f"{_reader(policy, base)}{network}{left_out})"
    lines.append(f"pipeline = {policy.pipeline_class}.{call}{_where(policy, base)}")
    if policy.scheduler_class:
        lines.append(
            f"pipeline.scheduler = {policy.scheduler_class}.from_config(pipeline.scheduler.config, clip_sample=False)"
        )
    if not full and not policy.takes_diffusers_lora:
        lines += [
            "from peft import PeftModel",
            f"pipeline.{part} = PeftModel.from_pretrained(pipeline.{part}, {push.repo!r}{revision})",
        ]
    elif not full:
        weights = 'weight_name="pytorch_lora_weights.safetensors"'
        into = "" if part == policy.network_name else f", load_into_{part}=True"
        lines.append(f"pipeline.load_lora_weights({push.repo!r}, {weights}{revision}{into})")
        for second in policy.joined_parts:
            weights = f'weight_name="{SECOND_NAME}"'
            lines.append(f"pipeline.load_lora_weights({push.repo!r}, {weights}{revision}, load_into_{second}=True)")
    lines += policy.pipeline_lines(recipe.sampling)
    lines += ['pipeline.to("cuda" if torch.cuda.is_available() else "cpu")', *_sampling_lines(recipe, policy, prompt)]
    return "\n".join(lines)


def _packages(policy: DiffusersConfig) -> list[str]:
    """Return the packages that diffusers needs for the pipeline, a LoRA and the file of a video."""
    packages = ["diffusers", "transformers", *([] if policy.train == "full" else ["peft"]), *policy.pipeline_packages]
    return packages + (["imageio", "imageio-ffmpeg"] if policy.has_frames else [])


def _sampling_lines(recipe: Recipe, policy: DiffusersConfig, prompt: str) -> list[str]:
    """Return the call of the pipeline with the run's sampling settings, and the line that saves what it makes."""
    sampling, keys = recipe.sampling, [f"prompt={prompt!r}"]  # by name: some pipelines take an image first
    keys += [f'{INPUT_ARGUMENTS[name]}=Image.open("{name}.png")' for name in policy.reads_inputs]
    if policy.most_inputs > 1:
        keys[1] = f'image=[Image.open(f"image_{{number}}.png") for number in range({policy.most_inputs})]'
    keys.append(f"num_inference_steps={sampling.num_steps}")
    sides = policy.latent_shape(policy.part_config(policy.network_name))[-2:]
    height, width = (policy.scale_factor * side for side in sides)
    keys += [f"{name}={value!r}" for name, value in policy.pipeline_arguments(sampling, (height, width)).items()]
    if policy.scheduler_class:  # pipelines of flow models add no noise
        keys.append(f"eta={0.0 if sampling.deterministic else sampling.eta}")
    made, attribute, save = "image", "images", 'image.save("image.png")'
    if policy.has_frames:
        video: Any = policy  # whose keys have the frame rate
        made, attribute = "frames", "frames"
        save = f'export_to_video(frames, "video.mp4", fps={video.frame_rate:g})'
    return [
        f"{made} = pipeline(",
        f"    {', '.join(keys)},",
        "    generator=torch.Generator().manual_seed(0),",
        f").{attribute}[0]",
        save,
    ]


def _reader(policy: DiffusersConfig, base: str | None) -> str:
    """Return the call that loads the base model, without its last arguments."""
    source = _source(policy, base)
    if base is None and names_a_file(policy.model):
        return f"from_single_file({source!r}, config={policy.single_file_config!r}"
    variant = f", variant={policy.variant!r}" if policy.variant else ""
    return f"from_pretrained({source!r}{variant}"


def _source(policy: DiffusersConfig, base: str | None) -> str:
    embedded = EMBEDDED_MODELS.get(policy.model)
    if embedded:
        return embedded.relative_to(Path(__file__).parents[3]).as_posix()
    return base or policy.model


def _where(policy: DiffusersConfig, base: str | None) -> str:
    if policy.model in EMBEDDED_MODELS:
        return "  # a folder in the source of ray-ddpo"
    if base is None and names_a_file(policy.model):
        return "  # a file on the machine that trained the weights"
    return "" if base else "  # a folder on the machine that trained the weights"
