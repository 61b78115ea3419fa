"""Find prompts that a text encoder truncates or cannot read, and prompts that differ only in the truncated part."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ray_ddpo.common.print_line import print_line
from ray_ddpo.common.recipe.tables import SamplingTable

MARK = "<prompt>"  # stands for the prompt in a chat template
SHOWN = 40  # characters of a prompt, and of the text before the cut


@dataclass(frozen=True)
class TextReader:
    """A text encoder's tokenizer with the length that the encoder reads."""

    name: str  # of the text encoder, among the pipeline's parts
    tokenizer: Any
    length: int  # tokens of a prompt that it reads, with those that begin and end a text
    template: int = 0  # further tokens, which a template takes before a prompt but not before the negative prompt
    marks: tuple[str, ...] = ()  # texts that stand for an input image, so that no prompt may have one

    @property
    def of_negative(self) -> "TextReader":
        """Return the reader as it reads the negative prompt."""
        return replace(self, length=self.length + self.template, template=0)


def print_cut_prompts(
    readers: Sequence[TextReader], prompts: Sequence[str], sampling: SamplingTable, guided_above: float = 1.0
) -> None:
    """Print a line if text encoders truncate any of the prompts.

    Raises:
        ValueError: a prompt has a text that stands for an input image.
    """
    for reader in readers:
        refuse_marks(reader.marks, [*prompts, sampling.negative_prompt or ""])
    if cut := cut_prompts_in_words(readers, list(dict.fromkeys(prompts)), sampling, guided_above):
        print_line(cut)


def refuse_marks(marks: Sequence[str], texts: Sequence[str]) -> None:
    """Raise ValueError if one of the texts has one of the marks, which stand for an input image."""
    for mark in marks:
        for text in texts:
            if mark in text:
                raise ValueError(
                    f"the prompt {_shown(text)} has {mark!r}, which stands for an input image in what the text encoder "
                    "reads: leave it out"
                )


def tokens_before(tokenizer: Any, template: Callable[[str], str]) -> int:
    """Return how many tokens a chat template puts before the prompt, less those that the tokenizer adds to any text."""
    before = tokenizer(template(MARK).partition(MARK)[0], add_special_tokens=False)["input_ids"]
    return len(before) - len(tokenizer("")["input_ids"])


def cut_prompts_in_words(
    readers: Sequence[TextReader], prompts: Sequence[str], sampling: SamplingTable, guided_above: float = 1.0
) -> str | None:
    """Return one line about truncated prompts: how many, by which text encoder, and where; None if there are none."""
    if not readers or not prompts:
        return None
    negative = sampling.negative_prompt
    cut: dict[str, list[int]] = {}
    ids: list[tuple[Any, ...]] = [()] * len(prompts)
    for reader in readers:
        kept = reader.tokenizer(list(prompts), truncation=True, max_length=reader.length)["input_ids"]
        whole = reader.tokenizer(list(prompts))["input_ids"]
        cut[reader.name] = [row for row, tokens in enumerate(whole) if len(tokens) > reader.length]
        ids = [(*before, tuple(tokens)) for before, tokens in zip(ids, kept, strict=True)]
    rows = sorted({row for of_reader in cut.values() for row in of_reader})
    said = [f"{len(rows)} of {len(prompts)} are longer than a text encoder reads"] if rows else []
    for reader in readers:
        if found := cut[reader.name]:
            first = prompts[found[0]]
            said.append(
                f"{_reads(reader)} and cuts {len(found)}, the first, {_shown(first)}, after {_end(reader, first)}"
            )
    said += _equal(prompts, ids, rows)
    if negative and sampling.guidance_scale <= guided_above:
        said.append(
            f"sampling.negative_prompt has no effect, sampling.guidance_scale {sampling.guidance_scale:g} is not "
            f"above {guided_above:g}"
        )
        negative = None
    for reader in (each.of_negative for each in readers):
        if negative and len(reader.tokenizer(negative)["input_ids"]) > reader.length:
            said.append(f"{_reads(reader)} and cuts sampling.negative_prompt after {_end(reader, negative)}")
    return f"prompts: {'; '.join(said)}" if said else None


def _shown(prompt: str) -> str:
    return repr(prompt if len(prompt) <= SHOWN else f"{prompt[:SHOWN]}…")


def _reads(reader: TextReader) -> str:
    return f"{reader.name} reads {reader.length} tokens"


def _end(reader: TextReader, prompt: str) -> str:
    kept = reader.tokenizer(prompt, truncation=True, max_length=reader.length)["input_ids"]
    text = reader.tokenizer.decode(kept, skip_special_tokens=True).strip()
    return repr(text if len(text) <= SHOWN else f"…{text[-SHOWN:]}")


def _equal(prompts: Sequence[str], ids: list[tuple[Any, ...]], cut: list[int]) -> list[str]:
    """Describe prompts that every text encoder reads as the same, if one of them is truncated."""
    same: dict[tuple[Any, ...], list[int]] = {}
    for row, key in enumerate(ids):
        same.setdefault(key, []).append(row)
    groups = [rows for rows in same.values() if len(rows) > 1 and set(rows) & set(cut)]
    if not groups:
        return []
    first, second = (f"…{prompts[row][-SHOWN:]}" for row in groups[0][:2])
    count = sum(map(len, groups))
    return [f"{count} are read as another one is: those that end with {first!r} and {second!r} are one to the model"]
