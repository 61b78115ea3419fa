"""Detect coloured circles, squares and triangles on a plain ground: by connected components and geometry, no weights."""

from collections.abc import Collection, Sequence
from functools import cache
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image as PILImage
from scipy import ndimage

from ray_ddpo.actors.detection.detector import DetectedObject, Detector, Image

SHAPES = ("circle", "square", "triangle")
# One point in sRGB for each of GenEval's names, and grey, so that a grey thing is none of them.
NAMED = {
    "red": (215, 30, 30),
    "orange": (250, 140, 20),
    "yellow": (250, 220, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "purple": (130, 40, 160),
    "pink": (250, 150, 190),
    "brown": (120, 70, 30),
    "black": (10, 10, 10),
    "white": (250, 250, 250),
    "grey": (135, 135, 135),
}
EDGE = 1 / 24  # of the shorter side: the frame whose median colour is the ground
WORKING_SIDE = 128  # pixels: larger images are reduced to about this, by whole factors
SMOOTHING = 1 / 100  # of the shorter side: standard deviation of the Gaussian against noise
MIN_SHARE = 0.2  # of the largest piece of touching objects: area below which a piece is a mixed edge
MIN_CONTRAST = 6.0  # distance from the ground in CIELAB from which on a pixel is none of the ground
HALF = 0.45  # of an object's own contrast, from which on a pixel belongs to the object
GHOST = 0.25  # of the contrast of the object that it touches, below which something is a trace of compression
MIN_SIZE = 1 / 16  # of the shorter side: extent below which something is a speck
MIN_FIT = 0.8  # intersection over union with the ideal shape below which something is no shape
ANGLES = 30  # orientations that are tried
FIT_SIDE = 40  # pixels to which a shape is reduced before it is compared


class ShapeDetector(Detector):
    """Finds circles, squares and triangles. Objects that touch are told apart by their colours only."""

    def detect(
        self, images: Sequence[Image], classes: Sequence[Collection[str]]
    ) -> list[dict[str, list[DetectedObject]]]:
        for asked in classes:
            check_classes(asked)
        return [find_shapes(image) for image in images]

    def colours(self, image: Image, objects: Sequence[DetectedObject], name: str) -> list[str]:
        lab = to_lab(image)
        return [nearest_name(np.median(lab[_core(found.mask)], axis=0)) for found in objects]


def check_classes(asked: Collection[str]) -> None:
    """Raise ValueError if a class is none of the shapes."""
    if unknown := sorted(set(asked) - set(SHAPES)):
        raise ValueError(f"the detector 'shapes' does not know {unknown}: it knows {list(SHAPES)}")


def find_shapes(image: Image) -> dict[str, list[DetectedObject]]:
    """Return the shapes of an image. The score is 1: what fits no shape is left out."""
    height, width = image.shape[:2]
    factor = max(1, min(height, width) // WORKING_SIDE)
    small = PILImage.fromarray(image).resize((width // factor, height // factor), PILImage.Resampling.BOX)
    found: dict[str, list[DetectedObject]] = {}
    for mask in separate_objects(np.asarray(small)):
        name, fit = best_fit(mask)
        if fit >= MIN_FIT:
            full = np.asarray(PILImage.fromarray(mask).resize((width, height), PILImage.Resampling.NEAREST))
            rows, columns = np.nonzero(full)
            box = (float(columns.min()), float(rows.min()), float(columns.max()), float(rows.max()))
            found.setdefault(name, []).append(DetectedObject(box, 1.0, full))
    return found


def separate_objects(image: Image) -> list[Bool[np.ndarray, "H W"]]:
    """Return the masks of all objects: connected pixels that differ from the ground, cut where the colour changes."""
    side = min(image.shape[:2])
    lab = to_lab(ndimage.gaussian_filter(image.astype(float), (SMOOTHING * side, SMOOTHING * side, 0)))
    frame = max(1, round(EDGE * side))
    edge = np.ones(image.shape[:2], bool)
    edge[frame:-frame, frame:-frame] = False
    distance = np.linalg.norm(lab - np.median(lab[edge], axis=0), axis=-1)
    noise = 3 * float(np.median(distance[edge]))
    masks = []
    for mask in _components(distance > max(MIN_CONTRAST, noise), side):
        masks += [cut for part in _at_half_contrast(mask, distance, side) for cut in _of_one_colour(part, lab, side)]
    return masks


def _components(mask: Bool[np.ndarray, "H W"], side: int) -> list[Bool[np.ndarray, "H W"]]:
    """Return the connected parts of a mask that are no specks."""
    return [part for part in _labelled(mask) if _extent(part) >= MIN_SIZE * side]


def _labelled(mask: Bool[np.ndarray, "H W"]) -> list[Bool[np.ndarray, "H W"]]:
    """Return the connected parts of a mask."""
    found: Any = ndimage.label(mask)
    labels, count = found
    return [labels == part for part in range(1, count + 1)]


def _at_half_contrast(
    mask: Bool[np.ndarray, "H W"], distance: Float[np.ndarray, "H W"], side: int
) -> list[Bool[np.ndarray, "H W"]]:
    """Cut a mask where the contrast is half of its own, so that blur and compression do not round the shape.

    What remains far from the parts with strong contrast, such as an orange object beside a black one, is cut by its own.
    """
    contrast = float(np.quantile(distance[mask], 0.9))
    strong = mask & (distance > HALF * contrast)
    found = _components(strong, side)
    if not found:
        return []
    near: Any = ndimage.binary_dilation(strong, iterations=max(1, round(side / 40)))
    rest = mask & ~near
    pale = [part for part in _components(rest, side) if np.quantile(distance[part], 0.9) > GHOST * contrast]
    return found + [part for piece in pale for part in _at_half_contrast(piece, distance, side)]


def _of_one_colour(
    mask: Bool[np.ndarray, "H W"], lab: Float[np.ndarray, "H W 3"], side: int
) -> list[Bool[np.ndarray, "H W"]]:
    """Cut a mask where objects of different colours touch. Pixels near an edge, whose colours mix, are shared out last."""
    core: Any = ndimage.binary_erosion(mask, iterations=max(1, round(side / 64)))
    names = np.zeros(mask.shape, int)
    names[core] = 1 + np.argmin(np.linalg.norm(lab[core][:, None] - _named_lab()[None], axis=-1), axis=1)
    pieces = []
    for name in np.unique(names[core]):
        pieces += _labelled(names == name)
    largest = max((int(piece.sum()) for piece in pieces), default=0)
    pieces = [piece for piece in pieces if piece.sum() >= MIN_SHARE * largest]
    if len(pieces) <= 1:
        return [mask]
    seeds = np.zeros(mask.shape, int)
    for number, piece in enumerate(pieces, 1):
        seeds[piece] = number
    nearest: Any = ndimage.distance_transform_edt(seeds == 0, return_distances=False, return_indices=True)
    shared = np.where(mask, seeds[tuple(nearest)], 0)
    return [shared == number for number in range(1, len(pieces) + 1)]


def _extent(mask: Bool[np.ndarray, "H W"]) -> int:
    """Return the longer side of the box around a mask, in pixels."""
    if not mask.any():
        return 0
    return max(int(np.ptp(places)) + 1 for places in np.nonzero(mask))


def _core(mask: Bool[np.ndarray, "H W"] | None) -> Bool[np.ndarray, "H W"]:
    """Return the inner half of a mask, where no colour is mixed with the ground's."""
    assert mask is not None
    depth: Any = ndimage.distance_transform_edt(mask)
    return depth >= 0.5 * depth.max()


def best_fit(mask: Bool[np.ndarray, "H W"]) -> tuple[str, float]:
    """Return the shape of the same area and centre that overlaps most with a mask, and the intersection over union."""
    rows, columns = np.nonzero(mask)
    crop = mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    step = max(1, max(crop.shape) // FIT_SIDE)
    crop = crop[::step, ::step]
    rows, columns = np.nonzero(crop)
    # The frame around the mask holds corners of an ideal shape that the mask lacks.
    reach = max(crop.shape)
    y, x = np.mgrid[-reach : crop.shape[0] + reach, -reach : crop.shape[1] + reach].astype(float)
    inside = np.pad(crop, reach)
    y, x = y - rows.mean(), x - columns.mean()
    fits = {}
    for name in SHAPES:
        ideals = _ideal(name, x, y, float(crop.sum()))
        common = (ideals & inside).sum((1, 2))
        fits[name] = float((common / (ideals | inside).sum((1, 2))).max())
    name = max(fits, key=fits.__getitem__)
    return name, fits[name]


def _ideal(
    name: str, x: Float[np.ndarray, "H W"], y: Float[np.ndarray, "H W"], area: float
) -> Bool[np.ndarray, "A H W"]:
    """Return masks of the ideal shape around the origin, in each orientation."""
    if name == "circle":
        return (x**2 + y**2 <= area / np.pi)[None]
    corners = {"square": 4, "triangle": 3}[name]
    # Area of a regular polygon with n corners: n tan(pi / n) a^2, with a the distance from centre to side.
    apothem = np.sqrt(area / (corners * np.tan(np.pi / corners)))
    turns = np.arange(ANGLES) / ANGLES * 2 * np.pi / corners
    angles = turns[:, None] + 2 * np.pi * np.arange(corners) / corners
    across = np.cos(angles)[..., None, None] * x + np.sin(angles)[..., None, None] * y
    return across.max(1) <= apothem


def to_lab(rgb: Float[np.ndarray, "*S 3"] | Image) -> Float[np.ndarray, "*S 3"]:
    """Convert sRGB from 0 to 255 to CIELAB under D65 (CIE 1976)."""
    share = np.asarray(rgb, float) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.119192, 0.9503041]]
    )
    xyz = linear @ to_xyz.T / np.array([0.95047, 1.0, 1.08883])
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)


@cache
def _named_lab() -> Float[np.ndarray, "K 3"]:
    return to_lab(np.array(list(NAMED.values()), float))


def nearest_name(lab: Float[np.ndarray, "3"]) -> str:
    """Return the name of the colour that is nearest in CIELAB."""
    return list(NAMED)[int(np.argmin(np.linalg.norm(_named_lab() - lab, axis=1)))]
