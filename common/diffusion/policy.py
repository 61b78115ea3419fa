"""The interface of every model family: encode prompts, give the distribution of a step, decode images."""

import logging
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int, UInt8
from pydantic import model_validator
from torch import Tensor

from ray_ddpo.common.base_parts import Base, entry_base
from ray_ddpo.common.diffusion.lora.adapters import MergedAdapters, load_weights
from ray_ddpo.common.diffusion.lora.files import files_of_lora
from ray_ddpo.common.diffusion.memory.sizes import DeviceKind, PolicySizes
from ray_ddpo.common.diffusion.prompt_lengths import TextReader
from ray_ddpo.common.diffusion.schedulers.denoising_steps import DenoisingSteps
from ray_ddpo.common.diffusion.transition import Transition
from ray_ddpo.common.model_files.model_hub import Weights, file_of
from ray_ddpo.common.policy_weights import PolicyWeights
from ray_ddpo.common.recipe.registry import Component
from ray_ddpo.common.recipe.tables import SamplingTable
from ray_ddpo.common.trajectory import DTYPES

# "check": the learner's second copy. It computes as samplers do but, like the learner, has no encoder and decoder.
Role = Literal["sampler", "learner", "check"]
Conditioning = dict[str, Tensor]
MODEL_FILES = ("safetensors", "pt", "pth", "bin", "ckpt", "npz", "json", "yaml", "toml", "txt", "model")
EMBEDDED_MODELS = {"tiny_animals": Path(__file__).parents[1] / "tiny_animals"}


