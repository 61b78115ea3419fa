"""Read a text with images in it as Qwen2-VL does, with its image processor that needs no torchvision."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, BatchFeature, ProcessorMixin
from transformers.models.qwen2_vl import Qwen2VLImageProcessorPil

IMAGE = "<|image_pad|>"  # stands for an image in a text


class ImageTextReader(ProcessorMixin):
    """Qwen2VLProcessor for images. The class of transformers reads videos too, and so needs torchvision."""

    def __init__(self, image_processor: Any, tokenizer: Any) -> None:
        self.image_processor, self.tokenizer = image_processor, tokenizer

    def __call__(self, text: Sequence[str], images: Any, **keys: Any) -> BatchFeature:
        """Return tokens with one place for each merged patch of an image, and the patches. Texts name images in order."""
        read = self.image_processor(images=images, return_tensors="pt")
        counts = (read["image_grid_thw"].prod(1) // self.image_processor.merge_size**2).tolist()
        widened = []
        for each in text:
            pieces = each.split(IMAGE)
            places = [IMAGE * counts.pop(0) for _ in pieces[1:]]
            widened.append(
                "".join([pieces[0], *(place + rest for place, rest in zip(places, pieces[1:], strict=True))])
            )
        return BatchFeature({**self.tokenizer(widened, padding=True, return_tensors="pt"), **read})


def image_text_reader(folder: Path) -> ImageTextReader:
    """Return the reader that a pipeline's folder `processor` describes."""
    images = Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True)
    return ImageTextReader(
        images, AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    )


def image_tokens(keys: dict[str, Any], size: tuple[int, int]) -> int:
    """Return how many tokens an image takes in a text.

    Args:
        keys: of the image processor.
        size: height and width in pixels.
    """
    processor: Any = Qwen2VLImageProcessorPil(**keys)
    return processor.get_number_of_image_patches(*size, {}) // processor.merge_size**2
