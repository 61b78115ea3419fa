"""Prompt sets that others have published: where each file is, pinned by commit and hash, and how its lines are read."""

import csv
import hashlib
import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx2

FLOW_GRPO = "https://raw.githubusercontent.com/yifan123/flow_grpo/ac4c86e8cae021841f1fde853d340e0db67690dd/dataset"
GENEVAL = "https://raw.githubusercontent.com/djghosh13/geneval/af4902f24d3ca90ebbb446dd9891a59e0f82725f"
# The authors' sheet, which the Imagen project page links to. Nothing keeps it from being changed.
DRAWBENCH = (
    "https://docs.google.com/spreadsheets/d/1y7nAbmR4FREi6npB1u-Bo3GFdwdOPYJc617rBOxIRHY/gviz/tq"
    "?tqx=out:csv&sheet=Sheet1"
)
MAX_BYTES = 64_000_000
SECONDS = 60.0
QUOTED = re.compile(r'"([^"]*)"')

Row = dict[str, Any]  # "prompt" and its metadata


@dataclass(frozen=True)
class PublishedFile:
    """One file of a published set."""

    url: str
    rows: Callable[[str], list[Row]]  # from the file's text
    sha256: str | None = None
    blob: str | None = None  # git's name of the content, a SHA-1, where the content's SHA-256 was not computed

    @property
    def pin(self) -> str:
        """Return what the content is compared with, in words."""
        return "SHA-256" if self.sha256 else "git's SHA-1" if self.blob else "not pinned"

    def download(self) -> list[Row]:
        """Download the file, check it against its hash, and return its prompts.

        Raises:
            ValueError: it cannot be had, is not the file that was pinned, or has no prompts.
        """
        content = _read(self.url)
        git_object = b"blob %d\0" % len(content) + content
        found = {"sha256": hashlib.sha256(content).hexdigest(), "blob": hashlib.sha1(git_object).hexdigest()}
        for name, value in found.items():
            pinned = getattr(self, name)
            if pinned is not None and pinned != value:
                raise ValueError(
                    f"{self.url} is another file than was pinned: its {name} is {value}, expected {pinned}"
                )
        try:
            rows = self.rows(content.decode("utf-8-sig"))
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError) as error:
            raise ValueError(
                f"{self.url} has not the form that was expected: {type(error).__name__}: {error}"
            ) from error
        if not rows:
            raise ValueError(f"{self.url} has no prompts")
        return rows


@dataclass(frozen=True)
class PublishedSet:
    """A published set of prompts."""

    files: dict[str, PublishedFile]  # by split: train, test
    about: str
    licence: str  # as the repository states it


def _read(url: str) -> bytes:
    """Return the content of a URL. Raise ValueError if the server does not send it."""
    parts, size = [], 0
    try:
        with (
            httpx2.Client(follow_redirects=True, timeout=SECONDS) as client,
            client.stream("GET", url) as response,
        ):
            if response.status_code != httpx2.codes.OK:
                raise ValueError(f"{url} answered {response.status_code}")
            for part in response.iter_bytes():
                parts.append(part)
                size += len(part)
                if size > MAX_BYTES:
                    raise ValueError(f"{url} is larger than {MAX_BYTES:,} bytes")
    except httpx2.RequestError as error:
        raise ValueError(f"{url} does not answer: {type(error).__name__}: {error}") from None
    return b"".join(parts)


def text_lines(text: str) -> list[Row]:
    """Return one prompt a line."""
    return [{"prompt": line.strip()} for line in text.split("\n") if line.strip()]


def quoted_lines(text: str) -> list[Row]:
    """Return one prompt a line, with its first quoted words as `target`; lines without clear ones are left out."""
    lines = [row["prompt"] for row in text_lines(text)]
    found = [(line, QUOTED.search(line)) for line in lines if line.count('"') % 2 == 0]
    return [{"prompt": prompt, "target": words[1]} for prompt, words in found if words and words[1].strip()]


def json_lines(text: str) -> list[Row]:
    """Return one JSON object a line, whose `prompt` is a text."""
    rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    return [{"prompt": row["prompt"], **row} for row in rows]


def drawbench_rows(text: str) -> list[Row]:
    """Return the prompts of DrawBench's table, with the category as `tag`."""
    return [{"prompt": row["Prompts"], "tag": row["Category"]} for row in csv.DictReader(io.StringIO(text))]


PUBLISHED: dict[str, PublishedSet] = {
    "ocr": PublishedSet(
        {
            "train": PublishedFile(
                f"{FLOW_GRPO}/ocr/train.txt", quoted_lines, blob="3ce0521b77b0a9031191d66ecc36ebaaf27a3922"
            ),
            "test": PublishedFile(
                f"{FLOW_GRPO}/ocr/test.txt",
                quoted_lines,
                sha256="4dd8caf3ab6ade73bd376c7d14c6ca49b6eacfb1bd321e22c40714ae4a98d4dc",
            ),
        },
        "Flow-GRPO's prompts with quoted words, for the reward ocr; 1018 for the test",
        "MIT",
    ),
    "geneval": PublishedSet(
        {
            "train": PublishedFile(
                f"{FLOW_GRPO}/geneval/train_metadata.jsonl", json_lines, blob="0b97e8a6802c08fc7537cd00c76ae79c851bddcb"
            ),
            "test": PublishedFile(
                f"{GENEVAL}/prompts/evaluation_metadata.jsonl",
                json_lines,
                sha256="5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13",
            ),
        },
        "Flow-GRPO's training prompts and GenEval's 553 prompts, with GenEval's metadata",
        "MIT",
    ),
    "pickscore": PublishedSet(
        {
            "train": PublishedFile(
                f"{FLOW_GRPO}/pickscore/train.txt",
                text_lines,
                sha256="2f425adcbb9a6d0feee7c6c448e1cb83a1f71deca9434b803907e2578eca837f",
            ),
            "test": PublishedFile(
                f"{FLOW_GRPO}/pickscore/test.txt",
                text_lines,
                sha256="d75c025fa451866e70f7e36243f7cdd93095523cb51f5f9651f2ce3236d20262",
            ),
        },
        "Flow-GRPO's prompts of people who used Pick-a-Pic, unfiltered; 2048 for the test",
        "MIT",
    ),
    "drawbench": PublishedSet(
        {"test": PublishedFile(DRAWBENCH, drawbench_rows)},
        "DrawBench, 200 prompts in eleven categories (Saharia et al. 2022)",
        "none stated",
    ),
}
