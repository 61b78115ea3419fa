"""The interface of every model family: encode prompts, give the distribution of a step, decode images."""

import logging
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int, UInt8
from pydantic import model_validator
from torch import Tensor

from ray_ddpo.common.base_parts import Base, entry_base
from ray_ddpo.common.cached_memory import return_cached_memory
from ray_ddpo.common.diffusion.graphed import GraphedNetwork
from ray_ddpo.common.diffusion.guidance import is_shared
from ray_ddpo.common.diffusion.lora.adapters import MergedAdapters, load_weights
from ray_ddpo.common.diffusion.lora.files import files_of_lora
from ray_ddpo.common.diffusion.memory.sizes import DeviceKind, PolicySizes
from ray_ddpo.common.diffusion.optional_methods import OptionalMethods
from ray_ddpo.common.diffusion.prompt_lengths import TextReader
from ray_ddpo.common.diffusion.schedulers.denoising_steps import DenoisingSteps, step_sizes
from ray_ddpo.common.diffusion.transition import Transition
from ray_ddpo.common.input_images import InputImages
from ray_ddpo.common.model_files.model_hub import Weights, file_of
from ray_ddpo.common.policy_weights import PolicyWeights
from ray_ddpo.common.recipe.registry import Component
from ray_ddpo.common.recipe.tables import SamplingTable
from ray_ddpo.common.trajectory import DTYPES

# "check": the learner's second copy. It computes as samplers do but, like the learner, has no encoder and decoder.
# "decoder": the files of a decoder alone, which a learner needs for gradients of a reward.
Role = Literal["sampler", "learner", "check", "decoder"]
Conditioning = dict[str, Tensor]
MODEL_FILES = ("safetensors", "pt", "pth", "bin", "ckpt", "npz", "json", "yaml", "toml", "txt", "model")
EMBEDDED_MODELS = {name: Path(__file__).parents[1] / name for name in ("tiny_animals", "tiny_words")}


