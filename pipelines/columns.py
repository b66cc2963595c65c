"""The columns of a manifest as people write them, to what is meant; a ValueError says which value is not understood."""

import ast
import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import lru_cache
from typing import Any

COLUMNS = ("video", "id", "captions", "split", "start", "end", "qa")
CAPTIONS = ("captions", "caption", "text")
"""Names under which captions are read."""
LOOK_ALIKES = {
    "captions": "sentence sentences description descriptions text texts encap desc".split(),  # noqa: SIM905
    "start": [
        "starts",
        "starttime",
        "startsec",
        "startseconds",
        "startsecond",
        "begin",
        "begintime",
        "from",
        "ss",
    ],
    "end": ["ends", "endtime", "endsec", "endseconds", "endsecond", "stop", "stoptime", "finish", "to"],
    "qa": ["qas", "questions"],
    "split": ["splits", "subset", "partition", "spilt"],
    "video": ["videos", "videopath", "path", "file", "filename", "filepath", "uri", "url", "videourl"],
}
"""What is likely meant for a column that is not there, without case and punctuation."""
PARTS = {"captions": {"caption", "captions"}, "start": {"start", "starts"}, "end": {"end", "ends"}}
"""Words of a longer name, as `clip_start`, `endTime`, `caption_en`, for which the same is likely meant."""
BETWEEN = re.compile(r"""['"]\s+['"]""")
CLOCK = re.compile(r"(?:(\d+):)?(\d{1,2}):(\d{1,2}(?:[.,]\d+)?)")


def check_columns(columns: Iterable[str]) -> None:
    """ValueError for a column that looks like one of ours under a name that is not read, where ours is not there."""
    if fault := _fault_of(tuple(map(str, columns))):
        raise ValueError(fault)


@lru_cache(1024)
def _fault_of(names: tuple[str, ...]) -> str:
    captions = [name for name in CAPTIONS if name in names]
    if len(captions) > 1:
        return f"captions stand in two columns, {' and '.join(captions)}: keep one"
    there = {*names, *(("captions",) if captions else ())}
    for name in names:
        if name in COLUMNS or name in CAPTIONS:
            continue
        bare = re.sub(r"[^a-z]", "", name.lower())
        words = set(re.findall(r"[a-z]+", re.sub(r"([A-Z])", r" \1", name).lower()))
        for column in COLUMNS:
            wanted = bare == column or bare in LOOK_ALIKES.get(column, ()) or words & PARTS.get(column, set())
            typo = len(bare) > 4 and difflib.SequenceMatcher(None, bare, column).ratio() >= 0.87
            if (wanted or typo) and (column not in there or bare == column):
                return (
                    f"the column {name!r} is not read: call it {column} if that is meant, else something else"
                )
    return "" if "video" in there else f"no `video` (its columns: {', '.join(names) or 'none'})"


def absent(value: Any) -> bool:
    """Whether a value says nothing: null, NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def captions_of(given: Mapping[str, Any]) -> list[str]:
    """The sentences of a row: a list, one sentence by itself, or a list in a cell; what is null among them is none."""
    name = next((name for name in CAPTIONS if name in given), "captions")
    value = given.get(name, [])
    if isinstance(value, str):
        cell = _cell(value) if value.lstrip().startswith("[") else [value]
        if cell == value and value.lstrip().startswith(("['", '["')):
            raise ValueError(f"`{name}` is {shown(value)}, a list that cannot be read: write it as JSON")
        value = cell if isinstance(cell, list) else [value]
    if not isinstance(value, list):
        raise ValueError(f"`{name}` is {shown(value)}, must be a sentence or a list of sentences")
    found = [caption for caption in value if not absent(caption)]
    if not all(isinstance(caption, str) for caption in found):
        raise ValueError(f"`{name}` is {shown(value)}, must be a sentence or a list of sentences")
    return [caption for caption in found if caption.strip()]


def questions_of(given: Mapping[str, Any]) -> list[dict[str, str]]:
    """The `{"question", "answer"}` pairs of a row, or of a cell that holds them as JSON."""
    value = given.get("qa", [])
    pairs = _cell(value) if isinstance(value, str) else value
    if (
        not isinstance(pairs, list)
        or not all(isinstance(pair, dict) for pair in pairs)
        or not all({"question", "answer"} <= pair.keys() for pair in pairs)
    ):
        raise ValueError(f'`qa` is {shown(value)}, must be a list of {{"question", "answer"}}')
    return [{name: str(part) for name, part in pair.items()} for pair in pairs]


def _cell(value: str) -> Any:
    """A list in a cell: as JSON, or as Python prints one; what is neither, as it stands."""
    for read in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            found = read(value)
            if read is ast.literal_eval and len(found) == 1 and BETWEEN.search(value):
                break  # an array of NumPy's, which Python would take for one long sentence
            return found
    return value


def id_of(value: Any) -> str:
    """An id as text; a whole number may come as a float, as spreadsheets and data frames have it."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"`id` is {shown(value)}, must be text")
    return str(value)


def split_of(value: Any) -> str:
    """A split's name, which begins the names of its shards."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"`split` is {shown(value)}, must be a word such as train, val or test")
    if len(value.encode("utf-8", "replace")) > 200 or not value.isprintable() or set(value) & set("/\\"):
        raise ValueError(f"`split` is {shown(value)}, which cannot name a file: use letters, digits, dashes")
    return value


def seconds_of(value: Any, column: str) -> float | None:
    """A time in seconds: a number, a number as text, or hh:mm:ss, mm:ss; None where there is none."""
    seconds = value
    if isinstance(value, str):
        text = value.strip()
        if not text:
            return None
        if clock := CLOCK.fullmatch(text):
            hours, minutes, rest = clock.groups()
            seconds = int(hours or 0) * 3600 + int(minutes) * 60 + float(rest.replace(",", "."))
        else:
            try:
                seconds = float(text)
            except ValueError:
                seconds = None
    if absent(value):
        return None
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < math.inf:
        raise ValueError(f"`{column}` is {shown(value)}, must be seconds, 0 or more, or hh:mm:ss")
    return float(seconds)


def shown(value: Any) -> str:
    """A value for a message, in few characters."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "…"
