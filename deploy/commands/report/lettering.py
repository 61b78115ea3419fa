"""Write prompts into images with the fonts of this machine, or a number in their place; never boxes."""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

MOST_FONTS = 3  # beside the usual one
PLACEHOLDERS = ("last resort", "lastresort", "adobe blank", "color emoji")  # cover characters, and draw none of them
VARIATIONS = str.maketrans("", "", "\ufe0e\ufe0f")  # ask for an emoji's other form, which no outline font has
SHAPED_SINCE = (3, 11)  # of matplotlib: before it, letters stand one by one from left to right


@dataclass(frozen=True)
class Lettering:
    """What is written in the place of each prompt, and with which fonts."""

    texts: tuple[str, ...]  # the prompt in one line, else its number as #1
    families: tuple[str, ...]  # the usual font first

    numbers: tuple[str, ...]  # of the prompts that a number stands for; else nothing


def lettering(prompts: Sequence[str]) -> Lettering:
    """Return what of the prompts can be read in an image on this machine."""
    import matplotlib
    from matplotlib import font_manager

    lines = [" ".join(prompt.translate(VARIATIONS).split()) for prompt in prompts]
    wanted = {letter for line in lines for letter in line if not letter.isspace()}
    usual = font_manager.FontProperties().get_name()
    there, families = _letters(font_manager.findfont(usual)), [usual]
    for _ in range(MOST_FONTS):
        if not wanted - there:
            break
        best = max(_fonts(), key=lambda font: (len(font[1] & (wanted - there)), font[0]), default=("", set()))
        if not best[1] & (wanted - there):
            break
        families.append(best[0])
        there |= best[1]
    shaped = matplotlib.__version_info__[:2] >= SHAPED_SINCE

    def readable(line: str) -> bool:
        letters = {letter for letter in line if not letter.isspace()}
        return letters <= there and (shaped or not any(map(_needs_shaping, line)))

    numbers = tuple("" if readable(line) else f"#{index}" for index, line in enumerate(lines, start=1))
    return Lettering(
        tuple(number or line for number, line in zip(numbers, lines, strict=True)), tuple(families), numbers
    )


def _needs_shaping(letter: str) -> bool:
    return unicodedata.bidirectional(letter) in ("R", "AL") or unicodedata.category(letter) in ("Mn", "Mc", "Cf")


def _fonts() -> Iterator[tuple[str, set[str]]]:
    """Return the upright fonts of this machine, each with the letters that it has."""
    from matplotlib.font_manager import fontManager

    for entry in sorted(fontManager.ttflist, key=lambda entry: (entry.name, entry.fname)):
        plain = entry.style == "normal" and Path(entry.fname).is_file()
        if plain and not any(name in entry.name.lower() for name in PLACEHOLDERS):
            yield entry.name, _letters(entry.fname)


def _letters(file: str) -> set[str]:
    from matplotlib.ft2font import FT2Font

    try:
        return set(map(chr, FT2Font(file).get_charmap()))
    except (RuntimeError, OSError):  # a font that matplotlib cannot read, such as one of bitmaps, writes nothing
        return set()
