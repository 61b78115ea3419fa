"""Stable Diffusion 1.x and 2.x: CLIP text, UNet with classifier-free guidance, DDIM steps, AutoencoderKL or AutoencoderTiny."""

import os
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from pydantic import Field
from torch import Tensor

from common.diffusion.compiled import CompiledNetwork
from common.diffusion.lora import (
    LoraSettings,
    MergedAdapters,
    compute_adapters_in,
    load_lora,
    make_trainable,
    save_lora,
)
from common.diffusion.policy import EMBEDDED_MODELS, Conditioning, Policy, PolicyConfig, Role, autocast, quiet_libraries
from common.diffusion.scheduler_ddim import ddim_table, ddim_transition, training_target
from common.diffusion.sizes import DeviceKind, PolicySizes
from common.diffusion.stable_diffusion_sizes import Training, part_config, stable_diffusion_sizes
from common.diffusion.transition import Transition
from common.model_hub import Weights, read_from_hub
from common.recipe_tables import SamplingTable
from common.trajectory import DTYPES

EMBEDDINGS_KEPT = 4096  # prompts; 118 kB each for SD 1.5 in half precision
LEARNER_NEEDS_NO = ("vae", "text_encoder", "tokenizer")


class StableDiffusionPolicy(Policy):
    """A loaded pipeline as a policy. Runs the same numerics in sampler and learner."""

    def __init__(
        self, config: "StableDiffusion", pipeline: Any, device: str, sampling: SamplingTable, role: Role
    ) -> None:
        self.config = config
        self.device = device
        self.dtype = config.dtype_of(role)
        # Channels last is what GPUs convolve fastest; on a CPU the embedded model is a seventh slower in it.
        layout = torch.channels_last if device.startswith("cuda") else torch.contiguous_format
        self.network: Any = pipeline.unet.to(device, memory_format=layout).eval()
        self.vae: Any = None
        if pipeline.vae:
            self.vae = pipeline.vae.to(device, memory_format=layout).eval().requires_grad_(False)
        self.text_encoder: Any = (
            pipeline.text_encoder.to(device).eval().requires_grad_(False) if pipeline.text_encoder else None
        )
        self.tokenizer = pipeline.tokenizer
        self.guidance_scale = sampling.guidance_scale
        self.num_steps = sampling.num_steps
        self.table = ddim_table(pipeline.scheduler.config, sampling.num_steps, sampling.eta, device)
        self.training_alphas = pipeline.scheduler.alphas_cumprod.to(device)
        self.num_train_timesteps = len(self.training_alphas)
        size = config.latent_size() or self.network.config.sample_size
        self.latent_shape = (self.network.config.in_channels, size, size)
        self._embeddings: dict[str, Tensor] = {}
        make_trainable(self.network, config.train, config.lora)
        if config.train == "lora" and self.dtype != torch.float32:
            compute_adapters_in(self.network, device, self.dtype)
        self._autocast = autocast(device, self.dtype if config.train == "full" else torch.float32)
        self.merged = MergedAdapters(self.network) if config.merge_adapters and role == "sampler" else None
        self._compiled: CompiledNetwork | None = None

    def compile(self, batch_size: int) -> None:
        branches = 1 if self.guidance_scale == 1 else 2
        self._compiled = CompiledNetwork(self.network, batch_size * branches)

    @property
    def noisy_steps(self) -> list[int]:
        return torch.nonzero(self.table.std() > 0).flatten().tolist()

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        return {
            "prompt_embeds": torch.cat([self._embedding(prompt) for prompt in prompts]),
            "negative_prompt_embeds": self._embedding(""),
        }

    def _embedding(self, prompt: str) -> Float[Tensor, "1 L D"]:
        # One prompt at a time: in a batch its last bits would depend on which prompts stand beside it.
        if prompt not in self._embeddings:
            if len(self._embeddings) >= EMBEDDINGS_KEPT:
                del self._embeddings[next(iter(self._embeddings))]
            tokens = self.tokenizer(
                prompt,
                padding="max_length",
                truncation=True,
                max_length=self.tokenizer.model_max_length,
                return_tensors="pt",
            )
            self._embeddings[prompt] = self.text_encoder(tokens.input_ids.to(self.device))[0]
        return self._embeddings[prompt]

    def initial_latents(self, noise: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        return noise

    def transition(
        self, latents: Float[Tensor, "B C H W"], steps: Int[Tensor, "B"], conditioning: Conditioning, noisy: bool = True
    ) -> Transition:
        output = self._guided(latents, self.table.timesteps[steps], conditioning)
        return ddim_transition(self.table, latents, output, steps, noisy)

    def _guided(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Classifier-free guidance (Ho & Salimans 2022), both branches in one batch, joined in float32."""
        embeds = conditioning["prompt_embeds"]
        if self.guidance_scale == 1:
            return self._predict(latents, timesteps, embeds)
        both = self._predict(
            latents.repeat(2, 1, 1, 1), timesteps.repeat(2), torch.cat([conditioning["negative_prompt_embeds"], embeds])
        )
        unconditional, conditional = both.float().chunk(2)
        return unconditional + self.guidance_scale * (conditional - unconditional)

    def _predict(self, latents: Tensor, timesteps: Tensor, embeds: Tensor) -> Tensor:
        inputs = latents.to(self.dtype), timesteps, embeds.to(self.dtype)
        with self._autocast:
            return self._compiled(*inputs) if self._compiled else self.network(*inputs, return_dict=False)[0]

    def denoise(
        self,
        clean_latents: Float[Tensor, "B C H W"],
        noise: Float[Tensor, "B C H W"],
        timesteps: Int[Tensor, "B"],
        conditioning: Conditioning,
    ) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B C H W"]]:
        alphas = self.training_alphas[timesteps]
        column = alphas.view(-1, 1, 1, 1)
        noised = column.sqrt() * clean_latents.float() + (1 - column).sqrt() * noise
        predicted = self._guided(noised, timesteps, conditioning).float()
        return predicted, training_target(self.table.prediction_type, clean_latents.float(), noise, alphas)

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "B C H W"]) -> UInt8[Tensor, "B H2 W2 3"]:
        scaled = latents.to(self.vae.dtype) / self.vae.config.scaling_factor
        pixels = self.vae.decode(scaled, return_dict=False)[0].float() / 2 + 0.5
        return (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)

    def save(self, folder: Path) -> Path:
        if self.config.train == "full":
            self.network.save_pretrained(folder / "unet", safe_serialization=True)
            return folder / "unet"
        return save_lora(self.network, self.config.lora, folder / "lora")

    def restore(self, path: Path) -> None:
        if self.config.train == "lora":
            return load_lora(self.network, path)
        from diffusers import UNet2DConditionModel

        self.network.load_state_dict(UNet2DConditionModel.from_pretrained(path, use_safetensors=True).state_dict())


class StableDiffusion(PolicyConfig):
    """`model`: a folder in diffusers' format, a hub name, or "tiny_animals", the model that ships with the project."""

    lora: LoraSettings = LoraSettings()
    resolution: int | None = Field(default=None, ge=8, multiple_of=8)  # pixels a side; None: the model's own

    def check(self) -> None:
        if self.train == "full" and self.dtype == "float16":
            raise ValueError(
                "policy.train is 'full' and policy.dtype is 'float16': whole networks train in float32 or bfloat16"
            )
        folder = self._folder()
        looks_like_path = self.model.startswith((".", "/", "~")) or self.model.count("/") != 1
        if (looks_like_path or folder.exists()) and not (folder / "model_index.json").is_file():
            raise ValueError(
                f"policy.model is {self.model!r}: there is no model_index.json in {folder}; "
                f"give a folder in diffusers' format, a hub name (owner/model) or one of {sorted(EMBEDDED_MODELS)}"
            )

    def _folder(self) -> Path:
        return EMBEDDED_MODELS.get(self.model, Path(os.path.expanduser(self.model)))

    def latent_size(self) -> int | None:
        """Latents a side at `resolution`; None: the model's own. From a file, for a learner loads no decoder to ask."""
        if self.resolution is None:
            return None
        config = part_config(self.model, self._folder(), "vae")
        channels = config.get("block_out_channels") or config["encoder_block_out_channels"]  # AutoencoderTiny's
        return self.resolution // 2 ** (len(channels) - 1)

    def needs(self) -> tuple[Weights, ...]:
        source = str(self._folder()) if self._folder().exists() else self.model
        parts = tuple(f"{part}/*.safetensors" for part in ("unet", "vae", "text_encoder"))
        return (Weights(source, ("model_index.json", *parts), "policy.model"),)

    def sizes(self, sampling: SamplingTable, device: DeviceKind = "cuda") -> PolicySizes:
        configs = {part: part_config(self.model, self._folder(), part) for part in ("unet", "vae", "text_encoder")}
        configs["unet"] = {**configs["unet"], "sample_size": self.latent_size() or configs["unet"]["sample_size"]}
        dtypes = self.dtype_of("learner"), self.dtype_of("sampler")
        training = Training(self.train, self.lora, *dtypes, self.gradient_checkpointing, self.merge_adapters)
        return stable_diffusion_sizes(configs, training, sampling, device)

    def load(self, device: str, sampling: SamplingTable, role: Role) -> StableDiffusionPolicy:
        quiet_libraries()
        from diffusers import DDIMScheduler, StableDiffusionPipeline

        self.check()
        source = self._folder() if self._folder().exists() else self.model
        left_out = {part: None for part in LEARNER_NEEDS_NO if role == "learner"}
        keys = {"safety_checker": None, "requires_safety_checker": False, **left_out}
        keys["dtype"] = torch.float32 if self.train == "full" else DTYPES[self.dtype]  # master weights are float32
        pipeline = read_from_hub(
            lambda local: StableDiffusionPipeline.from_pretrained(
                source, local_files_only=local, use_safetensors=True, trust_remote_code=False, **keys
            ),
            f"policy.model is {self.model!r}, which cannot be loaded",
        )
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
        if role == "sampler" and self.train == "lora":  # text encoder and decoder stay as they are
            pipeline.unet.to(self.dtype_of(role))
        if self.gradient_checkpointing and role == "learner":
            pipeline.unet.enable_gradient_checkpointing()
        return StableDiffusionPolicy(self, pipeline, device, sampling, role)
