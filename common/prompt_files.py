"""Read prompts from files in common formats: text, JSONL, JSON, CSV, TSV or parquet (no torch)."""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ray_ddpo.common.reading import reading

Format = Literal["text", "jsonl", "json", "csv", "tsv", "parquet"]
ENDINGS: dict[str, Format] = {
    "": "text",
    ".txt": "text",
    ".text": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
NAMES = ("prompt", "text", "caption")  # the prompts' column, if no key names another
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")
BYTE_ORDER_MARK = "\ufeff"
LIKE_JSON = re.compile(r"""[{\[]\s*(["']|$)""")
FORCED = 'or, if its lines are prompts as they are, set prompts.format = "text"'

Entry = tuple[str, Any]  # its place, such as "line 3", and its value: a text, or an object of columns


@dataclass(frozen=True)
class PromptFile:
    """A file of prompts, and the recipe's keys that say how to read it."""

    path: Path
    key: str  # the recipe's key that names the file
    format: Format | None = None  # None: by the file name's ending
    column: str | None = None  # None: the only one, or the one named as in NAMES

    def rows(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Yield each prompt's place, its text and its other columns, in the file's order.

        Raises:
            ValueError: The file cannot be used. One line names the recipe's key, the file, and the line or row.
        """
        if not self.path.is_file():
            raise self.fault(f"there is no such file{', it is a folder' if self.path.is_dir() else ''}")
        file_format = self._format()
        entries = list(READERS[file_format](self))
        if not entries:
            raise self.fault(f"the file has no prompts{'; it needs one a line' if file_format == 'text' else ''}")
        return self._from_table(entries, file_format) if isinstance(entries[0][1], dict) else self._from_texts(entries)

    def fault(self, says: str, where: str = "") -> ValueError:
        """Return the error that names the key, the file and the place in it."""
        return ValueError(f"{self.key} is {str(self.path)!r}{where and ', '}{where}: {says}")

    def _format(self) -> Format:
        """Return the file's format: the recipe's, or that of the file name's ending."""
        ending = self.path.suffix.lower()
        file_format = self.format or ENDINGS.get(ending)
        if file_format is None:
            problem = "it is compressed, unpack it first" if ending in COMPRESSED else f"{ending} is no known ending"
            known = ", ".join(name for name in ENDINGS if name)
            raise self.fault(
                f"{problem}; a file of prompts ends in one of {known}, or prompts.format says what it holds"
            )
        if file_format == "text" and self.column is not None:
            raise self.fault(f"prompts.column is {self.column!r}, and a text file has no columns: leave the key out")
        return file_format

    def _from_texts(self, entries: list[Entry]) -> Iterator[tuple[str, str, dict[str, Any]]]:
        if self.column is not None:
            raise self.fault(f"prompts.column is {self.column!r}, and the file has texts without columns")
        for where, text in entries:
            yield where, self._checked(text, where), {}

    def _from_table(self, entries: list[Entry], file_format: Format) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Yield the prompts of rows with columns."""
        for where, row in entries:
            if not isinstance(row, dict):
                raise self.fault(f"it is {_shown(row)}, and the ones before it are objects", where)
        names = list(dict.fromkeys(name for _, row in entries for name in row))
        column = self._column(names, file_format in ("csv", "tsv"))
        for where, row in entries:
            if column not in row:
                raise self.fault(f"it has no {column!r}, only {sorted(row)}", where)
            yield where, self._checked(row[column], where), {name: row[name] for name in row if name != column}

    def _column(self, columns: list[str], has_header: bool) -> str:
        """Return the prompts' column. Even an only one must have a known name in CSV, where the header may be missing."""
        if self.column is not None:
            if self.column not in columns:
                raise self.fault(f"prompts.column is {self.column!r}, and its columns are {columns}")
            return self.column
        if len(columns) == 1 and not has_header:
            return columns[0]
        named = [name for name in columns if name.lower() in NAMES]
        if len(named) != 1:
            called = f"several are called one of {list(NAMES)}" if named else f"none is called one of {list(NAMES)}"
            raise self.fault(f"its columns are {columns}, and {called}: say with prompts.column which has the prompts")
        return named[0]

    def _checked(self, text: Any, where: str) -> str:
        if not isinstance(text, str):
            raise self.fault(f"the prompt is {_shown(text)}, and it must be a text", where)
        if not text.strip():
            raise self.fault("the prompt is empty", where)
        return text

    def text(self) -> str:
        """Return the file's text, with \\n after every line. Raise ValueError if it is not UTF-8."""
        with reading(f"{self.key} is {str(self.path)!r}: the file"):
            data = self.path.read_bytes()
        advice = "save the file as UTF-8"
        if data.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise self.fault(f"it cannot be read as UTF-8, it begins as UTF-16 or UTF-32 does: {advice}")
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line, byte = data.count(b"\n", 0, error.start) + 1, data[error.start]
            says = f"it cannot be read as UTF-8, the byte {byte:#04x} is none: {advice}"
            raise self.fault(says, f"line {line}") from None
        if "\0" in text:
            line = text.count("\n", 0, text.index("\0")) + 1
            raise self.fault(f"it has a NUL character, so it is no text or no UTF-8: {advice}", f"line {line}")
        return io.StringIO(text, newline=None).read()

    def parsed(self, text: str, where: str = "") -> Any:
        """Return the JSON value in `text`. Raise ValueError if there is none, or if an object has a key twice."""
        try:
            return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            says = "lists or objects are nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise self.fault(f"it is not JSON: {says}{_other_format(text, self.path)}", where) from None


def _other_format(text: str, path: Path) -> str:
    """Return advice if the text looks like JSON lines in a JSON file, or the other way round."""
    lines = [line.strip() for line in text.split("\n", 2)[:2]]
    if lines in (["["], ["{"]) and path.suffix.lower() != ".json":
        return '; a file with one JSON value ends in .json, or prompts.format = "json"'
    if len(lines) == 2 and all(line[:1] + line[-1:] in ("{}", '""') for line in lines):
        return '; a file with a JSON value a line ends in .jsonl, or prompts.format = "jsonl"'
    return ""


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if twice:
        raise ValueError(f"the key {twice[0]!r} appears twice in an object")
    return dict(pairs)


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    kind = {dict: "an object", list: "a list"}.get(type(value))
    return kind or f"{str(value)[:40]!r}, of type {type(value).__name__}"


def _text_rows(file: PromptFile) -> Iterator[Entry]:
    """Yield the lines of a text file. Unless the recipe gives the format, refuse lines that look like another one."""
    for number, line in enumerate(file.text().split("\n"), start=1):
        prompt = line.removeprefix(BYTE_ORDER_MARK).strip()  # inside, in concatenated files
        if prompt and file.format is None:
            _refuse_other_than_text(file, prompt, number)
        if prompt:
            yield f"line {number}", prompt


def _refuse_other_than_text(file: PromptFile, line: str, number: int) -> None:
    where = f"line {number}"
    if LIKE_JSON.match(line) or _is_json(line):
        raise file.fault(f"it looks like JSON: let the file's name end in .jsonl or .json, {FORCED}", where)
    separator = next((each for each in "\t;," if each in line), ",")
    if number == 1 and any(cell.strip('"').lower() in NAMES for cell in line.split(separator)):
        raise file.fault(f"it looks like a table's header: let the file's name end in .csv or .tsv, {FORCED}", where)


def _is_json(line: str) -> bool:
    """Return whether a line is a JSON list or object."""
    if line[0] not in "[{":
        return False
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _jsonl_rows(file: PromptFile) -> Iterator[Entry]:
    """Yield the texts or objects of a JSONL file."""
    for number, line in enumerate(file.text().split("\n"), start=1):
        if not line.strip():
            continue
        where = f"line {number}"
        value = file.parsed(line, where)
        if not isinstance(value, (str, dict)):
            raise file.fault(f"it is {_shown(value)}, and it must be an object or a text", where)
        yield where, value


def _json_rows(file: PromptFile) -> Iterator[Entry]:
    """Yield the entries of a JSON list, or of an object of columns."""
    text = file.text()
    value = file.parsed(text) if text.strip() else []
    if isinstance(value, dict):
        value = _of_columns(file, value)
    if not isinstance(value, list):
        raise file.fault(f"it is {_shown(value)}, and it must be a list of texts or objects, or an object of columns")
    for number, entry in enumerate(value, start=1):
        if not isinstance(entry, (str, dict)):
            raise file.fault(f"it is {_shown(entry)}, and it must be an object or a text", f"entry {number}")
        yield f"entry {number}", entry


def _of_columns(file: PromptFile, columns: dict[str, Any]) -> list[dict[str, Any]]:
    lengths = {name: len(values) if isinstance(values, list) else None for name, values in columns.items()}
    if None in lengths.values() or len(set(lengths.values())) > 1:
        shown = ", ".join(f"{name!r} {'no list' if count is None else count}" for name, count in lengths.items())
        raise file.fault(f"it is an object, whose columns must be lists of one length, and they are: {shown}")
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _table_rows(file: PromptFile, separator: str) -> Iterator[Entry]:
    """Yield the rows of a CSV or TSV file as objects of its header's columns. Empty lines are skipped."""
    reader = csv.reader(io.StringIO(file.text()), delimiter=separator, strict=True)
    header, where = [], ""
    try:
        while True:
            where = f"line {reader.line_num + 1}"
            row = next(reader)
            if row and not header:
                header = row
                _refuse_twice(file, header)
            elif row and len(row) != len(header):
                raise file.fault(f"it has {len(row)} columns, and the header {len(header)}: {header}", where)
            elif row:
                yield where, dict(zip(header, row, strict=True))
    except StopIteration:
        return
    except csv.Error as error:
        raise file.fault(f"it is no {'CSV' if separator == ',' else 'TSV'}: {error}", where) from None


def _refuse_twice(file: PromptFile, columns: Iterable[str]) -> None:
    twice = [name for name, count in Counter(columns).items() if count > 1]
    if twice:
        raise file.fault(f"it has {len(twice)} columns twice: {twice}; give each a name of its own")


def _parquet_rows(file: PromptFile) -> Iterator[Entry]:
    """Yield the rows of a parquet file."""
    import pyarrow.parquet as parquet

    number = 0
    with reading(f"{file.key} is {str(file.path)!r}: the file"), parquet.ParquetFile(file.path) as opened:
        names = list(opened.schema_arrow.names)
        columns = [] if len(set(names)) < len(names) else opened.iter_batches()
        batches = [batch.to_pylist() for batch in columns]
    _refuse_twice(file, names)
    for batch in batches:
        for row in batch:
            number += 1
            yield f"row {number}", row


READERS: dict[Format, Callable[[PromptFile], Iterator[Entry]]] = {
    "text": _text_rows,
    "jsonl": _jsonl_rows,
    "json": _json_rows,
    "csv": partial(_table_rows, separator=","),
    "tsv": partial(_table_rows, separator="\t"),
    "parquet": _parquet_rows,
}
