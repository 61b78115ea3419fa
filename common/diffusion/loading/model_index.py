"""Read what a model's folder says it is (model_index.json), and refuse models that its family does not train."""

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ray_ddpo.common.diffusion import POLICIES
from ray_ddpo.common.model_files.file_faults import DamagedFile, check_file

if TYPE_CHECKING:
    from ray_ddpo.common.diffusion.loading.diffusers_config import DiffusersConfig

INDEX = "model_index.json"
FAMILIES = {  # diffusers' pipeline class → the family that trains it, and its name in words
    "StableDiffusionPipeline": ("stable_diffusion", "Stable Diffusion"),
    "StableDiffusionInpaintPipeline": ("sd_inpainting", "Stable Diffusion inpainting"),
    "StableDiffusionXLPipeline": ("sdxl", "SDXL"),
    "StableDiffusion3Pipeline": ("sd3", "Stable Diffusion 3"),
    "FluxPipeline": ("flux", "FLUX"),
    "FluxKontextPipeline": ("flux_kontext", "FLUX Kontext"),
    "QwenImagePipeline": ("qwen_image", "Qwen-Image"),
    "QwenImageEditPipeline": ("qwen_image_edit", "Qwen-Image-Edit"),
    "QwenImageEditPlusPipeline": ("qwen_image_edit_plus", "Qwen-Image-Edit of 2509 or later"),
    "Flux2Pipeline": ("flux2", "FLUX.2"),
    "Flux2KleinPipeline": ("flux2_klein", "FLUX.2-klein"),
    "ZImagePipeline": ("z_image", "Z-Image"),
    "HunyuanImagePipeline": ("hunyuan_image", "HunyuanImage"),
    "Lumina2Pipeline": ("lumina2", "Lumina 2"),
    "SanaPipeline": ("sana", "SANA"),
    "PixArtSigmaPipeline": ("pixart_sigma", "PixArt-Sigma"),
    "WanPipeline": ("wan", "Wan"),
    "LTXPipeline": ("ltx", "LTX-Video"),
    "WanImageToVideoPipeline": ("wan_i2v", "Wan from images"),
}
TOKENIZERS = {  # text encoder class → tokenizer classes; transformers has had two for each
    "CLIPTextModel": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "CLIPTextModelWithProjection": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "T5EncoderModel": ("T5Tokenizer", "T5TokenizerFast", "ByT5Tokenizer"),  # the last one has no vocabulary
    "UMT5EncoderModel": ("T5Tokenizer", "T5TokenizerFast"),
    "Qwen2_5_VLForConditionalGeneration": ("Qwen2Tokenizer", "Qwen2TokenizerFast"),
    "Qwen3Model": ("Qwen2Tokenizer", "Qwen2TokenizerFast"),
    "Qwen3ForCausalLM": ("Qwen2Tokenizer", "Qwen2TokenizerFast"),
    "Mistral3ForConditionalGeneration": ("PixtralProcessor", "LlamaTokenizer", "LlamaTokenizerFast"),
    "Gemma2Model": ("GemmaTokenizer", "GemmaTokenizerFast"),
}
VOCABULARIES = {  # tokenizer class → sets of files, one of which it needs
    "CLIPTokenizer": (("tokenizer.json",), ("vocab.json", "merges.txt")),
    "T5Tokenizer": (("tokenizer.json",), ("spiece.model",)),
    "Qwen2Tokenizer": (("tokenizer.json",), ("vocab.json", "merges.txt")),
    "Qwen2VLProcessor": (
        ("preprocessor_config.json", "tokenizer.json"),
        ("preprocessor_config.json", "vocab.json", "merges.txt"),
    ),
    "PixtralProcessor": (("tokenizer.json",),),
    "LlamaTokenizer": (("tokenizer.json",), ("tokenizer.model",)),
    "GemmaTokenizer": (("tokenizer.json",), ("tokenizer.model",)),
}
MODEL_TYPES = {  # text encoder class → allowed model_type; a full CLIP contains a text encoder
    "CLIPTextModel": ("clip_text_model", "clip"),
    "CLIPTextModelWithProjection": ("clip_text_model", "clip"),
    "T5EncoderModel": ("t5",),
    "UMT5EncoderModel": ("umt5",),
    "Qwen2_5_VLForConditionalGeneration": ("qwen2_5_vl",),
    "Qwen3Model": ("qwen3",),
    "Qwen3ForCausalLM": ("qwen3",),
    "Mistral3ForConditionalGeneration": ("mistral3",),
    "Gemma2Model": ("gemma2",),
}


