"""Fit an aesthetic head on frozen embeddings of rated images: a linear head in closed form, or the published MLP."""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

HeadKind = Literal["linear", "mlp", "mlp-relu"]
HEADS: tuple[HeadKind, ...] = ("linear", "mlp", "mlp-relu")
WIDTHS = (1024, 128, 64, 16)  # of improved-aesthetic-predictor, train_predictor.py
DROPOUT = (0.2, 0.2, 0.1)  # after the first three layers
LEARNING_RATE = 1e-3  # of Adam, as published
PENALTIES = tuple(10.0**power for power in torch.linspace(-6, 3, 37).tolist())  # for features of variance 1, per image
LEAST_DEVIATION = 1e-3  # of a feature, relative to the mean: do not scale up a feature that hardly varies


@dataclass(frozen=True)
class Rated:
    """N images: their embeddings of norm 1, and their ratings."""

    embeddings: Float[Tensor, "N D"]
    ratings: Float[Tensor, "N"]


@dataclass(frozen=True)
class Scale:
    """Mean and standard deviation of the training features and ratings, in float64."""

    mean: Float[Tensor, "D"]
    deviation: Float[Tensor, "D"]
    rating_mean: float
    rating_deviation: float

    @classmethod
    def of(cls, rated: Rated) -> "Scale":
        """Compute the scale of training images.

        Raises:
            ValueError: all ratings are equal.
        """
        features, ratings = rated.embeddings.double(), rated.ratings.double()
        deviation = features.std(0, correction=0)
        if not ratings.std(correction=0) > 0:
            raise ValueError(
                f"all {len(ratings)} ratings to fit on are {ratings[0].item():g}: there is nothing to learn from them"
            )
        least = (LEAST_DEVIATION * deviation.mean()).clamp_min(1e-12)
        return cls(features.mean(0), deviation.maximum(least), ratings.mean().item(), ratings.std(correction=0).item())

    def standard(self, rated: Rated) -> Rated:
        """Return standardized features and ratings."""
        embeddings = (rated.embeddings.double() - self.mean) / self.deviation
        return Rated(embeddings, (rated.ratings.double() - self.rating_mean) / self.rating_deviation)

    def fold_features(self, weight: Float[Tensor, "out D"], bias: Float[Tensor, "out"]) -> tuple[Tensor, Tensor]:
        """Convert a first layer on standardized features to one on embeddings."""
        folded = weight.double() / self.deviation
        return folded, bias.double() - folded @ self.mean

    def fold_ratings(self, weight: Float[Tensor, "1 in"], bias: Float[Tensor, "1"]) -> tuple[Tensor, Tensor]:
        """Convert a last layer that gives standardized ratings to one that gives ratings."""
        return self.rating_deviation * weight.double(), self.rating_mean + self.rating_deviation * bias.double()


@dataclass(frozen=True)
class FittedHead:
    """Weights in a published format, in float32 on the CPU, and the hyperparameters chosen on the validation images."""

    weights: dict[str, Tensor]
    chosen: dict[str, int | float]
    tried: list[dict[str, int | float]]  # all candidates with their validation MSE, in units of ratings


@dataclass(frozen=True)
class Training:
    """Hyperparameters of training the MLP: the published ones, and a seed."""

    seed: int = 0
    epochs: int = 50
    batch_size: int = 256


def fit_head(kind: HeadKind, train: Rated, validation: Rated, training: Training) -> FittedHead:
    """Fit a head, with hyperparameters or epoch chosen on the validation images.

    Raises:
        ValueError: all training ratings are equal.
    """
    scale = Scale.of(train)
    one, other = scale.standard(train), scale.standard(validation)
    if kind == "linear":
        return _fit_linear(one, other, scale)
    return _fit_mlp(one, other, scale, training, relu=kind == "mlp-relu")


def ridge_weights(
    features: Float[Tensor, "N D"], targets: Float[Tensor, "N"], penalties: tuple[float, ...]
) -> Float[Tensor, "P D"]:
    """Return argmin_w |features w - targets|² / N + penalty |w|² for each penalty, by one eigendecomposition."""
    count = len(targets)
    variances, directions = torch.linalg.eigh(features.T @ features / count)
    along = directions.T @ (features.T @ targets / count)
    return torch.stack([directions @ (along / (variances.clamp_min(0) + penalty)) for penalty in penalties])


