"""Input images of prompts: their files, contents, masks, and what is refused."""

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ray_ddpo.common.input_images import blank_inputs, check_inputs, read_inputs, without_places
from ray_ddpo.common.prompts import File, Prompt
from tests.accepted_page import assert_accepted, assert_refused
from tests.input_files import input_mask, input_pixels, save_inputs


def source(file: Path, **keys: Any) -> File:
    return File(**{"path": str(file), "image_column": "image", "mask_column": "mask", **keys})


def test_prompts_read_the_pixels_and_masks_of_their_files(tmp_path: Path) -> None:
    prompts = source(save_inputs(tmp_path)).sampled()
    inputs = read_inputs([prompt.metadata for prompt in prompts], (16, 16))
    for number in range(4):
        assert np.array_equal(inputs.pixels[number], input_pixels(number))
        assert np.array_equal(inputs.masks[number], input_mask(number))
    assert [prompt.text for prompt in prompts] == ["make it red", "a cat", "make it red", "a dog"]
    assert len({prompt.key for prompt in prompts}) == 4 and Prompt("a cat").key == "a cat"
    assert np.array_equal(inputs.select([2, 0]).pixels[1], input_pixels(0)) and len(set(inputs.contents)) == 4


def test_a_prompt_without_a_mask_may_change_nowhere_and_a_blank_one_everywhere(tmp_path: Path) -> None:
    prompts = source(save_inputs(tmp_path), mask_column=None).sampled()
    assert not read_inputs([prompts[0].metadata], (16, 16)).masks.any() and prompts[0].metadata["mask"] == "0_mask.png"
    assert blank_inputs(2, (4, 6)).masks.all() and not blank_inputs(2, (4, 6)).pixels.any()


def test_contents_tell_images_apart_wherever_they_lie(tmp_path: Path) -> None:
    here, there = (source(save_inputs(tmp_path / name)) for name in ("here", "there"))
    assert here.input_contents() == there.input_contents()
    first, second = here.sampled()[0], there.sampled()[0]
    assert first.metadata != second.metadata and without_places(first.metadata) == without_places(second.metadata)
    assert without_places({"image": "a.png", "row": 1}) == {"image": "a.png", "row": 1}
    Image.fromarray(input_pixels(9)).save(tmp_path / "here" / "0.png")
    assert here.input_contents() != there.input_contents()
    with pytest.raises(ValueError) as error:
        read_inputs([first.metadata], (16, 16))
    assert_refused("an input image that changed during a run", str(error.value))


def test_images_stand_upright_and_are_cut_to_the_outputs_size(tmp_path: Path) -> None:
    file, pixels = save_inputs(tmp_path, ("a cat",)), np.zeros((16, 32, 3), np.uint8)
    pixels[:, :16, 0] = 255  # the left half is red
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: the left half comes to lie above
    Image.fromarray(pixels).save(tmp_path / "0.png", exif=exif)
    Image.new("L", (16, 32), 255).save(tmp_path / "0_mask.png")
    prompt = source(file).sampled()[0]
    check_inputs([prompt.metadata], "prompts.path")
    shown = read_inputs([prompt.metadata], (16, 8)).pixels[0]
    assert shown.shape == (16, 8, 3) and shown[:7, :, 0].min() > 200 and shown[9:].max() < 50


@pytest.mark.parametrize(
    ("situation", "mode", "fill"),
    [
        ("a transparent input image", "RGBA", (1, 2, 3, 100)),
        ("an input image of more than 8 bits a channel", "I;16", 1000),
        ("a damaged input image", None, None),
    ],
)
def test_a_file_that_no_model_can_read_is_refused_before_the_run(
    situation: str, mode: str | None, fill: Any, tmp_path: Path
) -> None:
    file = save_inputs(tmp_path)
    if mode is None:
        (tmp_path / "2.png").write_bytes(b"no image")
    else:
        Image.new(mode, (16, 16), fill).save(tmp_path / "2.png")
    with pytest.raises(ValueError) as error:
        source(file).check()
    assert_refused(situation, str(error.value))


def test_opaque_and_grey_images_are_read_in_color(tmp_path: Path) -> None:
    file = save_inputs(tmp_path, ("a cat", "a dog"))
    Image.new("RGBA", (16, 16), (1, 2, 3, 255)).save(tmp_path / "0.png")
    Image.new("L", (16, 16), 7).save(tmp_path / "1.png")
    inputs = read_inputs([prompt.metadata for prompt in source(file).sampled()], (16, 16))
    assert (inputs.pixels[0] == (1, 2, 3)).all() and (inputs.pixels[1] == 7).all()