class PartNotThere(ValueError):
    """A part, or one of its files, is missing from a model's folder. The text says which, and what is there."""


@dataclass(frozen=True)
class PartClass:
    """The kind of a pipeline's part, its library, and the classes that the family allows; none means any class."""

    kind: Literal["model", "tokenizer", "scheduler"]
    library: str
    classes: tuple[str, ...] = ()


def known_parts(config: "DiffusersConfig", role: str = "sampler") -> dict[str, PartClass]:
    """Return the parts that a role loads. A sampler loads all of them."""
    if role == "decoder":
        return {"vae": PartClass("model", "diffusers", config.decoder_classes)}
    network = PartClass("model", "diffusers", (config.network_class, *config.legacy_network_classes))
    found = dict.fromkeys((config.trained_part, *config.joined_parts), network)
    found["scheduler"] = PartClass("scheduler", "diffusers")
    if role != "sampler":
        return found
    found |= dict.fromkeys(config.frozen_parts, network)
    found["vae"] = PartClass("model", "diffusers", config.decoder_classes)
    found |= {part: PartClass("model", "transformers", (name,)) for part, (_, name) in config.text_parts.items()}
    for tokenizer in config.tokenizers:
        if config.loading.get(tokenizer, True) is None:  # the recipe leaves it out
            continue
        _, encoder = config.text_parts.get(tokenizer.replace("tokenizer", "text_encoder"), ("", ""))
        found[tokenizer] = PartClass("tokenizer", "transformers", TOKENIZERS.get(encoder, ()))
    return found


@contextmanager
def about_model(model: str, key: str = "policy.model") -> Iterator[None]:
    """Prefix errors about a model's files with the recipe's key and value."""
    try:
        yield
    except PartNotThere as error:
        raise PartNotThere(f"{key} is {model!r}, which cannot be loaded: {error}") from error
    except DamagedFile as error:
        raise ValueError(f"{key} is {model!r}, and {error}") from error
    except ValueError as error:
        raise ValueError(f"{key} is {model!r}: {error}") from error


def about_folder(config: "DiffusersConfig") -> AbstractContextManager[None]:
    """Prefix errors about the folder of configurations, which is the model itself unless that is a single file."""
    if config.single_file_config is None:
        return about_model(config.model)
    return about_model(config.single_file_config, "policy.single_file_config")


def check_folder(config: "DiffusersConfig", folder: Path, role: str = "sampler") -> None:
    """Raise ValueError if the family does not train such a model, or if a role's files do not agree with the index."""
    index = read_object(folder / INDEX)
    _check_pipeline(config, index)
    named = {part: _class_of(config, part, index.get(part), known) for part, known in known_parts(config).items()}
    for part, known in known_parts(config, role).items():
        if not (folder / part).is_dir():
            raise PartNotThere(f"there is no folder {part} in {folder}, which {INDEX} names")
        _check_part(folder / part, named[part], known)
    if "vae" in known_parts(config, role):
        _check_channels(config, folder)


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in one of the model's JSON files. Raise ValueError if the file is missing or damaged."""
    if not path.is_file():
        raise PartNotThere(f"there is no {path.name} in {path.parent}")
    check_file(path)
    found = json.loads(path.read_bytes())
    if not isinstance(found, dict):
        raise DamagedFile(path, f"it must be a JSON object, and is {str(found)[:40]!r}")
    return found


