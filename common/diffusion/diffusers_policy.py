"""A diffusers pipeline as a policy: guidance, steps, decoding and files, which all families share."""

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from ray_ddpo.common.diffusion.compiled import CompiledNetwork, repeated_blocks
from ray_ddpo.common.diffusion.graphed import CudaRecorder, GraphedNetwork, Recorder
from ray_ddpo.common.diffusion.guidance import extrapolated, guided, join_branches
from ray_ddpo.common.diffusion.host_loading import has_unread, loads_on_host
from ray_ddpo.common.diffusion.lora.adapters import MergedAdapters, compute_adapters_in
from ray_ddpo.common.diffusion.lora.diffusers_format import (
    load_any_lora,
    loadable_encoders,
    save_for_peft,
    save_for_second_network,
)
from ray_ddpo.common.diffusion.lora.files import LoraFile
from ray_ddpo.common.diffusion.lora.start import make_trainable
from ray_ddpo.common.diffusion.network_storage import network_format, store_in_dtype
from ray_ddpo.common.diffusion.offload import on_device
from ray_ddpo.common.diffusion.policy import Conditioning, Policy, Role, autocast
from ray_ddpo.common.diffusion.prompt_lengths import TextReader
from ray_ddpo.common.diffusion.schedulers.ddim import ddim_table
from ray_ddpo.common.diffusion.schedulers.denoising_steps import DenoisingSteps
from ray_ddpo.common.diffusion.schedulers.flow_match import FlowMatchTable, flow_match_table
from ray_ddpo.common.diffusion.trained_weights import restore_trained, save_trained
from ray_ddpo.common.diffusion.transition import Transition
from ray_ddpo.common.diffusion.unit_divisors import compute_unit_divisions, skip_unit_divisions
from ray_ddpo.common.recipe.tables import SamplingTable

if TYPE_CHECKING:
    from ray_ddpo.common.diffusion.loading.diffusers_config import DiffusersConfig

EMBEDDING_BYTES = 1 << 29  # cached prompt embeddings: 4,500 prompts of SD 1.5 in half precision, 127 of FLUX

# As most pipelines return prompts.
EMBEDDINGS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
# As pipelines of a single text encoder return prompts with their masks.
MASKED_EMBEDDINGS = (
    *("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask"),
)
NetworkCall = Callable[..., Tensor]  # (network, latents, timesteps, **rows of conditioning) → the network's output


