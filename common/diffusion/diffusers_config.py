"""The keys of `[policy]` that every family of diffusers' pipelines has, and how a pipeline is found, counted and loaded."""

import os
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field

from common.diffusion.diffusers_policy import DiffusersPolicy, NetworkCall
from common.diffusion.honoured_keys import check_keys, check_steps
from common.diffusion.library_errors import names_the_model, try_once
from common.diffusion.lora import LoraSettings
from common.diffusion.model_sizes import Configs, model_sizes, read_config
from common.diffusion.policy import EMBEDDED_MODELS, PolicyConfig, Role, quiet_libraries
from common.diffusion.sizes import DeviceKind, PolicySizes
from common.model_hub import Weights, read_pretrained
from common.recipe_tables import SamplingTable
from common.trajectory import DTYPES

PART_FILES = ("safetensors", "json", "txt", "model")  # weights, configurations, vocabularies


class DiffusersConfig(PolicyConfig):
    """`model`: a folder in diffusers' format, a hub name, or the name of a model that ships with the project."""

    pipeline_class: ClassVar[str]  # of diffusers
    network_name: ClassVar[str]  # of the part that is trained
    network_class: ClassVar[str]
    tokenizers: ClassVar[tuple[str, ...]]
    scheduler_class: ClassVar[str | None] = None  # of diffusers, that draws as samplers do; none: the pipeline's own
    published: ClassVar[dict[str, Configs]]  # architectures that are known here, so that planning needs no hub

    lora: LoraSettings = LoraSettings()
    resolution: int | None = Field(default=None, ge=8, le=16_384, multiple_of=8)  # pixels a side; None: the model's own
    vae_slicing: bool = False  # the decoder takes a picture after the other
    vae_tiling: bool = False  # and each in tiles: less memory, and seams that can hardly be seen
    offload: bool = False  # text encoders and decoder wait in the host's memory while they have nothing to do

    @property
    @abstractmethod
    def text_parts(self) -> dict[str, tuple[str, str]]:
        """Of each text encoder transformers' classes: its configuration's, its own."""

    @property
    def loading(self) -> dict[str, Any]:
        """What the pipeline's own `from_pretrained` is given beside."""
        return {}

    @abstractmethod
    def network_call(self, sampling: SamplingTable) -> NetworkCall:
        """How the network is called: a function of (network, latents, timesteps, **rows of conditioning)."""

    @abstractmethod
    def conditioning_shapes(self, configs: Configs) -> dict[str, tuple[int, ...]]:
        """Of one prompt's row, by name, from the parts' configurations; without those that are negative."""

    @abstractmethod
    def make_policy(self, pipeline: Any, device: str, sampling: SamplingTable, role: Role) -> DiffusersPolicy:
        """The family's policy of a pipeline that was loaded."""

    def branches(self, sampling: SamplingTable) -> int:
        """Rows of the network for an image: with and without the prompt, where it is guided by the difference."""
        return 1 if sampling.guidance_scale == 1 else 2

    def latent_shape(self, network_config: dict[str, Any]) -> tuple[int, int, int]:
        """C, H, W of one image's latents."""
        size = self.latent_size() or network_config["sample_size"]
        return network_config["in_channels"], size, size

    def with_negative(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """The same with what all prompts share."""
        return shapes | {f"negative_{name}": shape for name, shape in shapes.items()}

    @property
    def decoder_dtype(self) -> torch.dtype:
        """What samplers decode in."""
        return self.loaded_dtype

    @property
    def loaded_dtype(self) -> torch.dtype:
        """What weights are read in."""
        return torch.float32 if self.train == "full" else DTYPES[self.dtype]  # master weights are float32

    def check(self) -> None:
        if self.train == "full" and self.dtype == "float16":
            raise ValueError(
                "policy.train is 'full' and policy.dtype is 'float16': whole networks train in float32 or bfloat16"
            )
        folder = self.folder()
        looks_like_path = self.model.startswith((".", "/", "~")) or self.model.count("/") != 1
        if (looks_like_path or folder.exists()) and not (folder / "model_index.json").is_file():
            raise ValueError(
                f"policy.model is {self.model!r}: there is no model_index.json in {folder}; "
                f"give a folder in diffusers' format, a hub name (owner/model) or one of {sorted(EMBEDDED_MODELS)}"
            )
        check_keys(self)

    def folder(self) -> Path:
        """Where the model lies, if it is a folder."""
        return EMBEDDED_MODELS.get(self.model, Path(os.path.expanduser(self.model)))

    def part_config(self, part: str) -> dict[str, Any]:
        """One part's configuration. ValueError: it is neither in a folder, nor known here, nor to be had from the hub."""
        return read_config(self.model, self.folder(), self.published, part)

    def latent_size(self) -> int | None:
        """Latents a side at `resolution`; None: the model's own. From a file, for a learner loads no decoder to ask."""
        if self.resolution is None:
            return None
        config = self.part_config("vae")
        channels = config.get("block_out_channels") or config["encoder_block_out_channels"]  # AutoencoderTiny's
        return self.resolution // 2 ** (len(channels) - 1)

    def needs(self) -> tuple[Weights, ...]:
        source = str(self.folder()) if self.folder().exists() else self.model
        parts = tuple(f"{part}/*.safetensors" for part in (self.network_name, "vae", *self.text_parts))
        return (Weights(source, ("model_index.json", *parts), "policy.model"),)

    def files_of(self, role: Role) -> tuple[Weights, ...]:
        """Return the files of each part that the role loads, to be fingerprinted."""
        model, *others = self.needs()
        beside = ("vae", *self.text_parts, *self.tokenizers) if role == "sampler" else ()
        parts = [f"{part}/*.{kind}" for part in (self.network_name, "scheduler", *beside) for kind in PART_FILES]
        return (Weights(model.source, ("model_index.json", *parts), model.key), *others)

    @names_the_model
    def sizes(self, sampling: SamplingTable, device: DeviceKind = "cuda") -> PolicySizes:
        check_steps(self, sampling)
        configs = {part: self.part_config(part) for part in (self.network_name, "vae", *self.text_parts)}
        return model_sizes(self, configs, sampling, device)

    @names_the_model
    def load(self, device: str, sampling: SamplingTable, role: Role) -> DiffusersPolicy:
        quiet_libraries()
        import diffusers

        self.check()
        source = str(self.folder()) if self.folder().exists() else self.model
        sampler_parts = ("vae", *self.text_parts, *self.tokenizers)  # the learner has no use for them
        keys = {**self.loading, **{part: None for part in sampler_parts if role != "sampler"}}
        pipeline_class: Any = getattr(diffusers, self.pipeline_class)
        pipeline = read_pretrained(
            source,
            lambda place, local: pipeline_class.from_pretrained(
                place,
                local_files_only=local,
                use_safetensors=True,
                trust_remote_code=False,
                dtype=self.loaded_dtype,
                **keys,
            ),
            f"policy.model is {self.model!r}, which cannot be loaded",
        )
        check_keys(self, pipeline)
        network = getattr(pipeline, self.network_name)
        if role == "sampler":
            self.set_up_decoder(pipeline.vae)
        if role != "learner" and self.train == "lora":  # text encoder and decoder stay as they are
            network.to(self.dtype_of(role))
        if self.gradient_checkpointing and role == "learner":
            network.enable_gradient_checkpointing()
        policy = self.make_policy(pipeline, device, sampling, role)
        if role == "sampler":
            try_once(policy)
        return policy

    def set_up_decoder(self, vae: Any) -> None:
        """As the recipe has it. ValueError: the decoder cannot do that."""
        vae.to(self.decoder_dtype)
        if self.vae_slicing:
            vae.enable_slicing()
        if self.vae_tiling:
            if type(vae).__name__ != "AutoencoderKL":  # AutoencoderTiny's own fails on pictures smaller than a tile
                raise ValueError(
                    f"policy.vae_tiling is true, and the model's decoder is an {type(vae).__name__}: only that of an "
                    "AutoencoderKL can take pictures in tiles"
                )
            vae.enable_tiling()
