"""The registry of model families, which encode prompts, take steps, and decode images. One file and one line each."""

from ray_ddpo.common.recipe.registry import Registry

POLICIES: Registry = {
    "stable_diffusion": "ray_ddpo.common.diffusion.families.stable_diffusion:StableDiffusion",
    "sd_inpainting": "ray_ddpo.common.diffusion.families.stable_diffusion:StableDiffusionInpainting",
    "sdxl": "ray_ddpo.common.diffusion.families.sdxl:SDXL",
    "sd3": "ray_ddpo.common.diffusion.families.sd3:SD3",
    "flux": "ray_ddpo.common.diffusion.families.flux:Flux",
    "flux_kontext": "ray_ddpo.common.diffusion.families.flux:FluxKontext",
    "qwen_image": "ray_ddpo.common.diffusion.families.qwen_image:QwenImage",
    "qwen_image_edit": "ray_ddpo.common.diffusion.families.qwen_image:QwenImageEdit",
    "qwen_image_edit_plus": "ray_ddpo.common.diffusion.families.qwen_image:QwenImageEditPlus",
    "flux2": "ray_ddpo.common.diffusion.families.flux2:Flux2",
    "flux2_klein": "ray_ddpo.common.diffusion.families.flux2:Flux2Klein",
    "flux2_edit": "ray_ddpo.common.diffusion.families.flux2:Flux2Edit",
    "flux2_klein_edit": "ray_ddpo.common.diffusion.families.flux2:Flux2KleinEdit",
    "z_image": "ray_ddpo.common.diffusion.families.z_image:ZImage",
    "hunyuan_image": "ray_ddpo.common.diffusion.families.hunyuan_image:HunyuanImage",
    "lumina2": "ray_ddpo.common.diffusion.families.lumina2:Lumina2",
    "pixart_sigma": "ray_ddpo.common.diffusion.families.pixart_sigma:PixArtSigma",
    "sana": "ray_ddpo.common.diffusion.families.sana:Sana",
    "wan": "ray_ddpo.common.diffusion.families.wan:Wan",
    "wan22": "ray_ddpo.common.diffusion.families.wan22:Wan22",
    "ltx": "ray_ddpo.common.diffusion.families.ltx:LTX",
    "wan_i2v": "ray_ddpo.common.diffusion.families.wan_i2v:WanImage",
    "wan22_i2v": "ray_ddpo.common.diffusion.families.wan22_i2v:Wan22Image",
    "wan_ti2v": "ray_ddpo.common.diffusion.families.wan_ti2v:WanTextImage",
}
