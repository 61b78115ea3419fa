"""Embeddings on disk: each image once, the same bits after a kill, broken images by name, and never two CLIPs."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ray_ddpo.common.image_models.clip_preprocessing import clip_pixels, rgb_pixels
from ray_ddpo.common.run_storage.storage import Storage
from ray_ddpo.learner.aesthetic_head.embedding import Embed, Embedder, embed_images_of
from ray_ddpo.learner.aesthetic_head.embedding_store import ClipIdentity, EmbeddingStore
from ray_ddpo.learner.aesthetic_head.image_files import read_squared, squared
from tests.rated_images import save_images

ROOT = Path(__file__).parents[3]
CLIP = ClipIdentity("clip", "abc-float32", 4)
PATHS = [f"0-{number:04d}.png" for number in range(40)]


class Counted:
    """An embedding that is a real function of the pixels, and the numbers of images that it was asked for."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.batches: list[int] = []
        self.fails_at = fails_at

    def __call__(self, images: Tensor) -> Tensor:
        if len(self.batches) == self.fails_at:
            raise KeyboardInterrupt
        self.batches.append(len(images))
        pixels = clip_pixels(images, 16)
        values = torch.cat([pixels.mean((2, 3)), pixels.std((1, 2, 3))[:, None]], 1)
        return values / values.norm(dim=1, keepdim=True)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    save_images(tmp_path / "images", len(PATHS))
    return tmp_path / "images"


@pytest.fixture
def opened(tmp_path: Path) -> Callable[[], EmbeddingStore]:
    return lambda: EmbeddingStore.open(Storage(tmp_path / "embeddings"), CLIP)


def embedder(embed: Embed) -> Embedder:
    return Embedder(embed, 16, "cpu", batch_size=4, part_batches=3)


def embeddings(store: EmbeddingStore) -> np.ndarray:
    return np.stack([embedding for path in PATHS if (embedding := store.known[path].embedding) is not None])


def test_a_picture_is_embedded_once_and_read_back_as_it_was(images: Path, opened: Callable[[], EmbeddingStore]) -> None:
    store, embed = opened(), Counted()
    assert embed_images_of(images, PATHS, embedder(embed), store) == {}
    assert embed.batches == [4] * 10 and len(store.storage.names()) == 4  # parts of 3, 3, 3 and 1 batches
    again, idle = opened(), Counted()
    embed_images_of(images, PATHS, embedder(idle), again)
    assert idle.batches == [] and np.array_equal(embeddings(again), embeddings(store))
    alone = embed(torch.from_numpy(rgb_pixels(Image.open(images / PATHS[7])))[None])[0].numpy()
    np.testing.assert_allclose(embeddings(again)[7], alone, atol=1e-6)


def test_what_was_stopped_goes_on_behind_its_last_part_with_the_same_bits(
    images: Path, opened: Callable[[], EmbeddingStore], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        embed_images_of(images, PATHS, embedder(Counted(fails_at=8)), opened())
    rest, store = Counted(), opened()
    assert len(store.known) == 24  # two parts of three batches
    embed_images_of(images, PATHS, embedder(rest), store)
    assert rest.batches == [4] * 4
    calm = EmbeddingStore.open(Storage(tmp_path / "calm"), CLIP)
    embed_images_of(images, PATHS, embedder(Counted()), calm)
    assert embeddings(store).tobytes() == embeddings(calm).tobytes()


SLOW = """
import sys, time
from pathlib import Path
from tests.learner.rated_images.test_embedding import CLIP, PATHS, Counted, embedder
from ray_ddpo.common.run_storage.storage import Storage
from ray_ddpo.learner.aesthetic_head.embedding import embed_images_of
from ray_ddpo.learner.aesthetic_head.embedding_store import EmbeddingStore
counted = Counted()
def slow(images):
    time.sleep(0.2)
    return counted(images)
embed_images_of(Path(sys.argv[1]), PATHS, embedder(slow), EmbeddingStore.open(Storage(sys.argv[2]), CLIP))
"""


@pytest.mark.thorough
def test_a_killed_process_loses_at_most_one_part(
    images: Path, opened: Callable[[], EmbeddingStore], tmp_path: Path
) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", SLOW, str(images), str(tmp_path / "embeddings")]
    process = subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / "embeddings" / "part-000001.parquet").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    rest, store = Counted(), opened()
    done = len(store.known)
    assert done in (24, 36)  # it was killed in its third part, or on a slow machine in its fourth
    embed_images_of(images, PATHS, embedder(rest), store)
    assert sum(rest.batches) == len(PATHS) - done
    calm = EmbeddingStore.open(Storage(tmp_path / "calm"), CLIP)
    embed_images_of(images, PATHS, embedder(Counted()), calm)
    assert embeddings(store).tobytes() == embeddings(calm).tobytes()


def test_only_what_has_changed_or_is_new_is_embedded_again(images: Path, opened: Callable[[], EmbeddingStore]) -> None:
    embed_images_of(images, PATHS[:30], embedder(Counted()), opened())
    Image.new("RGB", (30, 30), (255, 0, 0)).save(images / PATHS[3])
    later, store = Counted(), opened()
    before = store.known[PATHS[3]].embedding
    embed_images_of(images, PATHS, embedder(later), store)
    assert sum(later.batches) == 11
    last = opened().known[PATHS[3]].embedding  # the later of its two rows
    assert last is not None and before is not None and not np.allclose(last, before)


