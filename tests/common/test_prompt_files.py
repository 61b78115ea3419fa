"""Published prompt files: each format gives its prompts and metadata, or is refused with file and line."""

import csv
import datetime
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from ray_ddpo.common.prompts import PROMPTS, File, Prompt
from ray_ddpo.common.recipe.registry import build
from tests.accepted_page import assert_accepted, assert_refused

# As flow_grpo publishes dataset/geneval/train_metadata.jsonl: the keys beside the prompt are not the same in each line.
GENEVAL = [
    {
        "tag": "counting",
        "include": [{"class": "cat", "count": 2}],
        "exclude": [{"class": "cat", "count": 3}],
        "prompt": "two cats",
    },
    {"tag": "colors", "include": [{"class": "fox", "count": 1, "color": "red"}], "prompt": "a red fox, at dusk"},
]
HARD = ['a "quoted" cat, and a fox', "two\nlines", "ein Füchschen 🦊", "  spaces  "]


def file(path: Path, data: bytes | str, **keys: Any) -> File:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return build(PROMPTS, {"name": "file", "path": str(path), **keys}, "prompts")


def sampled(source: File) -> list[Prompt]:
    """Return every prompt that is sampled, with its metadata, in the file's order."""
    sample, generator = source.load(), np.random.default_rng(0)
    found = [sample(generator) for _ in range(900)]
    every = [prompt for prompt in source.evaluated() if prompt in found]
    assert all(prompt in every for prompt in found) and [prompt.text for prompt in every] == source.listed()
    return every


def refused(tmp_path: Path, name: str, data: bytes | str, **keys: Any) -> str:
    with pytest.raises(ValueError) as error:
        file(tmp_path / name, data, **keys).load()
    assert f"prompts.path is '{tmp_path / name}'" in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def as_csv(rows: list[dict[str, Any]], separator: str = ",") -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), delimiter=separator)
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def as_parquet(columns: dict[str, Any], **keys: Any) -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(pa.table(columns), buffer, **keys)
    return buffer.getvalue()


def test_jsonl_as_flow_grpo_publishes_it(tmp_path: Path) -> None:
    source = file(tmp_path / "train_metadata.jsonl", "\n".join(json.dumps(row) for row in GENEVAL) + "\n\n")
    metadata = [{key: value for key, value in row.items() if key != "prompt"} for row in GENEVAL]
    assert sampled(source) == [Prompt(row["prompt"], about) for row, about in zip(GENEVAL, metadata, strict=True)]
    assert_accepted("JSONL with metadata, as flow_grpo's `train_metadata.jsonl`")


def test_json_lists_and_columns(tmp_path: Path) -> None:
    texts = file(tmp_path / "a.json", json.dumps(HARD))
    assert sampled(texts) == [Prompt(text) for text in HARD]
    lines = file(tmp_path / "a.ndjson", "\n".join(json.dumps(text) for text in HARD))
    assert sampled(lines) == [Prompt(text) for text in HARD]
    rows = [{"text": text, "at": index} for index, text in enumerate(HARD)]
    expected = [Prompt(text, {"at": index}) for index, text in enumerate(HARD)]
    assert sampled(file(tmp_path / "b.JSON", json.dumps(rows, indent=1))) == expected
    columns = {"text": HARD, "at": list(range(len(HARD)))}
    assert sampled(file(tmp_path / "c.json", json.dumps(columns))) == expected
    assert_accepted("a JSON list of texts or objects, or an object of columns")


@pytest.mark.parametrize(("name", "separator"), [("a.csv", ","), ("a.tsv", "\t")])
def test_csv_and_tsv_with_quotes_and_line_ends_in_a_prompt(tmp_path: Path, name: str, separator: str) -> None:
    rows = [{"id": str(index), "Prompt": text} for index, text in enumerate(HARD)]
    assert sampled(file(tmp_path / name, as_csv(rows, separator))) == [
        Prompt(row["Prompt"], {"id": row["id"]}) for row in rows
    ]
    assert_accepted("CSV and TSV with a header, quoted commas and line ends")


def test_parquet_with_nested_columns_and_many_row_groups(tmp_path: Path) -> None:
    columns = {
        "caption": [f"cat {index}" for index in range(40)],
        "about": [{"boxes": [[index, 0.5]], "name": None} for index in range(40)],
        "kind": pa.array([f"{index % 2}" for index in range(40)]).dictionary_encode(),
    }
    found = sampled(file(tmp_path / "a.parquet", as_parquet(columns, row_group_size=7)))
    assert found[11] == Prompt("cat 11", {"about": {"boxes": [[11, 0.5]], "name": None}, "kind": "1"})
    assert_accepted("parquet, nested columns too")


