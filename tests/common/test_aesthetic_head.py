"""Heads in every published layout, compared with golden numbers if the published weights are available."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ray_ddpo.common.image_models.aesthetic_head import affine_map, read_head

DATA = Path(__file__).parents[2].parent / "shared" / "data"
HEADS = DATA / "aesthetic_heads"
needs_data = pytest.mark.skipif(not HEADS.is_dir(), reason=f"the published heads are not in {HEADS}")
MAIN = "sac+logos+ava1-l14-linearMSE.pth"

# Ratings of the embeddings that stand for the ratings 0 … 9.
GOLDEN = {
    MAIN: [1.655, 2.359, 3.070, 3.672, 4.238, 4.701, 5.073, 5.365, 5.577, 5.747],
    "ava+logos-l14-linearMSE.pth": [4.51, 4.48, 4.49, 4.60, 4.71, 4.84, 5.00, 5.15, 5.23, 5.27],
    "sa_0_4_vit_l_14_linear.pth": [-2.46, -0.14, 1.90, 3.58, 5.10, 6.47, 7.79, 9.05, 10.23, 11.30],
}


def deep_weights(positions: tuple[int, ...], sizes: tuple[int, ...] = (6, 5, 4, 3, 2, 1)) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for position, columns, rows in zip(positions, sizes[:-1], sizes[1:], strict=True):
        weights[f"layers.{position}.weight"] = torch.randn(rows, columns, generator=generator)
        weights[f"layers.{position}.bias"] = torch.randn(rows, generator=generator)
    return weights


def layer_by_layer(weights: dict[str, torch.Tensor], values: torch.Tensor, relu: bool) -> torch.Tensor:
    names = [name.removesuffix(".weight") for name in weights if name.endswith(".weight")]
    for name in names:
        values = values @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]
        values = values.clamp(min=0) if relu and name != names[-1] else values
    return values[:, 0]


def rating_embeddings(model: str) -> torch.Tensor:
    folder = DATA / "clip_rating_embeddings" / model
    return torch.from_numpy(np.concatenate([np.load(folder / f"rating{rating}.npy") for rating in range(10)]))


@needs_data
@pytest.mark.parametrize("name", GOLDEN)
def test_published_heads_give_their_golden_ratings(name: str) -> None:
    digits = 3 if name == MAIN else 2
    ratings = read_head(HEADS / name)(rating_embeddings("vit_l_14"))
    np.testing.assert_allclose(ratings.numpy(), GOLDEN[name], atol=0.6 * 10**-digits)


@needs_data
def test_the_main_head_gives_its_golden_ratings_of_random_directions() -> None:
    generator = np.random.default_rng(0)
    directions = np.stack([generator.standard_normal(768) for _ in range(3)])
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    ratings = read_head(HEADS / MAIN)(torch.from_numpy(directions).float())
    np.testing.assert_allclose(ratings.numpy(), [4.464581, 5.480435, 5.008131], atol=2e-6)


@needs_data
def test_the_main_head_is_one_affine_map_to_a_hundred_thousandth() -> None:
    head = read_head(HEADS / MAIN)
    ((weight, bias),) = head.layers
    assert weight.norm().item() == pytest.approx(17.9956, abs=1e-4) and bias.item() == pytest.approx(5.2366, abs=1e-4)
    weights = torch.load(HEADS / MAIN, map_location="cpu", weights_only=True)
    embeddings = rating_embeddings("vit_l_14")
    torch.testing.assert_close(head(embeddings), layer_by_layer(weights, embeddings, relu=False), atol=1e-5, rtol=0)


@needs_data
@pytest.mark.parametrize(
    ("name", "model"),
    [
        (MAIN, "vit_l_14"),
        ("sa_0_4_vit_l_14_linear.pth", "vit_l_14"),
        ("sa_0_4_vit_b_32_linear.pth", "vit_b_32"),
    ],
)
def test_the_embeddings_of_the_ratings_0_to_9_are_rated_in_order(name: str, model: str) -> None:
    ratings = read_head(HEADS / name)(rating_embeddings(model))
    assert len(ratings) == 10 and (ratings.diff() > 0).all()


@needs_data
@pytest.mark.parametrize("name", [MAIN, "ava+logos-l14-linearMSE.pth"])
def test_collapsing_a_head_changes_no_rating_by_more_than_a_hundred_thousandth(name: str) -> None:
    weights = torch.load(HEADS / name, map_location="cpu", weights_only=True)
    directions = torch.randn(500, 768, generator=torch.Generator().manual_seed(0))
    directions /= directions.norm(dim=1, keepdim=True)
    head = read_head(HEADS / name)
    assert len(head.layers) == 1
    torch.testing.assert_close(head(directions), layer_by_layer(weights, directions, relu=False), atol=1e-5, rtol=0)


@needs_data
def test_the_head_with_relu_is_read_with_its_relu() -> None:
    path = HEADS / "ava+logos-l14-reluMSE.pth"
    weights = torch.load(path, map_location="cpu", weights_only=True)
    embeddings = rating_embeddings("vit_l_14")
    ratings = read_head(path)(embeddings)
    torch.testing.assert_close(ratings, layer_by_layer(weights, embeddings, relu=True))
    assert (ratings - layer_by_layer(weights, embeddings, relu=False)).abs().max() > 0.1


@needs_data
def test_the_head_for_vit_b_32_takes_512_numbers() -> None:
    assert read_head(HEADS / "sa_0_4_vit_b_32_linear.pth").dimension == 512


def test_an_affine_map_of_two_layers_by_hand() -> None:
    first = (torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([1.0, -1.0]))
    second = (torch.tensor([[3.0, 4.0]]), torch.tensor([0.5]))
    weight, bias = affine_map((first, second))
    assert weight.tolist() == [[3.0, 10.0]]  # 3·(1, 2) + 4·(0, 1)
    assert bias.tolist() == [-0.5]  # 3·1 + 4·(-1) + 0.5


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize(("positions", "relu"), [((0, 2, 4, 6, 7), False), ((0, 3, 6, 9, 11), True)])
def test_deep_layouts_are_told_apart_by_their_positions(
    tmp_path: Path, positions: tuple[int, ...], relu: bool, suffix: str
) -> None:
    weights, path = deep_weights(positions), tmp_path / f"head{suffix}"
    save_file(weights, path) if suffix == ".safetensors" else torch.save(weights, path)
    values = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
    ratings = read_head(path)(values)
    torch.testing.assert_close(ratings, layer_by_layer(weights, values, relu))
    assert not torch.allclose(ratings, layer_by_layer(weights, values, not relu))


def test_a_head_of_one_layer_is_read_as_it_is(tmp_path: Path) -> None:
    save_file({"weight": torch.tensor([[2.0, -1.0]]), "bias": torch.tensor([5.0])}, tmp_path / "head.safetensors")
    head = read_head(tmp_path / "head.safetensors")
    assert head.dimension == 2 and head(torch.tensor([[1.0, 0.0], [0.0, 1.0]])).tolist() == [7.0, 4.0]


@pytest.mark.parametrize(
    "weights",
    [
        {"weight": torch.zeros(1, 4)},
        {"weight": torch.zeros(2, 4), "bias": torch.zeros(2)},
        deep_weights((0, 1, 2, 3, 4)),
        deep_weights((0, 2, 4, 6, 7)) | {"layers.2.weight": torch.zeros(4, 7)},
        {"weight": torch.zeros(1, 4), "bias": torch.zeros(1), "extra": torch.zeros(1)},
    ],
    ids=["no bias", "two ratings", "unknown positions", "layers that do not fit", "more than a head"],
)
def test_a_layout_that_is_not_published_is_refused_with_what_was_found(
    tmp_path: Path, weights: dict[str, torch.Tensor]
) -> None:
    save_file(weights, tmp_path / "head.safetensors")
    with pytest.raises(ValueError, match=r"has the weights .*weight \(\d, \d\).*: it must have one layer .*with ReLU"):
        read_head(tmp_path / "head.safetensors")


def test_a_head_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="nowhere.pth is not there: give the path of its weights, .safetensors or .pth"
    ):
        read_head(tmp_path / "nowhere.pth")


class Payload:
    """An object that would run code when unpickled."""

    def __reduce__(self) -> tuple:
        return exec, ("raise SystemExit('unpickled')",)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_that_is_no_weights_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"head{suffix}"
    path.write_bytes(b"not weights at all")
    with pytest.raises(
        ValueError, match="cannot be read: it must be a .safetensors file, or a .pth file of weights only"
    ):
        read_head(path)


def test_a_pth_file_that_carries_code_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"weight": Payload()}, tmp_path / "head.pth")
    with pytest.raises(ValueError, match="cannot be read"):
        read_head(tmp_path / "head.pth")
