"""Small pipelines of the model families with random weights, of diffusers' own classes and in their format."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ray_ddpo.common.diffusion.families.packing import packed
from tests.tiny_decoders import EIGHTFOLD, FLOW_AUTOENCODER
from tests.tiny_flux2 import save_tiny_flux2, save_tiny_flux2_klein
from tests.tiny_hunyuan_image import save_tiny_hunyuan_image
from tests.tiny_language_models import tiny_chat_tokenizer, tiny_qwen3
from tests.tiny_pipeline import save_tiny_inpainting, save_tiny_pipeline, tiny_tokenizer
from tests.tiny_qwen_image import save_tiny_qwen_image, save_tiny_qwen_image_edit, save_tiny_qwen_image_edit_plus
from tests.tiny_text_to_image import (
    save_tiny_lumina2,
    save_tiny_pixart_sigma,
    save_tiny_sana,
    tiny_t5,
    tiny_t5_tokenizer,
)
from tests.tiny_video import (
    FRAMES,
    save_tiny_ltx,
    save_tiny_wan,
    save_tiny_wan22,
    save_tiny_wan22_i2v,
    save_tiny_wan_i2v,
    save_tiny_wan_ti2v,
)

DDIM = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


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
        text_encoder=tiny_qwen3(32, len(tokenizer)),
        tokenizer=tokenizer,
    ).save_pretrained(folder, safe_serialization=True)
    return folder


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
    "qwen_image_edit": save_tiny_qwen_image_edit,
    "qwen_image_edit_plus": save_tiny_qwen_image_edit_plus,
    "flux2": save_tiny_flux2,
    "flux2_klein": save_tiny_flux2_klein,
    "flux2_edit": save_tiny_flux2,
    "flux2_klein_edit": save_tiny_flux2_klein,
    "z_image": save_tiny_z_image,
    "hunyuan_image": save_tiny_hunyuan_image,
    "lumina2": save_tiny_lumina2,
    "pixart_sigma": save_tiny_pixart_sigma,
    "sana": save_tiny_sana,
    "wan": save_tiny_wan,
    "wan22": save_tiny_wan22,
    "ltx": save_tiny_ltx,
    "wan_i2v": save_tiny_wan_i2v,
    "wan22_i2v": save_tiny_wan22_i2v,
    "wan_ti2v": save_tiny_wan_ti2v,
}
FROM_OUTSIDE: dict[str, Callable[[Path], Path]] = {  # as docs/extending.md has them
    "digits:Digits": save_tiny_digits,
    "shapes:Shapes": save_tiny_shapes,
}
QWEN_IMAGE = ("qwen_image", "qwen_image_edit", "qwen_image_edit_plus")
EDITING = (
    *("flux_kontext", "sd_inpainting", "qwen_image_edit", "qwen_image_edit_plus"),
    *("flux2_edit", "flux2_klein_edit"),
)
# Families with a mask get prompts of different lengths, so that their masks differ.
PROMPTS = {
    **dict.fromkeys((*QWEN_IMAGE, "lumina2", "pixart_sigma", "sana", "ltx"), ["a cat", "a calf", "cow"]),
    "hunyuan_image": ["a cat", 'a "calf"', "cow"],  # one with a text for the ByT5
    "z_image": ["a cat", "a long calf", "cow"],  # 32, 38 and 30 tokens with the template, and so 32 and 64 with filling
    "digits:Digits": ["seven", "3", "a two"],
    "shapes:Shapes": ["disc", "ring", "cross"],
}
KEYS: dict[str, dict[str, Any]] = {  # of `[policy]`, that such a small model needs
    "sd3": {"max_sequence_length": 12},
    "flux": {"max_sequence_length": 12, "resolution": 16},
    "flux_kontext": {"max_sequence_length": 12, "resolution": 16},
    "qwen_image": {"max_sequence_length": 12, "resolution": 16},
    "qwen_image_edit": {"max_sequence_length": 14, "resolution": 16},  # with 2 marks of the image
    "qwen_image_edit_plus": {"max_sequence_length": 25, "resolution": 16},  # with "Picture 1: " as well
    **dict.fromkeys(
        ("flux2", "flux2_klein", "flux2_edit", "flux2_klein_edit"), {"max_sequence_length": 17, "resolution": 16}
    ),
    "z_image": {"max_sequence_length": 38, "resolution": 16},
    "hunyuan_image": {"max_sequence_length": 12, "resolution": 16},
    "lumina2": {"max_sequence_length": 15},
    "pixart_sigma": {"max_sequence_length": 12},
    "sana": {"max_sequence_length": 14},
    **dict.fromkeys(
        ("wan", "wan22", "wan22_i2v", "wan_ti2v"), {"max_sequence_length": 12, "resolution": 16, "num_frames": FRAMES}
    ),
    "wan_i2v": {"resolution": 16, "num_frames": FRAMES},
    "ltx": {"max_sequence_length": 12, "resolution": 32, "num_frames": FRAMES},
}


SAFETY_CHECKED = ("stable_diffusion", "sd_inpainting")  # families whose pipelines ask for a safety checker
BY_DDIM = (*SAFETY_CHECKED, "sdxl", "pixart_sigma")  # families that step by DDIM
PACKED = ("flux", "flux_kontext", *QWEN_IMAGE)  # families whose pipelines take and give tokens instead of latents
UNGUIDED = ("flux", "flux_kontext", "flux2", "flux2_edit")  # families whose guidance is an input of the network
FROM_IMAGES = ("wan_i2v", "wan22_i2v", "wan_ti2v")
VIDEO = ("wan", "wan22", "ltx", *FROM_IMAGES)
WITHOUT_NEGATIVE = (*UNGUIDED, "flux2_klein", "flux2_klein_edit")  # families whose pipelines take no negative prompt


def image_keys(name: str, image: Image.Image) -> dict[str, Any]:
    """Return the arguments with which a family's own pipeline edits an image of the output's size, all of it."""
    if name == "sd_inpainting":
        return {"image": image, "mask_image": Image.new("L", image.size, 255)}
    if name == "flux_kontext":
        return {"image": image, "max_area": image.width * image.height, "_auto_resize": False}
    return {"image": image} if name in (*EDITING, *FROM_IMAGES) else {}


def given_latents(name: str, latents: torch.Tensor) -> torch.Tensor:
    """Return latents as the family's own pipeline takes them."""
    if name == "ltx":
        return latents.flatten(2).transpose(1, 2)
    return packed(latents) if name in PACKED else latents


