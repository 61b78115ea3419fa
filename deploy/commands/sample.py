"""ddpo sample: draw pictures with a run's weights, as PNGs."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from common.config import Recipe
from common.diffusion.lora import lora_file, read_lora_settings
from common.diffusion.policy import Policy
from common.diffusion.rollout import draw, window_of_pictures
from common.diffusion.weight_files import network_folder
from common.run_folder import RunFolder, weights_here
from common.runtime import settle
from deploy.parts import parts_of


@dataclass(frozen=True)
class SampleRequest:
    """What to draw, with which weights, and where to put it."""

    weights: str  # a run's folder, or a LoRA's file or folder
    recipe: str | None
    prompts: tuple[str, ...]
    seed: int
    output: str


def sample(request: SampleRequest, overrides: list[str]) -> Iterator[Path]:
    """Draw one picture a prompt; the paths as they are written. ValueError: no weights or no recipe there."""
    recipe = _recipe(request, overrides)
    with weights_here(request.weights) as path:
        policy = load_policy(recipe, path)
    output = Path(request.output)
    output.mkdir(parents=True, exist_ok=True)
    for index, prompt in enumerate(request.prompts):
        trajectory = draw(
            policy, [prompt], [request.seed + index], recipe.sampling, window_of_pictures(recipe.sampling)
        )
        pixels = policy.decode(trajectory.final_latents)[0].cpu().numpy()
        path = output / f"{index:03d}-{_file_name(prompt)}-seed{request.seed + index}.png"
        Image.fromarray(pixels).save(path)
        yield path


def load_policy(recipe: Recipe, weights: Path) -> Policy:
    """The recipe's policy with a run's weights, or with any LoRA that fits its network."""
    policy_config = parts_of(recipe).policy
    device = settle(recipe.runtime)
    if policy_config.train == "full":
        policy = policy_config.load(device, recipe.sampling, "sampler")
        policy.restore(network_folder(weights) or weights)
        return policy
    path = lora_file(weights)
    settings = read_lora_settings(path)
    if settings:
        policy_config = policy_config.model_copy(update={"lora": settings})
    policy = policy_config.load(device, recipe.sampling, "sampler")
    policy.restore(path)
    return policy


def _recipe(request: SampleRequest, overrides: list[str]) -> Recipe:
    if request.recipe is not None:
        return Recipe.load(request.recipe, overrides)
    folder = RunFolder(request.weights)
    if not folder.storage.exists(folder.recipe):
        raise ValueError(
            f"{request.weights} is no run's folder with a recipe: say with --recipe whose model these weights are for"
        )
    return folder.load_recipe(overrides)


def _file_name(prompt: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in prompt)[:60]