def test_broken_pictures_are_named_with_the_reason_and_stay_so_until_their_file_changes(
    images: Path, opened: Callable[[], EmbeddingStore]
) -> None:
    whole = (images / PATHS[0]).read_bytes()
    (images / PATHS[0]).write_bytes(b"not an image")
    (images / PATHS[1]).write_bytes(whole[: len(whole) // 2])
    (images / PATHS[2]).unlink()
    Image.new("RGB", (3000, 2)).save(images / PATHS[3])
    (images / PATHS[4]).write_bytes(b"")
    store = opened()
    broken = embed_images_of(images, PATHS, embedder(Counted()), store)
    assert list(broken) == PATHS[:5] and len(embeddings(store)) == 35
    assert broken[PATHS[0]].startswith("UnidentifiedImageError: cannot identify image file")
    assert broken[PATHS[1]].startswith(("OSError: ", "SyntaxError: ")) and broken[PATHS[2]] == "it is not in the folder"
    assert broken[PATHS[3]] == "it is 3000 x 2: the longer side may be 100 times the shorter one"
    idle = Counted()
    assert embed_images_of(images, PATHS, embedder(idle), opened()) == broken and idle.batches == []
    (images / PATHS[2]).write_bytes(whole)
    assert list(embed_images_of(images, PATHS, embedder(idle), opened())) == [PATHS[0], PATHS[1], *PATHS[3:5]]
    assert idle.batches == [1]


def test_an_embedding_that_is_not_finite_is_broken(images: Path, opened: Callable[[], EmbeddingStore]) -> None:
    def overflowing(images: Tensor) -> Tensor:
        return torch.tensor([[1.0, 0, 0, torch.inf], *[[1.0, 0, 0, 0]] * 3])

    broken = embed_images_of(images, PATHS, embedder(overflowing), opened())
    assert broken == dict.fromkeys(PATHS[::4], "its embedding is not finite")


def test_where_most_pictures_are_not_there_nothing_is_embedded(
    images: Path, opened: Callable[[], EmbeddingStore]
) -> None:
    embed = Counted()
    absent = [f"elsewhere/{path}" for path in PATHS]
    with pytest.raises(
        ValueError, match=r"40 of the table's 79 images in .*elsewhere/0-0000.png: it is not in the folder"
    ):
        embed_images_of(images, [*PATHS[:39], *absent], embedder(embed), opened())
    assert embed.batches == []


def test_where_most_pictures_are_broken_it_is_an_error(images: Path, opened: Callable[[], EmbeddingStore]) -> None:
    for path in PATHS[:21]:
        (images / path).write_bytes(b"not an image")
    with pytest.raises(ValueError, match="21 of the table's 40 images .* cannot be used, which is most of them"):
        embed_images_of(images, PATHS, embedder(Counted()), opened())


def test_embeddings_of_another_clip_are_refused(
    images: Path, opened: Callable[[], EmbeddingStore], tmp_path: Path
) -> None:
    embed_images_of(images, PATHS, embedder(Counted()), opened())
    other = ClipIdentity("clip", "abd-float32", 4)
    with pytest.raises(ValueError, match="has embeddings of the CLIP 'clip', and this one, 'clip', has other weights"):
        EmbeddingStore.open(Storage(tmp_path / "embeddings"), other)


def test_a_squared_picture_is_to_clip_what_the_picture_was() -> None:
    for height, width in ((50, 80), (224, 224), (300, 31)):
        pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        whole = clip_pixels(torch.from_numpy(pixels)[None], 32)
        assert torch.equal(clip_pixels(torch.from_numpy(squared(pixels, 32))[None], 32), whole)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16"])
def test_pictures_of_every_mode_are_read_as_clips_own_processor_reads_them(mode: str, tmp_path: Path) -> None:
    from transformers import CLIPImageProcessorPil

    generator = np.random.default_rng(0)
    colours = Image.fromarray(generator.integers(0, 256, (40, 50, 4), dtype=np.uint8), "RGBA")
    if mode == "I;16":
        image = Image.fromarray(generator.integers(0, 600, (40, 50), dtype=np.uint16))
    else:
        image = colours.convert(mode) if mode in ("RGBA", "LA") else colours.convert("RGB").convert(mode)
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    image.save(path, **({"transparency": 3} if mode == "P" else {}))
    pixels = read_squared(path, 32)
    assert not isinstance(pixels, str)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32, do_normalize=False, do_rescale=False)
    expected = np.array(processor(images=Image.open(path), return_tensors="np")["pixel_values"])[0]
    assert np.abs(pixels.transpose(2, 0, 1) - expected.astype(float)).max() <= 1
    assert (pixels.transpose(2, 0, 1) != expected).mean() < 0.02


def test_a_picture_is_not_turned_by_its_exif_tag(tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(rgb_pixels(Image.open(tmp_path / "turned.png")), np.array(image))
