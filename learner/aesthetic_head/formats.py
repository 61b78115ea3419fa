"""The formats of a table of rated images: csv, parquet, AVA's text file, and a json list of vote histograms."""

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pyarrow import ArrowException, parquet

Row = tuple[str, dict[str, Any]]  # its location in the file, such as "line 3", and its cells by column
AVA_FIELDS = 15  # index, image id, counts of the ratings 1 … 10, two content tags, challenge
AVA_VOTES = slice(2, 12)


def rows_of(table: Path, format_name: str | None = None) -> Iterator[Row]:
    """Yield a table's rows, with columns named as in a csv.

    Args:
        format_name: one of `READERS`. None: recognize the format.

    Raises:
        ValueError: the file does not exist, or cannot be read in this format.
    """
    if not table.is_file():
        raise ValueError(f"the table {table} is not there: give a file with a row an image")
    name = format_name or format_of(table)
    if name not in READERS:
        raise ValueError(f"the format is {name!r}: it must be one of {sorted(READERS)}")
    try:
        yield from READERS[name](table)
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error, ArrowException) as error:
        raise ValueError(f"the table {table} cannot be read as {name}: {error}") from error


def format_of(table: Path) -> str:
    """Recognize the format by the first line, with csv as the default."""
    with table.open("rb") as file:
        line = file.readline(1 << 16)
    if line.startswith(b"PAR1"):
        return "parquet"
    if line.lstrip().startswith(b"["):
        return "json"
    fields = line.split()
    return "ava" if len(fields) == AVA_FIELDS and all(field.isdigit() for field in fields) else "csv"


def _csv_rows(table: Path) -> Iterator[Row]:
    """Yield the rows of a csv file whose delimiter is a comma, a semicolon or a tab."""
    with table.open(encoding="utf-8-sig", newline="") as file:
        header = file.readline()
        file.seek(0)
        reader = csv.DictReader(file, delimiter=max(",;\t", key=header.count))
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(
                    f"{table}, line {reader.line_num}: it has another number of cells than the "
                    f"{len(reader.fieldnames or ())} "
                    "columns of the first line"
                )
            yield f"line {reader.line_num}", row


def _parquet_rows(table: Path) -> Iterator[Row]:
    first = 0
    for batch in parquet.ParquetFile(table).iter_batches():
        for number, row in enumerate(batch.to_pylist(), start=first):
            yield f"row {number}", row
        first += len(batch)


def _ava_rows(table: Path) -> Iterator[Row]:
    """Yield the rows of AVA's text file, with the path derived from the image id."""
    with table.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            fields = line.split()
            if fields and len(fields) != AVA_FIELDS:
                raise ValueError(
                    f"{table}, line {number}: it has {len(fields)} fields, and AVA's lines have {AVA_FIELDS}: index, "
                    "image id, counts of the ratings 1 to 10, two tags, challenge"
                )
            if fields:
                yield f"line {number}", {"path": f"{fields[1]}.jpg", "votes": fields[AVA_VOTES]}


def _json_rows(table: Path) -> Iterator[Row]:
    entries = json.loads(table.read_text(encoding="utf-8"))
    for number, entry in enumerate(entries if isinstance(entries, list) else [None]):
        if not isinstance(entry, dict) or not {"image_id", "label"} <= set(entry):
            raise ValueError(
                f"{table}, entry {number}: it must be an object with image_id and label, its counts of votes, in a list"
            )
        yield f"entry {number}", {"path": f"{entry['image_id']}.jpg", "votes": entry["label"]}


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "csv": _csv_rows,
    "parquet": _parquet_rows,
    "ava": _ava_rows,
    "json": _json_rows,
}
