"""Detect objects with a model of transformers: Mask2Former (as GenEval's authors), DETR's kind, or a zero-shot detector.

Colours are named by CLIP, with the authors' sentences (Ghosh et al. 2023, `evaluate_images.py`).
"""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image as PILImage
from torch import Tensor

from ray_ddpo.actors.detection.detector import Box, DetectedObject, Detector, Image
from ray_ddpo.actors.detection.requirements import COLOURS
from ray_ddpo.common.image_models.clip_towers import ClipTowers, load_clip, unit
from ray_ddpo.common.model_files.model_hub import Weights, cannot_load, read_pretrained
from ray_ddpo.common.model_files.pretrained import MODEL_FILES, TOKENIZER_FILE, Precision, loaded, torch_dtype

MASK2FORMER = "facebook/mask2former-swin-small-coco-instance"
CLIP = "openai/clip-vit-large-patch14"
PROCESSOR_FILE = "preprocessor_config.json"
SENTENCES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
BLANK = (0x99, 0x99, 0x99)  # around an object, where a mask is known
# GenEval's names of three COCO classes.
COCO_NAMES = {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard"}
MASKS = ("mask2former", "maskformer")
OPEN_VOCABULARY = ("owlvit", "owlv2", "grounding-dino", "mm-grounding-dino")
ROWS = 8  # images, or images with one class each, in a forward pass
LOWEST = 0.05  # confidence below which nothing is looked at

Found = dict[str, list[DetectedObject]]


def hub_needs(model: str, clip: str) -> tuple[Weights, ...]:
    """Return the files that `HubDetector` reads."""
    return (
        Weights(model, (*MODEL_FILES, PROCESSOR_FILE), "reward.model"),
        Weights(clip, (*MODEL_FILES, TOKENIZER_FILE), "reward.clip"),
    )


class HubDetector(Detector):
    """A detection model, and a CLIP model that names colours."""

    def __init__(self, model: str, clip: str, dtype: Precision, device: str) -> None:
        super().__init__(device)
        self._dtype = torch_dtype(dtype, device)
        self._model, self._processor = _read(model, self._dtype)
        self._model = self._model.to(device)
        self._kind: str = self._model.config.model_type
        _, clip_weights = hub_needs(model, clip)
        self._towers = load_clip(clip_weights, clip_weights, device, self._dtype)
        self._colours: dict[str, Float[Tensor, "K D"]] = {}

    def detect(self, images: Sequence[Image], classes: Sequence[Collection[str]]) -> list[Found]:
        found: list[Found] = [{} for _ in images]
        if self._kind in OPEN_VOCABULARY:
            asked = [(place, name) for place, names in enumerate(classes) for name in sorted(names)]
            for start in range(0, len(asked), ROWS):
                rows = asked[start : start + ROWS]
                detected = self._of_names([images[place] for place, _ in rows], [name for _, name in rows])
                for (place, name), objects in zip(rows, detected, strict=True):
                    found[place][name] = objects
            return found
        self._check_classes(classes)
        for start in range(0, len(images), ROWS):
            found[start : start + ROWS] = self._of_fixed_classes(images[start : start + ROWS])
        return found

    def _check_classes(self, classes: Sequence[Collection[str]]) -> None:
        known = set(self._model.config.id2label.values())
        asked = {name for names in classes for name in names}
        if unknown := sorted(name for name in asked if not {name, COCO_NAMES.get(name, name)} & known):
            raise ValueError(f"the detector {self._kind} does not know {unknown}: it knows {sorted(known)}")

    @torch.no_grad()
    def _of_fixed_classes(self, images: Sequence[Image]) -> list[Found]:
        """Detect the classes that the model was trained on."""
        inputs = self._processor(images=[PILImage.fromarray(image) for image in images], return_tensors="pt")
        outputs = self._model(**self._moved(inputs))
        sizes = [image.shape[:2] for image in images]
        if self._kind in MASKS:
            results = self._processor.post_process_instance_segmentation(
                outputs, threshold=LOWEST, target_sizes=sizes, return_binary_maps=True
            )
            return [self._by_class(_with_masks(result)) for result in results]
        results = self._processor.post_process_object_detection(
            outputs, threshold=LOWEST, target_sizes=torch.tensor(sizes)
        )
        return [self._by_class(_with_boxes(result)) for result in results]

    @torch.no_grad()
    def _of_names(self, images: Sequence[Image], names: Sequence[str]) -> list[list[DetectedObject]]:
        """Detect in each image the objects of one name."""
        pictures, sizes = [PILImage.fromarray(image) for image in images], [image.shape[:2] for image in images]
        grounded = self._kind.endswith("grounding-dino")
        texts = [f"{name}." for name in names] if grounded else [[f"a photo of a {name}"] for name in names]
        inputs = self._processor(images=pictures, text=texts, return_tensors="pt", padding=True)
        outputs = self._model(**self._moved(inputs))
        more: dict[str, Any] = {"input_ids": inputs["input_ids"], "text_threshold": 1.0} if grounded else {}
        results = self._processor.post_process_grounded_object_detection(
            outputs, threshold=LOWEST, target_sizes=torch.tensor(sizes), **more
        )
        return [[found for _, found in _with_boxes(result)] for result in results]

    def _moved(self, inputs: Any) -> dict[str, Tensor]:
        return {
            name: tensor.to(self.device, self._dtype if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in inputs.items()
            if isinstance(tensor, Tensor)
        }

    def _by_class(self, objects: list[tuple[int, DetectedObject]]) -> Found:
        """Return objects by GenEval's names."""
        ours = {coco: name for name, coco in COCO_NAMES.items()}
        found: Found = {}
        for label, each in objects:
            name = str(self._model.config.id2label[label])
            found.setdefault(ours.get(name, name), []).append(each)
        return found

    def colours(self, image: Image, objects: Sequence[DetectedObject], name: str) -> list[str]:
        if name not in self._colours:
            self._colours[name] = colour_embeddings(self._towers, name)
        named = []
        for found in objects:
            pixels = torch.from_numpy(cut_out(image, found)[None]).to(self.device)
            named.append(COLOURS[int((self._towers.embed_images(pixels) @ self._colours[name].T).argmax())])
        return named


def colour_embeddings(towers: ClipTowers, name: str) -> Float[Tensor, "K D"]:
    """Return one embedding for each colour: the mean over the sentences, of norm 1."""
    texts = [sentence.format(colour=colour, name=name) for colour in COLOURS for sentence in SENTENCES]
    return unit(towers.embed_texts(texts).unflatten(0, (len(COLOURS), len(SENTENCES))).mean(1))


def cut_out(image: Image, found: DetectedObject) -> UInt8[np.ndarray, "H2 W2 3"]:
    """Return the box around an object, with grey around the object if its mask is known."""
    if found.mask is not None:
        image = np.where(found.mask[..., None], image, np.array(BLANK, np.uint8))
    height, width = image.shape[:2]
    left, top, right, bottom = (round(edge) for edge in found.box)
    left, top = min(max(left, 0), width - 1), min(max(top, 0), height - 1)
    return np.array(image[top : max(bottom, top + 1), left : max(right, left + 1)])


def _with_masks(result: dict[str, Any]) -> list[tuple[int, DetectedObject]]:
    """Return class number and object for each instance. Its box is that of its mask."""
    if not result["segments_info"]:
        return []
    found = []
    for mask, about in zip(result["segmentation"].bool().cpu().numpy(), result["segments_info"], strict=True):
        rows, columns = np.nonzero(mask)
        box = (float(columns.min()), float(rows.min()), float(columns.max() + 1), float(rows.max() + 1))
        found.append((int(about["label_id"]), DetectedObject(box, float(about["score"]), mask)))
    return found


def _with_boxes(result: dict[str, Any]) -> list[tuple[int, DetectedObject]]:
    """Return class number and object for each box; the number is 0 if the classes were texts."""
    labels = result["labels"] if isinstance(result.get("labels"), Tensor) else [0] * len(result["scores"])
    found = []
    for label, score, edges in zip(labels, result["scores"].tolist(), result["boxes"].tolist(), strict=True):
        box: Box = (edges[0], edges[1], edges[2], edges[3])
        found.append((int(label), DetectedObject(box, score)))
    return found


def _read(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Load a detection model and its processor. Raise ValueError if it is of no kind that detects objects."""
    import transformers
    from transformers import AutoConfig, AutoImageProcessor, AutoProcessor

    weights, _ = hub_needs(name, CLIP)
    missing = cannot_load(weights)

    def read(place: Any, local_files_only: bool) -> tuple[Any, Any]:
        options = {"local_files_only": local_files_only, "trust_remote_code": False}
        kind = AutoConfig.from_pretrained(place, local_files_only=local_files_only, trust_remote_code=False).model_type
        if kind in OPEN_VOCABULARY:
            cls, processor = transformers.AutoModelForZeroShotObjectDetection, AutoProcessor
        elif kind in MASKS:
            cls, processor = transformers.AutoModelForUniversalSegmentation, AutoImageProcessor
        elif kind in transformers.models.auto.modeling_auto.MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES:
            cls, processor = transformers.AutoModelForObjectDetection, AutoImageProcessor
        else:
            raise ValueError(
                f"reward.model is {name!r}, of the kind {kind!r}: it must be Mask2Former, a detector such as DETR, or one "
                f"of {OPEN_VOCABULARY}"
            )
        model = loaded(cls, place, missing, dtype=dtype, local_files_only=local_files_only)
        return model, processor.from_pretrained(place, **options)

    return read_pretrained(name, read, missing)
