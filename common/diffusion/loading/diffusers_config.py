"""The keys of `[policy]` that all diffusers families share, and how a pipeline is found, counted and loaded."""

import json
import math
import os
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ray_ddpo.common.diffusion.diffusers_policy import DiffusersPolicy, NetworkCall
from ray_ddpo.common.diffusion.guidance import INPUT
from ray_ddpo.common.diffusion.loading.config_keys import check_keys, check_steps, configuration_files
from ray_ddpo.common.diffusion.loading.library_errors import NOT_MADE, library_errors, try_once
from ray_ddpo.common.diffusion.loading.model_sizes import Configs, model_sizes, read_config
from ray_ddpo.common.diffusion.loading.pipeline import check_model, files_by_role, load_pipeline, source_of
from ray_ddpo.common.diffusion.lora.adapters import LoraSettings
from ray_ddpo.common.diffusion.memory.sizes import DeviceKind, PolicySizes
from ray_ddpo.common.diffusion.memory.sizes_cache import cached_sizes
from ray_ddpo.common.diffusion.network_storage import convert_weights
from ray_ddpo.common.diffusion.policy import EMBEDDED_MODELS, Policy, PolicyConfig, Role, quiet_libraries
from ray_ddpo.common.diffusion.schedulers.conversion import DDIM, as_loaded, last_step_is_stochastic
from ray_ddpo.common.model_files.model_hub import Weights
from ray_ddpo.common.recipe.tables import SamplingTable
from ray_ddpo.common.trajectory import DTYPES

PIPELINES_UNIT = 8  # pixels: diffusers' pipelines with a UNet take multiples of it, whatever the decoder
LARGEST_SIDE = 16_384
LEVELS = {"AutoencoderTiny": 4, "AutoencoderDC": 6}  # of a decoder whose configuration says nothing; others: 1


