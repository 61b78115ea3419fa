"""Model folders as the world has them: loaded as plain diffusers loads them, or refused in one line that names the part."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.utils import logging

from common.base_parts import entry_base
from common.diffusion import POLICIES
from common.diffusion.diffusers_config import DiffusersConfig
from common.diffusion.diffusers_policy import DiffusersPolicy
from common.recipe_tables import SamplingTable
from common.registry import build
from tests.accepted_page import assert_accepted, assert_refused
from tests.model_copies import change_json, change_weights, copied, renamed, save_variant, weights_file, without
from tests.tiny_families import MAKERS, policy_table

SAMPLING = SamplingTable(num_steps=4, guidance_scale=3.0)
PARTS = {
    "stable_diffusion": ("unet", "vae", "text_encoder"),
    "sdxl": ("unet", "vae", "text_encoder", "text_encoder_2"),
    "sd3": ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"),
    "flux": ("transformer", "vae", "text_encoder", "text_encoder_2"),
}
ENCODING: dict[str, dict[str, Any]] = {
    "StableDiffusionPipeline": {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True},
    "StableDiffusionXLPipeline": {},
    "StableDiffusion3Pipeline": {"prompt_2": None, "prompt_3": None, "max_sequence_length": 12},
    "FluxPipeline": {"prompt_2": None, "max_sequence_length": 12},
}
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: maker(tmp_path_factory.mktemp(name)) for name, maker in MAKERS.items()}


def config_of(name: str, model: Path | str, **keys: Any) -> DiffusersConfig:
    return build(POLICIES, policy_table(name, Path(model), **keys), "policy")


def load(name: str, model: Path, **keys: Any) -> DiffusersPolicy:
    return config_of(name, model, **keys).load("cpu", SAMPLING, "sampler")


def refusal(name: str, model: Path, role: Any = "sampler", **keys: Any) -> str:
    """What is said where the model is loaded."""
    with pytest.raises(ValueError) as error:
        config_of(name, model, **keys).load("cpu", SAMPLING, role)
    assert "\n" not in str(error.value) and "the hub does not answer" not in str(error.value)
    return str(error.value)


def early_refusal(name: str, model: Path, **keys: Any) -> str:
    """What is said by `ddpo plan`, before anything is loaded."""
    with pytest.raises(ValueError) as error:
        config_of(name, model, **keys).sizes(SAMPLING)
    assert str(error.value) == refusal(name, model, **keys)
    return str(error.value)


def assert_same_as_diffusers(policy: DiffusersPolicy, model: Path, **keys: Any) -> None:
    """Compare every part's weights bit for bit with those of the plain pipeline of the same files, and the embeddings."""
    logging.set_verbosity_error()
    absent = {"safety_checker": None} if type(policy).__name__ == "StableDiffusionPolicy" else {}
    pipeline_class: Any = getattr(diffusers, policy.config.pipeline_class)
    plain = pipeline_class.from_pretrained(model, torch_dtype=policy.config.loaded_dtype, **absent, **keys)
    assert_same_parts(policy, plain)


def assert_same_parts(policy: DiffusersPolicy, plain: Any) -> None:
    config = policy.config
    for part in (config.network_name, "vae", *config.text_parts):
        ours, theirs = getattr(policy.pipeline, part).state_dict(), getattr(plain, part).state_dict()
        ours = {name.replace("base_layer.", ""): value for name, value in ours.items() if "lora_" not in name}
        assert ours.keys() == theirs.keys(), part
        assert all(torch.equal(ours[name], value) for name, value in theirs.items()), part
    encoded = [value for value in plain.encode_prompt("a cat", **ENCODING[config.pipeline_class]) if value is not None]
    if config.loaded_dtype != torch.float32:  # which rounds too much to compare embeddings
        return
    for name, ours in policy.encode(["a cat"]).items():  # of the same weights, which lie in memory in another way
        assert any(ours.shape == value.shape and torch.allclose(ours, value, 1e-4, 1e-5) for value in encoded), name


FAULTS: list[tuple[str, Callable[[str, dict], dict]]] = [
    ("weights of a part are missing", lambda part, state: without(_first(state))(state)),
    ("all names of a part's weights begin with something else", lambda part, state: renamed("", "module.")(state)),
    ("weights of a part are of another size", lambda part, state: {**state, _first(state): torch.zeros(3, 5)}),
]


def _first(state: dict) -> str:
    return next(name for name in sorted(state) if name.endswith("weight") and "encoder.embed_tokens" not in name)


@pytest.mark.parametrize("family", PARTS)
def test_a_part_whose_weights_are_not_its_own_is_refused_with_the_first_and_their_number(
    family: str, models: dict[str, Path], tmp_path: Path
) -> None:
    for part in PARTS[family]:
        for number, (situation, change) in enumerate(FAULTS):
            model = copied(models[family], tmp_path / f"{part}-{number}")
            change_weights(model, part, lambda state, change=change, part=part: change(part, state))
            said = refusal(family, model)
            assert_refused(situation, said)
            assert f"its {part}, " in said and str(model) in said


