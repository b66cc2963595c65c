"""Manifests: which clips there are. JSON Lines or Parquet, local or `s3://`, read as a stream.

Published annotation formats become manifests in `hbi.pipelines.datasets`.
"""

import json
import math
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from hbi.infra import storage

COLUMNS = ("video", "id", "captions", "split", "start", "end", "qa")
VIDEO_NAME = re.compile(
    r"\.(3g2|3gp|asf|avi|divx|f4v|flv|gif|h264|h265|hevc|ivf|m1v|m2ts|m2v|m4v|mjpe?g|mkv|mov|mp4|mpe|mpe?g|mts|mxf|nut|"
    r"ogv|rm|rmvb|ts|vob|webm|wmv|y4m)$",
    re.IGNORECASE,
)
PARQUET_ROWS = 1024
"""Rows of a Parquet manifest that are held at a time."""


@dataclass(frozen=True)
class Row:
    """One clip of a manifest."""

    video: str
    """Path or URI of the video."""
    id: str
    """The clip's name; duplicates are allowed."""
    captions: list[str] = field(default_factory=list)
    """Sentences that describe the clip."""
    split: str = "train"
    """`train`, `val`, `test`, …"""
    start: float | None = None
    """Where the clip begins, in seconds; None: where the video does."""
    end: float | None = None
    """Where the clip ends, in seconds; None: where the video does."""
    qa: list[dict[str, str]] = field(default_factory=list)
    """`{"question", "answer"}` pairs."""
    extra: dict[str, Any] = field(default_factory=dict)
    """The manifest's other columns, carried along."""

    @staticmethod
    def parse(content: Any, where: str, base: str = "") -> "Row":
        """The row that a decoded JSON object holds; ValueError says `where`, which column, and the mend.

        A relative `video` is relative to the folder `base`. Absent and null columns get their defaults.
        """
        if not isinstance(content, dict):
            raise ValueError(
                f'{where}: a row is an object such as {{"video": "a.mp4"}}, not {_shown(content)}'
            )
        given = {column: value for column, value in content.items() if value is not None}
        video = given.get("video")
        if video is None:
            raise ValueError(f"{where}: no `video` (its columns: {', '.join(map(str, content)) or 'none'})")
        if not isinstance(video, str) or not video:
            raise ValueError(f"{where}: `video` is {_shown(video)}, must be a path or URI")
        captions = given.get("captions", [])
        if isinstance(captions, str) or not _all(captions, str):
            raise ValueError(f"{where}: `captions` is {_shown(captions)}, must be a list of sentences")
        split = given.get("split", "train")
        if not isinstance(split, str) or not split:
            raise ValueError(
                f"{where}: `split` is {_shown(split)}, must be a word such as train, val or test"
            )
        id = given.get("id", _name(video))
        if not isinstance(id, str | int) or isinstance(id, bool):
            raise ValueError(f"{where}: `id` is {_shown(id)}, must be text")
        start, end = (_seconds(given.get(column), column, where) for column in ("start", "end"))
        if end is not None and end <= (start or 0.0):
            raise ValueError(f"{where}: `end` is {end:g} s, must be after `start` ({start or 0:g} s)")
        qa = given.get("qa", [])
        if not _all(qa, dict) or not all({"question", "answer"} <= pair.keys() for pair in qa):
            raise ValueError(f'{where}: `qa` is {_shown(qa)}, must be a list of {{"question", "answer"}}')
        return Row(
            video=storage.join(base, video) if base else video,
            id=str(id),
            captions=list(captions),
            split=split,
            start=start,
            end=end,
            qa=[{name: str(value) for name, value in pair.items()} for pair in qa],
            extra={name: value for name, value in content.items() if name not in COLUMNS},
        )

    def line(self) -> str:
        """The row as a line of a JSON Lines manifest, without what is default."""
        content: dict[str, Any] = {"video": self.video, "id": self.id, "captions": self.captions}
        content |= {"split": self.split} if self.split != "train" else {}
        content |= {
            name: value for name in ("start", "end", "qa") if (value := getattr(self, name)) not in (None, [])
        }
        # Escaped to ASCII: file names that are not UTF-8 come back as they were.
        return json.dumps(content | self.extra)


def read_manifest(path: str) -> Iterator[Row]:
    """The rows of a manifest, streamed; `*.parquet` or `*.pq` is Parquet, everything else JSON Lines.

    Raises ValueError naming the line (or row) where a row is malformed or has no `video`, and where the file is
    missing or no manifest at all.
    """
    base = storage.parent(path)
    rows = _parquet(path) if path.lower().endswith((".parquet", ".pq")) else _json_lines(path)
    try:
        for where, content in rows:
            yield Row.parse(content, where, base)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such manifest") from None
    except IsADirectoryError:
        raise ValueError(
            f"{path}: is a folder: give the manifest file in it, or make one of its videos"
        ) from None
    except PermissionError as error:
        raise ValueError(f"{path}: the manifest may not be read ({error})") from None


def write_manifest(rows: Iterable[Row], path: str) -> int:
    """Writes rows as JSON Lines, whole or not at all; how many there were. Videos become absolute paths or URIs."""
    count = 0
    with tempfile.TemporaryDirectory(prefix="hbi-manifest-") as folder:
        staging = Path(folder) / "manifest.jsonl"
        with staging.open("w", encoding="ascii") as stream:
            for row in rows:
                stream.write(replace(row, video=storage.absolute(row.video)).line() + "\n")
                count += 1
        if not count:
            raise ValueError(f"{path}: there is no clip to write")
        storage.put_file(str(staging), path, move=True)
    return count


def _json_lines(path: str) -> Iterator[tuple[str, Any]]:
    lines = enumerate(storage.read_lines(path), 1)
    for number, line in lines:
        text = line.removeprefix("\ufeff") if number == 1 else line
        if not text.strip():
            continue
        where = f"{path} line {number}"
        try:
            yield where, json.loads(text, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON ({error}): a manifest has one JSON object a line") from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _parquet(path: str) -> Iterator[tuple[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    with storage.open_file(path) as stream:
        try:
            batches = parquet.ParquetFile(stream).iter_batches(batch_size=PARQUET_ROWS)
            first = next(batches, None)
            number = 0
            for batch in chain([first] if first is not None else [], batches):
                for content in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", _plain(content)
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


def _name(video: str) -> str:
    """The video's name without its folders and its last extension."""
    name = re.split(r"[?#]", video)[0] if re.match(r"https?://", video) else video
    name = name.rstrip("/").rsplit("/", 1)[-1]
    return os.path.splitext(name)[0] or name  # noqa: PTH122


def _seconds(value: Any, column: str, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ValueError(f"{where}: `{column}` is {_shown(value)}, must be seconds, 0 or more")
    return float(value)


def _all(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(part, kind) for part in value)


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "…"
