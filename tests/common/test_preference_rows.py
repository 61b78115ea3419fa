"""Random access to preference files, the order of pairs, and images at another size."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from ray_ddpo.common.preference_files import decoded_image, read_preferences
from ray_ddpo.common.preference_prompts import PreferenceImages, Preferences, SamplePairs
from ray_ddpo.common.preference_rows import SIDES, PreferenceRows, fitted
from tests.preference_pairs import SIZE, png_of_noise, write_pairs

MANY = tuple(f"animal {number}" for number in range(20))  # more than a row group of parquet


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_an_image_read_alone_is_that_of_the_file_read_in_order(tmp_path: Path, ending: str) -> None:
    path = write_pairs(tmp_path / f"pairs.{ending}", MANY)
    rows, pairs = PreferenceRows(path), list(read_preferences(path))
    assert rows.prompts == [pair.prompt for pair in pairs] == list(MANY)
    for row in (19, 0, 8, 7, 13):
        for side in SIDES:
            in_order = np.asarray(Image.open(io.BytesIO(getattr(pairs[row], side))))
            assert np.array_equal(np.asarray(rows.image(row, side)), in_order)


def test_an_image_stands_upright_and_transparent_pixels_are_refused() -> None:
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.new("RGB", (16, 8)).save(file, "PNG", exif=exif)
    assert decoded_image("row 1, chosen", file.getvalue()).size == (8, 16)
    for alpha in (255, 254):
        file = io.BytesIO()
        Image.new("RGBA", (16, 8), (1, 2, 3, alpha)).save(file, "PNG")
        if alpha == 255:
            assert decoded_image("row 1, chosen", file.getvalue()).size == (16, 8)
        else:
            with pytest.raises(ValueError, match="^row 1, chosen: it has transparent pixels"):
                decoded_image("row 1, chosen", file.getvalue())


def test_a_row_group_of_a_written_file_is_small(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "pairs.parquet", MANY)
    assert parquet.ParquetFile(path).metadata.num_row_groups == 3


@pytest.mark.parametrize(
    ("size", "wanted", "middle"),
    [
        ((4, 4), (4, 4), (slice(0, 4), slice(0, 4))),
        ((4, 9), (4, 4), (slice(0, 4), slice(2, 6))),  # round((9 − 4) / 2) = 2: Python rounds half to even
        ((9, 4), (4, 4), (slice(2, 6), slice(0, 4))),
        ((4, 11), (4, 8), (slice(0, 4), slice(2, 10))),
    ],
)
def test_an_image_that_covers_the_size_already_is_only_cut(
    size: tuple[int, int], wanted: tuple[int, int], middle: tuple[slice, slice]
) -> None:
    pixels = np.arange(size[0] * size[1] * 3, dtype=np.uint8).reshape(*size, 3)
    assert np.array_equal(fitted(Image.fromarray(pixels), wanted), pixels[middle])


def test_a_larger_image_is_resized_to_its_shorter_side() -> None:
    """Halving a picture of equal blocks of 2 × 2 pixels leaves each block's color in the middle of flat areas."""
    pixels = np.zeros((8, 20, 3), np.uint8)
    pixels[:, 10:] = 200
    found = fitted(Image.fromarray(pixels), (4, 4))
    assert found.shape == (4, 4, 3)
    assert (found[:, 0] == 0).all() and (found[:, 3] == 200).all()
    assert (found[0] == found[3]).all()


def test_a_gray_image_with_transparency_has_three_channels() -> None:
    assert fitted(Image.new("LA", (6, 6), (90, 10)), (6, 6)).tolist() == [[[90, 90, 90]] * 6] * 6


@pytest.mark.parametrize(("kind", "mode"), [(np.uint16, "I;16"), (np.int32, "I")])
def test_an_image_of_more_than_8_bits_is_refused(kind: type, mode: str, tmp_path: Path) -> None:
    """Pillow would cut its values off at 255, so that nearly all of it were white."""
    image = Image.fromarray(np.arange(0, 65280, 255, dtype=kind).reshape(16, 16))
    assert image.mode == mode
    image.save(tmp_path / "deep.tiff")
    line = {"prompt": "cat", "chosen": "deep.tiff", "rejected": "deep.tiff"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(line) + "\n")
    said = f"row 1, chosen: it is no image that can be read: its pixels are of Pillow's mode {mode}"
    with pytest.raises(ValueError, match=said):
        PreferenceRows(tmp_path / "pairs.jsonl").image(0, "chosen")
    with pytest.raises(ValueError, match=said):
        list(read_preferences(tmp_path / "pairs.jsonl"))


