"""Read a score from an answer of a vision-language model. An answer that is not clear is refused, never scored."""

import json
import math
import re
from dataclasses import dataclass
from typing import Any

NUMBER = r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
# A number alone, perhaps after "Score:", perhaps with "/10" or "out of 10" behind. Not skipped: a sign, even of another
# character, a comparison such as "<5", "about", and "%".
NUMBER_ALONE = re.compile(
    rf"[^\w+.\-−–—‐‑<>≤≥~≈±]*(?:(?:final|overall|total)?\s*(?:score|rating|answer|grade)\b(?:\s|is\b|[=:*_])*)?({NUMBER})"
    rf"\s*(?:(?:/|out of)\s*({NUMBER}))?[^\w%‰]*",
    re.IGNORECASE,
)
HIGHEST_LOG_PROB = 1e-3  # nats: 0 with rounding
FENCE = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL | re.IGNORECASE)
LEAST_MASS = 0.5  # of the first token's probability that "yes" and "no" must have together


class UnreadableAnswer(ValueError):
    """An answer without a clear score."""


@dataclass(frozen=True)
class ChatAnswer:
    """An answer of the model."""

    text: str
    first_token: tuple[tuple[str, float], ...] = ()  # candidates for the first token and their log-probs
    cut_off: bool = False  # it reached max_tokens


def read_number(text: str, lowest: float, highest: float, pattern: str | None = None) -> float:
    """Return the number of an answer.

    Args:
        text: the answer. Without `pattern`, it must be a number and nothing else but a label such as "Score:".
        lowest: the lowest allowed number.
        highest: the highest allowed number. An answer such as "7/10" must name it.
        pattern: a regular expression with one group, which must match one number of the answer, or one only.

    Raises:
        UnreadableAnswer: the answer has no such number, several different ones, or a number outside the range.
    """
    if pattern is None:
        match = NUMBER_ALONE.fullmatch(text.strip())
        if match is None:
            raise UnreadableAnswer("it must be a number and nothing else")
        if match[2] is not None and float(match[2]) != highest:
            raise UnreadableAnswer(f"it must be a number out of {highest:g}")
        found = {match[1]}
    else:
        found = set(re.findall(pattern, text))
        if len(found) != 1:
            raise UnreadableAnswer(f"it must have one number after the pattern {pattern!r}, and has {len(found)}")
    (number,) = found
    try:
        return in_range(float(number), lowest, highest)
    except ValueError as error:
        raise UnreadableAnswer(f"{number!r} {error}") from None


def read_json_number(text: str, field: str, lowest: float, highest: float) -> float:
    """Return a number of an answer that is a JSON object, perhaps in a fenced code block.

    Raises:
        UnreadableAnswer: the answer is no JSON object, or `field` is no number in the range.
    """
    fenced = FENCE.findall(text)
    if len(fenced) > 1:
        raise UnreadableAnswer("it must have one JSON object, and has several code blocks")
    try:
        value = json.loads(
            fenced[0] if fenced else text, parse_constant=_refuse_constant, object_pairs_hook=_without_twice
        )
    except UnreadableAnswer:
        raise
    except (ValueError, RecursionError):
        raise UnreadableAnswer("it must be a JSON object") from None
    number = value.get(field) if isinstance(value, dict) else None
    if not isinstance(number, int | float) or isinstance(number, bool):
        raise UnreadableAnswer(f'it must be a JSON object with a number as "{field}"')
    try:
        return in_range(float(number), lowest, highest)
    except (ValueError, OverflowError) as error:
        raise UnreadableAnswer(f'"{field}" {error}') from None


def read_yes_or_no(text: str) -> float:
    """Return 1 for an answer that begins with "yes", 0 for "no".

    Raises:
        UnreadableAnswer: the answer begins with neither, or has both words.
    """
    words = re.findall(r"\w+", text.casefold())
    if not words or words[0] not in ("yes", "no") or {"yes", "no"} <= set(words):
        raise UnreadableAnswer('it must begin with "yes" or "no", and must not have both')
    return float(words[0] == "yes")


def yes_probability(first_token: tuple[tuple[str, float], ...]) -> float:
    """Return the probability of "yes" among "yes" and "no" as the answer's first token.

    This is VQAScore (Lin et al. 2024, arXiv 2404.01291, eq. 1) divided by the probability of either word, so that a
    model's taste for other words does not change the score.

    Args:
        first_token: candidates for the first token, and their log-probs in nats.

    Raises:
        UnreadableAnswer: there are no log-probs, one is none, or another word is more probable than both.
    """
    if not first_token:
        raise UnreadableAnswer("the service gave no log-probs: set log_probs = false for its yes-or-no questions")
    mass = {"yes": 0.0, "no": 0.0}
    for token, log_prob in first_token:
        word = token.strip(" \t\n▁Ġ\"'*.,!").casefold()
        if not log_prob <= HIGHEST_LOG_PROB:
            raise UnreadableAnswer(f"the log-prob of {token!r} is {log_prob:g}: it must be 0 or less")
        if word in mass:
            mass[word] += math.exp(log_prob)
    total = mass["yes"] + mass["no"]
    if not total >= LEAST_MASS:
        raise UnreadableAnswer(f'"yes" and "no" have a probability of {total:.2g} together, under {LEAST_MASS:g}')
    return mass["yes"] / total


def in_range(number: float, lowest: float, highest: float) -> float:
    """Return the number. Raise ValueError if it is outside the range, or not finite."""
    if not lowest <= number <= highest:
        raise ValueError(f"is {number:g}: it must be from {lowest:g} to {highest:g}")
    return number


def _refuse_constant(constant: str) -> Any:
    raise ValueError(f"{constant} is no number")


def _without_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object. Raise UnreadableAnswer if it has a key twice, as one of two scores would be taken."""
    value = dict(pairs)
    if len(value) < len(pairs):
        raise UnreadableAnswer("it must be a JSON object, and has a key twice")
    return value