class Policy(OptionalMethods, ABC):
    """A denoising network that is live on a device, with the steps it takes. Made by a `PolicyConfig`."""

    network: Any  # a diffusers model (its stubs know neither config nor adapters): holds what is trained
    device: str
    num_steps: int
    num_train_timesteps: int  # of the model's own schedule
    latent_shape: tuple[int, ...]  # C, H, W of an image's latents, or C, F, H, W of a video's
    guided_above: float = 1.0  # the largest guidance scale with which the network runs once a step
    merged: MergedAdapters | None = None  # a sampler's, where the recipe has them merged
    graphed: GraphedNetwork | None = None  # the network, if it is replayed as CUDA graphs
    # Rows of the last `decode` whose pixels were no finite numbers before they became uint8; a family need not tell.
    not_finite: tuple[int, ...] = ()

    def compile(self, batch_size: int) -> None:
        """Compile the network for batches of this size: smaller batches are padded, larger ones split.

        Raises:
            ValueError: The family does not support compilation. This is the default.
        """
        raise ValueError(f'policy.compile is set, and {type(self).__name__} has no compiled network: give "none"')

    def record_graphs(self) -> None:
        """Record the network's kernels as CUDA graphs, and replay them in later passes of the same shape.

        Raises:
            ValueError: The family does not support CUDA graphs. This is the default.
        """
        raise ValueError(f'policy.cuda_graphs is true, and {type(self).__name__} records no CUDA graphs: give "auto"')

    def image_size(self) -> tuple[int, int] | None:
        """Return height and width of an image in pixels; None if only decoding tells. Families may leave this out."""
        return None

    def load_weights(self, weights: PolicyWeights) -> int:
        """Load a version's weights into the network. Return how many parameters were loaded.

        Raises:
            ValueError: As `load_weights` of `lora.adapters`.
        """
        bound = load_weights(self.network, weights)
        if self.merged:
            self.merged.merge()
        return bound

    def sleep(self) -> None:
        """Return the memory of activations to the GPU: that of recorded graphs, and what the allocator keeps."""
        if self.graphed:
            self.graphed.release()
        return_cached_memory()

    @property
    @abstractmethod
    def stochastic_steps(self) -> list[int]:
        """Return the steps whose standard deviation is above 0. Only these are actions."""

    @abstractmethod
    def encode(self, prompts: list[str], inputs: InputImages | None = None) -> Conditioning:
        """Return tensors with one row per prompt, and those that all prompts share (`is_shared`) with one.

        Only a family that `reads_inputs` gets `inputs`, a row per prompt; without, it takes black ones, to be tried.
        """

    def initial_latents(self, noise: Float[Tensor, "B C *S"]) -> Float[Tensor, "B C *S"]:
        """Return the latents where a trajectory starts. In most families this is the standard normal `noise` itself."""
        return noise

    def text_readers(self) -> list[TextReader]:
        """Return the readers of the text encoders, which find prompts that are too long; empty if unknown."""
        return []

    def rows_of_task(self, rows: Conditioning) -> Conditioning:
        """Return conditioning, one row per image, as `transition` takes it at each step of a task; by default as given."""
        return rows

    @abstractmethod
    def transition(
        self,
        latents: Float[Tensor, "B C *S"],
        steps: Int[Tensor, "B"],
        conditioning: Conditioning,
        stochastic: bool = True,
    ) -> Transition:
        """Return the distribution of the next latents.

        Args:
            latents: the current latents.
            steps: each row's step index; rows may be at different steps.
            conditioning: one row per row of `latents`.
            stochastic: if False, take the deterministic step, with standard deviation 0.
        """

    def denoising_steps(self, sampling: SamplingTable) -> DenoisingSteps:
        """Return the schedule for these settings, whose steps `predict` gives the outputs of.

        Raises:
            ValueError: The family takes its own steps only. This is the default.
        """
        raise ValueError(
            f"{type(self).__name__} has no denoising_steps, so it takes no cache_interval, no solver, and no "
            "evaluation.num_steps other than sampling.num_steps: leave these keys out"
        )

    def predict(
        self, latents: Float[Tensor, "B C *S"], timesteps: Tensor, conditioning: Conditioning
    ) -> Float[Tensor, "B C *S"]:
        """Return the network's guided output, of which a schedule makes a step.

        Args:
            latents: the current latents.
            timesteps: one per row, from `denoising_steps`.
            conditioning: one row per row of `latents`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no predict")

    @abstractmethod
    def denoise(
        self,
        clean_latents: Float[Tensor, "B C *S"],
        noise: Float[Tensor, "B C *S"],
        timesteps: Int[Tensor, "B"],
        conditioning: Conditioning,
    ) -> tuple[Float[Tensor, "B C *S"], Float[Tensor, "B C *S"]]:
        """Run the network, guided as in sampling, on clean latents noised to `timesteps`.

        Returns:
            Prediction and target, both float32, of what the network predicts (noise, velocity or clean latents).
        """

    def clean_scale(self, timesteps: Int[Tensor, "B"]) -> Float[Tensor, "B"]:
        """Return by how much the predicted clean latents change if the prediction changes by one.

        If the policy has `steps`, they decide; otherwise the scale is 1.
        """
        steps = getattr(self, "steps", None)
        ones = torch.ones(len(timesteps), device=timesteps.device)
        return steps.clean_scale(timesteps) if isinstance(steps, DenoisingSteps) else ones

    def step_sizes(self) -> Float[Tensor, "T"]:
        """Return how far the next latents move per unit of the network's output, in each step without noise.

        Raises:
            ValueError: The family has no `steps` of a schedule, and does not override this method. grpo_guard needs it.
        """
        return step_sizes(getattr(self, "steps", None), type(self).__name__)

    @abstractmethod
    def decode(self, latents: Float[Tensor, "B C *S"]) -> UInt8[Tensor, "B *F H2 W2 3"]:
        """Return the images of final latents."""

    @abstractmethod
    def save(self, folder: Path) -> Path:
        """Write the trained weights into a run's folder in diffusers' format. Return the path that diffusers loads."""

    @abstractmethod
    def restore(self, path: Path) -> None:
        """Read trained weights that `save` wrote, or others in the same format.

        Raises:
            ValueError: The weights do not fit this network.
        """


class PolicyConfig(Component, ABC):
    """A model family's keys in the recipe. `load` reads the weights, in the one process that needs them."""

    takes_negative_prompt: ClassVar[bool] = False  # whether `encode` uses `sampling.negative_prompt`
    takes_other_steps: ClassVar[bool] = False  # whether the policy has `denoising_steps` and `predict`
    takes_images: ClassVar[bool] = False  # whether the policy has `encode_images`
    reads_inputs: ClassVar[tuple[str, ...]] = ()  # as the policy's
    denoises_unguided: ClassVar[bool] = False  # whether the policy's `denoise` honours `guides_denoising`
    takes_sde: ClassVar[bool] = False  # whether its schedule is a flow that takes `sampling.sde`
    has_frames: ClassVar[bool] = False  # whether it makes videos, which a sampler decodes one by one
    takes_sampler_storage: ClassVar[bool] = False  # whether a sampler's policy honours the key `sampler_storage`

    model: str
    """Pretrained model: a folder, a file, a hub name, or the name of an embedded model."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Dtype of the frozen weights and of the forward passes. Trained weights are float32."""
    train: Literal["lora", "full"] = "lora"
    """Weights to train: LoRA adapters, or the whole network."""
    gradient_checkpointing: bool | Literal["auto"] = False
    """Re-compute activations in the backward pass: less memory, same bits. `auto`: only where they do not fit."""
    compile: Literal["none", "sampler", "both"] = "none"
    """Roles whose network runs through torch.compile. `both`: samplers and learner."""
    cuda_graphs: bool | Literal["auto"] = "auto"
    """Replay recorded CUDA graphs of the network: less work for the host, same bits.

    `auto`: on a GPU, where adapters are trained and the network is neither compiled nor re-computed.
    """
    sampler_dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Dtype of a sampler's network. By default `dtype`."""
    merge_adapters: bool = False
    """Merge the adapters into a sampler's weights: fewer and larger kernels."""
    sampler_storage: Literal["float8_e4m3fn"] | None = None
    """Dtype in which a sampler stores the frozen weights of its layers; each layer is converted when it is used."""

    @model_validator(mode="after")
    def _lora_keys_are_for_adapters(self) -> "PolicyConfig":
        if self.merge_adapters and self.train == "full":
            raise ValueError('merge_adapters is true and train "full": only a LoRA\'s adapters are merged')
        if self._lora_path() is not None and self.train == "full":
            raise ValueError('lora.path is given and train "full": only adapters begin as those of a file')
        return self

    @model_validator(mode="after")
    def _graphs_are_of_an_eager_network(self) -> "PolicyConfig":
        """Refuse required CUDA graphs of a network that cannot be recorded."""
        if self.cuda_graphs is True and self.compile != "none":
            raise ValueError(
                f'cuda_graphs is true and compile "{self.compile}": graphs are recorded of a network that is not '
                'compiled; give cuda_graphs = "auto", or compile = "none"'
            )
        if self.cuda_graphs is True and self.gradient_checkpointing is True:
            raise ValueError(
                "cuda_graphs is true and gradient_checkpointing too: re-computation cannot be recorded; give "
                'cuda_graphs = "auto", which replays graphs in samplers alone, or gradient_checkpointing = false'
            )
        return self

    @model_validator(mode="after")
    def _stored_weights_can_be_rounded(self) -> "PolicyConfig":
        """Refuse a storage dtype for weights that are trained, merged into or compiled, or that the family ignores."""
        if self.sampler_storage is None:
            return self
        given = f"sampler_storage is {self.sampler_storage!r}"
        if not self.takes_sampler_storage:
            raise ValueError(f"{given}, and {type(self).__name__} stores weights in one dtype only: leave it out")
        if self.train == "full":
            raise ValueError(f'{given} and train "full": trained weights would be rounded away; train = "lora"')
        if self.merge_adapters:
            raise ValueError(f"{given} and merge_adapters true: merged adapters would be rounded away; give one")
        if self.is_compiled("sampler"):
            raise ValueError(f'{given} and compile {self.compile!r}: converting layers are not compiled; give "none"')
        return self

    def _lora_path(self) -> str | None:
        return getattr(getattr(self, "lora", None), "path", None)

    @property
    def joined_parts(self) -> tuple[str, ...]:
        """Return further networks of the same class, which are trained as submodules of the first one."""
        return ()

    @property
    def most_inputs(self) -> int:
        """Return how many input images a prompt may have, if the family reads any."""
        return 1

    def lora_files(self) -> tuple[Weights, ...]:
        """Return the files of the LoRA that training starts from. Raise ValueError if they do not exist."""
        path = self._lora_path()
        return () if path is None else (files_of_lora(path),)

    def stochastic_steps(self, sampling: SamplingTable) -> int:
        """Return how many steps of a trajectory are stochastic, as far as can be told without the model's schedule."""
        return sampling.num_steps

    @abstractmethod
    def check(self) -> None:
        """Raise ValueError if it can be told without loading that the model does not exist."""

    def check_sampling(self, sampling: SamplingTable) -> None:
        """Raise ValueError if the family does not support these sampling options."""
        if sampling.negative_prompt and not self.takes_negative_prompt:
            raise ValueError(
                f"sampling.negative_prompt is {sampling.negative_prompt!r}, and {type(self).__name__} takes none: "
                "leave it out"
            )
        if sampling.sde is not None and not self.takes_sde:
            raise ValueError(
                f"sampling.sde is {sampling.sde!r}, and {type(self).__name__} takes none: only families of flow "
                "matching have a choice of stochastic samplers, and a UNet steps by DDIM with sampling.eta; leave it out"
            )
        if sampling.eta > 1 and (not self.takes_sde or sampling.sde == "cps"):
            steps = 'sampling.sde "cps"' if self.takes_sde else f"{type(self).__name__}, whose steps are DDIM's"
            raise ValueError(
                f"sampling.eta is {sampling.eta:g}, with {steps}: it must be greater than 0 and at most 1, where all of "
                "the predicted noise is replaced; Flow-SDE and Dance-SDE take up to 2"
            )

    def dtype_of(self, role: Role) -> torch.dtype:
        """Return the dtype that a role's network computes in."""
        return DTYPES[self.dtype if role == "learner" else self.sampler_dtype or self.dtype]

    def is_compiled(self, role: Role) -> bool:
        """Return whether a role's network is compiled."""
        return self.compile == "both" or (self.compile == "sampler" and role != "learner")

    def with_checkpointing(self, on: bool) -> "PolicyConfig":
        """Return the same policy with gradient checkpointing on or off, because families do not know "auto"."""
        return self.model_copy(update={"gradient_checkpointing": on})

    @property
    def numerics_differ(self) -> bool:
        """Return whether log-probs of sampler and learner differ by more than float32 rounding.

        In half precision compiled networks round elsewhere, merging rounds updates away, and 8 bits are other weights.
        """
        if self.sampler_storage is not None:
            return True
        half = {self.dtype_of("sampler"), self.dtype_of("learner")} != {torch.float32}
        other = self.compile != "none" or self.merge_adapters
        return self.dtype_of("sampler") != self.dtype_of("learner") or (half and other)

    def needs(self) -> tuple[Weights, ...]:
        """Return the files that a sampler's `load` reads, for `ddpo doctor`."""
        return ()

    def files_of(self, role: Role) -> tuple[Weights, ...]:
        """Return the files that a role's `load` reads, to be fingerprinted. Defaults to all files below `model`."""
        if self.needs() or not (path := Path(os.path.expanduser(self.model))).exists():
            return self.needs()
        if path.is_file():
            return (file_of(str(path), "", "", "policy.model"),)
        return (Weights(str(path), tuple(f"**/*.{kind}" for kind in MODEL_FILES), "policy.model"),)

    def loaded_base(self, role: Role) -> Base:
        """Return the fingerprints of the files that a role's policy is made from."""
        return entry_base(self, "policy", (*self.files_of(role), *self.lora_files()))

    @abstractmethod
    def sizes(self, sampling: SamplingTable, device: DeviceKind = "cuda") -> PolicySizes:
        """Return what `ddpo plan` needs to know, without loading weights. Memory is predicted for `device`."""

    def load_decoder(self, policy: Policy) -> None:
        """Load the decoder into a learner's policy, so that it has `decode_pixels`. By default it has a decoder already."""

    @abstractmethod
    def load(self, device: str, sampling: SamplingTable, role: Role) -> Policy:
        """Return a live policy. Only a sampler's policy has text encoders and decoder.

        Raises:
            ValueError: The model cannot be found.
        """


def select_rows(conditioning: Conditioning, index: Int[Tensor, "B"]) -> Conditioning:
    """Return one row for each of `index`. Rows that all prompts share are expanded without a copy."""
    shared = {name: rows.expand(len(index), *rows.shape[1:]) for name, rows in conditioning.items() if is_shared(name)}
    return {name: shared[name] if name in shared else rows[index] for name, rows in conditioning.items()}


def autocast(device: str, dtype: torch.dtype, cached: bool = True) -> torch.autocast:
    """Return autocast to `dtype` for a network with float32 weights. It is disabled if `dtype` is float32.

    Args:
        cached: keep converted weights until the forward pass ends. The bits are the same without.
    """
    return torch.autocast(device.partition(":")[0], dtype, enabled=dtype != torch.float32, cache_enabled=cached)


def quiet_libraries() -> None:
    """Silence the libraries' messages about each part. This program reports loading itself, once."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # imported by others wherever it is installed
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