def test_each_pass_over_the_file_has_each_pair_once_in_an_order_of_its_own() -> None:
    pairs = SamplePairs(list(MANY), np.arange(len(MANY)))
    epochs = [[pairs.group(3, epoch * 20 + place) for place in range(20)] for epoch in range(3)]
    orders = [[chosen.metadata["row"] for chosen, _ in epoch] for epoch in epochs]
    assert all(sorted(order) == list(range(1, 21)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert SamplePairs(list(MANY), np.arange(20)).group(3, 47) == epochs[2][7]
    assert [pairs.group(4, place) for place in range(20)] != epochs[0]
    chosen, rejected = epochs[0][0]
    assert chosen.text == rejected.text == MANY[chosen.metadata["row"] - 1]
    assert (chosen.metadata["side"], rejected.metadata["side"]) == SIDES


def test_prompts_are_emptied_and_images_are_mirrored_in_the_share_that_is_asked_for() -> None:
    pairs = SamplePairs(list(MANY), np.arange(20), empty_prompts=0.2, horizontal_flip=True)
    found = [pairs.group(0, number) for number in range(2000)]
    empty = np.mean([chosen.text == "" for chosen, _ in found])
    flips = np.array([[image.metadata.get("flipped", False) for image in pair] for pair in found])
    # Five standard errors of a share of 2000.
    assert abs(empty - 0.2) < 5 * np.sqrt(0.2 * 0.8 / 2000)
    assert (abs(flips.mean(0) - 0.5) < 5 * 0.5 / np.sqrt(2000)).all()
    assert abs((flips[:, 0] == flips[:, 1]).mean() - 0.5) < 5 * 0.5 / np.sqrt(2000)


def test_pixels_are_those_of_the_metadata(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "pairs.parquet")
    given, source = Preferences(path=str(path)).load_images(), Preferences(path=str(path), horizontal_flip=True)
    prompts = [prompt for number in range(40) for prompt in source.load().group(0, number)]
    flipped = next(prompt for prompt in prompts if prompt.metadata.get("flipped"))
    plain = next(prompt for prompt in prompts if "flipped" not in prompt.metadata)
    found = given.pixels((flipped, plain), SIZE)
    for pixels, prompt in zip((found[0][:, ::-1], found[1]), (flipped, plain), strict=True):
        seed = 2 * (prompt.metadata["row"] - 1) + SIDES.index(prompt.metadata["side"])
        assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(png_of_noise(seed)))))


def test_held_out_prompts_are_not_trained_on(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "pairs.parquet", ("cat", "dog", "cat", "ant"))
    source = Preferences(path=str(path), held_out_prompts=("cat",))
    assert source.listed() == ["dog", "ant"] and source.held_out() == ["cat"]
    rows = {source.load().group(0, number)[0].metadata["row"] for number in range(8)}
    assert rows == {2, 4}
    with pytest.raises(ValueError, match=r"held_out_prompts has \['bee'\], which is no prompt"):
        Preferences(path=str(path), held_out_prompts=("bee",)).load()
    with pytest.raises(ValueError, match="nothing to train on"):
        Preferences(path=str(path), held_out_prompts=("cat", "dog", "ant")).load()


def broken(tmp_path: Path, what: str) -> Path:
    path = write_pairs(tmp_path / "pairs.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    if what == "missing column":
        del rows[2]["rejected"]
    if what == "prompt":
        rows[1]["prompt"] = 7
    if what == "missing image":
        (tmp_path / rows[3]["chosen"]).unlink()
    if what == "damaged image":
        image = tmp_path / rows[4]["rejected"]
        image.write_bytes(image.read_bytes()[:100])
    path.write_text("" if what == "empty" else "".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("missing column", "row 3: it has no 'rejected'"),
        ("prompt", "row 2: the prompt is 7"),
        ("missing image", "row 4, chosen: there is no image"),
        ("damaged image", "row 5, rejected: it is no image that can be read"),
        ("empty", "has no rows"),
    ],
)
def test_a_broken_file_is_refused_with_row_and_column(tmp_path: Path, what: str, said: str) -> None:
    source = Preferences(path=str(broken(tmp_path, what)))
    with pytest.raises(ValueError, match=said):
        source.load()
        source.check()


def test_a_parquet_file_without_a_column_or_with_a_damaged_image_is_refused(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "pairs.parquet")
    table = parquet.ParquetFile(path).read()
    parquet.write_table(table.drop_columns("rejected"), path)
    with pytest.raises(ValueError, match="and no 'rejected'"):
        PreferenceRows(path)
    column = pa.array([*table["chosen"].to_pylist()[:-1], b"no image"])
    parquet.write_table(table.set_column(1, "chosen", column), path)
    with pytest.raises(ValueError, match="row 5, chosen: it is no image"):
        PreferenceRows(path).check_images(5)
    PreferenceRows(path).check_images(4)


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "pairs.jsonl")
    source = Preferences(path=str(path))
    assert len(source.listed()) == 5
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    assert source.listed() == ["cat", "dog"]
    assert isinstance(source.load_images(), PreferenceImages)