TEXT = "a cat\na fox\n"
ENCODED = {
    "a.txt": TEXT,
    "b.jsonl": '{"prompt": "a cat"}\n"a fox"\n'.replace('"a fox"', '{"prompt": "a fox"}'),
    "c.json": '["a cat",\n"a fox"]',
    "d.csv": "prompt\na cat\na fox\n",
    "e.tsv": "prompt\na cat\na fox\n",
}


@pytest.mark.parametrize("name", ENCODED)
def test_a_byte_order_mark_and_crlf_are_no_part_of_a_prompt(tmp_path: Path, name: str) -> None:
    data = b"\xef\xbb\xbf" + ENCODED[name].replace("\n", "\r\n").encode()
    assert file(tmp_path / name, data).listed() == ["a cat", "a fox"]
    assert_accepted("a byte order mark, CRLF")
    wide = refused(tmp_path, name, ENCODED[name].encode("utf-16"))
    assert_refused("UTF-16, or another encoding than UTF-8", wide)
    assert "NUL character" in refused(tmp_path, name, ENCODED[name].encode("utf-16-le"))
    latin = refused(tmp_path, name, ENCODED[name].replace("fox", "Füchschen").encode("latin-1"))
    assert "cannot be read as UTF-8, the byte 0xfc is none" in latin and ", line " in latin


def test_text_lines_are_those_that_an_editor_shows(tmp_path: Path) -> None:
    """Use prompts with other characters at which `str.splitlines` splits, and a concatenated file with marks inside."""
    joined = "a cat\u2028and a dog\n\ufeffa fox\x85\n\n"
    assert file(tmp_path / "a.txt", joined).listed() == ["a cat\u2028and a dog", "a fox"]
    assert json.loads('["\u2028"]') and file(tmp_path / "a.jsonl", '["x\u2028"]'.strip("[]")).listed() == ["x\u2028"]


def test_prompts_sampled_from_a_text_file_are_the_same_in_any_format(tmp_path: Path) -> None:
    texts = [f"cat {index}" for index in range(17)]
    sources = [
        file(tmp_path / "a.txt", "\n".join(texts)),
        file(tmp_path / "a.json", json.dumps(texts)),
        file(tmp_path / "a.csv", "prompt\n" + "\n".join(texts)),
        file(tmp_path / "a", "\n".join(texts)),
        file(tmp_path / "a.lst", "\n".join(texts), format="text"),
    ]
    for source in sources:
        sample, generator, numbers = source.load(), np.random.default_rng(5), np.random.default_rng(5)
        assert [sample(generator).text for _ in range(9)] == [texts[int(numbers.integers(17))] for _ in range(9)]


def test_a_key_names_format_and_column(tmp_path: Path) -> None:
    rows = [{"prompt": "a cat", "text": "HELLO"}, {"prompt": "a fox", "text": "BYE"}]
    said = refused(tmp_path, "a.csv", as_csv(rows))
    assert_refused("several columns, and none or several called prompt, text or caption", said)
    assert file(tmp_path / "a.csv", as_csv(rows), column="text").listed() == ["HELLO", "BYE"]
    assert file(tmp_path / "a.data", as_csv(rows), format="csv", column="prompt").listed() == ["a cat", "a fox"]
    assert_accepted("a file of another ending with `prompts.format`, prompts in a column that `prompts.column` names")
    assert_refused("`prompts.column` names no column", refused(tmp_path, "a.csv", as_csv(rows), column="body"))
    assert "has no columns" in refused(tmp_path, "a.txt", "a cat\n", column="prompt")
    assert "texts without columns" in refused(tmp_path, "a.json", '["a cat"]', column="prompt")


LIKE_OTHERS = {
    "JSONL": '{"prompt": "a cat"}\n{"prompt": "a dog"}\n',
    "Python": "{'prompt': 'a cat'}\n",
    "list": '[\n "a cat",\n "a dog"\n]\n',
    "later": 'a cat\n["a dog"]\n',
    "CSV": "id,prompt\n1,a cat\n",
    "TSV": "Prompt\tCategory\na cat\tanimals\n",
    "Excel": 'id;"caption"\n1;a cat\n',
    "one column": "caption\na cat\n",
}


