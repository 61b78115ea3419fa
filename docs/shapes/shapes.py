"""A model family around this network: its keys, for `name = "shapes:Shapes"` in a recipe's `[policy]`, and its policy."""

from pathlib import Path

import torch
from shape_network import ShapeNetwork
from torch import Tensor

from ray_ddpo.common.diffusion.guidance import guided
from ray_ddpo.common.diffusion.lora.adapters import LoraSettings, MergedAdapters
from ray_ddpo.common.diffusion.lora.start import make_trainable
from ray_ddpo.common.diffusion.memory.network_memory import Inputs
from ray_ddpo.common.diffusion.memory.sizes import DeviceKind, PolicySizes
from ray_ddpo.common.diffusion.network_sizes import network_sizes
from ray_ddpo.common.diffusion.policy import Conditioning, Policy, PolicyConfig, Role
from ray_ddpo.common.diffusion.schedulers.ddim import ddim_table
from ray_ddpo.common.diffusion.trained_weights import restore_trained, save_trained
from ray_ddpo.common.diffusion.transition import Transition
from ray_ddpo.common.recipe.tables import SamplingTable

CLASSES = ("disc", "square", "cross", "ring")
SCHEDULE = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "epsilon"}  # Nichol & Dhariwal 2021
LATENT_SHAPE = (3, 16, 16)


def images_of(latents: Tensor) -> Tensor:
    return ((latents.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


class Shapes(PolicyConfig):
    """`model`: a file of weights that `torch.save` wrote of a state dict."""

    lora: LoraSettings = LoraSettings(rank=8, alpha=8, target_modules=("enter", "down", "middle", "leave", "shift"))

    def check(self) -> None:
        if not Path(self.model).is_file():
            raise ValueError(f"policy.model is {self.model!r}: no such file; python pretrain_shapes.py makes it")
        if self.dtype != "float32" or self.sampler_dtype:
            raise ValueError("policy.dtype and sampler_dtype are for large networks: this one computes in float32")

    def stochastic_steps(self, sampling: SamplingTable) -> int:
        return sampling.num_steps - 1  # the last one leads to the image

    def sizes(self, sampling: SamplingTable, device: DeviceKind = "cuda") -> PolicySizes:
        with torch.device("meta"):  # nothing is loaded, and nothing computed
            network = ShapeNetwork(len(CLASSES))
        rows, dtypes = 2 if sampling.is_guided else 1, {"label": torch.int64}
        inputs = Inputs(ShapeNetwork.__call__, LATENT_SHAPE, {"label": ()}, rows, dtypes)
        return network_sizes(self, network, inputs, sampling, device, images_of)

    def load(self, device: str, sampling: SamplingTable, role: Role) -> Policy:
        network = ShapeNetwork(len(CLASSES))
        network.load_state_dict(torch.load(self.model, map_location="cpu", weights_only=True))
        return ShapesPolicy(self, network.to(device).eval(), device, sampling, role)


class ShapesPolicy(Policy):
    def __init__(self, config: Shapes, network: ShapeNetwork, device: str, sampling: SamplingTable, role: Role) -> None:
        self.config, self.network, self.device = config, network, device
        make_trainable(network, config.train, config.lora)
        self.merged = MergedAdapters(network) if config.merge_adapters and role == "sampler" else None
        self.guidance_scale = sampling.guidance_scale if sampling.is_guided else None
        self.steps = ddim_table(SCHEDULE, sampling.num_steps, sampling.eta, device)
        self.num_steps, self.num_train_timesteps = sampling.num_steps, self.steps.num_train_timesteps
        self.latent_shape = LATENT_SHAPE

    @property
    def stochastic_steps(self) -> list[int]:
        return torch.nonzero(self.steps.std() > 0).flatten().tolist()

    def encode(self, prompts: list[str]) -> Conditioning:
        if unknown := [prompt for prompt in prompts if prompt not in CLASSES]:
            raise ValueError(f"the prompt {unknown[0]!r} is no class: it must be one of {CLASSES}")
        labels = torch.tensor([CLASSES.index(prompt) for prompt in prompts], device=self.device)
        return {"label": labels, "negative_label": torch.tensor([len(CLASSES)], device=self.device)}

    def transition(
        self, latents: Tensor, steps: Tensor, conditioning: Conditioning, stochastic: bool = True
    ) -> Transition:
        predicted = self._noise(latents.float(), self.steps.timesteps[steps], conditioning)
        return self.steps.transition(latents, predicted, steps, stochastic)

    def denoise(
        self, clean_latents: Tensor, noise: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> tuple[Tensor, Tensor]:
        noised, times, target = self.steps.add_noise(clean_latents.float(), noise, timesteps)
        return self._noise(noised, times, conditioning), target

    def _noise(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        def predict(latents: Tensor, timesteps: Tensor, rows: Conditioning) -> Tensor:
            return self.network(latents, timesteps, **rows)

        return guided(predict, latents, timesteps, conditioning, self.guidance_scale)

    def decode(self, latents: Tensor) -> Tensor:
        return images_of(latents)

    def save(self, folder: Path) -> Path:
        return save_trained(self.network, self.config.train, self.config.lora, folder, "unet")

    def restore(self, path: Path) -> None:
        restore_trained(self.network, self.config.train, path)
