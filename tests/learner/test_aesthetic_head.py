"""Fitting a head: ridge compared with its formula, folded ratings and features, formats, and the same bits."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ray_ddpo.common.image_models.aesthetic_head import read_head
from ray_ddpo.learner.aesthetic_head.fit import (
    HEADS,
    FittedHead,
    HeadKind,
    Rated,
    Scale,
    Training,
    fit_head,
    published_mlp,
    ridge_weights,
)

QUICK = Training(seed=3, epochs=4, batch_size=32)


def rated(count: int, seed: int, noise: float = 0.0) -> Rated:
    """Directions in 6 dimensions around a common one, as CLIP's are, rated by a known linear function about 5."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(count, 6, generator=generator) * torch.tensor([1, 1, 0.5, 0.5, 0.1, 0.1]) + 2
    embeddings = embeddings / embeddings.norm(dim=1, keepdim=True)
    taste = torch.tensor([3.0, -2.0, 1.0, 0.0, 4.0, -1.0])
    return Rated(embeddings, 5 + embeddings @ taste + noise * torch.randn(count, generator=generator))


def predictions(head: FittedHead, folder: Path, embeddings: Tensor) -> Tensor:
    save_file(head.weights, folder / "head.safetensors")
    return read_head(folder / "head.safetensors")(embeddings)


def test_ridge_by_hand_in_one_dimension() -> None:
    # mean(x²) = 5/2, mean(x·y) = 4; 4 / (5/2 + penalty)
    weights = ridge_weights(torch.tensor([[1.0], [2.0]]).double(), torch.tensor([2.0, 3.0]).double(), (0.0, 1.5))
    assert weights.flatten().tolist() == pytest.approx([1.6, 1.0])


def test_ridge_is_where_its_loss_has_no_slope() -> None:
    generator = torch.Generator().manual_seed(0)
    features, targets = (torch.randn(*shape, generator=generator).double() for shape in ((20, 5), (20,)))
    for penalty, weight in zip((0.01, 2.0), ridge_weights(features, targets, (0.01, 2.0)), strict=True):
        weight = weight.clone().requires_grad_()
        ((features @ weight - targets).square().mean() + penalty * weight.square().sum()).backward()
        assert weight.grad is not None and weight.grad.abs().max() < 1e-12


def test_the_linear_head_recovers_a_linear_taste(tmp_path: Path) -> None:
    head = fit_head("linear", rated(200, 0), rated(50, 1), Training())
    unseen = rated(100, 2)
    torch.testing.assert_close(predictions(head, tmp_path, unseen.embeddings), unseen.ratings, atol=1e-3, rtol=0)


def test_the_validation_pictures_choose_the_penalty() -> None:
    """With 8 noisy images to fit on, the least penalty is not the best; the best of those tried is taken."""
    head = fit_head("linear", rated(8, 0, noise=1.0), rated(400, 1), Training())
    errors = {each["penalty"]: each["mse"] for each in head.tried}
    assert head.chosen["penalty"] == min(errors, key=lambda penalty: errors[penalty])
    assert head.chosen["penalty"] > min(errors) and min(errors.values()) < 0.9 * errors[min(errors)]


@pytest.mark.parametrize("kind", HEADS)
def test_every_head_is_read_in_a_published_layout_and_gives_the_validation_error_it_was_chosen_for(
    kind: HeadKind, tmp_path: Path
) -> None:
    validation = rated(60, 1)
    head = fit_head(kind, rated(300, 0), validation, QUICK)
    error = (predictions(head, tmp_path, validation.embeddings) - validation.ratings).square().mean().item()
    assert error == pytest.approx(min(each["mse"] for each in head.tried), rel=1e-3, abs=1e-6)
    layers = len(read_head(tmp_path / "head.safetensors").layers)
    assert layers == (5 if kind == "mlp-relu" else 1)


def test_the_mlp_learns_what_no_linear_head_can(tmp_path: Path) -> None:
    def bent(of: Rated) -> Rated:
        return Rated(of.embeddings, 5 + 20 * (of.embeddings[:, 0] - of.embeddings[:, 0].mean()).abs())

    train, validation, unseen = (bent(rated(count, seed)) for count, seed in ((600, 0), (200, 1), (200, 2)))
    errors = {}
    for kind in ("linear", "mlp-relu"):
        head = fit_head(kind, train, validation, Training(epochs=30, batch_size=64))
        errors[kind] = (predictions(head, tmp_path, unseen.embeddings) - unseen.ratings).square().mean().item()
    assert errors["mlp-relu"] < 0.3 * errors["linear"]


def test_the_best_epoch_is_kept_and_not_the_last(tmp_path: Path) -> None:
    """On 12 images with noise the error on others rises again."""
    validation = rated(300, 1)
    head = fit_head("mlp-relu", rated(12, 0, noise=2.0), validation, Training(epochs=40))
    errors = [each["mse"] for each in head.tried]
    assert head.chosen["epoch"] == errors.index(min(errors)) + 1 < 40 and errors[-1] > 1.05 * min(errors)
    error = (predictions(head, tmp_path, validation.embeddings) - validation.ratings).square().mean().item()
    assert error == pytest.approx(min(errors), rel=1e-3)


@pytest.mark.parametrize("kind", HEADS)
def test_a_seed_decides_the_bits_whatever_was_drawn_before(kind: HeadKind) -> None:
    first = fit_head(kind, rated(100, 0), rated(40, 1), QUICK)
    torch.randn(7)
    state = torch.get_rng_state()
    again = fit_head(kind, rated(100, 0), rated(40, 1), QUICK)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first.weights[name], again.weights[name]) for name in first.weights)
    other = fit_head(kind, rated(100, 0), rated(40, 1), Training(seed=4, epochs=4, batch_size=32))
    assert kind == "linear" or not torch.equal(first.weights["layers.0.weight"], other.weights["layers.0.weight"])


def test_the_published_mlp_has_its_927_969_parameters() -> None:
    assert sum(parameter.numel() for parameter in published_mlp(768, relu=False).parameters()) == 927_969
    assert [type(layer).__name__ for layer in published_mlp(768, relu=True)][:3] == ["Linear", "ReLU", "Dropout"]


def test_equal_ratings_are_refused() -> None:
    with pytest.raises(ValueError, match="all 5 ratings to fit on are 3: there is nothing to learn"):
        fit_head("linear", Rated(rated(5, 0).embeddings, torch.full((5,), 3.0)), rated(5, 1), Training())


def test_a_feature_that_never_varies_does_no_harm(tmp_path: Path) -> None:
    def with_constant(of: Rated) -> Rated:
        return Rated(torch.cat([of.embeddings, torch.full((len(of.ratings), 1), 0.3)], 1), of.ratings)

    head = fit_head("linear", with_constant(rated(200, 0)), with_constant(rated(50, 1)), Training())
    unseen = with_constant(rated(100, 2))
    torch.testing.assert_close(predictions(head, tmp_path, unseen.embeddings), unseen.ratings, atol=1e-3, rtol=0)


def test_the_units_that_are_fitted_in_have_mean_0_and_deviation_1() -> None:
    of = rated(50, 0)
    standard = Scale.of(of).standard(of)
    for values in (standard.embeddings[:, 0], standard.ratings):
        assert values.mean().item() == pytest.approx(0, abs=1e-12) and values.std(correction=0).item() == pytest.approx(
            1
        )
