"""The interface of a detector: images in, objects with boxes, scores and colours out."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, UInt8

Image = UInt8[np.ndarray, "H W 3"]
Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels


@dataclass(frozen=True)
class DetectedObject:
    """One object of an image."""

    box: Box
    score: float  # the detector's confidence, 0 … 1
    mask: Bool[np.ndarray, "H W"] | None = None  # None if the detector knows boxes only


class Detector(ABC):
    """A detector that is loaded on a device."""

    def __init__(self, device: str) -> None:
        """Load the detector. A recipe's `module:Class` is called with the device, such as cpu or cuda:0."""
        self.device = device

    @abstractmethod
    def detect(
        self, images: Sequence[Image], classes: Sequence[Collection[str]]
    ) -> list[dict[str, list[DetectedObject]]]:
        """Find objects.

        Args:
            images: uint8, of any sizes.
            classes: the names that matter for each image.

        Returns:
            For each image the objects by class, in any order. Other classes than those asked for may be there.

        Raises:
            ValueError: the detector does not know a class.
        """

    @abstractmethod
    def colours(self, image: Image, objects: Sequence[DetectedObject], name: str) -> list[str]:
        """Return the colour of each object of class `name`, one of GenEval's names."""
