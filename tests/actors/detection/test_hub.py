"""Models of transformers as detectors: small ones with random weights, beside the same computed by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ray_ddpo.actors.detection.detector import DetectedObject
from ray_ddpo.actors.detection.hub import SENTENCES, HubDetector, colour_embeddings, cut_out
from ray_ddpo.common.image_models.clip_towers import load_clip
from ray_ddpo.common.model_files.model_hub import Weights
from tests.tiny_clip import save_tiny_clip
from tests.tiny_detectors import save_tiny_grounding_dino, save_tiny_mask2former, save_tiny_owlv2, save_tiny_yolos

IMAGES = list(np.random.default_rng(0).integers(0, 256, (2, 64, 96, 3), np.uint8))
BOTH = [{"cat", "dog"}, {"dog"}]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


def detector(model: Path, clip: Path) -> HubDetector:
    return HubDetector(str(model), str(clip), "float32", "cpu")


def check_objects(found: list[dict[str, list[DetectedObject]]], masks: bool) -> None:
    """Check that something is found, inside the image."""
    objects = [each for of_image in found for of_class in of_image.values() for each in of_class]
    assert objects
    for each in objects:
        left, top, right, bottom = each.box
        assert 0.05 <= each.score <= 1 and right >= left and bottom >= top
        if masks:
            assert each.mask is not None and each.mask.shape == (64, 96) and left >= 0 and right <= 96


def test_mask2former_gives_masks_and_their_boxes(tmp_path: Path, clip: Path) -> None:
    live = detector(save_tiny_mask2former(tmp_path), clip)
    found = live.detect(IMAGES, BOTH)
    check_objects(found, masks=True)
    alone = [live.detect([image], [{"cat"}])[0] for image in IMAGES]
    for together, single in zip(found, alone, strict=True):
        assert together.keys() == single.keys()
        for name in together:
            np.testing.assert_allclose([o.score for o in together[name]], [o.score for o in single[name]], atol=1e-3)
            assert live.colours(IMAGES[0], together[name], name)


def test_a_detector_with_fixed_classes_has_the_boxes_of_its_own_code(tmp_path: Path, clip: Path) -> None:
    live = detector(save_tiny_yolos(tmp_path), clip)
    found = live.detect(IMAGES, BOTH)
    check_objects(found, masks=False)
    inputs = live._processor(images=[Image.fromarray(image) for image in IMAGES], return_tensors="pt")
    with torch.no_grad():
        outputs = live._model(**inputs)
    probabilities = outputs.logits.softmax(-1)[..., :-1]
    for row in range(2):
        best = probabilities[row].max(-1).values.sort(descending=True).values.numpy()
        ours = sorted((each.score for of_class in found[row].values() for each in of_class), reverse=True)
        np.testing.assert_allclose(ours, best[best > 0.05], rtol=1e-5)
    assert set().union(*found) <= {"cat", "dog", "computer mouse"}  # GenEval's name of COCO's mouse


@pytest.mark.parametrize("save", [save_tiny_owlv2, save_tiny_grounding_dino])
def test_a_zero_shot_detector_is_asked_for_each_class_alone(save, tmp_path: Path, clip: Path) -> None:
    live = detector(save(tmp_path), clip)
    found = live.detect(IMAGES, BOTH)
    assert [set(of_image) for of_image in found] == BOTH
    check_objects(found, masks=False)
    (alone,) = live.detect(IMAGES[1:], [{"dog"}])
    np.testing.assert_allclose(
        [each.score for each in alone["dog"]], [each.score for each in found[1]["dog"]], rtol=1e-3, atol=1e-4
    )


def test_an_unknown_class_or_kind_of_model_is_refused(tmp_path: Path, clip: Path) -> None:
    live = detector(save_tiny_yolos(tmp_path), clip)
    with pytest.raises(ValueError, match=r"does not know \['dragon'\]: it knows \['cat'"):
        live.detect(IMAGES, [{"dragon"}, {"cat", "computer mouse"}])
    with pytest.raises(ValueError, match="of the kind 'clip': it must be Mask2Former"):
        detector(clip, clip)
    with pytest.raises(ValueError, match="reward.model"):
        detector(tmp_path / "nothing", clip)


def test_colours_are_compared_with_the_mean_of_the_authors_sentences(clip: Path) -> None:
    weights = Weights(str(clip), (), "reward.clip")
    towers = load_clip(weights, weights, "cpu", torch.float32)
    embeddings = colour_embeddings(towers, "cat")
    texts = towers.embed_texts([sentence.format(colour="orange", name="cat") for sentence in SENTENCES])
    mean = texts.double().mean(0)
    torch.testing.assert_close(embeddings[1].double(), mean / mean.norm(), rtol=1e-5, atol=1e-6)


def test_an_object_is_cut_out_on_grey() -> None:
    image = np.full((10, 20, 3), 255, np.uint8)
    mask = np.zeros((10, 20), bool)
    mask[2:4, 5:8] = True
    cut = cut_out(image, DetectedObject((4.0, 2.0, 9.0, 4.0), 1.0, mask))
    assert cut.shape == (2, 5, 3) and (cut[:, 0] == 0x99).all() and (cut[:, 1:4] == 255).all()
    assert cut_out(image, DetectedObject((30.0, -5.0, 30.2, -4.0), 1.0)).shape == (1, 1, 3)
