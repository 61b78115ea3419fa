"""How to load what is published, as a program that runs."""

from pathlib import Path

from common.config import Recipe
from common.diffusion.policy import EMBEDDED_MODELS, PolicyConfig


def loading(recipe: Recipe, policy: PolicyConfig, base: str | None, prompt: str) -> str:
    """Python that draws a picture as the run's samplers do; diffusers is all that it needs."""
    push, full = recipe.push, policy.train == "full"
    revision = f", revision={push.revision!r}" if push.revision else ""
    imports = ["DDIMScheduler", "StableDiffusionPipeline", *(["UNet2DConditionModel"] if full else [])]
    lines = ["import torch", f"from diffusers import {', '.join(imports)}", ""]
    unet = ""
    if full:
        lines.append(f'unet = UNet2DConditionModel.from_pretrained({push.repo!r}, subfolder="unet"{revision})')
        unet = ", unet=unet"
    lines.append(
        f"pipeline = StableDiffusionPipeline.from_pretrained({_source(policy, base)!r}{unet}){_where(policy, base)}"
    )
    lines.append("pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)")
    if not full:
        weights = 'weight_name="pytorch_lora_weights.safetensors"'
        lines.append(f"pipeline.load_lora_weights({push.repo!r}, {weights}{revision})")
    lines += ['pipeline.to("cuda" if torch.cuda.is_available() else "cpu")', *_drawing(recipe, policy, prompt)]
    return "\n".join(lines)


def _drawing(recipe: Recipe, policy: PolicyConfig, prompt: str) -> list[str]:
    sampling, side = recipe.sampling, getattr(policy, "resolution", None)
    size = f", height={side}, width={side}" if side else ""
    return [
        "picture = pipeline(",
        f"    {prompt!r}, num_inference_steps={sampling.num_steps}, guidance_scale={sampling.guidance_scale}, "
        f"eta={sampling.eta}{size},",
        "    generator=torch.Generator().manual_seed(0),",
        ").images[0]",
        'picture.save("picture.png")',
    ]


def _source(policy: PolicyConfig, base: str | None) -> str:
    embedded = EMBEDDED_MODELS.get(policy.model)
    if embedded:
        return embedded.relative_to(Path(__file__).parents[3]).as_posix()
    return base or policy.model


def _where(policy: PolicyConfig, base: str | None) -> str:
    if policy.model in EMBEDDED_MODELS:
        return "  # a folder of ray-ddpo's source"
    return "" if base else "  # a folder of the machine that trained it"