def shown_latents(name: str, latents: torch.Tensor) -> torch.Tensor:
    """Return latents as the family's own pipeline shows them after a step."""
    if name == "wan_ti2v":
        return latents[:, :, 1:]  # the first frame is the input image's
    return latents.flatten(2).transpose(1, 2) if name.startswith("flux2") else given_latents(name, latents)


def call_keys(name: str, scale: float, negative: str | None = None) -> dict[str, Any]:
    """Return the arguments with which a family's own pipeline samples two images of the small model with guidance."""
    size = {"height": 16, "width": 16}
    size |= image_keys(name, Image.new("RGB", (16, 16)))
    if name in QWEN_IMAGE:
        negatives = [" " if negative is None else negative] * 2
        return {"true_cfg_scale": scale, "negative_prompt": negatives, "max_sequence_length": 12, **size}
    length = KEYS.get(name, {}).get("max_sequence_length")
    text = {} if length is None else {"max_sequence_length": length}
    if name in ("sana", "pixart_sigma"):
        # Sizes of the model's own list would be taken instead of these.
        text, negative = {**KEYS[name], "use_resolution_binning": False}, negative or ""
        text |= {"height": 32, "width": 32} if name == "sana" else {}
    if name in WITHOUT_NEGATIVE:
        return {"guidance_scale": scale, **text, **size}
    text |= size if name in ("z_image", "hunyuan_image", "sd_inpainting", *VIDEO) else {}
    text |= {"num_frames": FRAMES, "output_type": "pil"} if name in VIDEO else {}
    text |= {"height": 32, "width": 32} if name == "ltx" else {}
    return {"guidance_scale": scale, "negative_prompt": None if negative is None else [negative] * 2, **text}


def shown(made: Sequence[Any]) -> np.ndarray:
    """Return what a family's own pipeline made, images or lists of frames, as numbers of 0 to 255."""
    clips = [np.stack([np.asarray(frame) for frame in each]) if isinstance(each, list) else each for each in made]
    return np.stack([np.asarray(each) for each in clips]).astype(int)


def take_first_order_steps(name: str, pipeline: Any) -> None:
    """Give a pipeline the scheduler class whose steps without noise are those of samplers."""
    import diffusers

    if name in BY_DDIM:
        pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    elif isinstance(pipeline.scheduler, diffusers.DPMSolverMultistepScheduler):
        keys: Any = {"solver_order": 1, "algorithm_type": "dpmsolver++"}
        pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, **keys)
    elif isinstance(pipeline.scheduler, diffusers.UniPCMultistepScheduler):
        keys = {"solver_order": 1, "disable_corrector": list(range(100))}
        pipeline.scheduler = diffusers.UniPCMultistepScheduler.from_config(pipeline.scheduler.config, **keys)


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
