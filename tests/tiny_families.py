"""Small pipelines of the model families with random weights, of diffusers' own classes and in their format."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ray_ddpo.common.diffusion.families.packing import packed
from tests.tiny_pipeline import save_tiny_inpainting, save_tiny_pipeline, tiny_tokenizer
from tests.tiny_text_to_image import (
    EIGHTFOLD,
    save_tiny_pixart_sigma,
    save_tiny_sana,
    tiny_t5,
    tiny_t5_tokenizer,
)

DDIM = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
QWEN_IMAGE_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
AUTOENCODER = {
    "block_out_channels": (8, 8),
    "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}
FLOW_AUTOENCODER = AUTOENCODER | {
    "latent_channels": 4,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 1.5,
    "shift_factor": 0.06,
}


def save_tiny_sdxl(folder: Path, seed: int = 0, **scheduler: object) -> Path:
    """Write the pipeline. `scheduler` changes the published configuration."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16 + 24,
        attention_head_dim=(2, 4),
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 24,
    )
    config: Any = DDIM | {"set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": "leading", **scheduler}
    StableDiffusionXLPipeline(
        vae=AutoencoderKL(**EIGHTFOLD, scaling_factor=0.13),
        text_encoder=_clip(16, with_projection=False),
        text_encoder_2=_clip(24, with_projection=True),
        tokenizer=tiny_tokenizer(),
        tokenizer_2=tiny_tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler.from_config(config),
        add_watermarker=False,
    ).save_pretrained(folder, safe_serialization=True)
    return folder


def save_tiny_sd3(folder: Path, seed: int = 0, **scheduler: object) -> Path:
    """Write the pipeline. `scheduler` changes its configuration."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=48,
        caption_projection_dim=16,
        pooled_projection_dim=16 + 24,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    keys: Any = {"shift": 3.0, **scheduler}
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**keys),
        vae=AutoencoderKL(**FLOW_AUTOENCODER),
        text_encoder=_clip(16, with_projection=True),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=_clip(24, with_projection=True),
        tokenizer_2=tiny_tokenizer(),
        text_encoder_3=tiny_t5(48),
        tokenizer_3=tiny_t5_tokenizer(),
    ).save_pretrained(folder, safe_serialization=True)
    return folder


def save_tiny_flux(folder: Path, seed: int = 0, pipeline: str = "FluxPipeline", **scheduler: object) -> Path:
    """Write the pipeline. `scheduler` changes its configuration, which shifts noise levels with the image's size."""
    import diffusers
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    keys: Any = {"shift": 3.0, "use_dynamic_shifting": True, **scheduler}
    getattr(diffusers, pipeline)(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**keys),
        vae=AutoencoderKL(**FLOW_AUTOENCODER),
        text_encoder=_clip(16, with_projection=False),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=tiny_t5(32),
        tokenizer_2=tiny_t5_tokenizer(),
    ).save_pretrained(folder, safe_serialization=True)
    return folder


def save_tiny_flux_kontext(folder: Path, seed: int = 0, **scheduler: object) -> Path:
    """Write the pipeline, whose parts are those of FLUX.1."""
    return save_tiny_flux(folder, seed, "FluxKontextPipeline", **scheduler)


def save_tiny_qwen_image(folder: Path, seed: int = 0, **scheduler: object) -> Path:
    """Write the pipeline. `scheduler` changes its configuration, which ends above noise level 0."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )

    torch.manual_seed(seed)
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.0, 0.3],
        latents_std=[1.5, 0.7, 1.0, 2.0],
    )
    keys: Any = {
        "use_dynamic_shifting": True,
        "base_shift": 0.5,
        "max_shift": 0.9,
        "max_image_seq_len": 8192,
        "shift_terminal": 0.02,
        **scheduler,
    }
    tokenizer = tiny_qwen_tokenizer(QWEN_IMAGE_TEMPLATE, 34)
    QwenImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**keys),
        vae=vae,
        text_encoder=_qwen_vl(32, len(tokenizer)),
        tokenizer=tokenizer,
    ).save_pretrained(folder, safe_serialization=True)
    return folder


def save_tiny_z_image(folder: Path, seed: int = 0, **scheduler: object) -> Path:
    """Write the pipeline. `scheduler` changes its configuration. The template is 26 tokens before the prompt, 1 after."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

    torch.manual_seed(seed)
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[4, 6, 6],
        axes_lens=[128, 32, 32],
    )
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(token)  # of a new network it is 0
    keys: Any = {"shift": 3.0, **scheduler}
    tokenizer = tiny_chat_tokenizer(26)
    ZImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**keys),
        vae=AutoencoderKL(**FLOW_AUTOENCODER),
        text_encoder=_qwen3(32, len(tokenizer)),
        tokenizer=tokenizer,
    ).save_pretrained(folder, safe_serialization=True)
    return folder


