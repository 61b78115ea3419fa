"""Sets of prompts: those that ship, and published ones fetched from a server and checked by their hash."""

import hashlib
import json
import subprocess
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from ray_ddpo import cli
from ray_ddpo.actors.rewards.geneval import GenEval
from ray_ddpo.actors.rewards.ocr import Ocr
from ray_ddpo.common import published_prompts
from ray_ddpo.common.prompt_files import PromptFile
from ray_ddpo.common.prompt_set import PromptSet, shipped_file, shipped_prompts
from ray_ddpo.common.prompts import Prompt, read_prompts
from ray_ddpo.common.published_prompts import (
    PUBLISHED,
    PublishedFile,
    PublishedSet,
    drawbench_rows,
    json_lines,
    quoted_lines,
    text_lines,
)
from ray_ddpo.deploy.commands.prompt_sets import fetch_set

REWARDS = {"words": Ocr(), "shapes": GenEval(detector="shapes")}


@pytest.mark.parametrize("name", ["words", "shapes"])
def test_training_and_test_prompts_of_a_shipped_set_differ_and_can_be_scored(name: str) -> None:
    source = PromptSet.model_validate({"set": name})
    train, test = source.sampled(), source.evaluated()
    texts = [prompt.text for prompt in (*train, *test)]
    assert len(set(texts)) == len(texts) and len(train) > 100 and len(test) > 30
    REWARDS[name].check_prompts([*train, *test])
    assert {prompt.metadata["tag"] for prompt in test} == {prompt.metadata["tag"] for prompt in train}
    assert source.held_out() == [prompt.text for prompt in test]
    sample = source.load()
    generator = np.random.default_rng(0)
    assert {sample(generator).text for _ in range(100)} <= {prompt.text for prompt in train}


def test_no_word_is_in_both_halves() -> None:
    halves = [{prompt.text.split('"')[1] for prompt in shipped_prompts("words", half)} for half in ("train", "test")]
    assert not halves[0] & halves[1]


def test_metadata_of_a_listed_prompt_are_found() -> None:
    source = PromptSet(set="shapes")
    test, train = source.evaluated()[0], source.sampled()[0]
    assert source.evaluated([train.text, test.text, "a dog"]) == [train, test, Prompt("a dog")]


def test_a_sentence_with_two_shapes_names_them_in_its_metadata() -> None:
    """Read again by other code than wrote the file: every named colour and shape is in the metadata and in the text."""
    for half in ("train", "test"):
        for line in shipped_file("shapes", half).read_text().splitlines():
            row = json.loads(line)
            words = row["prompt"].split()
            for asked in row["include"]:
                plural = asked["class"] + ("s" if asked["count"] > 1 else "")
                number = {1: None, 2: "two", 3: "three", 4: "four"}[asked["count"]]
                assert plural in words and (number is None or number in words)
                if "color" in asked:
                    assert words[words.index(plural) - 1] == asked["color"] or words.count(plural) > 1
            if positions := [asked["position"][0] for asked in row["include"] if "position" in asked]:
                assert positions[0] in row["prompt"]
            assert len(row["include"]) == sum(word.rstrip("s") in ("circle", "square", "triangle") for word in words)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Serve a folder over HTTP."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

    serving = ThreadingHTTPServer(("127.0.0.1", 0), lambda *given: Quiet(*given, directory=str(folder)))
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{serving.server_port}", folder
    serving.shutdown()
    serving.server_close()


def test_a_published_set_is_fetched_as_jsonl_that_a_run_reads(
    server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    url, folder = server
    (folder / "train.txt").write_text('a sign "CAT"\n\na "DOG" é\nno words\n', encoding="utf-8")
    (folder / "test.txt").write_text('a sign "CAT"\n"FOX"', encoding="utf-8")
    sha256 = hashlib.sha256((folder / "test.txt").read_bytes()).hexdigest()
    blob = subprocess.run(["git", "hash-object", folder / "train.txt"], capture_output=True, text=True, check=True)
    files = {
        "train": PublishedFile(f"{url}/train.txt", quoted_lines, blob=blob.stdout.strip()),
        "test": PublishedFile(f"{url}/test.txt", quoted_lines, sha256=sha256),
    }
    monkeypatch.setitem(published_prompts.PUBLISHED, "ocr", PublishedSet(files, "made up", "ours"))
    output = tmp_path / "prompts"
    assert cli.main(["prompts", "ocr", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "ocr_test.jsonl: 2 prompts (SHA-256); 1 of them are in train, too" in printed
    assert "ocr_train.jsonl: 2 prompts (git's SHA-1)" in printed
    read = read_prompts(PromptFile(output / "ocr_train.jsonl", "prompts.path"))
    assert read == [Prompt('a sign "CAT"', {"target": "CAT"}), Prompt('a "DOG" é', {"target": "DOG"})]
    assert cli.main(["prompts", "ocr", "--output", str(output)]) == 2
    assert "is there already: remove the file, or give another --output" in capsys.readouterr().err


@pytest.mark.rotated(every=4)
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sha256": "0" * 64}, "another file than was pinned: its sha256 is"),
        ({"blob": "0" * 40}, "another file than was pinned: its blob is"),
        ({"rows": json_lines}, "has not the form that was expected: JSONDecodeError"),
        ({"rows": quoted_lines}, "has no prompts"),
        ({"url": "/nothing.txt"}, "answered 404"),
        ({"url": None}, "does not answer"),
    ],
)
def test_a_file_that_is_not_as_it_should_be_is_refused_and_nothing_is_written(
    changes: dict, said: str, server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, folder = server
    (folder / "a.txt").write_text("a cat\n")
    place = changes.pop("url", "/a.txt")
    address = f"{url}{place}" if place else "http://127.0.0.1:9/a.txt"
    file = PublishedFile(**{"url": address, "rows": text_lines, **changes})
    monkeypatch.setitem(published_prompts.PUBLISHED, "made_up", PublishedSet({"test": file}, "", ""))
    with pytest.raises(ValueError, match=said):
        list(fetch_set("made_up", tmp_path / "prompts"))
    assert not (tmp_path / "prompts").exists()


def test_the_forms_of_published_files_are_read() -> None:
    line = {"tag": "counting", "include": [{"class": "clock", "count": 2}], "prompt": "two clocks"}
    assert json_lines(json.dumps(line) + "\n") == [line]
    table = '"Prompts","Category"\n"A red colored car.","Colors"\n"A sign that says ""Hi"", twice","Text"\n'
    assert drawbench_rows(table) == [
        {"prompt": "A red colored car.", "tag": "Colors"},
        {"prompt": 'A sign that says "Hi", twice', "tag": "Text"},
    ]


def test_every_set_is_listed_with_how_its_files_are_checked(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["prompts"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["words", "shapes", *PUBLISHED]
    assert "test (not pinned)" in printed[-1]
    assert all(
        file.sha256 or file.blob for name in ("ocr", "geneval", "pickscore") for file in PUBLISHED[name].files.values()
    )
    assert cli.main(["prompts", "nothing"]) == 2