def _fit_linear(train: Rated, validation: Rated, scale: Scale) -> FittedHead:
    """Fit a linear head in closed form, deterministically, for all penalties at once."""
    weights = ridge_weights(train.embeddings, train.ratings, PENALTIES)
    errors = (validation.embeddings @ weights.T - validation.ratings[:, None]).square().mean(0)
    best = int(errors.argmin())
    unit = scale.rating_deviation**2
    tried = [{"penalty": each, "mse": unit * mse} for each, mse in zip(PENALTIES, errors.tolist(), strict=True)]
    weight, bias = scale.fold_ratings(
        *scale.fold_features(weights[best : best + 1], torch.zeros_like(train.ratings[:1]))
    )
    return FittedHead(_stored({"weight": weight, "bias": bias}), {"penalty": PENALTIES[best]}, tried)


def published_mlp(dimension: int, relu: bool) -> nn.Sequential:
    """Return the published MLP.

    Its layers have the positions by which `ray_ddpo.common.image_models.aesthetic_head` recognizes the format.
    """
    layers: list[nn.Module] = []
    for inputs, outputs, dropout in zip((dimension, *WIDTHS), WIDTHS, (*DROPOUT, None), strict=False):
        layers += [
            nn.Linear(inputs, outputs),
            *([nn.ReLU()] if relu else []),
            *([nn.Dropout(dropout)] if dropout else []),
        ]
    return nn.Sequential(*layers, nn.Linear(WIDTHS[-1], 1))


def _fit_mlp(train: Rated, validation: Rated, scale: Scale, training: Training, relu: bool) -> FittedHead:
    """Train the MLP, and keep the weights after the best epoch."""
    device = train.embeddings.device
    # The seed decides weights, order and dropout. The process's own random state stays as it is.
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(training.seed)
        network = published_mlp(train.embeddings.shape[1], relu).to(device)
        best, errors = _train(network, _single(train), _single(validation), training)
    network.load_state_dict(best)
    unit = scale.rating_deviation**2
    tried = [{"epoch": epoch, "mse": unit * mse} for epoch, mse in enumerate(errors, start=1)]
    chosen = min(tried, key=lambda each: each["mse"])["epoch"]
    return FittedHead(_stored(_folded(network, scale)), {"epoch": chosen}, tried)


def _train(
    network: nn.Sequential, train: Rated, validation: Rated, training: Training
) -> tuple[dict[str, Any], list[float]]:
    """Return the weights after the best epoch, and the validation MSE after each epoch."""
    optimizer = torch.optim.Adam(network.parameters(), LEARNING_RATE)
    best, errors = {}, []
    for _ in range(training.epochs):
        network.train()
        for rows in torch.randperm(len(train.ratings)).split(training.batch_size):
            optimizer.zero_grad()
            _mse(network, Rated(train.embeddings[rows], train.ratings[rows])).backward()
            optimizer.step()
        network.eval()
        with torch.no_grad():
            error = _mse(network, validation).item()
        if math.isfinite(error) and error < min(errors, default=math.inf):
            best = deepcopy(network.state_dict())
        errors.append(error)
    if not best:
        raise ValueError(
            f"the head's error on the validation images is {errors[-1]} after every epoch: nothing was learned"
        )
    return best, errors


def _mse(network: Callable[[Tensor], Tensor], rated: Rated) -> Float[Tensor, ""]:
    return (network(rated.embeddings).squeeze(-1) - rated.ratings).square().mean()


def _single(rated: Rated) -> Rated:
    return Rated(rated.embeddings.float(), rated.ratings.float())


def _folded(network: nn.Sequential, scale: Scale) -> dict[str, Tensor]:
    weights = {f"layers.{name}": tensor.detach().double() for name, tensor in network.state_dict().items()}
    for fold, layer in ((scale.fold_features, "layers.0"), (scale.fold_ratings, f"layers.{len(network) - 1}")):
        folded = fold(weights[f"{layer}.weight"], weights[f"{layer}.bias"])
        weights[f"{layer}.weight"], weights[f"{layer}.bias"] = folded
    return weights


def _stored(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.float().cpu().contiguous() for name, tensor in weights.items()}
