"""ValueFunction: predict an image's reward from the latents, step and prompt of a transition, as a baseline (DPOK)."""

from collections.abc import Mapping
from typing import Any, final

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ray_ddpo.common.diffusion.policy import Conditioning, select_rows
from ray_ddpo.learner.algorithms.value_settings import ValueSettings
from ray_ddpo.learner.round_data.transitions import Indices, RoundTransitions, indices_of

HIDDEN = 256  # of each layer, as in the authors' ValueMulti
ROWS = 256  # transitions whose values are computed at a time
_VALUE = 17  # hashed with the run's seed, round and part: the batches of the value function


class StepLinear(nn.Module):
    """A linear layer whose outputs are multiplied by learned factors of the denoising step (`ConditionalLinear`)."""

    def __init__(self, num_in: int, num_out: int, num_steps: int) -> None:
        super().__init__()
        self.linear = nn.Linear(num_in, num_out)
        self.factors = nn.Embedding(num_steps, num_out)
        nn.init.uniform_(self.factors.weight)
        nn.init.xavier_normal_(self.linear.weight)

    def forward(self, values: Float[Tensor, "B I"], steps: Int[Tensor, "B"]) -> Float[Tensor, "B O"]:
        return self.factors(steps) * self.linear(values)


class ValueNetwork(nn.Module):
    """The authors' ValueMulti (google-research/dpok, reward_model.py): three layers of 256 and a linear output."""

    def __init__(self, num_in: int, num_steps: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([StepLinear(width, HIDDEN, num_steps) for width in (num_in, HIDDEN, HIDDEN)])
        self.value = nn.Linear(HIDDEN, 1)
        nn.init.xavier_normal_(self.value.weight)

    def forward(self, inputs: Float[Tensor, "B I"], steps: Int[Tensor, "B"]) -> Float[Tensor, "B"]:
        for layer in self.layers:
            inputs = F.relu(layer(inputs, steps))
        return self.value(inputs).squeeze(1)


@final
class ValueFunction:
    """A value function with its optimizer. Every rank has the same, and learns from all of a round's transitions."""

    def __init__(self, settings: ValueSettings, num_steps: int, seed: int, device: str) -> None:
        self._settings = settings
        self._num_steps = num_steps
        self._seed = seed
        self._device = device
        self._network: ValueNetwork | None = None  # made when the width of its inputs is known
        self._optimizer: Any = None

    def learn(
        self, transitions: RoundTransitions, images: Int[Tensor, "M"], place: tuple[int, int]
    ) -> tuple[Float[Tensor, "N W"], dict[str, float]]:
        """Learn the advantages of some images from their transitions, and return the values of all transitions.

        Args:
            transitions: of a round, or of a part of it.
            images: the numbers of those that are trained on.
            place: the round and its part, which choose the batches with the run's seed.
        """
        indices = indices_of(images, transitions.positions(0))
        generator, losses = np.random.default_rng([self._seed, _VALUE, *place]), []
        size = min(self._settings.batch_size, len(indices))
        for _ in range(self._settings.steps if size else 0):
            some = indices[torch.from_numpy(generator.choice(len(indices), size, replace=False))]
            losses.append(self._step(transitions, some))
        values = transitions.advantages.new_zeros(transitions.steps.shape)
        with torch.no_grad():
            for some in indices.split(ROWS) if size else ():
                inputs, steps, _ = self._inputs(transitions, some)
                values[tuple(some.to(values.device).T)] = self._made(inputs.shape[1])(inputs, steps)
        return values, _metrics(
            losses, transitions.advantages[images.to(values.device)], values[images.to(values.device)]
        )

    def _step(self, transitions: RoundTransitions, some: Indices) -> float:
        inputs, steps, advantages = self._inputs(transitions, some)
        network = self._made(inputs.shape[1])
        self._optimizer.zero_grad()
        loss = F.mse_loss(network(inputs, steps), advantages)
        loss.backward()
        self._optimizer.step()
        return float(loss.detach())

    def _inputs(self, transitions: RoundTransitions, some: Indices) -> tuple[Tensor, Tensor, Tensor]:
        """Return the inputs of the network, the steps, and the advantages to predict."""
        images, positions = some.to(self._device).unbind(1)
        latents = transitions.gather("latents", *some.unbind(1)).float().flatten(1)
        prompts = prompt_features(select_rows(transitions.conditioning, transitions.prompt_rows[images]))
        return torch.cat([latents, prompts], 1), transitions.steps[images, positions], transitions.advantages[images]

    def _made(self, width: int) -> ValueNetwork:
        """Return the network for inputs of this width, which is made at first."""
        if self._network is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self._seed)
                self._network = ValueNetwork(width, self._num_steps).to(self._device)
            self._optimizer = torch.optim.AdamW(
                self._network.parameters(), lr=self._settings.learning_rate, foreach=False
            )
        return self._network

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters, none before the first round."""
        return [] if self._network is None else list(self._network.parameters())

    def arrays(self) -> dict[str, np.ndarray]:
        """Return a copy of weights and optimizer state, by name; nothing before the first round."""
        if self._network is None:
            return {}
        arrays = {}
        for name, parameter in self._network.named_parameters():
            arrays[f"{name}/weight"] = parameter
            arrays |= {f"{name}/{key}": value for key, value in self._optimizer.state[parameter].items()}
        return {name: value.detach().cpu().numpy().copy() for name, value in arrays.items()}

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Continue from `arrays`, to the same bits.

        Raises:
            ValueError: the arrays are those of another value function.
        """
        self._network, self._optimizer = None, None
        if not arrays:
            return
        first = arrays.get("layers.0.linear.weight/weight")
        width = 0 if first is None or first.ndim != 2 else first.shape[1]
        for name, parameter in self._made(width).named_parameters():
            stored = {key: torch.from_numpy(arrays[f"{name}/{key}"].copy()) for key in _kept_keys(arrays, name)}
            weight = stored.pop("weight", None)
            if weight is None or weight.shape != parameter.shape:
                raise ValueError(
                    f"the checkpoint's value function has no {name} of shape {tuple(parameter.shape)}: it is of another "
                    "model, or of a run without algorithm.value"
                )
            with torch.no_grad():
                parameter.copy_(weight)
            if stored:
                self._optimizer.state[parameter] = {
                    key: value if key == "step" else value.to(self._device) for key, value in stored.items()
                }