FLUX2_TRANSFORMER = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 3 * 16,
    "axes_dims_rope": (4, 4, 4, 4),
}
FLUX2_SCHEDULER = {"shift": 3.0, "use_dynamic_shifting": True}


def save_tiny_flux2(folder: Path, seed: int = 0, **scheduler: object) -> Path:
    """Write the pipeline of dev with a tokenizer in place of a processor. `scheduler` changes its configuration."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Pipeline, Flux2Transformer2DModel

    torch.manual_seed(seed)
    keys: Any = FLUX2_SCHEDULER | scheduler
    tokenizer = tiny_mistral_tokenizer()
    Flux2Pipeline(
        transformer=Flux2Transformer2DModel(**FLUX2_TRANSFORMER),
        scheduler=FlowMatchEulerDiscreteScheduler(**keys),
        vae=_flux2_decoder(),
        text_encoder=_mistral3(16, len(tokenizer)),
        tokenizer=tokenizer,
    ).save_pretrained(folder, safe_serialization=True)
    return folder


def save_tiny_flux2_klein(folder: Path, seed: int = 0, is_distilled: bool = False, **scheduler: object) -> Path:
    """Write the pipeline of the base, or of the distilled model. `scheduler` changes its configuration."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel

    torch.manual_seed(seed)
    keys: Any = FLUX2_SCHEDULER | scheduler
    tokenizer = tiny_chat_tokenizer(5)
    Flux2KleinPipeline(
        transformer=Flux2Transformer2DModel(**FLUX2_TRANSFORMER, guidance_embeds=False),
        scheduler=FlowMatchEulerDiscreteScheduler(**keys),
        vae=_flux2_decoder(),
        text_encoder=_qwen3(16, len(tokenizer), layers=28, whole=True),
        tokenizer=tokenizer,
        is_distilled=is_distilled,
    ).save_pretrained(folder, safe_serialization=True)
    return folder


def _flux2_decoder() -> Any:
    """Return a decoder whose batch norm has statistics of its own."""
    from diffusers import AutoencoderKLFlux2

    vae = AutoencoderKLFlux2(**AUTOENCODER, latent_channels=4)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae


def save_tiny_digits(folder: Path, seed: int = 0) -> Path:
    """Write the network of docs/digits."""
    from digit_transformer import DigitTransformer

    torch.manual_seed(seed)
    DigitTransformer(size=8, patch=2, width=16, num_heads=2, num_blocks=2).save_pretrained(
        folder, safe_serialization=True
    )
    return folder


def save_tiny_shapes(folder: Path, seed: int = 0) -> Path:
    """Write the weights of docs/shapes."""
    from shape_network import ShapeNetwork

    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(ShapeNetwork().state_dict(), folder / "shapes.pt")
    return folder / "shapes.pt"