class Policy(ABC):
    """A denoising network that is live on a device, with the steps it takes. Made by a `PolicyConfig`."""

    network: Any  # a diffusers model (its stubs know neither config nor adapters): holds what is trained
    device: str
    num_steps: int
    num_train_timesteps: int  # of the model's own schedule
    latent_shape: tuple[int, int, int]  # C, H, W of one image's latents
    merged: MergedAdapters | None = None  # a sampler's, where the recipe has them merged
    # Rows of the last `decode` whose pixels were no finite numbers before they became uint8; a family need not tell.
    not_finite: tuple[int, ...] = ()

    def compile(self, batch_size: int) -> None:
        """Compile the network for batches of this size: smaller batches are padded, larger ones split.

        Raises:
            ValueError: The family does not support compilation. This is the default.
        """
        raise ValueError(f'policy.compile is set, and {type(self).__name__} has no compiled network: give "none"')

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

    @property
    @abstractmethod
    def stochastic_steps(self) -> list[int]:
        """Return the steps whose standard deviation is above 0. Only these are actions."""

    @abstractmethod
    def encode(self, prompts: list[str]) -> Conditioning:
        """Return tensors with one row per prompt. Those named `negative_…` have one row for all prompts."""

    def initial_latents(self, noise: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Return the latents where a trajectory starts. In most families this is the standard normal `noise` itself."""
        return noise

    def text_readers(self) -> list[TextReader]:
        """Return the readers of the text encoders, which find prompts that are too long; empty if unknown."""
        return []

    @abstractmethod
    def transition(
        self,
        latents: Float[Tensor, "B C H W"],
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

    @abstractmethod
    def denoise(
        self,
        clean_latents: Float[Tensor, "B C H W"],
        noise: Float[Tensor, "B C H W"],
        timesteps: Int[Tensor, "B"],
        conditioning: Conditioning,
    ) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B C H W"]]:
        """Run the network, guided as in sampling, on clean latents noised to `timesteps`.

        Returns:
            Prediction and target, both float32, in the network's own parameterization (noise, velocity or clean
            latents).
        """

    def clean_scale(self, timesteps: Int[Tensor, "B"]) -> Float[Tensor, "B"]:
        """Return by how much the predicted clean latents change if the prediction changes by one.

        If the policy has `steps`, they decide; otherwise the scale is 1.
        """
        steps = getattr(self, "steps", None)
        ones = torch.ones(len(timesteps), device=timesteps.device)
        return steps.clean_scale(timesteps) if isinstance(steps, DenoisingSteps) else ones

    @abstractmethod
    def decode(self, latents: Float[Tensor, "B C H W"]) -> UInt8[Tensor, "B H2 W2 3"]:
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

    # Whether `encode` uses `sampling.negative_prompt` for the unconditional branch.
    takes_negative_prompt: ClassVar[bool] = False

    model: str
    """Pretrained model: a folder, a file, a hub name, or the name of an embedded model."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Dtype of the frozen weights and of the forward passes. Trained weights are float32."""
    train: Literal["lora", "full"] = "lora"
    """Weights to train: LoRA adapters, or the whole network."""
    gradient_checkpointing: bool = False
    """Re-compute activations in the backward pass: less memory, same bits."""
    compile: Literal["none", "sampler", "both"] = "none"
    """Roles whose network runs through torch.compile. `both`: samplers and learner."""
    sampler_dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Dtype of a sampler's network. By default `dtype`."""
    merge_adapters: bool = False
    """Merge the adapters into a sampler's weights: fewer and larger kernels."""

    @model_validator(mode="after")
    def _lora_keys_are_for_adapters(self) -> "PolicyConfig":
        if self.merge_adapters and self.train == "full":
            raise ValueError('merge_adapters is true and train "full": only a LoRA\'s adapters are merged')
        if self._lora_path() is not None and self.train == "full":
            raise ValueError('lora.path is given and train "full": only adapters begin as those of a file')
        return self

    def _lora_path(self) -> str | None:
        return getattr(getattr(self, "lora", None), "path", None)

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

    def dtype_of(self, role: Role) -> torch.dtype:
        """Return the dtype that a role's network computes in."""
        return DTYPES[self.dtype if role == "learner" else self.sampler_dtype or self.dtype]

    def is_compiled(self, role: Role) -> bool:
        """Return whether a role's network is compiled."""
        return self.compile == "both" or (self.compile == "sampler" and role != "learner")

    @property
    def numerics_differ(self) -> bool:
        """Return whether log-probs of sampler and learner differ by more than float32 rounding.

        In half precision a compiled network rounds at other places, and merging rounds small updates away.
        """
        half = {self.dtype_of("sampler"), self.dtype_of("learner")} != {torch.float32}
        other = self.compile != "none" or self.merge_adapters
        return self.dtype_of("sampler") != self.dtype_of("learner") or (half and other)

    def needs(self) -> tuple[Weights, ...]:
        """Return the files that a sampler's `load` reads, for `ddpo doctor`."""
        return ()

    def files_of(self, role: Role) -> tuple[Weights, ...]:
        """Return the files that a role's `load` reads, to be fingerprinted. Defaults to all files below `model`."""
        path = Path(self.model).expanduser()
        if self.needs() or not path.exists():
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

    @abstractmethod
    def load(self, device: str, sampling: SamplingTable, role: Role) -> Policy:
        """Return a live policy. Only a sampler's policy has text encoders and decoder.

        Raises:
            ValueError: The model cannot be found.
        """


def select_rows(conditioning: Conditioning, index: Int[Tensor, "B"]) -> Conditioning:
    """Return one row for each of `index`. Rows that all prompts share are expanded without a copy."""
    return {
        name: value.expand(len(index), *value.shape[1:]) if name.startswith("negative_") else value[index]
        for name, value in conditioning.items()
    }


def autocast(device: str, dtype: torch.dtype) -> torch.autocast:
    """Return autocast to `dtype` for a network with float32 weights. It is disabled if `dtype` is float32."""
    return torch.autocast(device.partition(":")[0], dtype, enabled=dtype != torch.float32)


def quiet_libraries() -> None:
    """Silence the libraries' messages about each part. This program reports loading itself, once."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # imported by others wherever it is installed
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
