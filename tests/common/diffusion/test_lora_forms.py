"""LoRA files in every format and family: their effect equals plain diffusers', in sampling and as a start of training."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin
from safetensors.torch import load_file, save_file
from torch import Tensor

from ray_ddpo.common.diffusion.diffusers_policy import DiffusersPolicy
from ray_ddpo.common.diffusion.families import flux as policy_flux
from ray_ddpo.common.diffusion.families import sana as policy_sana
from ray_ddpo.common.diffusion.families import sd3 as policy_sd3
from ray_ddpo.common.diffusion.families import sdxl as policy_sdxl
from ray_ddpo.common.diffusion.families import stable_diffusion as policy_stable_diffusion
from ray_ddpo.common.diffusion.lora.adapters import LoraSettings, read_lora_settings, read_weights, reference_policy
from ray_ddpo.common.diffusion.lora.files import EXACT_NAME, FILE_NAME, METADATA, lora_file, read_lora_file
from ray_ddpo.common.diffusion.lora.kohya import flux_names, save_kohya
from ray_ddpo.common.diffusion.lora.start import make_trainable
from ray_ddpo.common.diffusion.policy import quiet_libraries
from ray_ddpo.common.diffusion.trained_weights import save_trained, stored_weights
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.deploy.commands.weights.given_weights import load_policy
from tests.accepted_page import assert_accepted, assert_refused
from tests.conftest import small_tables
from tests.lora_forms import FORMS, part_name
from tests.tiny_families import MAKERS, policy_table
from tests.tiny_policy import scatter

PIPELINES = {
    "stable_diffusion": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "flux": "FluxPipeline",
    "sana": "SanaPipeline",
}
# Blocks whose kohya names diffusers reads in every size; the others only in FLUX's own size.
FLUX_LAYERS = tuple(f"transformer_blocks.0.attn.{layer}" for layer in ("to_q", "to_v", "add_k_proj", "to_out.0"))
TARGETS = {"sd3": ("attn.to_q", "attn.add_q_proj", "attn.to_out.0"), "flux": FLUX_LAYERS}

IN_TURNS = (pytest.mark.thorough, pytest.mark.rotated(every=3))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    home = tmp_path_factory.mktemp("families")
    return functools.cache(lambda family: MAKERS[family](home / family))


def pipeline_of(family: str, model: Path) -> Any:
    quiet_libraries()
    pipeline = getattr(diffusers, PIPELINES[family]).from_pretrained(model)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return pipeline


@torch.no_grad()
def output(pipeline: Any, family: str) -> Tensor:
    """Return the network's prediction for fixed latents with a prompt, through the text encoders."""
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    network, steps = getattr(pipeline, part_name(family)), torch.tensor([900.0, 10.0])
    if family == "stable_diffusion":
        rows, call = pipeline.encode_prompt("cat", "cpu", 1, False)[:1], policy_stable_diffusion.call_unet
    elif family == "sdxl":
        embeds, _, pooled, _ = pipeline.encode_prompt("cat", device="cpu", do_classifier_free_guidance=False)
        rows, call = (embeds, pooled), functools.partial(policy_sdxl.call_unet, 2)
    elif family == "sd3":
        keys: Any = {"do_classifier_free_guidance": False, "max_sequence_length": 12}
        embeds, _, pooled, _ = pipeline.encode_prompt("cat", None, None, **keys)
        rows, call = (embeds, pooled), policy_sd3.call_transformer
    elif family == "sana":
        rows = pipeline.encode_prompt("cat", False, device="cpu", max_sequence_length=14)[:2]
        call = policy_sana.call_transformer
    else:
        rows = pipeline.encode_prompt("cat", None, max_sequence_length=12)[:2]
        call = functools.partial(policy_flux.call_transformer, 3.5)
    return call(network, latents, steps, *(row.expand(2, *row.shape[1:]) for row in rows))


def with_plain_diffusers(family: str, model: Path, path: Path) -> Tensor:
    """Load the file with diffusers, or PEFT's own folder with PEFT."""
    pipeline = pipeline_of(family, model)
    if path.is_dir():
        from peft import PeftModel

        adapted = PeftModel.from_pretrained(getattr(pipeline, part_name(family)), str(path))
        setattr(pipeline, part_name(family), adapted)
    else:
        pipeline.load_lora_weights(str(path))
    return output(pipeline, family)


