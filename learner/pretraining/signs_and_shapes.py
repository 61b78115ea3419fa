"""Render the training images of the model that writes: signs with a word, and coloured shapes on a coarse grid."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import ascii_uppercase

import matplotlib
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from ray_ddpo.common.prompt_set import shipped_prompts

PIXELS = 64
SCALE = 4  # images are drawn larger by this factor and reduced, for smooth edges
FONT = "DejaVuSans-Bold"  # comes with matplotlib, under its own free licence
LENGTHS = (2, 3, 4)  # letters of a word
SLOTS = {2: 22, 3: 19, 4: 15}  # pixels a letter, by the word's length
LETTER_SIZES = {2: 26, 3: 22, 4: 18}  # pixels of the font
INKS = ((15, 15, 15), (20, 40, 120), (120, 20, 20), (20, 90, 30))
SIGN_GROUNDS = ((255, 255, 255), (245, 235, 200), (210, 230, 250), (255, 220, 120))
SENTENCES = ("a sign that says", "a label that reads", "a card that shows")  # the same number of words in each

SHAPES = ("circle", "square", "triangle")
COLOURS = {
    "red": (215, 30, 30),
    "yellow": (250, 220, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "black": (10, 10, 10),
}
SHAPE_GROUND = (225, 225, 225)
NUMBERS = {1: "a", 2: "two", 3: "three"}
RELATIONS = {"left of": (0, 1), "right of": (1, 0), "above": (2, 3), "below": (3, 2)}
TAGS = {
    "single_object": 0.04,
    "colors": 0.14,
    "counting": 0.24,
    "two_object": 0.06,
    "color_attr": 0.3,
    "position": 0.22,
}
# Centres of the objects in pixels, by their number. With two, the first and second layout show the four relations.
CENTRES: dict[int, tuple[tuple[tuple[int, int], ...], ...]] = {
    1: (((32, 32),),),
    2: (((17, 32), (47, 32)), ((32, 17), (32, 47))),
    3: (((17, 17), (47, 17), (32, 47)), ((32, 17), (17, 47), (47, 47))),
}


@dataclass(frozen=True)
class CaptionedImage:
    """An image and its caption."""

    pixels: UInt8[np.ndarray, "64 64 3"]
    caption: str


@dataclass(frozen=True)
class Kind:
    """Objects of one shape and colour."""

    count: int
    colour: str | None
    shape: str

    @property
    def text(self) -> str:
        """Return its part of a prompt, such as `two red circles`."""
        noun = self.shape if self.count == 1 else f"{self.shape}s"
        return " ".join(filter(None, (NUMBERS[self.count], self.colour, noun)))


@dataclass(frozen=True)
class Scene:
    """What a prompt about shapes asks for."""

    tag: str
    kinds: tuple[Kind, ...]
    relation: str | None = None  # of the first kind to the second

    @property
    def text(self) -> str:
        """Return the prompt."""
        return f" {self.relation or 'and'} ".join(kind.text for kind in self.kinds)

    @property
    def count(self) -> int:
        """Return the number of objects."""
        return sum(kind.count for kind in self.kinds)


@cache
def all_scenes() -> tuple[Scene, ...]:
    """Return all scenes that the model knows."""
    kinds = [(colour, shape) for shape in SHAPES for colour in COLOURS]
    pairs = [(a, b) for a in kinds for b in kinds if a[0] != b[0] and a[1] != b[1]]
    scenes = [Scene("single_object", (Kind(1, None, shape),)) for shape in SHAPES]
    scenes += [Scene("colors", (Kind(1, *kind),)) for kind in kinds]
    scenes += [Scene("counting", (Kind(count, *kind),)) for count in (2, 3) for kind in kinds]
    scenes += [Scene("two_object", (Kind(1, None, a), Kind(1, None, b))) for a in SHAPES for b in SHAPES if a != b]
    for counts in ((1, 1), (2, 1), (1, 2)):
        scenes += [Scene("color_attr", (Kind(counts[0], *a), Kind(counts[1], *b))) for a, b in pairs]
    scenes += [Scene("position", (Kind(1, *a), Kind(1, *b)), relation) for relation in RELATIONS for a, b in pairs]
    return tuple(scenes)


@cache
def trained_scenes() -> dict[str, list[Scene]]:
    """Return the scenes by tag, without those of the test prompts."""
    held_out = {prompt.text for prompt in shipped_prompts("shapes", "test")}
    known = [scene for scene in all_scenes() if scene.text not in held_out]
    return {tag: [scene for scene in known if scene.tag == tag] for tag in TAGS}


@cache
def held_out_words() -> frozenset[str]:
    """Return the words of the test prompts, which no training image shows."""
    return frozenset(prompt.text.split('"')[1] for prompt in shipped_prompts("words", "test"))


def random_sign(generator: np.random.Generator) -> CaptionedImage:
    """Draw a sign with random letters."""
    word, sentence = random_word(generator), SENTENCES[generator.integers(len(SENTENCES))]
    return CaptionedImage(draw_sign(word, generator), f'{sentence} "{word}"')


def random_word(generator: np.random.Generator) -> str:
    """Return random letters that are no word of the test prompts. Longer words are more frequent."""
    while True:
        length = int(generator.choice(LENGTHS, p=(0.15, 0.35, 0.5)))
        word = "".join(generator.choice(list(ascii_uppercase), length))
        if word not in held_out_words():
            return word


def draw_sign(word: str, generator: np.random.Generator) -> UInt8[np.ndarray, "64 64 3"]:
    """Draw a word of 2 to 4 letters near the middle of a sign, in random colours."""
    image = Image.new("RGB", (SCALE * PIXELS, SCALE * PIXELS), SIGN_GROUNDS[generator.integers(len(SIGN_GROUNDS))])
    pen, ink = ImageDraw.Draw(image), INKS[generator.integers(len(INKS))]
    slot, font = SLOTS[len(word)], load_font(SCALE * LETTER_SIZES[len(word)])
    x, y = PIXELS / 2 + generator.uniform(-1, 1), PIXELS / 2 + generator.uniform(-3, 3)
    for place, letter in enumerate(word):
        centre = x + slot * (place - (len(word) - 1) / 2)
        pen.text((SCALE * centre, SCALE * y), letter, fill=ink, font=font, anchor="mm")
    return _reduced(image)


@cache
def load_font(size: int) -> ImageFont.FreeTypeFont:
    """Load the font in a size in pixels."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", f"{FONT}.ttf")), size)


