"""The rows of the index's table: a clip, what is kept of its pictures, and the columns that hold both."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

SEGMENTS = 3
"""Vectors that stand for a clip when candidates are sought."""
SEGMENT_COLUMNS = tuple(f"segment_{i}" for i in range(SEGMENTS))


class IndexUnavailable(OSError):
    """The table cannot be read or written just now: it was deleted, or its storage does not answer."""


@dataclass(frozen=True)
class Clip:
    """What an index knows of a clip besides its tokens. All text is valid Unicode."""

    id: str
    """Unique in the index."""
    video: str
    """Path or URI of the source, as JSON can hold it (bytes that are no UTF-8 are written \\xff)."""
    start: float
    """Where the clip begins in the source, in seconds."""
    end: float
    """Where it ends, in seconds."""
    timestamps: list[float]
    """Presentation time of each frame token, in seconds."""
    captions: list[str] = field(default_factory=list)
    """Sentences that came with it."""
    split: str = ""
    """The manifest's split; empty for what was added while serving."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """The manifest's other columns."""
    source: str = ""
    """The path or URI itself, as `os.fsdecode` gives it."""
    part: str = ""
    """What brought it: a shard and its digest, or one request."""

    @property
    def labels(self) -> list[str]:
        """What it can be filtered by: `key=value`."""
        pairs = {"split": self.split} | self.metadata
        return [f"{key}={value}" for key, value in pairs.items() if isinstance(value, str | int | bool)]


@dataclass(frozen=True)
class Encoded:
    """What is kept of a clip's pictures."""

    tokens: np.ndarray
    """float16 [frames, dim], unit vectors."""
    logits: np.ndarray
    """float32 [frames], weight logits before the softmax."""
    segments: np.ndarray
    """float16 [SEGMENTS, dim], of `hbi.serving.index.stages.segments_of`."""
    segment_weights: np.ndarray
    """float32 [SEGMENTS], which sum to 1."""
    thumbnails: list[bytes] = field(default_factory=list)
    """JPEG of each frame, small."""
    frames: np.ndarray = field(default_factory=lambda: np.empty(0, np.float16))
    """float16 [frames, dim], each frame by itself, before it has seen the others; none: its matches are not explained
    by the game on what goes in."""


def schema(dim: int) -> pa.Schema:
    """The table's columns."""
    text, number = pa.string(), pa.float64()
    vector = pa.list_(pa.float16(), dim)
    return pa.schema(
        [("id", text), ("video", text), ("source", pa.binary()), ("start", number), ("end", number)]
        + [("timestamps", pa.list_(number)), ("captions", pa.list_(text)), ("split", text)]
        + [("metadata", text), ("labels", pa.list_(text)), ("part", text)]
        + [("tokens", pa.binary()), ("logits", pa.list_(pa.float32())), ("frames", pa.binary())]
        + [(column, vector) for column in SEGMENT_COLUMNS]
        + [("segment_weights", pa.list_(pa.float32(), SEGMENTS)), ("thumbnails", pa.list_(pa.binary()))]
    )


CLIP_COLUMNS = (
    "id",
    "video",
    "source",
    "start",
    "end",
    "timestamps",
    "captions",
    "split",
    "metadata",
    "part",
)


def rows_of(clips: Sequence[Clip], encoded: Sequence[Encoded]) -> pa.Table:
    """Clips as rows of the table; ValueError for text that is not Unicode."""
    dim = encoded[0].tokens.shape[1]
    columns: dict[str, Any] = {name: [getattr(clip, name) for clip in clips] for name in CLIP_COLUMNS}
    columns["source"] = [_source_bytes(clip.source) for clip in clips]
    columns["metadata"] = [json.dumps(clip.metadata) for clip in clips]
    columns["labels"] = [[as_text(label) for label in clip.labels] for clip in clips]
    columns["tokens"] = [part.tokens.astype(np.float16).tobytes() for part in encoded]
    columns["frames"] = [part.frames.astype(np.float16).tobytes() for part in encoded]
    columns["logits"] = [part.logits.astype(np.float32) for part in encoded]
    for i, column in enumerate(SEGMENT_COLUMNS):
        flat = np.concatenate([part.segments[i].astype(np.float16) for part in encoded])
        columns[column] = pa.FixedSizeListArray.from_arrays(pa.array(flat), dim)
    columns["segment_weights"] = [part.segment_weights.astype(np.float32) for part in encoded]
    columns["thumbnails"] = [part.thumbnails for part in encoded]
    wanted = schema(dim)
    return pa.table({name: pa.array(columns[name], wanted.field(name).type) if not isinstance(columns[name], pa.Array)
                     else columns[name] for name in wanted.names}, schema=wanted)  # fmt: skip


def as_text(name: str) -> str:
    """Any file name as valid Unicode: half characters and bytes that are no UTF-8 are written out (\\xff, \\ud800)."""
    whole = (
        name.encode("utf-8", "surrogateescape")
        if _escaped(name)
        else name.encode("utf-8", "backslashreplace")
    )
    return whole.decode("utf-8", "backslashreplace")


def _source_bytes(source: str) -> bytes:
    """A path as the bytes that the file system knows; half characters, which no file has, are written out."""
    return os.fsencode(source) if _escaped(source) else as_text(source).encode()


def _escaped(name: str) -> bool:
    """Whether its only halves are those by which Python keeps bytes of a file name."""
    try:
        name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


def clip_of(row: dict[str, Any]) -> Clip:
    """A clip from the columns of CLIP_COLUMNS."""
    values = {name: row[name] for name in CLIP_COLUMNS}
    return Clip(**values | {"source": os.fsdecode(row["source"]), "metadata": json.loads(row["metadata"])})


def labelled(filters: dict[str, str]) -> str | None:
    """The condition that a clip has each of these labels."""
    if not filters:
        return None
    labels = ", ".join(_quoted(f"{key}={value}") for key, value in filters.items())
    return f"array_has_all(labels, [{labels}])"


def any_of(column: str, values: Sequence[str]) -> str:
    """The condition that a text column holds one of these values."""
    return f"{column} IN ({', '.join(map(_quoted, values))})"


def not_of(column: str, value: str) -> str:
    """The condition that a text column holds another value."""
    return f"{column} <> {_quoted(value)}"


def _quoted(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


@contextmanager
def reaching(folder: str) -> Iterator[None]:
    """What LanceDB says of a table that is gone or of storage that does not answer, in one line."""
    try:
        yield
    except IndexUnavailable:
        raise
    except (RuntimeError, OSError) as error:
        said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise IndexUnavailable(f"{folder}: the index cannot be reached ({said[:200]})") from error
