"""A diffusers pipeline as a policy: guidance, steps, decoding and files, which all families share."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from ray_ddpo.common.diffusion.compiled import CompiledNetwork
from ray_ddpo.common.diffusion.guidance import guided
from ray_ddpo.common.diffusion.lora.adapters import MergedAdapters, compute_adapters_in
from ray_ddpo.common.diffusion.lora.diffusers_format import load_any_lora, loadable_encoders
from ray_ddpo.common.diffusion.lora.files import LoraFile
from ray_ddpo.common.diffusion.lora.start import make_trainable
from ray_ddpo.common.diffusion.policy import Conditioning, Policy, Role, autocast
from ray_ddpo.common.diffusion.prompt_lengths import TextReader
from ray_ddpo.common.diffusion.schedulers.ddim import ddim_table
from ray_ddpo.common.diffusion.schedulers.denoising_steps import DenoisingSteps
from ray_ddpo.common.diffusion.trained_weights import restore_trained, save_trained
from ray_ddpo.common.diffusion.transition import Transition
from ray_ddpo.common.recipe.tables import SamplingTable

if TYPE_CHECKING:
    from ray_ddpo.common.diffusion.loading.diffusers_config import DiffusersConfig

EMBEDDING_BYTES = 1 << 29  # cached prompt embeddings: 4,500 prompts of SD 1.5 in half precision, 127 of FLUX

# As most pipelines return prompts.
EMBEDDINGS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
NetworkCall = Callable[..., Tensor]  # (network, latents, timesteps, **rows of conditioning) → the network's output


class DiffusersPolicy(Policy):
    """A loaded pipeline as a policy. Sampler and learner run the same numerics."""

    def __init__(
        self, config: "DiffusersConfig", pipeline: Any, device: str, sampling: SamplingTable, role: Role
    ) -> None:
        self.config = config
        self.device = device
        self.dtype = config.dtype_of(role)
        # GPUs convolve fastest in channels_last; on a CPU the embedded model is a seventh slower with it.
        memory_format = torch.channels_last if device.startswith("cuda") else torch.contiguous_format
        self.network: Any = getattr(pipeline, config.network_name).to(device, memory_format=memory_format).eval()
        self.pipeline = pipeline
        self.vae: Any = pipeline.vae
        self.text_encoders: list[Any] = [getattr(pipeline, part, None) for part in config.text_parts]
        idle_device = "cpu" if config.offload else device
        for part in (part for part in (self.vae, *self.text_encoders) if part is not None):
            part.to(idle_device, memory_format=memory_format).eval().requires_grad_(False)
        self.guidance_scale = sampling.guidance_scale
        self.negative_prompt = sampling.negative_prompt
        self.branches = config.branches(sampling)
        self.num_steps = sampling.num_steps
        self.latent_shape = config.latent_shape(dict(self.network.config))
        self.steps: DenoisingSteps = self._table(sampling)
        self.num_train_timesteps = self.steps.num_train_timesteps
        self._call = functools.partial(config.network_call(sampling), self.network)
        self._embeddings: dict[str, Conditioning] = {}
        make_trainable(self.network, config.train, config.lora)
        self.network.eval()  # again, because adapters from a file may have dropout
        if config.train == "lora" and self.dtype != torch.float32:
            compute_adapters_in(self.network, device, self.dtype)
        self._autocast = autocast(device, self.dtype if config.train == "full" else torch.float32)
        self.merged = MergedAdapters(self.network) if config.merge_adapters and role != "learner" else None
        self._compiled: CompiledNetwork | None = None

    def _table(self, sampling: SamplingTable) -> DenoisingSteps:
        """Return the denoising steps, on the device. `pipeline`, `latent_shape` and `device` are set already."""
        return ddim_table(self.pipeline.scheduler.config, sampling.num_steps, sampling.eta, self.device)

    def _encode(self, prompt: str, with_negative: bool, **keys: Any) -> Conditioning:
        """Encode one prompt in the text encoders' dtype. Return one row per tensor.

        Args:
            prompt: the text.
            with_negative: whether to return the `negative_…` tensors of `negative_prompt` too, which all prompts share.
            keys: further arguments of the pipeline's `encode_prompt`.
        """
        encoded = self.pipeline.encode_prompt(
            prompt,
            device=self.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=with_negative,
            negative_prompt=self.negative_prompt,  # None stays None: an empty text is encoded, None may mean zeros
            **keys,
        )
        return {name: value for name, value in zip(EMBEDDINGS, encoded, strict=False) if value is not None}

    @contextmanager
    def _at_work(self, *parts: Any) -> Iterator[None]:
        """Move offloaded parts to the device for the duration of the body."""
        parts = tuple(part for part in parts if part is not None) if self.config.offload else ()
        for part in parts:
            part.to(self.device)
        try:
            yield
        finally:
            for part in parts:
                part.to("cpu")

    def compile(self, batch_size: int) -> None:
        self._compiled = CompiledNetwork(self._call, batch_size * self.branches)

    def image_size(self) -> tuple[int, int]:
        height, width = self.latent_shape[1:]
        return self.config.scale_factor * height, self.config.scale_factor * width

    @property
    def stochastic_steps(self) -> list[int]:
        return torch.nonzero(self.steps.std() > 0).flatten().tolist()

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        # One prompt at a time: in a batch, its last bits would depend on the other prompts.
        missing = [prompt for prompt in ("", *prompts) if prompt not in self._embeddings]
        new: dict[str, Conditioning] = {}
        if missing:
            with self._at_work(*self.text_encoders):
                new = {prompt: self._encode(prompt, with_negative=not prompt) for prompt in missing}
        known = self._embeddings | new
        for prompt, row in new.items():
            most = EMBEDDING_BYTES // sum(value.nbytes for value in row.values())
            if len(self._embeddings) >= max(most, 2):  # drop the oldest, but not the empty prompt: each task needs it
                del self._embeddings[next(each for each in self._embeddings if each)]
            self._embeddings[prompt] = row
        shared = {name: value for name, value in known[""].items() if name.startswith("negative_")}
        names = [name for name in known[""] if name not in shared]
        return {**{name: torch.cat([known[prompt][name] for prompt in prompts]) for name in names}, **shared}

    def text_readers(self) -> list[TextReader]:
        readers = []
        for name in self.config.tokenizers:
            part, tokenizer = name.replace("tokenizer", "text_encoder"), getattr(self.pipeline, name, None)
            if tokenizer is not None:
                # diffusers truncates for CLIP at the first tokenizer's length, and for T5 at its caller's.
                length = getattr(self.pipeline, "tokenizer_max_length", tokenizer.model_max_length)
                if self.config.text_parts[part][1] == "T5EncoderModel":
                    length = getattr(self.config, "max_sequence_length", length)
                readers.append(TextReader(part, tokenizer, length))
        return readers

    def transition(
        self,
        latents: Float[Tensor, "B C H W"],
        steps: Int[Tensor, "B"],
        conditioning: Conditioning,
        stochastic: bool = True,
    ) -> Transition:
        output = self._guided(latents, self.steps.timesteps[steps], conditioning)
        return self.steps.transition(latents, output, steps, stochastic)

    def _guided(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        scale = self.guidance_scale if self.branches == 2 else None
        return guided(self._predict, latents, timesteps, conditioning, scale)

    def _predict(self, latents: Tensor, timesteps: Tensor, rows: Conditioning) -> Tensor:
        in_dtype = {name: value.to(self.dtype) if value.is_floating_point() else value for name, value in rows.items()}
        with self._autocast:
            return (self._compiled or self._call)(latents=latents.to(self.dtype), timesteps=timesteps, **in_dtype)

    def denoise(
        self,
        clean_latents: Float[Tensor, "B C H W"],
        noise: Float[Tensor, "B C H W"],
        timesteps: Int[Tensor, "B"],
        conditioning: Conditioning,
    ) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B C H W"]]:
        noised, timestep_input, target = self.steps.add_noise(clean_latents.float(), noise, timesteps)
        return self._guided(noised, timestep_input, conditioning).float(), target

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "B C H W"]) -> UInt8[Tensor, "B H2 W2 3"]:
        with self._at_work(self.vae):
            pixels = self.vae.decode(self._unscaled(latents.to(self.vae.dtype)), return_dict=False)[0]
        pixels = pixels.float() / 2 + 0.5
        finite = pixels.isfinite().flatten(1).all(1).tolist()
        self.not_finite = tuple(row for row, is_finite in enumerate(finite) if not is_finite)
        return (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)

    def _unscaled(self, latents: Tensor) -> Tensor:
        """Return latents as the decoder takes them. Each diffusers pipeline honours other keys here."""
        shift = getattr(self.vae.config, "shift_factor", None)
        scaled = latents / self.vae.config.scaling_factor
        return scaled if shift is None else scaled + shift

    def save(self, folder: Path) -> Path:
        return save_trained(self.network, self.config.train, self.config.lora, folder, self.config.network_name)

    def restore(self, path: Path) -> None:
        restore_trained(self.network, self.config.train, path)

    def take_lora(self, file: LoraFile) -> None:
        """Replace the policy's adapters by any LoRA that diffusers reads. The new adapters are not trained.

        Raises:
            ValueError: The file has another format, or does not fit network and text encoders.
        """
        self.network.unload_lora()
        encoders = loadable_encoders(self.pipeline)
        load_any_lora(file, self.network, self.config.network_name, encoders)
        for part in (self.network, *encoders.values()):
            part.eval().requires_grad_(False)
        self._embeddings.clear()
        self.merged = None