def text_tower(keys: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of a full CLIP's text tower, which transformers loads as the text encoder; others as they are."""
    tower = keys.get("text_config") if keys.get("model_type", "clip") == "clip" else None
    return tower if isinstance(tower, dict) else keys


def read_class(folder: Path, part: str) -> str:
    """Return the class of a part, as named in the index of a checked folder."""
    return read_object(folder / INDEX)[part][1]


def conversion(config: "DiffusersConfig", load: str) -> str:
    """Return the command that writes a model in diffusers' format with safetensors, and what to do with the result."""
    program = f"from diffusers import {config.pipeline_class} as P; P.{load}.save_pretrained('MODEL')"
    return f'`python -c "{program}"`, and set policy.model to the folder MODEL'


def _check_pipeline(config: "DiffusersConfig", index: dict[str, Any]) -> None:
    """Check that the index names a pipeline that the recipe's family trains."""
    name = index.get("_class_name")
    known = f"the families are {sorted(POLICIES)}, for {', '.join(FAMILIES)}"
    if index.get("requires_aesthetics_score") is True:
        raise ValueError(f"this is the refiner of an SDXL ({name}), which no family here trains; {known}")
    if name in (config.index_classes or (config.pipeline_class,)):
        return
    if not isinstance(name, str):
        raise ValueError(f"{INDEX} names no pipeline of diffusers' (its _class_name is {name!r}); {known}")
    if name not in FAMILIES:
        raise ValueError(f"this is {with_article(name)}, which no family here trains; {known}")
    family, words = FAMILIES[name]
    other = f", or the folder one for {config.pipeline_class}" if config.single_file_config else ""
    raise ValueError(f'this is {with_article(words)} ({name}): policy.name must be "{family}"{other}')


def _check_channels(config: "DiffusersConfig", folder: Path) -> None:
    """Check that the network takes the decoder's latents and nothing else."""
    network = read_object(folder / config.network_name / "config.json")
    taken, given = network.get("in_channels"), read_object(folder / "vae" / "config.json").get(config.latent_key)
    if taken and given and taken != config.taken_channels(given):
        raise ValueError(
            f"its {config.network_name} takes latents of {taken} channels and its decoder has {given}: a model with an "
            f"image as a second input, which no family here trains (in_channels in {config.network_name}/config.json, "
            f"{config.latent_key} in vae/config.json)"
        )


def with_article(words: str) -> str:
    return f"{'an' if words[0] in 'AEIO' or words.startswith('SD') else 'a'} {words}"


def _class_of(config: "DiffusersConfig", part: str, entry: Any, known: PartClass) -> str:
    """Return the class that the index names for a part."""
    if not isinstance(entry, list) or len(entry) != 2 or entry[1] is None:
        switch = config.switches.get(part)
        remedy = f"set {switch} to do without" if switch else "give a folder that has it"
        raise ValueError(f"{INDEX} has no {part}, which {config.pipeline_class} needs here: {remedy}")
    library, name = entry
    if library != known.library or (known.classes and name not in known.classes):
        expected = " or ".join(known.classes) or "a class"
        raise ValueError(
            f"its {part} is {with_article(str(name))} of {library}, and must be {expected} of {known.library}"
        )
    return name


def _check_part(folder: Path, named: str, known: PartClass) -> None:
    """Check that a part's own files are of the class that the index names."""
    if known.kind == "tokenizer":
        sets = VOCABULARIES.get(named.removesuffix("Fast"), ())
        if sets and not any(all((folder / name).is_file() for name in files) for files in sets):
            needed = " or ".join(" with ".join(files) for files in sets)
            raise PartNotThere(f"its {folder.name} has no vocabulary: {folder} must have {needed}")
        return
    path = folder / ("scheduler_config.json" if known.kind == "scheduler" else "config.json")
    own = read_object(path)
    if known.kind == "scheduler":
        return
    if known.library == "diffusers":
        said, expected = own.get("_class_name"), (named,)
    else:
        said, expected = own.get("model_type"), MODEL_TYPES.get(named)
    if said and expected and said not in expected:
        raise ValueError(f"{path} is that of {with_article(str(said))}, and {INDEX} says {named}")
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"its {folder.name} has a LoRA beside its weights (adapter_config.json): merge or remove it")
