"""Fetch drawings of animals from npm icon packages and render them, for the embedded model and its probe."""

import io
import json
import os
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from ray_ddpo.common.packages import require_packages

# Only sets under MIT or Apache-2.0, at exact versions: the weights stay free of share-alike questions.
STYLES = {
    "noto": "@iconify-json/noto@1.2.9",
    "fluent-emoji-flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "fluent-emoji": "@iconify-json/fluent-emoji@1.2.7",
    "noto-v1": "@iconify-json/noto-v1@1.2.5",
}

# Icons with another name than the animal, and further drawings of it. By default the icon has the animal's name.
ANIMAL_ICONS = {
    "cat": ("cat", "cat-face", "black-cat", "grinning-cat"),
    "dog": ("dog", "dog-face", "service-dog", "guide-dog"),
    "horse": ("horse", "horse-face"),
    "monkey": ("monkey", "monkey-face"),
    "rabbit": ("rabbit", "rabbit-face"),
    "sheep": ("ewe",),
    "cow": ("cow", "cow-face"),
    "lion": ("lion", "lion-face"),
    "tiger": ("tiger", "tiger-face"),
    "bear": ("bear", "bear-face"),
    "butterfly": ("butterfly", "monarch-butterfly"),
    "fish": ("fish", "tropical-fish"),
    "whale": ("whale", "spouting-whale"),
    "squirrel": ("chipmunk",),
    "mouse": ("mouse", "mouse-face"),
    "chicken": ("chicken", "rooster"),
    "bee": ("honeybee",),
    "pig": ("pig", "pig-face"),
    "camel": ("camel", "two-hump-camel"),
}

# Further animals by name. No prompt asks for them, but they make the model better.
OTHER_ICONS = """
ram ox boar koala panda panda-face polar-bear hamster badger beaver bison mammoth elephant rhinoceros hippopotamus
giraffe orangutan sloth otter skunk poodle leopard unicorn water-buffalo eagle owl parrot penguin peacock flamingo
swan dove dodo baby-chick front-facing-baby-chick crocodile dragon dragon-face t-rex sauropod octopus squid crab
lobster shrimp blowfish seal snail bug lady-beetle cockroach mosquito scorpion worm donkey moose
black-bird unicorn-face hamster-face jellyfish teddy-bear
"""

NAMESPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
PROMPTS_FILE = Path(__file__).parents[2] / "common" / "prompt_lists" / "animals.txt"


@dataclass(frozen=True)
class Drawing:
    """A vector drawing of an animal in a style."""

    animal: str  # the caption
    style: str  # a key of STYLES
    icon: str  # its name in the set
    body: str  # the content of the svg element
    width: float  # of the body, in its units
    height: float

    def render(
        self, size: int, scale: float = 1.0, shift: tuple[float, float] = (0.0, 0.0)
    ) -> UInt8[np.ndarray, "{size} {size} 3"]:
        """Render RGB pixels 0 ... 255 on white.

        Args:
            size: pixels on a side.
            shift: to the right and down, in fractions of the side.
        """
        import resvg_py

        span = max(self.width, self.height) / scale
        left = self.width / 2 - span * (0.5 + shift[0])
        top = self.height / 2 - span * (0.5 + shift[1])
        svg = f'<svg {NAMESPACES} viewBox="{left} {top} {span} {span}">{self.body}</svg>'
        png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, background="#ffffff")
        return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGB"))


def prompted_animals() -> list[str]:
    """Return DDPO's 45 animals (Black et al. 2023, appendix), in their order."""
    return PROMPTS_FILE.read_text().split()


def read_drawings(other_animals: bool = False) -> list[Drawing]:
    """Return the drawings of the 45 animals, and perhaps of further ones, in all styles, without duplicates.

    Raises:
        ValueError: The package that renders drawings is not installed.
    """
    require_packages("drawing animals", "resvg_py")
    wanted = [(animal, icon) for animal in prompted_animals() for icon in ANIMAL_ICONS.get(animal, (animal,))]
    if other_animals:
        names = [icon.removeprefix("front-facing-").removesuffix("-face") for icon in OTHER_ICONS.split()]
        wanted += [(name.replace("-", " "), icon) for name, icon in zip(names, OTHER_ICONS.split(), strict=True)]
    drawings = [drawing for style in STYLES for drawing in _of_one_style(style, wanted)]
    return list({drawing.body: drawing for drawing in drawings}.values())


def _of_one_style(style: str, wanted: list[tuple[str, str]]) -> list[Drawing]:
    """Return the drawings of a style, for (animal, icon) pairs that the style has."""
    icon_set = json.loads((fetch(style) / "package" / "icons.json").read_text())
    aliases = {name: alias["parent"] for name, alias in icon_set.get("aliases", {}).items()}
    drawings = []
    for animal, icon in wanted:
        found = icon_set["icons"].get(aliases.get(icon, icon))
        if found is not None:
            # Icons without a size have the set's, or iconify's default of 16 if the set has none.
            width, height = (found.get(side, icon_set.get(side, 16)) for side in ("width", "height"))
            drawings.append(Drawing(animal, style, icon, found["body"], width, height))
    return drawings


def fetch(style: str) -> Path:
    """Return the folder of the style's unpacked npm package, which the npm client downloads the first time."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ray-ddpo" / "icons"
    folder = cache / STYLES[style].removeprefix("@iconify-json/")
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        packed = subprocess.run(
            ["npm", "pack", STYLES[style], "--pack-destination", str(cache)], check=True, capture_output=True, text=True
        )
        unpacking = folder.with_suffix(".unpacking")
        with tarfile.open(cache / packed.stdout.split()[-1]) as archive:
            archive.extractall(unpacking, filter="data")
        unpacking.rename(folder)
    return folder
