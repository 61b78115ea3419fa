"""How to load what is published, as a program that runs."""

from pathlib import Path

from ray_ddpo.common.diffusion.families.flux import OWN_LATENT_SIZE
from ray_ddpo.common.diffusion.loading.diffusers_config import DiffusersConfig
from ray_ddpo.common.diffusion.loading.model_files import names_a_file
from ray_ddpo.common.diffusion.policy import EMBEDDED_MODELS, PolicyConfig
from ray_ddpo.common.recipe.recipe import Recipe


def loading(recipe: Recipe, policy: PolicyConfig, base: str | None, prompt: str) -> str:
    """Python that samples an image with the run's weights; diffusers is all that it needs, where the model is of its own."""
    if not isinstance(policy, DiffusersConfig):
        return f"# {type(policy).__name__} is no pipeline of diffusers: ddpo sample samples with these weights"
    push, full, part = recipe.push, policy.train == "full", policy.network_name
    revision = f", revision={push.revision!r}" if push.revision else ""
    names = [policy.pipeline_class, *([policy.network_class] if full else [])]
    names += [policy.scheduler_class] if policy.scheduler_class else []
    lines = ["import torch", f"from diffusers import {', '.join(sorted(names))}", ""]
    network = ""
    if full:
        lines.append(f'{part} = {policy.network_class}.from_pretrained({push.repo!r}, subfolder="{part}"{revision})')
        network = f", {part}={part}"
    call = f"{_reader(policy, base)}{network})"
    lines.append(f"pipeline = {policy.pipeline_class}.{call}{_where(policy, base)}")
    if policy.scheduler_class:
        lines.append(f"pipeline.scheduler = {policy.scheduler_class}.from_config(pipeline.scheduler.config)")
    if not full:
        weights = 'weight_name="pytorch_lora_weights.safetensors"'
        lines.append(f"pipeline.load_lora_weights({push.repo!r}, {weights}{revision})")
    lines += ['pipeline.to("cuda" if torch.cuda.is_available() else "cpu")', *_drawing(recipe, policy, prompt)]
    return "\n".join(lines)


def _drawing(recipe: Recipe, policy: DiffusersConfig, prompt: str) -> list[str]:
    sampling, keys = recipe.sampling, [repr(prompt)]
    keys += [f"num_inference_steps={sampling.num_steps}", f"guidance_scale={sampling.guidance_scale}"]
    if policy.scheduler_class:  # a flow's pipeline adds no noise
        keys.append(f"eta={sampling.eta}")
    if policy.given_sizes:  # both, for some pipelines take neither where one is lacking
        own = policy.part_config(policy.network_name).get("sample_size", OWN_LATENT_SIZE)
        height, width = (policy.scale_factor * side for side in policy.latent_sides(own))
        keys += [f"height={height}", f"width={width}"]
    if sampling.negative_prompt:
        keys.append(f"negative_prompt={sampling.negative_prompt!r}")
    return [
        "image = pipeline(",
        f"    {', '.join(keys)},",
        "    generator=torch.Generator().manual_seed(0),",
        ").images[0]",
        'image.save("image.png")',
    ]


def _reader(policy: DiffusersConfig, base: str | None) -> str:
    """Return the call that reads the base model, but for its last arguments."""
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
        return "  # a folder of ray-ddpo's source"
    if base is None and names_a_file(policy.model):
        return "  # a file of the machine that trained it"
    return "" if base else "  # a folder of the machine that trained it"