def tiny_qwen_tokenizer(template: str, length: int) -> Any:
    """Return a tokenizer of bytes, that reads the template's text before the prompt as `length` tokens, and 1 after it."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    letters = sorted(ByteLevel.alphabet())
    tokenizer: Any = Qwen2Tokenizer(vocab={letter: index for index, letter in enumerate(letters)}, merges=[])
    before, after = template.split("{}")
    edges = [round(at * len(before) / length) for at in range(length + 1)]
    pieces = [before[start:stop] for start, stop in itertools.pairwise(edges)]
    tokenizer.add_special_tokens({"extra_special_tokens": [*dict.fromkeys(pieces), after]})
    return tokenizer


def tiny_chat_tokenizer(length: int) -> Any:
    """Return a tokenizer of bytes with a chat template that puts `length` tokens before a prompt, and 1 after it."""
    tokenizer = tiny_qwen_tokenizer(QWEN_IMAGE_TEMPLATE, length)
    template = QWEN_IMAGE_TEMPLATE.replace("{}", "{{ message['content'] }}")
    tokenizer.chat_template = f"{{% for message in messages %}}{template}{{% endfor %}}"
    return tokenizer


def tiny_mistral_tokenizer() -> Any:
    """Return a tokenizer of letters with a chat template that puts 5 tokens before a prompt, and 1 after it."""
    from transformers import LlamaTokenizerFast

    letters = ["▁", *(chr(code) for code in range(ord("a"), ord("z") + 1))]
    names = ("<unk>", "<s>", "</s>", "[SYSTEM]", "[ABOUT]", "[INST]", "[PROMPT]", "[/INST]", *letters)
    tokenizer: Any = LlamaTokenizerFast(
        vocab={name: index for index, name in enumerate(names)}, merges=[], add_prefix_space=False
    )
    tokenizer.add_special_tokens({"pad_token": "<unk>", "extra_special_tokens": list(names[3:8])})
    tokenizer.chat_template = "<s>[SYSTEM][ABOUT][INST][PROMPT]{{ messages[1]['content'][0]['text'] }}[/INST]"
    return tokenizer


def _mistral3(width: int, vocabulary: int) -> Any:
    """Return a model with the 30 layers that the pipeline reads states of."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    text: Any = {"model_type": "mistral", "hidden_size": width, "intermediate_size": width, "num_hidden_layers": 31}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": vocabulary}
    vision: Any = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    return Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision))


def _qwen3(width: int, vocabulary: int, layers: int = 2, whole: bool = False) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

    keys: Any = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": layers}
    keys |= {"vocab_size": vocabulary, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    return (Qwen3ForCausalLM if whole else Qwen3Model)(Qwen3Config(**keys))


def _qwen_vl(width: int, vocabulary: int) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text: Any = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": 1, "vocab_size": vocabulary}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    text |= {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    vision: Any = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": width}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


def _clip(width: int, with_projection: bool) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=520,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        projection_dim=width,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return (CLIPTextModelWithProjection if with_projection else CLIPTextModel)(config)


MAKERS: dict[str, Callable[[Path], Path]] = {
    "stable_diffusion": save_tiny_pipeline,
    "sd_inpainting": save_tiny_inpainting,
    "sdxl": save_tiny_sdxl,
    "sd3": save_tiny_sd3,
    "flux": save_tiny_flux,
    "flux_kontext": save_tiny_flux_kontext,
    "qwen_image": save_tiny_qwen_image,
    "flux2": save_tiny_flux2,
    "flux2_klein": save_tiny_flux2_klein,
    "z_image": save_tiny_z_image,
    "pixart_sigma": save_tiny_pixart_sigma,
    "sana": save_tiny_sana,
}
FROM_OUTSIDE: dict[str, Callable[[Path], Path]] = {  # as docs/extending.md has them
    "digits:Digits": save_tiny_digits,
    "shapes:Shapes": save_tiny_shapes,
}
# Families with a mask get prompts of different lengths, so that their masks differ.
PROMPTS = {
    **dict.fromkeys(("qwen_image", "pixart_sigma", "sana"), ["a cat", "a calf", "cow"]),
    "z_image": ["a cat", "a long calf", "cow"],  # 32, 38 and 30 tokens with the template, and so 32 and 64 with filling
    "digits:Digits": ["seven", "3", "a two"],
    "shapes:Shapes": ["disc", "ring", "cross"],
}
KEYS: dict[str, dict[str, Any]] = {  # of `[policy]`, that such a small model needs
    "sd3": {"max_sequence_length": 12},
    "flux": {"max_sequence_length": 12, "resolution": 16},
    "flux_kontext": {"max_sequence_length": 12, "resolution": 16},
    "qwen_image": {"max_sequence_length": 12, "resolution": 16},
    "flux2": {"max_sequence_length": 17, "resolution": 16},
    "flux2_klein": {"max_sequence_length": 17, "resolution": 16},
    "z_image": {"max_sequence_length": 38, "resolution": 16},
    "pixart_sigma": {"max_sequence_length": 12},
    "sana": {"max_sequence_length": 14},
}


