"""What every model family promises: encode prompts, give one step's distribution, decode images."""

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

# "check": the learner's second copy, which computes as samplers do and, as the learner, neither encodes nor decodes.
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
        """From here on the network runs compiled, on batches of this size: smaller ones are filled up, larger ones cut.

        Raises:
            ValueError: the family has no compiled network, as none has that says nothing else.
        """
        raise ValueError(f'policy.compile is set, and {type(self).__name__} has no compiled network: give "none"')

    def image_size(self) -> tuple[int, int] | None:
        """Return height and width of an image in pixels, if that is known without decoding one; a family need not tell."""
        return None

    def load_weights(self, weights: PolicyWeights) -> int:
        """Lay a version's weights into the network; how many parameters were bound. Errors are those of `load_weights`."""
        bound = load_weights(self.network, weights)
        if self.merged:
            self.merged.merge()
        return bound

    @property
    @abstractmethod
    def stochastic_steps(self) -> list[int]:
        """The steps that are actions: their standard deviation is above 0."""

    @abstractmethod
    def encode(self, prompts: list[str]) -> Conditioning:
        """Tensors with one row a prompt; those named `negative_…` have one row for all."""

    def initial_latents(self, noise: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Return the latents where a trajectory starts, from standard normal noise: the noise itself, in most families."""
        return noise

    def text_readers(self) -> list[TextReader]:
        """Return the text encoders, to find prompts that are longer than they read; none where nobody can say."""
        return []

    @abstractmethod
    def transition(
        self, latents: Float[Tensor, "B C H W"], steps: Int[Tensor, "B"], conditioning: Conditioning, noisy: bool = True
    ) -> Transition:
        """The distribution of the next latents. Each row may be at a step of its own; conditioning has a row each.

        Not `noisy`: these steps are taken without noise, standard deviation 0.
        """

    @abstractmethod
    def denoise(
        self,
        clean_latents: Float[Tensor, "B C H W"],
        noise: Float[Tensor, "B C H W"],
        timesteps: Int[Tensor, "B"],
        conditioning: Conditioning,
    ) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B C H W"]]:
        """What the network, guided as it samples, predicts of clean latents noised to `timesteps`, and what it should.

        Both float32, in the network's own terms (noise, velocity or clean latents).
        """

    def clean_scale(self, timesteps: Int[Tensor, "B"]) -> Float[Tensor, "B"]:
        """How far the clean latents move that a prediction stands for, when it moves by one: as the steps say, if it has some."""
        steps = getattr(self, "steps", None)
        ones = torch.ones(len(timesteps), device=timesteps.device)
        return steps.clean_scale(timesteps) if isinstance(steps, DenoisingSteps) else ones

    @abstractmethod
    def decode(self, latents: Float[Tensor, "B C H W"]) -> UInt8[Tensor, "B H2 W2 3"]:
        """PageImages of final latents."""

    @abstractmethod
    def save(self, folder: Path) -> Path:
        """Write the trained weights into a run's folder in diffusers' own format; the path that diffusers loads."""

    @abstractmethod
    def restore(self, path: Path) -> None:
        """Read trained weights that `save` wrote, or any of the same form. ValueError: they do not fit this network."""


class PolicyConfig(Component, ABC):
    """A model family's keys in the recipe. `load` reads the weights, in the one process that needs them."""

    # Whether `encode` gives what all prompts share as of `sampling.negative_prompt`.
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
    def _only_adapters_are_merged(self) -> "PolicyConfig":
        if self.merge_adapters and self.train == "full":
            raise ValueError('merge_adapters is true and train "full": only a LoRA\'s adapters are merged')
        return self

    @model_validator(mode="after")
    def _only_adapters_begin_with_a_lora(self) -> "PolicyConfig":
        if self._lora_path() is not None and self.train == "full":
            raise ValueError('lora.path is given and train "full": only adapters begin as those of a file')
        return self

    def _lora_path(self) -> str | None:
        return getattr(getattr(self, "lora", None), "path", None)

    def lora_files(self) -> tuple[Weights, ...]:
        """Return the files of the LoRA that training begins from. ValueError: they are not there."""
        path = self._lora_path()
        return () if path is None else (files_of_lora(path),)

    def stochastic_steps(self, sampling: SamplingTable) -> int:
        """How many steps of a path have noise, as far as can be told without its schedule."""
        return sampling.num_steps

    @abstractmethod
    def check(self) -> None:
        """ValueError where it can be told without loading that the model is not there."""

    def check_sampling(self, sampling: SamplingTable) -> None:
        """Raise ValueError if the family cannot sample so."""
        if sampling.negative_prompt and not self.takes_negative_prompt:
            raise ValueError(
                f"sampling.negative_prompt is {sampling.negative_prompt!r}, and {type(self).__name__} takes none: leave it out"
            )

    def dtype_of(self, role: Role) -> torch.dtype:
        """What a role's network computes in."""
        return DTYPES[self.dtype if role == "learner" else self.sampler_dtype or self.dtype]

    def is_compiled(self, role: Role) -> bool:
        """Whether a role's network is."""
        return self.compile == "both" or (self.compile == "sampler" and role != "learner")

    @property
    def numerics_differ(self) -> bool:
        """Whether sampler and learner give a step log_probs that lie further apart than rounding in float32 puts them.

        In half precision a compiled network rounds in other places, and merging rounds what was learned away.
        """
        half = {self.dtype_of("sampler"), self.dtype_of("learner")} != {torch.float32}
        other = self.compile != "none" or self.merge_adapters
        return self.dtype_of("sampler") != self.dtype_of("learner") or (half and other)

    def needs(self) -> tuple[Weights, ...]:
        """The files that a sampler's `load` reads, for `ddpo doctor`."""
        return ()

    def files_of(self, role: Role) -> tuple[Weights, ...]:
        """Return the files that a role's `load` reads, to be fingerprinted; where nobody says, all that `model` names."""
        path = Path(self.model).expanduser()
        if self.needs() or not path.exists():
            return self.needs()
        if path.is_file():
            return (file_of(str(path), "", "", "policy.model"),)
        return (Weights(str(path), tuple(f"**/*.{kind}" for kind in MODEL_FILES), "policy.model"),)

    def loaded_base(self, role: Role) -> Base:
        """Return the fingerprints of what a role's policy is made from."""
        return entry_base(self, "policy", (*self.files_of(role), *self.lora_files()))

    @abstractmethod
    def sizes(self, sampling: SamplingTable, device: DeviceKind = "cuda") -> PolicySizes:
        """What `ddpo plan` needs to know, without loading weights; memory is that of such a device."""

    @abstractmethod
    def load(self, device: str, sampling: SamplingTable, role: Role) -> Policy:
        """A live policy. Only a sampler's has text encoder and decoder. ValueError: the model cannot be found."""


def select_rows(conditioning: Conditioning, index: Int[Tensor, "B"]) -> Conditioning:
    """One row for each of `index`; what all prompts share is repeated without a copy."""
    return {
        name: value.expand(len(index), *value.shape[1:]) if name.startswith("negative_") else value[index]
        for name, value in conditioning.items()
    }


def autocast(device: str, dtype: torch.dtype) -> torch.autocast:
    """Half precision for a network whose weights are float32; nothing where it is to compute in float32."""
    return torch.autocast(device.partition(":")[0], dtype, enabled=dtype != torch.float32)


def quiet_libraries() -> None:
    """Loading is announced by us, once; what the libraries say of each part is for their own developers."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # imported by others wherever it is installed
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
