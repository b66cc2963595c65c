"""Tables in files, as rows: JSON Lines, a JSON array, CSV, TSV (in UTF-8 or UTF-16, gzip or not), and Parquet."""

import codecs
import csv
import gzip
import io
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from itertools import chain, zip_longest
from typing import IO, Any, cast

from hbi.infra import storage

PARQUET_ROWS = 1024
"""Rows of a Parquet file that are held at a time."""
LONGEST_CELL = 2**27
HEAD_CHARACTERS, PIECE_CHARACTERS = 4096, 1 << 20
"""Of JSON: by how much it is told whether it is an array, and so much of one is read at a time."""
BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
SPACE = re.compile(r"\s*")
NOTHING = ("", "NaN", "nan", "NULL", "null", "None", "<NA>", "N/A", "n/a", "#N/A")
"""Cells that stand for no value, as data frames and spreadsheets write them."""
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
            if kind in HEADED:
                yield from _csv(text, "," if kind == ".csv" else "\t")
                return
            head = text.read(HEAD_CHARACTERS)
            rows = _json_array if re.match(r"\s*\[\s*[{\]]", head) else _json_lines
            yield from rows(_Resumed(head, text))
    except _NoArray as error:
        raise ValueError(f"{path}: {error}") from None
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


class _Resumed:
    """A text of which the head was read."""

    def __init__(self, head: str, rest: IO[str]) -> None:
        self.head, self.rest = head, rest

    def read(self, length: int) -> str:
        """Some more of it, nothing at its end."""
        head, self.head = self.head, ""
        return head or self.rest.read(length)

    def __iter__(self) -> Iterator[str]:
        *lines, last = self.head.split("\n")
        yield from (line + "\n" for line in lines)
        yield last + self.rest.readline()
        yield from self.rest


class _NoArray(ValueError):
    """A JSON array that breaks off or is none: what follows cannot be told apart."""


def _json_array(text: _Resumed) -> Iterator[tuple[str, Any]]:
    """The elements of an array, a piece of the file held at a time."""
    array = _Array(text)
    array.take("[")
    if not array.takes("]"):
        while True:
            array.see()
            where = f"line {array.line}"
            yield where, _row(array.element())
            if array.takes("]"):
                break
            array.take(",")
    if array.see():
        raise _NoArray(f"line {array.line}: there is more after the end of the JSON array")


class _Array:
    """A place in the text of a JSON array."""

    def __init__(self, text: _Resumed) -> None:
        self.text, self.held, self.place, self.line = text, "", 0, 1
        self.decoder = json.JSONDecoder(parse_constant=float)

    def see(self) -> str:
        """The next character that is no white space, nothing at the end."""
        while True:
            end = SPACE.match(self.held, self.place).end()  # pyright: ignore[reportOptionalMemberAccess]
            self._go(end)
            if end < len(self.held) or not self._more(PIECE_CHARACTERS):
                return self.held[self.place : self.place + 1]

    def takes(self, mark: str) -> bool:
        """Whether the next character is this; goes beyond it if so."""
        found = self.see() == mark
        self.place += found
        return found

    def take(self, mark: str) -> None:
        """Goes beyond a character that has to be there."""
        if not self.takes(mark):
            rest = self.held[self.place :][:20]
            said = f"{mark} is missing before {rest!r}" if rest else f"it breaks off where {mark} is missing"
            raise _NoArray(f"line {self.line}: not a JSON array: {said}")

    def element(self) -> Any:
        """The value that begins here."""
        length = PIECE_CHARACTERS
        while True:
            try:
                value, end = self.decoder.raw_decode(self.held, self.place)
            except (ValueError, RecursionError) as error:
                if len(self.held) - self.place > LONGEST_CELL or not self._more(length):
                    said = str(error).split(":")[0]
                    raise _NoArray(
                        f"line {self.line}: not JSON ({said}): mend it, or write one object a line"
                    ) from None
                length *= 2
                continue
            if end == len(self.held) and self._more(length):
                continue  # a number may go on
            self._go(end)
            return value

    def _go(self, place: int) -> None:
        self.line += self.held.count("\n", self.place, place)
        self.place = place

    def _more(self, length: int) -> bool:
        """Reads on; whether there was more."""
        more = self.text.read(length)
        self.held, self.place = self.held[self.place :] + more, 0
        return bool(more)


def _row(content: Any) -> Any:
    if isinstance(content, dict | Unreadable):
        return content
    said = json.dumps(content)
    said = said if len(said) <= 60 else said[:57] + "…"
    return Unreadable(f'a row is an object such as {{"video": "a.mp4"}}, not {said}')


def _json_lines(text: _Resumed) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text, 1):
        if not line.strip():
            continue
        try:
            content = json.loads(line, parse_constant=float)
        except (ValueError, RecursionError) as error:
            content = Unreadable(f"not JSON ({error}): a manifest has one JSON object a line")
        yield f"line {number}", _row(content)


def _csv(text: IO[str], delimiter: str) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(LONGEST_CELL)
    header = text.readline()
    if delimiter not in header:  # a .csv may be separated by semicolons or tabs
        delimiter = max(",;\t", key=header.count)
    reader = csv.reader(chain([header], text), delimiter=delimiter)
    names = [name.strip() for name in next(reader, ())]
    twice = next((name for name, count in Counter(names).items() if name and count > 1), None)
    if twice is not None:
        raise csv.Error(f"two of its columns are called {twice!r}: keep one")
    for cells in reader:
        if not cells:
            continue
        if any(cells[len(names) :]):
            content: Any = Unreadable(f"more cells than the header has columns ({len(names)})")
        else:
            # Without a name: the index that data frames write in front.
            content = {
                name: None if cell in NOTHING else cell
                for name, cell in zip_longest(names, cells[: len(names)], fillvalue="")
                if name
            }
        yield f"line {reader.line_num}", content


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