class DiffusersPolicy(Policy):
    """A loaded pipeline as a policy. Sampler and learner run the same numerics."""

    embeddings: ClassVar[tuple[str, ...]] = EMBEDDINGS  # what the pipeline's `encode_prompt` returns, in its order
    default_negative: ClassVar[str | None] = None  # None is not the empty text, and may mean zeros
    count_key: ClassVar[str] = "num_images_per_prompt"  # of the pipeline's `encode_prompt`
    adds_shift: ClassVar[bool] = True  # whether the pipeline honours the decoder's `shift_factor`

    def __init__(
        self, config: "DiffusersConfig", pipeline: Any, device: str, sampling: SamplingTable, role: Role
    ) -> None:
        self.config = config
        self.device = device
        self.dtype = config.dtype_of(role)
        on_host = loads_on_host()
        memory_format = network_format("cpu" if on_host else device, config.is_compiled(role), config.has_frames)
        placed = {"device": "cpu" if on_host else device, "memory_format": memory_format}
        network: Any = getattr(pipeline, config.trained_part)
        self.network: Any = (network if has_unread() else network.to(**placed)).eval()
        self.pipeline = pipeline
        self.reads_inputs, self.most_inputs = config.reads_inputs, config.most_inputs
        self.vae: Any = pipeline.vae
        self.text_encoders: list[Any] = [getattr(pipeline, part, None) for part in config.text_parts]
        idle_device = "cpu" if config.offload else device
        for part in (part for part in (self.vae, *self.text_encoders) if part is not None):
            part.to(idle_device).eval().requires_grad_(False)
        self.guidance_scale = sampling.guidance_scale
        self.negative_prompt = sampling.negative_prompt
        self.branches = config.branches(sampling)
        self.guided_above = config.guided_above
        self.num_steps = sampling.num_steps
        self.latent_shape = config.latent_shape(dict(self.network.config))
        self.steps: DenoisingSteps = self._table(sampling)
        self.num_train_timesteps = self.steps.num_train_timesteps
        self._stochastic_steps: list[int] = torch.nonzero(self.steps.std() > 0).flatten().tolist()
        self._call = functools.partial(config.network_call(sampling), self.network)
        self._embeddings: dict[Hashable, Conditioning] = {}
        make_trainable(self.network, config.train, config.lora)
        skip_unit_divisions(self.network)
        self.network.eval()  # again, because adapters from a file may have dropout
        if config.train == "lora" and self.dtype != torch.float32:
            compute_adapters_in(self.network, device, self.dtype)
        if role != "learner" and not config.merge_adapters:
            store_in_dtype(self.network, config.train, self.dtype)
        # Weights that are gathered block by block must not stay in autocast's cache, which holds all of them.
        self._autocast = autocast(device, self.dtype if config.train == "full" else torch.float32, cached=not on_host)
        self.merged = MergedAdapters(self.network) if config.merge_adapters and role != "learner" else None
        if config.sampler_storage is not None and role != "learner":  # of the layers, but for norms and adapters
            storage_dtype = getattr(torch, config.sampler_storage)
            self.network.enable_layerwise_casting(storage_dtype=storage_dtype, compute_dtype=self.dtype)
        self._compiled: CompiledNetwork | None = None

    def _table(self, sampling: SamplingTable) -> DenoisingSteps:
        """Return the denoising steps, on the device. `pipeline`, `latent_shape` and `device` are set already."""
        return ddim_table(self.pipeline.scheduler.config, sampling.num_steps, sampling.eta, self.device)

    def _flow_table(
        self, sampling: SamplingTable, patch: int, evenly_spaced: bool, shift: float | None = None
    ) -> FlowMatchTable:
        """Return a flow's steps, on the device, for a network that reads `patch` × `patch` latents as a token."""
        *frames, height, width = self.latent_shape[1:]
        tokens = math.prod(frames) * (height // patch) * (width // patch)
        scheduler, steps = self.pipeline.scheduler.config, sampling.num_steps
        table = flow_match_table(scheduler, steps, sampling.eta, tokens, evenly_spaced, sampling.sde, shift)
        return table.to(self.device)

    def _solver_table(self, sampling: SamplingTable) -> FlowMatchTable:
        """Return the steps of a flow whose scheduler may be a solver, on the device, as its noise levels are."""
        scheduler = self.pipeline.scheduler
        keys = {**scheduler.config, "_class_name": type(scheduler).__name__}
        return flow_match_table(keys, sampling.num_steps, sampling.eta, None, False, sampling.sde).to(self.device)

    def _encode(self, prompt: str, with_negative: bool, **keys: Any) -> Conditioning:
        """Encode one prompt in the text encoders' dtype. Return one row per tensor.

        Args:
            prompt: the text.
            with_negative: whether to return the `negative_…` tensors of `negative_prompt` too, which all prompts share.
            keys: further arguments of the pipeline's `encode_prompt`.
        """
        negative = self.default_negative if self.negative_prompt is None else self.negative_prompt
        encoded = self.pipeline.encode_prompt(
            prompt,
            device=self.device,
            do_classifier_free_guidance=with_negative,
            negative_prompt=negative,
            **{self.count_key: 1},
            **keys,
        )
        return {name: value for name, value in zip(self.embeddings, encoded, strict=False) if value is not None}

    def _at_work(self, *parts: Any) -> AbstractContextManager[None]:
        """Copy offloaded parts to the device for the duration of a block."""
        if not self.config.offload:
            return nullcontext()
        return on_device([part for part in parts if part is not None], self.device)

    def compile(self, batch_size: int) -> None:
        compute_unit_divisions(self.network)
        blocks = repeated_blocks(self.network) if self.config.compile_blocks else ()
        self._compiled = CompiledNetwork(self._call, batch_size * self.branches, blocks)

    def record_graphs(self, make_recorder: Callable[[], Recorder] = CudaRecorder) -> None:
        # A cast that autocast caches outside of a recording would be missing in it.
        dtype = self.dtype if self.config.train == "full" else torch.float32
        uncached = autocast(self.device, dtype, cached=False)

        def call(**inputs: Tensor) -> Tensor:
            with uncached:
                return self._call(**inputs)

        self.graphed = GraphedNetwork(call, self.network, make_recorder)

    def image_size(self) -> tuple[int, int]:
        height, width = self.latent_shape[-2:]
        return self.config.scale_factor * height, self.config.scale_factor * width

    @property
    def stochastic_steps(self) -> list[int]:
        return list(self._stochastic_steps)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        known = self._cached(("", *prompts), lambda prompt: self._encode(prompt, with_negative=not prompt))
        shared = {name: value for name, value in known[""].items() if name.startswith("negative_")}
        names = [name for name in known[""] if name not in shared]
        return {**{name: torch.cat([known[prompt][name] for prompt in prompts]) for name in names}, **shared}

    def _cached(self, keys: Sequence[Any], encode: Callable[[Any], Conditioning]) -> dict[Any, Conditioning]:
        """Return the text encoders' rows by key, such as the prompt. Those that are not in the cache are encoded."""
        # One prompt at a time: in a batch, its last bits would depend on the other prompts.
        missing = [key for key in keys if key not in self._embeddings]
        new: dict[Hashable, Conditioning] = {}
        if missing:
            with self._at_work(*self.text_encoders):
                new = {key: encode(key) for key in missing}
        known = {key: new[key] if key in new else self._embeddings[key] for key in keys}
        for key, row in new.items():
            most = EMBEDDING_BYTES // sum(value.nbytes for value in row.values())
            if len(self._embeddings) >= max(most, 2):  # drop the oldest, but not the empty prompt: each task needs it
                del self._embeddings[next(each for each in self._embeddings if each)]
            self._embeddings[key] = row
        return known

    def text_readers(self) -> list[TextReader]:
        readers = []
        for name in self.config.tokenizers:
            part, tokenizer = name.replace("tokenizer", "text_encoder"), getattr(self.pipeline, name, None)
            if tokenizer is not None:
                # diffusers truncates for CLIP at the first tokenizer's length, and for T5 at its caller's.
                length = getattr(self.pipeline, "tokenizer_max_length", tokenizer.model_max_length)
                if self.config.text_parts[part][1] in ("T5EncoderModel", "UMT5EncoderModel"):
                    length = getattr(self.config, "max_sequence_length", length)
                readers.append(TextReader(part, tokenizer, length))
        return readers

    def rows_of_task(self, rows: Conditioning) -> Conditioning:
        return self._in_dtype(rows | join_branches(rows) if self.branches == 2 else rows)

    def transition(
        self,
        latents: Float[Tensor, "B C *S"],
        steps: Int[Tensor, "B"],
        conditioning: Conditioning,
        stochastic: bool = True,
    ) -> Transition:
        output = self.predict(latents, self.steps.timesteps[steps], conditioning)
        return self.steps.transition(latents, output, steps, stochastic)

    def denoising_steps(self, sampling: SamplingTable) -> DenoisingSteps:
        return self.steps if sampling.num_steps == self.num_steps else self._table(sampling)

    def predict(
        self, latents: Float[Tensor, "B C *S"], timesteps: Tensor, conditioning: Conditioning
    ) -> Float[Tensor, "B C *S"]:
        return self._guided(latents, timesteps, conditioning, self.branches == 2)

    def _guided(
        self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning, both: bool
    ) -> Float[Tensor, "B C *S"]:
        """Run the network with `both` branches, or for the prompt alone."""
        scale = self.guidance_scale if both else None
        return guided(self._predict, latents, timesteps, conditioning, scale, self._combined)

    def _combined(self, unconditional: Tensor, conditional: Tensor, guidance_scale: float) -> Tensor:
        """Return the guided prediction of both branches, as the family's pipeline combines them."""
        return extrapolated(unconditional, conditional, guidance_scale)

    def _predict(self, latents: Tensor, timesteps: Tensor, rows: Conditioning) -> Tensor:
        inputs = {"latents": latents.to(self.dtype), "timesteps": timesteps, **self._in_dtype(rows)}
        if self.graphed:
            return self.graphed(**inputs)
        with self._autocast:
            return (self._compiled or self._call)(**inputs)

    def _in_dtype(self, rows: Conditioning) -> Conditioning:
        return {name: value.to(self.dtype) if value.is_floating_point() else value for name, value in rows.items()}

    def denoise(
        self,
        clean_latents: Float[Tensor, "B C *S"],
        noise: Float[Tensor, "B C *S"],
        timesteps: Int[Tensor, "B"],
        conditioning: Conditioning,
    ) -> tuple[Float[Tensor, "B C *S"], Float[Tensor, "B C *S"]]:
        noised, timestep_input, target = self.steps.add_noise(clean_latents.float(), noise, timesteps)
        both = self.branches == 2 and self.guides_denoising
        return self._guided(noised, timestep_input, conditioning, both).float(), target

    def take_decoder(self, vae: Any) -> None:
        """Hold a decoder on the device. Its weights get no gradients."""
        self.vae = vae.to(self.device).eval().requires_grad_(False)

    def decode_pixels(self, latents: Float[Tensor, "B C *S"]) -> Float[Tensor, "B 3 H2 W2"]:
        pixels = self.config.decoded(self.vae, self._unscaled(latents.to(self.vae.dtype)))
        return (pixels.float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "B C *S"]) -> UInt8[Tensor, "B *F H2 W2 3"]:
        pixels = self._decoded(latents).float() / 2 + 0.5
        finite = pixels.isfinite().flatten(1).all(1).tolist()
        self.not_finite = tuple(row for row, is_finite in enumerate(finite) if not is_finite)
        return (pixels.clamp(0, 1) * 255).round().to(torch.uint8).movedim(1, -1)

    def _decoded(self, latents: Tensor) -> Tensor:
        """Run the decoder. If memory is short, do without the graphs, which keep the network's activations."""
        try:
            with self._at_work(self.vae):
                return self.config.decoded(self.vae, self._unscaled(latents.to(self.vae.dtype)))
        except torch.OutOfMemoryError:
            if not (self.graphed and self.graphed.holds_memory):
                raise
            graphed = self.graphed
        graphed.stay_eager("their memory is needed for decoding")
        return self._decoded(latents)

    def _unscaled(self, latents: Tensor) -> Tensor:
        """Return latents as the decoder takes them. Each diffusers pipeline honours other keys here."""
        scaled, shift = latents / self.vae.config.scaling_factor, self._shift
        return scaled if shift is None else scaled + shift

    @property
    def _shift(self) -> float | None:
        return getattr(self.vae.config, "shift_factor", None) if self.adds_shift else None

    @torch.no_grad()
    def encode_images(
        self, pixels: UInt8[Tensor, "B H2 W2 3"], noise: Float[Tensor, "B C *S"]
    ) -> Float[Tensor, "B C *S"]:
        inputs = (pixels.float() / 127.5 - 1).permute(0, 3, 1, 2).to(self.vae.dtype)
        with self._at_work(self.vae):
            return self._scaled(self.config.encoded(self.vae, inputs, noise))

    def _scaled(self, latents: Tensor) -> Tensor:
        """Return the encoder's latents as the network takes them: the inverse of `_unscaled`."""
        return (latents if self._shift is None else latents - self._shift) * self.vae.config.scaling_factor

    def save(self, folder: Path) -> Path:
        path = save_trained(self.network, self.config.train, self.config.lora, folder, self.config.network_name)
        if self.config.train == "lora" and not self.config.takes_diffusers_lora:
            save_for_peft(path)
        if self.config.joined_parts:
            save_for_second_network(path)
        return path

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
        self.merged = self.graphed = None