def random_shapes(generator: np.random.Generator) -> CaptionedImage:
    """Draw a random scene."""
    scenes = trained_scenes()[str(generator.choice(list(TAGS), p=list(TAGS.values())))]
    scene = scenes[generator.integers(len(scenes))]
    return CaptionedImage(draw_shapes(scene, generator), scene.text)


def draw_shapes(scene: Scene, generator: np.random.Generator) -> UInt8[np.ndarray, "64 64 3"]:
    """Draw a scene's objects on a coarse grid, so that they do not touch. A colour that it does not name is random."""
    image = Image.new("RGB", (SCALE * PIXELS, SCALE * PIXELS), SHAPE_GROUND)
    pen = ImageDraw.Draw(image)
    objects = [kind for kind in scene.kinds for _ in range(kind.count)]
    for kind, (x, y) in zip(objects, _centres(scene, generator), strict=True):
        colour = COLOURS[kind.colour or list(COLOURS)[generator.integers(len(COLOURS))]]
        centre = (SCALE * (x + generator.uniform(-2, 2)), SCALE * (y + generator.uniform(-2, 2)))
        radius = SCALE * generator.uniform(10, 11.5)
        if kind.shape == "circle":
            pen.circle(centre, radius, fill=colour)
        elif kind.shape == "square":
            pen.regular_polygon((*centre, radius * 1.3), 4, fill=colour)
        else:
            pen.regular_polygon((*centre, radius * 1.25), 3, fill=colour)
    return _reduced(image)


def _centres(scene: Scene, generator: np.random.Generator) -> list[tuple[int, int]]:
    """Return the centres of a scene's objects, in their order."""
    if scene.relation is not None:
        four = [centre for layout in CENTRES[2] for centre in layout]
        return [four[place] for place in RELATIONS[scene.relation]]
    layouts = CENTRES[scene.count]
    layout = layouts[generator.integers(len(layouts))]
    return [layout[place] for place in generator.permutation(len(layout))]


def _reduced(image: Image.Image) -> UInt8[np.ndarray, "64 64 3"]:
    return np.asarray(image.resize((PIXELS, PIXELS), Image.Resampling.BOX))