SAFETY_CHECKED = ("stable_diffusion", "sd_inpainting")  # families whose pipelines ask for a safety checker
BY_DDIM = (*SAFETY_CHECKED, "sdxl", "pixart_sigma")  # families that step by DDIM
PACKED = ("flux", "flux_kontext", "qwen_image")  # families whose pipelines take and give tokens instead of latents
UNGUIDED = ("flux", "flux_kontext", "flux2")  # families whose guidance is an input of the network
WITHOUT_NEGATIVE = (*UNGUIDED, "flux2_klein")  # families whose pipelines take no negative prompt


def kontext_keys(image: Image.Image) -> dict[str, Any]:
    """Return the arguments with which FLUX Kontext's pipeline takes an input image as it is."""
    return {"image": image, "max_area": image.width * image.height, "_auto_resize": False}


def given_latents(name: str, latents: torch.Tensor) -> torch.Tensor:
    """Return latents as the family's own pipeline takes them."""
    return packed(latents) if name in PACKED else latents


def shown_latents(name: str, latents: torch.Tensor) -> torch.Tensor:
    """Return latents as the family's own pipeline shows them after a step."""
    return latents.flatten(2).transpose(1, 2) if name.startswith("flux2") else given_latents(name, latents)


def call_keys(name: str, scale: float, negative: str | None = None) -> dict[str, Any]:
    """Return the arguments with which a family's own pipeline samples two images of the small model with guidance."""
    size = {"height": 16, "width": 16}
    if name == "qwen_image":
        negatives = [" " if negative is None else negative] * 2
        return {"true_cfg_scale": scale, "negative_prompt": negatives, "max_sequence_length": 12, **size}
    if name == "sd_inpainting":
        blank = {"image": Image.new("RGB", (16, 16)), "mask_image": Image.new("L", (16, 16), 255), **size}
        return {"guidance_scale": scale, "negative_prompt": None if negative is None else [negative] * 2, **blank}
    length = KEYS.get(name, {}).get("max_sequence_length")
    text = {} if length is None else {"max_sequence_length": length}
    if name == "flux_kontext":
        return {"guidance_scale": scale, **text, **size, **kontext_keys(Image.new("RGB", (16, 16)))}
    if name in ("sana", "pixart_sigma"):
        # Sizes of the model's own list would be taken instead of these.
        text, negative = {**KEYS[name], "use_resolution_binning": False}, negative or ""
        text |= {"height": 32, "width": 32} if name == "sana" else {}
    if name in WITHOUT_NEGATIVE:
        return {"guidance_scale": scale, **text, **size}
    text |= size if name == "z_image" else {}
    return {"guidance_scale": scale, "negative_prompt": None if negative is None else [negative] * 2, **text}


def take_first_order_steps(name: str, pipeline: Any) -> None:
    """Give a pipeline the scheduler class whose steps without noise are those of samplers."""
    import diffusers

    if name in BY_DDIM:
        pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    elif isinstance(pipeline.scheduler, diffusers.DPMSolverMultistepScheduler):
        keys: Any = {"solver_order": 1, "algorithm_type": "dpmsolver++"}
        pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, **keys)


def load_lora(pipeline: Any, folder: Path) -> None:
    """Load a LoRA as its users do: with diffusers or, where diffusers has no loader for the network, with PEFT."""
    if hasattr(pipeline, "load_lora_weights"):
        pipeline.load_lora_weights(folder)
        return
    from peft import PeftModel

    pipeline.transformer = PeftModel.from_pretrained(pipeline.transformer, str(folder))


def policy_table(name: str, model: Path, **keys: Any) -> dict[str, Any]:
    """Return the recipe's `[policy]` for a family's small model."""
    return {"name": name, "model": str(model), **KEYS.get(name, {}), **keys}