def recipe_of(family: str, model: Path, folder: Path, **keys: Any) -> Recipe:
    # Another adapter than any file's, which must not change a file's strength.
    keys = {"lora": {"rank": 3, "alpha": 29, "target_modules": ["to_q"]}, **keys}
    tables = small_tables(model, folder)
    tables["learner"]["micro_batch_size"] = 4  # the flows' last step has no noise
    return Recipe.parse({**tables, "policy": policy_table(family, model, **keys)})


def assert_same_effect(found: Tensor, expected: Tensor, base: Tensor) -> None:
    size = (expected - base).abs().max()
    assert size > 1e-2, "the LoRA has an effect"
    assert (found - expected).abs().max() <= 1e-5 * size


SITUATIONS = {
    "no_metadata": "a LoRA without metadata in its header",
    "mixed_ranks": "a LoRA whose layers have several ranks, without metadata",
    "patterns": "a LoRA with `rank_pattern` and `alpha_pattern` in its header",
    "dora": "a DoRA as diffusers and PEFT write it (`lora_magnitude_vector`)",
    "peft": "a folder of PEFT's: `adapter_model.safetensors` and `adapter_config.json`",
    "text_encoders": "a LoRA with a part for the text encoders",
    "kohya": "a LoRA of kohya's scripts, with `.alpha` and text encoders, for Stable Diffusion or SDXL",
    "kohya_sgm": "a LoRA of kohya's scripts by SDXL's own block names",
    "kohya_flux": "a LoRA of kohya's scripts for FLUX, with query, key and value in one layer",
    "old_names": "a LoRA of attention processors, as diffusers wrote it in 2023",
    "lora_down": "a LoRA by the names `lora.down` and `lora.up`",
}


@pytest.mark.parametrize(
    "family",
    ["stable_diffusion", *(pytest.param(name, marks=IN_TURNS) for name in ("sdxl", "sd3", "flux", "sana"))],
)
def test_every_form_that_diffusers_reads_has_its_effect_here(
    family: str, models: Callable[[str], Path], tmp_path: Path
) -> None:
    model = models(family)
    recipe, plain = recipe_of(family, model, tmp_path), pipeline_of(family, model)
    base = output(plain, family)
    for form in [name for name, (_, families) in FORMS.items() if family in families]:
        path = FORMS[form][0](plain, family, tmp_path / form)
        policy = load_policy(recipe, path)
        assert isinstance(policy, DiffusersPolicy)
        assert_same_effect(output(policy.pipeline, family), with_plain_diffusers(family, model, path), base)
        assert not any(parameter.requires_grad for parameter in policy.network.parameters())
        assert_accepted(SITUATIONS[form])


def trained(family: str, model: Path, folder: Path, settings: LoraSettings) -> tuple[Any, Tensor]:
    """Return a pipeline whose adapters were changed, saved as a run's, and its output."""
    pipeline = pipeline_of(family, model)
    network = getattr(pipeline, part_name(family))
    make_trainable(network, "lora", settings)
    scatter(network, 0.2)
    save_trained(network, "lora", settings, folder, part_name(family))
    return pipeline, output(pipeline, family)


@pytest.mark.parametrize(
    ("family", "alpha"),
    [
        ("stable_diffusion", 8),
        pytest.param("sdxl", 3, marks=IN_TURNS),  # 3/4 rounds the weights
        pytest.param("sd3", 8, marks=IN_TURNS),
        pytest.param("flux", 2, marks=IN_TURNS),
    ],
)
def test_our_own_file_has_one_strength_in_every_program(
    family: str, alpha: int, models: Callable[[str], Path], tmp_path: Path
) -> None:
    model, part, run = models(family), part_name(family), tmp_path / "run"
    settings = LoraSettings(rank=4, alpha=alpha, target_modules=TARGETS.get(family, ("to_q", "to_out.0")))
    base = output(pipeline_of(family, model), family)
    pipeline, expected = trained(family, model, run, settings)
    headless, old = tmp_path / "headless.safetensors", tmp_path / "old.safetensors"
    tensors = load_file(run / "lora" / FILE_NAME)
    save_file(tensors, headless)
    files = {
        "our own LoRA in diffusers": run / "lora" / FILE_NAME,
        "our own LoRA in a program that reads no header": headless,
    }
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    if family == "sd3":
        with pytest.raises(ValueError) as error:
            save_kohya(read_lora_file(run / "lora" / FILE_NAME), ours)
        assert_refused("`ddpo export` of a LoRA for SD 3", f"ddpo export: {error.value}")
    else:
        save_kohya(read_lora_file(run / "lora" / FILE_NAME), ours)
        files |= {"our own LoRA through `ddpo export`": ours}
    if part == "unet":
        save_file(diffusers.utils.convert_state_dict_to_kohya(dict(tensors)), theirs)
        files |= {"our own LoRA through diffusers' kohya converter": theirs}
    for situation, path in files.items():
        assert_same_effect(with_plain_diffusers(family, model, path), expected, base)
        assert_accepted(situation)
    weights = read_weights(getattr(pipeline, part), 3)
    assert stored_weights(run, weights.manifest, 3).fingerprint == weights.fingerprint
    assert (run / "lora" / EXACT_NAME).exists() == (alpha == 3)
    found = read_lora_settings(run)
    assert found is not None and (found.rank, found.alpha) == (4, alpha)
    policy = load_policy(recipe_of(family, model, tmp_path), run)
    assert isinstance(policy, DiffusersPolicy) and torch.equal(output(policy.pipeline, family), expected)
    # As versions before this one wrote it: the weights as they are, and alpha in the header.
    raw = {
        f"{part}.{name.replace('.default', '')}": torch.from_numpy(array) for name, array in weights.arrays().items()
    }
    save_file(raw, old, {METADATA: header_of(part, 4, alpha, list(settings.target_modules))})
    policy = load_policy(recipe_of(family, model, tmp_path), old)
    assert isinstance(policy, DiffusersPolicy) and torch.equal(output(policy.pipeline, family), expected)
    assert_accepted("a LoRA of an earlier version of this program, with alpha in the header alone")


