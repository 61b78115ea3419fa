"""Models with one configuration key changed, and plain diffusers' results with them as expected values."""

import functools
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError

from ray_ddpo.common.diffusion import POLICIES
from ray_ddpo.common.diffusion.loading.diffusers_config import DiffusersConfig
from ray_ddpo.common.diffusion.rollout import image_noise, sample_trajectories
from ray_ddpo.common.recipe.registry import build, component_class
from ray_ddpo.common.recipe.tables import SamplingTable
from tests.own_pipelines import own_call, own_pipeline
from tests.tiny_families import BY_DDIM, call_keys, policy_table, shown, shown_latents

ABSENT = object()  # the key is taken out of the file
PROCESSORS = ("processor", "image_processor")
PROMPTS, SEEDS = ["a cat", "abcdefgh ijklm"], [3, 4]
SCALE, STEPS = 3.0, 4
# What diffusers and transformers raise where they refuse a configuration.
LIBRARY_ERRORS = (
    *(ValueError, TypeError, RuntimeError, AttributeError, KeyError, IndexError, ImportError, AssertionError),
    *(NotImplementedError, ZeroDivisionError, OverflowError, OSError, StrictDataclassError),
)


@dataclass(frozen=True)
class Change:
    """One key of one part, and its other value."""

    part: str
    key: str
    value: Any

    def __str__(self) -> str:
        return f"{self.part}.{self.key}={'absent' if self.value is ABSENT else self.value!r}"


@dataclass(frozen=True)
class Sampled:
    """Final latents and images of the two prompts."""

    latents: torch.Tensor
    images: np.ndarray


def config_file(model: Path, part: str) -> Path:
    if part == "model_index":
        return model / "model_index.json"
    names = {"scheduler": "scheduler_config.json", **dict.fromkeys(PROCESSORS, "preprocessor_config.json")}
    return model / part / names.get(part, "tokenizer_config.json" if part.startswith("tokenizer") else "config.json")


def changed_model(model: Path, changes: Iterable[Change], folder: Path) -> Path:
    """Write a copy with keys changed. Parts whose shapes follow from the keys get random weights."""
    shutil.copytree(model, folder, copy_function=lambda a, b: Path(b).hardlink_to(a))
    by_part: dict[str, list[Change]] = {}
    for change in changes:
        by_part.setdefault(change.part, []).append(change)
    for part, of_part in by_part.items():
        file = config_file(folder, part)
        keys = json.loads(file.read_text())
        for change in of_part:
            keys.pop(change.key, None)
            keys |= {} if change.value is ABSENT else {change.key: change.value}
        file.unlink()  # a link to the model's own
        _write_weights(folder, part, keys)
        file.write_text(json.dumps(keys))
    return folder


def _write_weights(model: Path, part: str, keys: dict[str, Any]) -> None:
    """Write random weights for the part's configuration. Keep the old ones if the library cannot build such a part."""
    import diffusers
    import transformers

    if part in ("model_index", "scheduler", *PROCESSORS) or part.startswith("tokenizer"):
        return
    library, name = json.loads((model / "model_index.json").read_text())[part]
    made: Any = getattr({"diffusers": diffusers, "transformers": transformers}[library], name)
    written = {key: value for key, value in keys.items() if key not in ("architectures", "transformers_version")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        try:
            module = made.from_config(keys) if library == "diffusers" else made(made.config_class(**written))
            module.save_pretrained(model / "new", safe_serialization=True)
        except LIBRARY_ERRORS:
            return
    for weights in (model / part).glob("*.safetensors"):
        weights.unlink()
    for weights in (model / "new").glob("*.safetensors"):
        weights.rename(model / part / weights.name)
    shutil.rmtree(model / "new")


def plain_pipeline(name: str, model: Path) -> Any:
    """Load the folder with diffusers alone. Solvers take steps of first order, of DDIM without clipping if of betas."""
    import diffusers

    pipeline = own_pipeline(name, config_of(name, model), model, first_order=name not in BY_DDIM)
    config = pipeline.scheduler.config
    if name in BY_DDIM and not isinstance(pipeline.scheduler, diffusers.DDIMScheduler):
        written = json.loads(config_file(model, "scheduler").read_text())
        silent = {} if "clip_sample" in written or "DDPM" in config["_class_name"] else {"clip_sample": False}
        pipeline.scheduler = diffusers.DDIMScheduler.from_config(config, **silent)
    return pipeline


def plainly_drawn(name: str, model: Path, eta: float, num_steps: int = STEPS) -> Sampled:
    """Sample with the pipeline's own call."""
    pipeline, seen = plain_pipeline(name, model), []
    latent_shape = config_of(name, model).latent_shape(dict(getattr(pipeline, network_of(name)).config))
    keys: dict[str, Any] = {"num_inference_steps": num_steps, **call_keys(name, SCALE)}
    if name in BY_DDIM:
        keys |= {"eta": eta, "generator": [torch.Generator().manual_seed(seed) for seed in SEEDS]}

    step = pipeline.scheduler.step

    @functools.wraps(step)  # pipelines look at its arguments
    def watch(*given: Any, **named: Any) -> Any:
        seen.append(step(*given, **named)[0])
        return (seen[-1],)

    pipeline.scheduler.step = watch
    noise = None if name in BY_DDIM else next(image_noise(SEEDS, latent_shape))
    images = own_call(name, pipeline, PROMPTS, noise, **keys)
    last = seen[num_steps - 1 :: num_steps]  # one of each call
    if name == "wan_ti2v":  # the pipeline replaces the first frame after its last step
        last = [each[:, :, 1:] for each in last]
    return Sampled(torch.cat(last), shown(images))


def ours_drawn(name: str, model: Path, eta: float, num_steps: int = STEPS) -> Sampled:
    """Sample with the program.

    Raises:
        ValueError: The model is refused.
    """
    sampling = SamplingTable(num_steps=num_steps, guidance_scale=SCALE, eta=eta or 1.0)
    policy = config_of(name, model).load("cpu", sampling, "sampler")
    window = range(num_steps) if name in BY_DDIM and eta else range(0)
    latents = sample_trajectories(policy, PROMPTS, SEEDS, sampling, window).final_latents
    images = policy.decode(latents).numpy().astype(int)
    return Sampled(shown_latents(name, latents), images)


def network_of(name: str) -> str:
    return component_class(POLICIES, name, "policy", DiffusersConfig).network_name


def config_of(name: str, model: Path) -> DiffusersConfig:
    """Build the family's configuration without adapters, which only cost time here."""
    # Pipelines of Qwen-Image-Edit cut no prompt.
    length = {"max_sequence_length": 40} if name.startswith("qwen_image_edit") else {}
    return build(POLICIES, policy_table(name, model, train="full", **length), "policy")


def assert_same(ours: Sampled, plain: Sampled) -> None:
    """Check that latents agree within float32's rounding and that few pixels differ by one rounding step."""
    assert ours.latents.shape == plain.latents.shape
    scale = float(plain.latents.abs().max())
    torch.testing.assert_close(ours.latents, plain.latents, rtol=1e-3, atol=1e-3 * max(scale, 1.0))
    difference = np.abs(ours.images - plain.images)
    assert difference.max() <= 1, f"images differ by up to {difference.max()}"
    assert (difference > 0).mean() < 0.02, f"{(difference > 0).mean():.3f} of the images' values differ"