def test_missing_files_columns_and_masks_of_another_size_are_named(tmp_path: Path) -> None:
    file = save_inputs(tmp_path)
    with pytest.raises(ValueError, match=r"line 1: its 'picture' is missing, and it must be the path"):
        source(file, image_column="picture").sampled()
    Image.new("L", (8, 8)).save(tmp_path / "1_mask.png")
    with pytest.raises(ValueError) as error:
        source(file).check()
    assert_refused("a mask of another size than its image", str(error.value))
    (tmp_path / "3.png").unlink()
    with pytest.raises(ValueError) as error:
        source(file).load()
    assert_refused("an input image that is missing", str(error.value))
    with pytest.raises(ValueError, match="mask_column is 'mask' and image_column None"):
        source(file, image_column=None)
    with pytest.raises(ValueError, match="a prompt has no input image"):
        read_inputs([{}], (16, 16))


def test_evaluation_takes_prompts_with_their_images_only(tmp_path: Path) -> None:
    file = source(save_inputs(tmp_path))
    assert [prompt.metadata["image"][-5:] for prompt in file.evaluated(["make it red"])] == ["0.png", "2.png"]
    with pytest.raises(ValueError, match=r"evaluation.prompts has \['a cow'\], which is no prompt of"):
        file.evaluated(["a cow"])


def test_elongated_images_and_masks_of_zeros_and_ones_are_refused_before_the_run(tmp_path: Path) -> None:
    file = save_inputs(tmp_path, ("a cat",))
    for size in ((1000, 9), (9, 1000)):  # scaled to cover 1024 pixels, it would take gigabytes
        Image.new("RGB", size).save(tmp_path / "0.png")
        with pytest.raises(ValueError) as error:
            source(file, mask_column=None).check()
        assert_refused("an elongated input image", str(error.value))
    Image.new("RGB", (900, 9)).save(tmp_path / "0.png")
    source(file, mask_column=None).check()
    file = save_inputs(tmp_path, ("a cat",))
    Image.fromarray(input_mask(0).astype(np.uint8)).save(tmp_path / "0_mask.png")
    with pytest.raises(ValueError) as error:
        source(file).check()
    assert_refused("a mask of zeros and ones", str(error.value))
    for value in (0, 128, 255):
        Image.new("L", (16, 16), value).save(tmp_path / "0_mask.png")
        source(file).check()


@pytest.mark.parametrize("mask", ["0_mask.png", ["a", "list"], None, 3])
def test_a_column_called_mask_is_metadata_like_others_if_no_key_names_it(mask: Any, tmp_path: Path) -> None:
    file = save_inputs(tmp_path, ("a cat",))
    file.write_text(json.dumps({"prompt": "a cat", "image": "0.png", "mask": mask}))
    prompts = source(file, mask_column=None, column="prompt")
    prompts.check()
    prompt = prompts.sampled()[0]
    assert prompt.metadata["mask"] == mask and not read_inputs([prompt.metadata], (16, 16)).masks.any()


@pytest.mark.parametrize("column", ["image", "image_sha256", "mask_sha256"])
def test_a_column_with_a_name_of_the_inputs_metadata_is_refused(column: str, tmp_path: Path) -> None:
    file = save_inputs(tmp_path, ("a cat",))
    file.write_text(json.dumps({"prompt": "a cat", "picture": "0.png", column: "mine"}))
    with pytest.raises(ValueError) as error:
        source(file, image_column="picture", mask_column=None, column="prompt").sampled()
    assert_refused("a column with a name of the input images' metadata", str(error.value))


@pytest.mark.parametrize("path", ["~nobody_of_this_name/0.png", "a" * 5000, "a\0b", "/dev/null", "."])
def test_a_path_that_no_image_can_have_is_refused_with_its_line(path: str, tmp_path: Path) -> None:
    file = save_inputs(tmp_path, ("a cat",))
    file.write_text(json.dumps({"prompt": "a cat", "image": path}))
    with pytest.raises(ValueError, match="line 1: 'image': there is no image "):
        source(file, mask_column=None, column="prompt").sampled()


def test_an_url_is_refused_as_no_file(tmp_path: Path) -> None:
    file = save_inputs(tmp_path, ("a cat",))
    file.write_text(json.dumps({"prompt": "a cat", "image": "https://example.org/0.png"}))
    with pytest.raises(ValueError) as error:
        source(file, mask_column=None, column="prompt").sampled()
    assert_refused("an URL in the place of an input image", str(error.value))


def test_colors_of_16_bits_are_read_with_their_upper_8(tmp_path: Path) -> None:
    file, values = save_inputs(tmp_path, ("a cat",)), np.random.default_rng(0).integers(0, 1 << 16, (16, 16, 3))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)  # Pillow writes no such file
    header = struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    (tmp_path / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    prompt = source(file).sampled()[0]
    assert np.array_equal(read_inputs([prompt.metadata], (16, 16)).pixels[0], values >> 8)
    assert_accepted("colors of 16 bits, as in some PNG files")