def value_bytes(settings: ValueSettings, latent_elements: int, num_steps: int) -> int:
    """Return the bytes of a value function with its optimizer and a batch. Prompt features, a few thousand, are not counted.

    Args:
        settings: the keys of `[algorithm.value]`.
        latent_elements: of one image's latents.
        num_steps: denoising steps.
    """
    layers = (latent_elements + 2 * HIDDEN) * HIDDEN + 3 * HIDDEN * (1 + num_steps) + HIDDEN + 1
    # Weights, gradients and AdamW's two moments; a batch's latents, alone and with the prompts' features.
    return 4 * (4 * layers + 2 * max(settings.batch_size, ROWS) * latent_elements)


def _kept_keys(arrays: Mapping[str, np.ndarray], name: str) -> list[str]:
    return [each.rpartition("/")[2] for each in arrays if each.rpartition("/")[0] == name]


def prompt_features(conditioning: Conditioning) -> Float[Tensor, "B F"]:
    """Return one vector per row: each positive conditioning tensor, its mean over all axes but the first and last.

    Each is scaled to a root mean square of 1, so that large numbers, such as SDXL's sizes, do not hide the latents. A
    single number, such as a label, stays as it is.
    """
    means = []
    for name, value in sorted(conditioning.items()):
        if not name.startswith("negative_"):
            rows = value.float().reshape(len(value), -1, value.shape[-1] if value.ndim > 1 else 1).mean(1)
            scale = rows.square().mean(1, keepdim=True).sqrt().clamp(min=1e-6)
            means.append(rows / scale if rows.shape[1] > 1 else rows)
    return torch.cat(means, 1)


def _metrics(losses: list[float], advantages: Float[Tensor, "M"], values: Float[Tensor, "M W"]) -> dict[str, float]:
    """Return the mean loss, and the share of the advantages' variance that the values explain."""
    if not losses:
        return {}
    rest = (advantages[:, None] - values).double().var(correction=0)
    total = advantages.double().var(correction=0)
    explained = float(1 - rest / total) if total > 0 else float("nan")
    return {"value/loss": float(np.mean(losses)), "value/explained_variance": explained}
