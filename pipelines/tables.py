"""Tables in files, as a stream of rows: JSON Lines, CSV, TSV (each in UTF-8 or UTF-16, gzip or not), and Parquet."""

import codecs
import csv
import gzip
import io
import json
import math
import zlib
from collections.abc import Iterator
from typing import IO, Any, cast

from hbi.infra import storage

PARQUET_ROWS = 1024
"""Rows of a Parquet file that are held at a time."""
LONGEST_CELL = 2**27
BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
HEADED = (".csv", ".tsv", ".parquet", ".pq")
"""Formats whose columns are the same in every row, known before the first."""


class Unreadable(str):
    """What stands in the place of a row that cannot be read: the reason."""


def kind_of_table(path: str) -> str:
    """`.csv`, `.tsv`, `.parquet`, or anything else for JSON Lines: the extension, that of gzip apart."""
    name = path.lower().removesuffix(".gz").removesuffix(".gzip")
    return "." + name.rsplit(".", 1)[-1] if "." in name.rsplit("/", 1)[-1] else ""


def read_table(path: str) -> Iterator[tuple[str, Any]]:
    """Each row with where it stands (`line 3`): a dict of its columns, or `Unreadable`.

    ValueError where the file as a whole is none that can be read; FileNotFoundError and the like as they come.
    """
    kind = kind_of_table(path)
    if kind in (".parquet", ".pq"):
        yield from _parquet(path)
        return
    try:
        with storage.open_file(path) as stream:
            text = _text(stream)
            yield from _csv(text, "," if kind == ".csv" else "\t") if kind in HEADED else _json_lines(text)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path}: its gzip is damaged or incomplete ({error})") from None
    except csv.Error as error:
        raise ValueError(f"{path}: not a table ({error})") from None


def _text(stream: IO[bytes]) -> IO[str]:
    """The text of a file, whatever it is written in; bytes that are not UTF-8 survive (surrogates)."""
    buffered = cast("io.BufferedReader", stream)
    if buffered.peek(2)[:2] == b"\x1f\x8b":
        buffered = io.BufferedReader(gzip.GzipFile(fileobj=stream))  # pyright: ignore[reportArgumentType]
    head = buffered.peek(4)[:4]
    bom, encoding = next(((bom, name) for bom, name in BOMS if head.startswith(bom)), (b"", ""))
    buffered.read(len(bom))
    if not bom:
        # Text of ours begins with ASCII: every other byte of UTF-16 is zero then.
        zeros = [byte == 0 for byte in head]
        encoding = {(False, True, False, True): "utf-16-le", (True, False, True, False): "utf-16-be"}.get(
            cast("Any", tuple(zeros)), "utf-8"
        )
    errors = "surrogateescape" if encoding == "utf-8" else "replace"
    return io.TextIOWrapper(buffered, encoding, errors=errors, newline="")


def _json_lines(text: IO[str]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_lines(text), 1):
        if not line.strip():
            continue
        try:
            content = json.loads(line, parse_constant=float)
        except (ValueError, RecursionError) as error:
            content = Unreadable(f"not JSON ({error}): a manifest has one JSON object a line")
        if not isinstance(content, dict | Unreadable):
            said = json.dumps(content)
            said = said if len(said) <= 60 else said[:57] + "…"
            content = Unreadable(f'a row is an object such as {{"video": "a.mp4"}}, not {said}')
        yield f"line {number}", content


def _lines(text: IO[str]) -> Iterator[str]:
    """Lines that end with a line feed (a carriage return before it is white space to JSON)."""
    yield from text


def _csv(text: IO[str], delimiter: str) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(LONGEST_CELL)
    reader = csv.DictReader(text, delimiter=delimiter, restkey="", restval=None)
    reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
    for row in reader:
        where = f"line {reader.line_num}"
        if row.get(""):
            yield where, Unreadable(f"more cells than the header has columns ({len(reader.fieldnames)})")
            continue
        yield (
            where,
            {name: value for name, value in row.items() if name and value not in (None, "")}
            | {name: None for name in reader.fieldnames if name and not row.get(name)},
        )


def _parquet(path: str) -> Iterator[tuple[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    with storage.open_file(path) as stream:
        try:
            for batch in parquet.ParquetFile(stream).iter_batches(batch_size=PARQUET_ROWS):
                for content in batch.to_pylist():
                    number += 1
                    yield f"row {number}", _plain(content)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
            raise ValueError(
                f"{path}: not a Parquet file that can be read ({str(error).splitlines()[0]})"
            ) from None


def _plain(value: Any) -> Any:
    """Arrow's values as JSON has them."""
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if value is None or isinstance(value, str | int | bool):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    return str(value)  # dates, decimals