@pytest.mark.parametrize("kind", LIKE_OTHERS)
def test_a_text_file_that_looks_like_another_format_is_refused(tmp_path: Path, kind: str) -> None:
    said = refused(tmp_path, "a.txt", LIKE_OTHERS[kind])
    headed = kind in ("CSV", "TSV", "Excel", "one column")
    situation = "a text file with a table's header" if headed else "a text file with lines of JSON"
    assert_refused("a text file with a table's header" if headed else "a text file with lines of JSON", said)
    assert situation and f"line {2 if kind == 'later' else 1}:" in said
    lines = [line.strip() for line in LIKE_OTHERS[kind].splitlines() if line.strip()]
    assert file(tmp_path / "a.txt", LIKE_OTHERS[kind], format="text").listed() == lines


def test_prompts_with_brackets_quotes_and_commas_are_text(tmp_path: Path) -> None:
    usual = [
        "[V] dog",
        "{{masterpiece}}, a cat",
        "{red|blue} cat",
        "(cat:1.2)",
        '"STOP" sign, text',
        "[cat:dog:0.5]",
        "prompt engineering",
    ]
    assert file(tmp_path / "a.txt", "\n".join(usual)).listed() == usual


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": "b"\n', "line 2: it is not JSON: Expecting ',' delimiter"),
        ("a.jsonl", '{"prompt": "a"}\n\n{"prompt": ""}', "line 3: the prompt is empty"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": null}', "line 2: the prompt is null, and it must be a text"),
        ("a.jsonl", '{"prompt": 7}', "line 1: the prompt is '7', of type int, and it must be a text"),
        ("a.jsonl", '{"prompt": ["a"]}', "line 1: the prompt is a list, and it must be a text"),
        ("a.jsonl", '{"prompt": "a"}\n{"tag": "b"}', "line 2: it has no 'prompt', only ['tag']"),
        ("a.jsonl", '{"prompt": "a"}\n"b"', "line 2: it is 'b', of type str, and the ones before it are objects"),
        ("a.jsonl", '"a"\n{"prompt": "b"}', "line 2: the prompt is an object, and it must be a text"),
        ("a.jsonl", "7\n", "line 1: it is '7', of type int, and it must be an object or a text"),
        ("a.jsonl", '{"prompt": "a", "x": NaN}', "line 1: it is not JSON: NaN is no number of JSON"),
        ("a.jsonl", '{"prompt": "a", "x": [1e999]}', "line 1: metadata.x.0 is 'inf': a prompt's metadata is what JSON holds"),
        ("a.jsonl", '{"prompt": "a", "prompt": "b"}', "line 1: it is not JSON: the key 'prompt' appears twice in an object"),
        ("a.jsonl", '{"prompt": "a", "x": "\\ud800"}', "line 1: metadata.x '\\ud800' is no text that can be encoded"),
        ("a.jsonl", '{"prompt": "a \\ud800 cat"}', "line 1: the prompt 'a \\ud800 cat' is no text that can be encoded"),
        ("a.jsonl", "[\n", "line 1: it is not JSON: Expecting value: line 1 column 2 (char 1); a file with one JSON value"),
        ("a.json", '{"prompt": "a"}\n{"prompt": "b"}\n', "it is not JSON: Extra data: line 2 column 1 (char 16); a file with a"),
        ("a.json", "7", "it is '7', of type int, and it must be a list of texts or objects"),
        ("a.json", '["a", ["b"]]', "entry 2: it is a list, and it must be an object or a text"),
        ("a.json", '{"prompt": ["a", "b"], "x": [1]}', "must be lists of one length, and they are: 'prompt' 2, 'x' 1"),
        ("a.json", '{"prompt": "a"}', "and they are: 'prompt' no list"),
        ("a.json", "[" * 100_000, "it is not JSON: lists or objects are nested too deeply"),
        ("a.csv", "prompt,x\na cat\n", "line 2: it has 1 columns, and the header 2: ['prompt', 'x']"),
        ("a.csv", "prompt,prompt\na,b\n", "it has 1 columns twice: ['prompt']"),
        ("a.csv", 'prompt,x\n"a\nb",1\n,2\n', "line 4: the prompt is empty"),
        ("a.csv", 'prompt\n"a cat\n', "line 2: it is no CSV: unexpected end of data"),
        ("a.csv", "a cat\na dog\n", "its columns are ['a cat'], and none is called one of ['prompt', 'text', 'caption']"),
        ("a.csv", "prompt;x\na cat;1\n", "its columns are ['prompt;x'], and none is called one of"),
        ("a.parquet", b"PAR1 and no more", "cannot be read, it is damaged: ArrowInvalid"),
        ("a.parquet", as_parquet({"prompt": ["a", None]}), "row 2: the prompt is null, and it must be a text"),
        ("a.parquet", as_parquet({"prompt": ["a"], "x": [float("nan")]}), "row 1: metadata.x is 'nan'"),
        ("a.parquet", as_parquet({"prompt": ["a"], "image": [b"x"]}), "row 1: metadata.image is \"b'x'\", of type bytes"),
        (
            "a.parquet",
            as_parquet({"prompt": ["a"], "at": [datetime.datetime(2024, 5, 1)]}),
            "row 1: metadata.at is '2024-05-01 00:00:00', of type datetime",
        ),
        ("a.jsonl.gz", b"\x1f\x8b", "it is compressed, unpack it first; a file of prompts ends in one of .txt, "),
        ("a.yaml", "- a cat", ".yaml is no known ending; a file of prompts ends in one of .txt, .text, .jsonl"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_file_and_line(tmp_path: Path, name: str, data: bytes | str, says: str) -> None:
    assert says in refused(tmp_path, name, data)


def test_the_rows_of_the_page_about_files_that_are_refused(tmp_path: Path) -> None:
    assert_refused(
        "a line that is no JSON, an empty prompt, null, a number", refused(tmp_path, "a.jsonl", '{"prompt": 7}')
    )
    assert_refused("CSV or TSV without a header", refused(tmp_path, "a.csv", "a cat\na dog\n"))
    assert_refused("a compressed file, or one of another ending", refused(tmp_path, "a.txt.gz", b"\x1f\x8b"))
    nan = refused(tmp_path, "a.parquet", as_parquet({"prompt": ["a"], "x": [float("nan")]}))
    assert_refused("metadata that JSON has no value for: NaN, bytes, times", nan)
    for name in ENCODED:
        assert "the file has no prompts" in refused(tmp_path, name, b"")
    for name in ("a.parquet", "b.csv"):
        empty = as_parquet({"prompt": pa.array([], pa.string())}) if name == "a.parquet" else "prompt\n"
        assert "the file has no prompts" in refused(tmp_path, name, empty)
    with pytest.raises(ValueError, match=r"there is no such file, it is a folder") as error:
        build(PROMPTS, {"name": "file", "path": str(tmp_path)}, "prompts").load()
    assert_refused("a folder in the place of the file", str(error.value))
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    parquet.write_table(twice, tmp_path / "twice.parquet")
    assert "it has 1 columns twice" in refused(tmp_path, "twice.parquet", (tmp_path / "twice.parquet").read_bytes())


def test_held_out_prompts_have_their_metadata_from_either_file(tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": text, "at": at}) for at, text in enumerate(["a cat", "a dog", "a fox", "a dog"])]
    (tmp_path / "test.jsonl").write_text('{"prompt": "an owl", "at": 9}\n')
    left_out = file(tmp_path / "a.jsonl", "\n".join(lines), held_out_prompts=["a dog"])
    assert left_out.evaluated() == [Prompt("a dog", {"at": 1}), Prompt("a dog", {"at": 3})]
    assert left_out.listed() == ["a cat", "a fox"] and left_out.held_out() == ["a dog", "a dog"]
    assert left_out.evaluated(["a fox", "new"]) == [Prompt("a fox", {"at": 2}), Prompt("new")]
    assert left_out.evaluated(["a dog"]) == left_out.evaluated()  # both rows
    second = file(tmp_path / "a.jsonl", "\n".join(lines), held_out_path=str(tmp_path / "test.jsonl"))
    assert second.evaluated() == [Prompt("an owl", {"at": 9})] and len(second.listed()) == 4
    assert [weights.key for weights in second.needs()] == ["prompts.path", "prompts.held_out_path"]
    assert_accepted("a second file of prompts for evaluation, `prompts.held_out_path`")
    with pytest.raises(ValueError, match="held_out_path is .* and held_out_prompts has 1 prompts: give one of them"):
        file(tmp_path / "a.jsonl", "\n".join(lines), held_out_prompts=["a cat"], held_out_path="x")


def test_metadata_is_what_json_gives_back_wherever_prompts_come_from() -> None:
    metadata = {"box": (np.int64(1), np.float32(0.5)), "ok": np.bool_(True), "none": None}
    prompt = Prompt("a cat", metadata)
    assert prompt.metadata == json.loads(json.dumps(prompt.metadata)) == {"box": [1, 0.5], "ok": True, "none": None}
    for wrong, says in [
        ({"a": {1: "b"}}, "metadata.a has the key 1"),
        ({"a": {"b": {2}}}, "metadata.a.b is .*, of type set"),
    ]:
        with pytest.raises(ValueError, match=says):
            Prompt("a cat", wrong)