class DiffusersConfig(PolicyConfig):
    """Policy of a diffusers pipeline. `model` is a folder in its format, a single file, a hub name or an embedded model."""

    policy_class: ClassVar[type[DiffusersPolicy]]
    pipeline_class: ClassVar[str]  # of diffusers
    index_classes: ClassVar[tuple[str, ...]] = ()  # that a model's index may name instead
    network_name: ClassVar[str]  # of the part that is trained
    network_class: ClassVar[str]
    legacy_network_classes: ClassVar[tuple[str, ...]] = ()  # names in older folders, which diffusers still reads
    tokenizers: ClassVar[tuple[str, ...]]
    decoder_classes: ClassVar[tuple[str, ...]] = ("AutoencoderKL", "AutoencoderTiny")
    latent_key: ClassVar[str] = "latent_channels"  # the decoder's, that says how many channels its latents have
    latent_packing: ClassVar[int] = 1  # latents that one of the network's tokens holds
    switches: ClassVar[dict[str, str]] = {}  # parts that the family can do without: the key and value that say so
    guided_above: ClassVar[float] = 1.0  # the largest guidance scale with which the network runs once a step
    scheduler_class: ClassVar[str | None] = None  # of diffusers, that samples as samplers do; none: the pipeline's own
    takes_diffusers_lora: ClassVar[bool] = True  # whether diffusers loads LoRAs into it; if not, PEFT does
    pipeline_packages: ClassVar[tuple[str, ...]] = ()  # that the pipeline needs, and this program does not
    takes_negative_prompt: ClassVar[bool] = True
    takes_other_steps: ClassVar[bool] = True
    takes_images: ClassVar[bool] = True
    denoises_unguided: ClassVar[bool] = True
    takes_sampler_storage: ClassVar[bool] = True
    published: ClassVar[dict[str, Configs]]  # architectures that are known here, so that planning needs no hub

    resolution: int | None = Field(default=None, ge=8, le=LARGEST_SIDE, multiple_of=8)
    """Height and width of square images in pixels. By default the model's own size."""
    height: int | None = Field(default=None, ge=8, le=LARGEST_SIDE)
    """Height of images in pixels. By default the model's own."""
    width: int | None = Field(default=None, ge=8, le=LARGEST_SIDE)
    """Width of images in pixels. By default the model's own."""
    variant: str | None = Field(default=None, pattern=r"[A-Za-z0-9_-]+")
    """Variant of the weight files, such as `fp16`. By default the files without one."""
    single_file_config: str | None = None
    """Folder or hub name with the configurations of a single-file `model`. By default they follow from the file."""
    lora: LoraSettings = LoraSettings()
    """LoRA adapters that are trained."""
    vae_slicing: bool = False
    """Decode one image at a time: less memory."""
    vae_tiling: bool = False
    """Decode each image in tiles: less memory, with seams that can hardly be seen."""
    compile_blocks: bool = False
    """Compile only the blocks that the network repeats, each by itself, instead of the whole network."""
    offload: bool = False
    """Keep text encoders and decoder in the host's memory while they are idle: less GPU memory."""

    @model_validator(mode="after")
    def _blocks_belong_to_a_compiled_network(self) -> "DiffusersConfig":
        if self.compile_blocks and self.compile == "none":
            raise ValueError(
                'compile_blocks is true and compile "none": nothing is compiled; give compile = "sampler" or "both"'
            )
        return self

    @model_validator(mode="after")
    def _size_is_given_once(self) -> "DiffusersConfig":
        if self.resolution is not None and (self.height, self.width) != (None, None):
            raise ValueError(
                f"resolution is {self.resolution}, height {self.height} and width {self.width}: give a square's "
                "resolution, or height and width"
            )
        return self

    @property
    @abstractmethod
    def text_parts(self) -> dict[str, tuple[str, str]]:
        """Return transformers' configuration class and model class for each text encoder."""

    @property
    def trained_part(self) -> str:
        """Return the pipeline's part that is trained, whose LoRA files say `network_name`."""
        return self.network_name

    @property
    def frozen_parts(self) -> tuple[str, ...]:
        """Return further networks of the same class, which samplers alone load, and which are not trained."""
        return ()

    def join_networks(self, network: Any, others: Sequence[Any]) -> None:
        """Make the further networks submodules of the first one, under their names in the pipeline."""
        for part, other in zip(self.joined_parts, others, strict=True):
            network.add_module(part, other)

    @property
    def loading(self) -> dict[str, Any]:
        """Return additional arguments for the pipeline's own `from_pretrained`."""
        return {}

    def made_parts(self, folder: Path) -> dict[str, Any]:
        """Return a sampler's parts that the pipeline cannot load by itself, made from the model's folder."""
        return {}

    def set_up_network(self, network: Any) -> None:
        """Prepare a network, loaded or on the meta device, for `network_call`. Most families leave it as it is."""
        return

    @abstractmethod
    def network_call(self, sampling: SamplingTable) -> NetworkCall:
        """Return the function of (network, latents, timesteps, **rows of conditioning) that calls the network."""

    @abstractmethod
    def conditioning_shapes(self, configs: Configs) -> dict[str, tuple[int, ...]]:
        """Return the shapes of one prompt's row by name, from the parts' configurations; no negative tensors."""

    def make_policy(self, pipeline: Any, device: str, sampling: SamplingTable, role: Role) -> DiffusersPolicy:
        """Return the family's policy for a loaded pipeline."""
        return self.policy_class(self, pipeline, device, sampling, role)

    def branches(self, sampling: SamplingTable) -> int:
        """Return the network's rows per image: 2 with classifier-free guidance, else 1."""
        return 2 if sampling.guidance_scale > self.guided_above else 1

    def stochastic_steps(self, sampling: SamplingTable) -> int:
        if self.takes_sde:
            return sampling.num_steps - 1  # a flow ends without noise
        parts = configuration_files(self) if self.scheduler_class == DDIM else {}
        if "scheduler" not in parts:
            return super().stochastic_steps(sampling)
        loaded = as_loaded(parts.get("model_index", {}), parts["scheduler"])[0]
        return sampling.num_steps - (not last_step_is_stochastic(loaded))

    def pipeline_arguments(self, sampling: SamplingTable, size: tuple[int, int]) -> dict[str, Any]:
        """Return the arguments with which the family's pipeline samples as samplers do, for a model card's program.

        The prompt, input images and steps are not among them.

        Args:
            sampling: the recipe's settings.
            size: height and width of the images in pixels.
        """
        arguments: dict[str, Any] = {"guidance_scale": sampling.guidance_scale}
        if sampling.negative_prompt:
            arguments["negative_prompt"] = sampling.negative_prompt
        if "max_sequence_length" in self.model_fields_set:
            arguments["max_sequence_length"] = getattr(self, "max_sequence_length", None)
        if self.given_sizes:  # both, because some pipelines ignore one without the other
            arguments |= {"height": size[0], "width": size[1]}
        return arguments

    def pipeline_lines(self, sampling: SamplingTable) -> list[str]:
        """Return lines of a model card's program that set up its `pipeline`, beside the arguments of its call."""
        return []

    def taken_channels(self, latent_channels: int) -> int:
        """Return how many channels the network takes, for latents of so many channels."""
        return self.latent_packing * latent_channels

    def latent_shape(self, network_config: dict[str, Any]) -> tuple[int, ...]:
        """Return C, H, W of one image's latents, or C, F, H, W of a video's."""
        return network_config["in_channels"], *self.latent_sides(network_config["sample_size"])

    def with_negative(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Return the shapes with those of the `negative_…` tensors."""
        negative = {f"negative_{name}": shape for name, shape in shapes.items() if not name.startswith(INPUT)}
        return shapes | negative

    @property
    def scale_factor(self) -> int:
        """Return the pixels per side of one latent. Read from a file, because a learner loads no decoder."""
        config = self.part_config("vae")
        # AutoencoderTiny calls the key differently. Without either key, use diffusers' default for the decoder's class.
        default = (64,) * LEVELS.get(config.get("_class_name", ""), 1)
        channels = config.get("block_out_channels") or config.get("encoder_block_out_channels") or default
        return 2 ** (len(channels) - 1)

    @property
    def size_unit(self) -> int:
        """Return the number of pixels that height and width must be multiples of."""
        return math.lcm(PIPELINES_UNIT, self.scale_factor)

    @property
    def given_sizes(self) -> dict[str, tuple[int | None, int | None]]:
        """Return the size keys that the recipe sets, with the height and width that each gives."""
        keys = {"resolution": (self.resolution,) * 2, "height": (self.height, None), "width": (None, self.width)}
        return {key: sides for key, sides in keys.items() if sides != (None, None)}

    def check_size(self) -> None:
        """Raise ValueError if the model does not support the size. The message names the nearest supported sizes."""
        for key, sides in self.given_sizes.items():
            pixels, unit = next(side for side in sides if side is not None), self.size_unit
            if pixels % unit:
                below = pixels // unit * unit
                nearest = f"{below} or {below + unit}" if below else f"{unit}"
                raise ValueError(
                    f"policy.{key} is {pixels}: this model makes multiples of {unit} pixels, such as {nearest}"
                )

    def latent_sides(self, own: int | Sequence[int] | None) -> tuple[int, int]:
        """Return height and width of an image's latents. `own` is the model's size, of a square or as (height, width)."""
        self.check_size()
        if own is None and len(self.given_sizes) < 2 and self.resolution is None:
            raise ValueError("the model says no sample_size: give policy.height and policy.width")
        sides = list(own) if isinstance(own, Sequence) else [own or 0] * 2
        for given in self.given_sizes.values():
            for side, pixels in enumerate(given):
                if pixels is not None:
                    sides[side] = pixels // self.scale_factor
        return sides[0], sides[1]

    @property
    def decoder_dtype(self) -> torch.dtype:
        """Return the dtype that samplers decode in."""
        return self.loaded_dtype

    @property
    def loaded_dtype(self) -> torch.dtype:
        """Return the dtype that weights are read in."""
        return torch.float32 if self.train == "full" else DTYPES[self.dtype]  # master weights are float32

    def check(self) -> None:
        self._check("sampler")

    def _check(self, role: Role) -> None:
        """Check everything about the model that can be told without loading it, for one role."""
        if self.train == "full" and self.dtype == "float16":
            raise ValueError(
                "policy.train is 'full' and policy.dtype is 'float16': full networks train in float32 or bfloat16"
            )
        check_model(self, role)
        check_keys(self)
        if self.folder().exists() or self.model in self.published:  # otherwise its configuration is read at loading
            self.check_size()

    def folder(self) -> Path:
        """Return the model's folder on this machine, or the folder of configurations if the model is a single file."""
        source = source_of(self)
        return EMBEDDED_MODELS.get(source, Path(os.path.expanduser(source)))

    def part_config(self, part: str) -> dict[str, Any]:
        """Return one part's configuration, from a folder, from the architectures known here, or from the hub."""
        return read_config(source_of(self), self.folder(), self.published, part)

    def needs(self) -> tuple[Weights, ...]:
        return files_by_role(self, "sampler", texts=False)

    def files_of(self, role: Role) -> tuple[Weights, ...]:
        """Return the files of each part that the role loads, to be fingerprinted."""
        return files_by_role(self, role)

    def sizes(self, sampling: SamplingTable, device: DeviceKind = "cuda") -> PolicySizes:
        with library_errors(self.model, NOT_MADE):
            self.check()
            configs = {part: self.part_config(part) for part in (self.network_name, "vae", *self.text_parts)}
            files, is_own = configuration_files(self), bool(self.user_modules())
            # A copy in another folder has the same sizes.
            keys = self.model_dump_json(exclude={"model"} if files and not is_own else None)
            read = json.dumps([configs, files], sort_keys=True, default=dict)
            model = f"{type(self).__module__}:{type(self).__qualname__}\n{keys}\n{read}"

            def count() -> PolicySizes:
                check_steps(self, sampling)
                return model_sizes(self, configs, model, sampling, device)

            if is_own:  # a user's code may change between two calls
                return count()
            return cached_sizes(f"{model}\n{sampling.model_dump_json()}\n{device}", count)

    def load(self, device: str, sampling: SamplingTable, role: Role) -> DiffusersPolicy:
        quiet_libraries()
        with library_errors(self.model, NOT_MADE):
            self._check(role)
            pipeline = load_pipeline(self, role)
            check_keys(self, pipeline)
            network = getattr(pipeline, self.trained_part)
            self.join_networks(network, [getattr(pipeline, part) for part in self.joined_parts])
            self.set_up_network(network)
            if role == "sampler":
                self.set_up_decoder(pipeline.vae)
            if role != "learner" and self.train == "lora":  # text encoders and decoder keep their dtype
                convert_weights(network, self.dtype_of(role))
            if self.gradient_checkpointing is True and role == "learner":
                network.enable_gradient_checkpointing()
            policy = self.make_policy(pipeline, device, sampling, role)
            if role == "sampler":
                try_once(policy)
            return policy

    def load_decoder(self, policy: Policy) -> None:
        assert isinstance(policy, DiffusersPolicy), "the policy is this configuration's own"
        quiet_libraries()
        with library_errors(self.model, NOT_MADE):
            self._check("decoder")
            vae = load_pipeline(self, "decoder").vae
            self.set_up_decoder(vae)
            policy.take_decoder(vae)

    def encoded(self, vae: Any, pixels: Tensor, noise: Tensor) -> Tensor:
        """Return a sample of the encoder's posterior for pixels from −1 to 1, in its own scale and in float32."""
        found = vae.encode(pixels, return_dict=False)[0]
        if isinstance(found, Tensor):  # AutoencoderTiny gives latents
            return found.float()
        return found.mean.float() + found.std.float() * noise

    def decoded(self, vae: Any, latents: Tensor) -> Tensor:
        """Return the decoder's output, from about −1 to 1, for latents in its own scale. Shape (B, 3, H, W)."""
        return vae.decode(latents, return_dict=False)[0]

    def set_up_decoder(self, vae: Any) -> None:
        """Apply the recipe's decoder options. Raise ValueError if the decoder does not support one of them."""
        vae.to(self.decoder_dtype)
        if self.vae_slicing:
            vae.enable_slicing()
        if self.vae_tiling:
            if type(vae).__name__ == "AutoencoderTiny":  # its own fails on images smaller than a tile
                raise ValueError(
                    f"policy.vae_tiling is true, and the model's decoder is an {type(vae).__name__}, which cannot take "
                    "images in tiles: leave it out"
                )
            vae.enable_tiling()