def header_of(part: str, rank: int, alpha: int, targets: list[str]) -> str:
    return json.dumps({f"{part}.r": rank, f"{part}.lora_alpha": alpha, f"{part}.target_modules": targets})


@pytest.mark.parametrize(
    "family",
    ["stable_diffusion", *(pytest.param(name, marks=IN_TURNS) for name in ("sdxl", "sd3", "flux"))],
)
def test_training_begins_with_the_effect_of_the_file(
    family: str, models: Callable[[str], Path], tmp_path: Path
) -> None:
    model, part = models(family), part_name(family)
    plain = pipeline_of(family, model)
    base = output(plain, family)
    for form in ("no_metadata", "patterns", "peft"):
        path = FORMS[form][0](plain, family, tmp_path / form)
        expected = with_plain_diffusers(family, model, path)
        settings, pipeline = LoraSettings(path=str(path)), pipeline_of(family, model)
        network = getattr(pipeline, part)
        make_trainable(network, "lora", settings)
        assert_same_effect(output(pipeline, family), expected, base)
        with reference_policy(network):
            assert torch.equal(output(pipeline, family), base)
        weights, run = read_weights(network, 0), tmp_path / f"{form}-run"
        save_trained(network, "lora", settings, run, part)
        assert stored_weights(run, weights.manifest, 0).fingerprint == weights.fingerprint
        assert_same_effect(with_plain_diffusers(family, model, run / "lora" / FILE_NAME), expected, base)
        policy = load_policy(recipe_of(family, model, tmp_path), run)
        assert isinstance(policy, DiffusersPolicy)
        assert_same_effect(output(policy.pipeline, family), expected, base)
        assert read_weights(policy.network, 0).fingerprint == weights.fingerprint
        assert lora_file(run).parent == run / "lora"
        if part == "unet":  # the patterns have several ranks and alphas
            exported = tmp_path / f"{form}.safetensors"
            save_kohya(read_lora_file(run / "lora" / FILE_NAME), exported)
            assert_same_effect(with_plain_diffusers(family, model, exported), expected, base)
    assert_accepted("`policy.lora.path` names a LoRA: training begins with it")


def test_kohyas_names_of_flux_come_back_from_diffusers_in_its_own_size() -> None:
    generator, tensors = torch.Generator().manual_seed(0), {}
    for block in ("transformer_blocks.0.attn", "single_transformer_blocks.3.attn"):
        for layer in ("to_q", "to_k", "to_v", *(("to_out.0", "add_q_proj") if block.startswith("t") else ())):
            key = f"transformer.{block}.{layer}.lora"
            tensors[f"{key}_A.weight"] = torch.randn(2, 3072, generator=generator)
            tensors[f"{key}_B.weight"] = torch.randn(3072, 2, generator=generator)
    named = flux_names(tensors)
    assert named["lora_unet_single_blocks_3_linear1.lora_up.weight"].shape == (7 * 3072, 8)
    back: Any = FluxLoraLoaderMixin.lora_state_dict(dict(named))
    assert all(torch.equal(back[name], value) for name, value in tensors.items())
    assert not any(value.any() for name, value in back.items() if name not in tensors)