def test_a_lora_that_was_not_unloaded_before_saving_is_named(models: dict[str, Path], tmp_path: Path) -> None:
    for part, name in (("unet", "to_q."), ("text_encoder", "q_proj.")):
        model = copied(models["stable_diffusion"], tmp_path / part)
        change_weights(model, part, renamed(name, f"{name}base_layer."))
        assert_refused(
            "a LoRA was fused into a part and not unloaded before saving", refusal("stable_diffusion", model)
        )


def test_weights_that_the_configuration_has_no_place_for_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    model = copied(models["sd3"], tmp_path / "model")
    change_json(model / "transformer" / "config.json", qk_norm=None)
    assert_refused("a network or decoder has weights that its configuration has no place for", refusal("sd3", model))


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


def test_a_whole_clip_gives_its_text_tower(models: dict[str, Path], tmp_path: Path) -> None:
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


@pytest.mark.parametrize("family", PARTS)
def test_a_folder_of_another_family_is_refused_with_the_name_to_give(family: str, models: dict[str, Path]) -> None:
    for other in set(PARTS) - {family}:
        said = early_refusal(family, models[other])
        assert_refused("a folder of another family", said)
        assert said.endswith(f'policy.name must be "{other}"')


PIPELINES = [
    "StableDiffusionInpaintPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionControlNetPipeline",
    "KandinskyV22Pipeline",
    "PixArtAlphaPipeline",
    "FluxFillPipeline",
    "LatentConsistencyModelPipeline",
    ["pipeline", "MyPipeline"],
    None,
]


def test_a_pipeline_that_no_family_trains_is_refused_by_its_class(models: dict[str, Path], tmp_path: Path) -> None:
    model = copied(models["stable_diffusion"], tmp_path / "model")
    for name in PIPELINES:
        change_json(model / "model_index.json", _class_name=name)
        said = early_refusal("stable_diffusion", model)
        if isinstance(name, str):
            assert_refused("a pipeline that no family trains", said)
            assert name in said
        else:
            assert_refused("a model_index.json that names no pipeline of diffusers", said)


def test_the_refiner_of_sdxl_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    model = copied(models["sdxl"], tmp_path / "model")
    keys = {"text_encoder": [None, None], "tokenizer": [None, None], "requires_aesthetics_score": True}
    for name in ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"):
        change_json(model / "model_index.json", _class_name=name, **keys)
        assert_refused("the refiner of an SDXL", early_refusal("sdxl", model))


def test_a_network_that_is_given_an_image_too_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    for family in ("stable_diffusion", "flux"):
        model = copied(models[family], tmp_path / family)
        network = PARTS[family][0]
        channels = json.loads((model / network / "config.json").read_text())["in_channels"]
        change_json(model / network / "config.json", in_channels=channels * 2 + 1)
        situation = "a network that takes other channels than its decoder gives, as inpainting models"
        assert_refused(situation, early_refusal(family, model))


CLASSES = [
    ("stable_diffusion", "vae", "AsymmetricAutoencoderKL"),
    ("stable_diffusion", "vae", "ConsistencyDecoderVAE"),
    ("stable_diffusion", "unet", "UNetMotionModel"),
    ("stable_diffusion", "text_encoder", "CLIPTextModelWithProjection"),
    ("sdxl", "text_encoder_2", "CLIPTextModel"),
    ("sdxl", "text_encoder", "T5EncoderModel"),
    ("sd3", "text_encoder_3", "UMT5EncoderModel"),
    ("flux", "transformer", "FluxControlNetModel"),
    ("flux", "tokenizer_2", "LlamaTokenizer"),
]


@pytest.mark.parametrize(("family", "part", "name"), CLASSES)
def test_a_part_of_another_class_is_refused_by_part_and_class(
    family: str, part: str, name: str, models: dict[str, Path], tmp_path: Path
) -> None:
    model = copied(models[family], tmp_path / "model")
    library = json.loads((model / "model_index.json").read_text())[part][0]
    change_json(model / "model_index.json", **{part: [library, name]})
    said = early_refusal(family, model)
    assert_refused("a part of another class than the family knows", said)
    assert f"its {part} is " in said and name in said


def test_a_part_whose_own_configuration_is_of_another_class_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    for part, keys in (("unet", {"_class_name": "UNetMotionModel"}), ("text_encoder", {"model_type": "xlm-roberta"})):
        model = copied(models["stable_diffusion"], tmp_path / part)
        change_json(model / part / "config.json", **keys)
        said = early_refusal("stable_diffusion", model)
        assert_refused("a part's own configuration is that of another class", said)


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


def test_parts_that_nobody_uses_need_not_be_there(models: dict[str, Path], tmp_path: Path) -> None:
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


