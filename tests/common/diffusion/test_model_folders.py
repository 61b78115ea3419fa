"""Published model folders load as in plain diffusers."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_ddpo.common.base_parts import entry_base
from ray_ddpo.common.diffusion import POLICIES
from ray_ddpo.common.recipe.registry import build
from tests.accepted_page import assert_accepted, assert_refused
from tests.loaded_models import (
    PARTS,
    SAMPLING,
    assert_same_as_diffusers,
    config_of,
    early_refusal,
    load,
)
from tests.model_copies import change_json, change_weights, copied, save_variant, weights_file
from tests.tiny_families import MAKERS


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: maker(tmp_path_factory.mktemp(name)) for name, maker in MAKERS.items()}


@pytest.mark.thorough
def test_names_of_earlier_versions_are_read_as_diffusers_and_transformers_read_them(
    models: dict[str, Path], tmp_path: Path
) -> None:
    model = copied(models["sdxl"], tmp_path / "model")
    old = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}

    def as_published(state: dict) -> dict:
        for name, before in old.items():
            state = {each.replace(name, before) if "attentions" in each else each: v for each, v in state.items()}
        return state

    assert as_published(dict.fromkeys(["encoder.mid_block.attentions.0.to_q.bias"])) != {}
    change_weights(model, "vae", as_published)
    places = {"text_model.embeddings.position_ids": torch.arange(8)[None]}
    bare = lambda name: name.removeprefix("text_model.")  # noqa: E731
    change_weights(
        model,
        "text_encoder",
        lambda state: {f"text_model.{bare(name)}": value for name, value in state.items()} | places,
    )
    policy = load("sdxl", model)
    assert_same_as_diffusers(policy, models["sdxl"])
    assert_accepted("names of weights as earlier versions of diffusers and transformers wrote them")


@pytest.mark.thorough
def test_the_class_name_that_a_pixart_sigma_was_published_with_is_read(models: dict[str, Path], tmp_path: Path) -> None:
    model = copied(models["pixart_sigma"], tmp_path / "model")
    change_json(model / "model_index.json", transformer=["diffusers", "Transformer2DModel"])
    change_json(model / "transformer" / "config.json", _class_name="Transformer2DModel")
    before, after = (load("pixart_sigma", folder) for folder in (models["pixart_sigma"], model))
    assert type(after.network) is type(before.network)
    state, wanted = after.network.state_dict(), before.network.state_dict()
    pretrained = [name for name in wanted if "lora" not in name]  # adapters begin with random numbers
    assert pretrained and all(torch.equal(state[name], wanted[name]) for name in pretrained)
    assert_accepted("a PixArt-Sigma whose network is called Transformer2DModel")


@pytest.mark.thorough
def test_a_full_clip_gives_its_text_tower(models: dict[str, Path], tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    model = copied(models["stable_diffusion"], tmp_path / "model")
    text = json.loads((model / "text_encoder" / "config.json").read_text())
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8, "projection_dim": 16}
    shutil.rmtree(model / "text_encoder")
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(
        model / "text_encoder"
    )
    config = config_of("stable_diffusion", model)
    assert config.conditioning_shapes({"text_encoder": config.part_config("text_encoder")})["prompt_embeds"] == (8, 16)
    assert_same_as_diffusers(load("stable_diffusion", model), model)
    assert_accepted("a whole CLIP as text encoder")


@pytest.mark.thorough
@pytest.mark.parametrize("family", PARTS)
def test_a_small_decoder_is_taken_in_every_family(family: str, models: dict[str, Path], tmp_path: Path) -> None:
    from diffusers import AutoencoderTiny

    model = copied(models[family], tmp_path / "model")
    shutil.rmtree(model / "vae")
    blocks = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    AutoencoderTiny(**blocks, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).save_pretrained(model / "vae")
    change_json(model / "model_index.json", vae=["diffusers", "AutoencoderTiny"])
    assert_same_as_diffusers(load(family, model), model)
    assert_accepted("a decoder that is an AutoencoderTiny")


@pytest.mark.thorough
def test_unused_parts_need_not_exist(models: dict[str, Path], tmp_path: Path) -> None:
    unused = {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
    }
    for family in PARTS:
        model = copied(models[family], tmp_path / family)
        names = [name for name in unused if name in json.loads((model / "model_index.json").read_text())]
        change_json(model / "model_index.json", **{name: unused[name] for name in names})
        load(family, model)  # named by the index, and no folder there
        change_json(model / "model_index.json", **dict.fromkeys(names, ...))
        assert_same_as_diffusers(load(family, model), model)
    assert_accepted("feature extractor, safety checker or image encoder missing, null or not named")


@pytest.mark.thorough
def test_a_missing_text_encoder_is_refused_with_the_key_that_does_without(
    models: dict[str, Path], tmp_path: Path
) -> None:
    model = copied(models["sd3"], tmp_path / "model")
    change_json(model / "model_index.json", text_encoder_3=[None, None], tokenizer_3=[None, None])
    assert_refused("SD3 without its T5, and policy.t5 true", early_refusal("sd3", model))
    assert_same_as_diffusers(load("sd3", model, t5=False), model, text_encoder_3=None, tokenizer_3=None)
    assert_accepted("SD3 without its T5, and policy.t5 = false")
    for value in ([None, None], ...):
        change_json(model / "model_index.json", text_encoder=value)
        assert_refused("a part that the family needs is missing or null", early_refusal("sd3", model, t5=False))


@pytest.mark.thorough
@pytest.mark.parametrize("zeros", [True, False])
def test_sdxl_encodes_no_prompt_as_its_folder_says(zeros: bool, models: dict[str, Path], tmp_path: Path) -> None:
    model = copied(models["sdxl"], tmp_path / "model")
    change_json(model / "model_index.json", force_zeros_for_empty_prompt=zeros)
    policy = load("sdxl", model)
    assert_same_as_diffusers(policy, model)
    assert bool((policy.encode(["a cat"])["negative_prompt_embeds"] == 0).all()) is zeros
    assert_accepted("SDXL with force_zeros_for_empty_prompt true or false")


@pytest.mark.thorough
@pytest.mark.rotated(every=3)
@pytest.mark.parametrize("family", PARTS)
@pytest.mark.parametrize("shards", [False, True])
def test_the_only_variant_is_taken(family: str, shards: bool, models: dict[str, Path], tmp_path: Path) -> None:
    model = copied(models[family], tmp_path / "model")
    for part in PARTS[family]:
        save_variant(model, part, "fp16", shards)
    keys = {} if shards else {"dtype": "bfloat16"}
    assert_same_as_diffusers(load(family, model, **keys), model, variant="fp16")
    assert_accepted("weights in several files with an index" if shards else "only the files of one variant (fp16)")


@pytest.mark.rotated(every=2, group="longest")
def test_of_several_variants_one_has_to_be_named(models: dict[str, Path], tmp_path: Path) -> None:
    model = copied(models["stable_diffusion"], tmp_path / "model")
    usual = weights_file(model, "unet").read_bytes()
    save_variant(model, "unet", "fp16")
    shutil.copy(weights_file(model, "unet").with_suffix(".fp16.safetensors"), tmp_path / "half")
    weights_file(model, "unet").write_bytes(usual)
    assert_same_as_diffusers(load("stable_diffusion", model), model)
    both = load("stable_diffusion", model, variant="fp16")
    assert_same_as_diffusers(both, model, variant="fp16")
    assert_accepted("policy.variant where both are there; parts without it from their usual files")
    weights_file(model, "unet").rename(model / "unet" / "diffusion_pytorch_model.ema.safetensors")
    assert_refused("several variants and no policy.variant", early_refusal("stable_diffusion", model))
    assert_refused(
        "a variant that no part has", early_refusal("stable_diffusion", models["stable_diffusion"], variant="x")
    )


def test_fingerprints_cover_the_files_that_are_loaded_and_no_others(models: dict[str, Path], tmp_path: Path) -> None:
    model = copied(models["stable_diffusion"], tmp_path / "model")
    before = base_of(model)
    assert base_of(models["stable_diffusion"]) == before
    for name in ("unet/other.safetensors", "unet/diffusion_pytorch_model.ema.safetensors", "vae/notes.md"):
        shutil.copy(weights_file(model, "unet"), model / name)
    assert base_of(model) == before
    assert base_of(model, variant="ema")["policy.model/unet"] != before["policy.model/unet"]
    save_variant(model, "text_encoder", "fp16", shards=True)
    changed = base_of(model)
    assert changed["policy.model/text_encoder"] != before["policy.model/text_encoder"]
    shard = next((model / "text_encoder").glob("*00002-of-00002.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert base_of(model)["policy.model/text_encoder"] != changed["policy.model/text_encoder"]
    assert base_of(model) | {"policy.model/text_encoder": ""} == changed | {"policy.model/text_encoder": ""}


def base_of(model: Path, **keys: Any) -> dict[str, str]:
    config = config_of("stable_diffusion", model, **keys)
    return {name: part.sha256 for name, part in entry_base(config, "policy", config.files_of("sampler")).items()}


@pytest.mark.thorough
def test_a_learner_needs_only_network_and_scheduler(models: dict[str, Path], tmp_path: Path) -> None:
    for family, parts in PARTS.items():
        model = copied(models[family], tmp_path / family)
        for part in (*parts[2:], "tokenizer"):
            shutil.rmtree(model / part)
        weights_file(model, "vae").unlink()
        assert config_of(family, model).load("cpu", SAMPLING, "learner").vae is None
    assert_accepted("text encoders and decoder missing on the learner's machine")


def test_what_was_downloaded_is_loaded_as_a_folder_is(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("ray_ddpo.common.model_files.model_hub.hub_answers", lambda: False)
    repository = tmp_path / "models--owner--model"
    snapshot = copied(models["stable_diffusion"], repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    config = build(POLICIES, {"name": "stable_diffusion", "model": "owner/model"}, "policy")
    policy = config.load("cpu", SAMPLING, "sampler")
    assert_same_as_diffusers(policy, models["stable_diffusion"])
    save_variant(snapshot, "unet", "fp16")
    assert_same_as_diffusers(config.load("cpu", SAMPLING, "sampler"), snapshot, variant="fp16")
    found = {name: part.sha256 for name, part in entry_base(config, "policy", config.files_of("sampler")).items()}
    assert found == base_of(snapshot)
    next((snapshot / "unet").glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match="'owner/model', which cannot be loaded .*the hub does not answer"):
        config.load("cpu", SAMPLING, "sampler")