@pytest.mark.parametrize("zeros", [True, False])
def test_sdxl_encodes_no_prompt_as_its_folder_says(zeros: bool, models: dict[str, Path], tmp_path: Path) -> None:
    model = copied(models["sdxl"], tmp_path / "model")
    change_json(model / "model_index.json", force_zeros_for_empty_prompt=zeros)
    policy = load("sdxl", model)
    assert_same_as_diffusers(policy, model)
    assert bool((policy.encode(["a cat"])["negative_prompt_embeds"] == 0).all()) is zeros
    assert_accepted("SDXL with force_zeros_for_empty_prompt true or false")


@pytest.mark.parametrize("family", PARTS)
@pytest.mark.parametrize("shards", [False, True])
def test_the_only_variant_is_taken(family: str, shards: bool, models: dict[str, Path], tmp_path: Path) -> None:
    model = copied(models[family], tmp_path / "model")
    for part in PARTS[family]:
        save_variant(model, part, "fp16", shards)
    keys = {} if shards else {"dtype": "bfloat16"}
    assert_same_as_diffusers(load(family, model, **keys), model, variant="fp16")
    assert_accepted("weights in several files with an index" if shards else "only the files of one variant (fp16)")


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


def test_pickles_alone_are_refused_with_the_command_that_converts_them(models: dict[str, Path], tmp_path: Path) -> None:
    model = copied(models["stable_diffusion"], tmp_path / "model")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    for part in PARTS["stable_diffusion"]:
        weights_file(model, part).unlink()
        name = "pytorch_model.fp16.bin" if part == "text_encoder" else "diffusion_pytorch_model.fp16.bin"
        torch.save(getattr(pipeline, part).state_dict(), model / part / name)
    said = early_refusal("stable_diffusion", model)
    assert_refused("only .bin files", said)
    program = said.split('`python -c "')[1].split('"`')[0].replace("'MODEL'", f"'{tmp_path / 'MODEL'}'")
    exec(program, {})  # as a reader types it
    assert_same_parts(load("stable_diffusion", tmp_path / "MODEL"), pipeline)


WRONG_FILES = [
    ("a file that is empty", b""),
    ("a git-LFS pointer instead of a file", LFS.encode()),
    ("a web page instead of a file", b"<!DOCTYPE html><html>Log in</html>"),
    ("a pickle that is called .safetensors", b"PK\x03\x04pickle"),
    ("a file that is cut off", None),
]


def test_a_file_that_is_not_what_its_name_says_is_refused_by_name(models: dict[str, Path], tmp_path: Path) -> None:
    files = ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", "vae/config.json"]
    files += ["tokenizer/tokenizer.json", "scheduler/scheduler_config.json", "model_index.json"]
    for situation, content in WRONG_FILES:
        for name in files:
            if name.endswith(".json") and b"PK" in (content or b""):
                continue
            model = copied(models["stable_diffusion"], tmp_path / "model")
            path = model / name
            path.write_bytes(path.read_bytes()[:-20] if content is None else content)
            said = refusal("stable_diffusion", model)
            assert_refused(situation, said)
            assert str(path) in said
            shutil.rmtree(model)


def test_what_is_missing_in_a_local_folder_is_named_and_the_hub_is_not_asked(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> bool:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("common.model_hub.hub_answers", fail)
    original = models["stable_diffusion"]
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        model = copied(original, tmp_path / part)
        shutil.rmtree(model / part)
        assert_refused("a part's folder is missing", early_refusal("stable_diffusion", model))
    model = copied(original, tmp_path / "vocabulary")
    for name in ("tokenizer.json", "vocab.json"):
        (model / "tokenizer" / name).unlink(missing_ok=True)
    assert_refused("a tokenizer without a vocabulary", early_refusal("stable_diffusion", model))
    model = copied(original, tmp_path / "misnamed")
    weights_file(model, "vae").rename(model / "vae" / "sd-vae.safetensors")
    assert_refused("weights under another name", early_refusal("stable_diffusion", model))
    model = copied(original, tmp_path / "shards")
    save_variant(model, "unet", "fp16", shards=True)
    next((model / "unet").glob("*00001-of-00002.safetensors")).unlink()
    assert_refused("one of several files of weights is missing", early_refusal("stable_diffusion", model))
    model = copied(original, tmp_path / "adapter")
    (model / "text_encoder" / "adapter_config.json").write_text("{}")
    assert_refused("a text encoder with a LoRA beside its weights", early_refusal("stable_diffusion", model))


def test_a_learner_needs_network_and_scheduler_alone(models: dict[str, Path], tmp_path: Path) -> None:
    for family, parts in PARTS.items():
        model = copied(models[family], tmp_path / family)
        for part in (*parts[2:], "tokenizer"):
            shutil.rmtree(model / part)
        weights_file(model, "vae").unlink()
        assert config_of(family, model).load("cpu", SAMPLING, "learner").vae is None
    assert_accepted("text encoders and decoder missing on the learner's machine")
