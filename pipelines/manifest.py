"""Manifests: which clips there are. JSON Lines, CSV, TSV or Parquet, local or remote, read as a stream.

Published annotation formats become manifests in `hbi.pipelines.datasets`.
"""

import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hbi.infra import storage
from hbi.pipelines.columns import (
    CAPTIONS,
    COLUMNS,
    absent,
    captions_of,
    check_columns,
    id_of,
    questions_of,
    seconds_of,
    shown,
    split_of,
)
from hbi.pipelines.tables import HEADED, Unreadable, kind_of_table, read_table

VIDEO_NAME = re.compile(
    r"\.(3g2|3gp|asf|avi|divx|f4v|flv|gif|h264|h265|hevc|ivf|m1v|m2ts|m2v|m4v|mjpe?g|mkv|mov|mp4|mpe|mpe?g|mts|mxf|nut|"
    r"ogv|rm|rmvb|ts|vob|webm|wmv|y4m)$",
    re.IGNORECASE,
)
HOPELESS = 100
"""So many rows without one that is a clip at the beginning of a manifest: it is wrong as a whole."""


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
    fault: str = ""
    """Why the row is no clip, where its columns say something that cannot be meant."""

    @staticmethod
    def parse(content: Any, base: str = "") -> "Row":
        """The row that a table's row means; ValueError says which column cannot be meant, and the mend.

        A relative `video` is relative to the folder `base`. Absent and null columns get their defaults.
        """
        if isinstance(content, Unreadable):
            raise ValueError(content)
        check_columns(content)
        given = {column: value for column, value in content.items() if not absent(value)}
        video = given.get("video", "")
        if not isinstance(video, str) or not video:
            raise ValueError(f"`video` is {shown(content['video'])}, must be a path or URI")
        start, end = (seconds_of(given.get(column), column) for column in ("start", "end"))
        if end is not None and end <= (start or 0.0):
            raise ValueError(f"`end` is {end:g} s, must be after `start` ({start or 0:g} s)")
        return Row(
            video=storage.join(base, video) if base else video,
            id=id_of(given["id"]) if "id" in given else _name(video),
            captions=captions_of(given),
            split=split_of(given.get("split", "train")),
            start=start,
            end=end,
            qa=questions_of(given),
            extra={name: value for name, value in content.items() if name not in (*COLUMNS, *CAPTIONS)},
        )

    @staticmethod
    def no_clip(content: Any, where: str, fault: str) -> "Row":
        """The row that stands for one which cannot be meant, with as much of it as is understood."""
        given = content if isinstance(content, dict) else {}
        video, id, split = (given.get(name) for name in ("video", "id", "split"))
        try:
            split = split_of(split)
        except ValueError:
            split = "train"
        name = str(video) if video else ""
        id = str(id) if id else _name(name) or where
        return Row(name, id, split=split, extra=given, fault=f"{where}: {fault}")

    def line(self) -> str:
        """The row as a line of a JSON Lines manifest, without what is default; one with a fault as it was."""
        if self.fault:
            return json.dumps(self.extra)
        content: dict[str, Any] = {"video": self.video, "id": self.id, "captions": self.captions}
        content |= {"split": self.split} if self.split != "train" else {}
        content |= {
            name: value for name in ("start", "end", "qa") if (value := getattr(self, name)) not in (None, [])
        }
        # Escaped to ASCII: file names that are not UTF-8 come back as they were.
        return json.dumps(content | self.extra)


def read_manifest(path: str) -> Iterator[Row]:
    """The rows of a manifest, streamed; `*.parquet`, `*.csv`, `*.tsv`, everything else JSON Lines or an
    array; gzip or not.

    A row that cannot be meant has a `fault`. Raises ValueError where the manifest is missing, none at all, or wrong as
    a whole: its header, or every one of its first rows.
    """
    base, headed = storage.parent(path), kind_of_table(path) in HEADED
    bad: list[Row] | None = []
    try:
        for number, (where, content) in enumerate(read_table(path)):
            try:
                if headed and not number and isinstance(content, dict):
                    _check_header(path, content)
                row = Row.parse(content, base)
            except _Header:
                raise
            except ValueError as error:
                row = Row.no_clip(content, where, str(error))
            if bad is None:
                yield row
                continue
            bad.append(row)
            if not row.fault:
                yield from bad
                bad = None
            elif len(bad) == HOPELESS:
                break
    except FileNotFoundError:
        raise ValueError(f"{path}: no such manifest") from None
    except IsADirectoryError:
        raise ValueError(
            f"{path}: is a folder: give the manifest file in it, or make one of its videos"
        ) from None
    except PermissionError as error:
        raise ValueError(f"{path}: the manifest may not be read ({error})") from None
    if bad:
        every = "its only row" if len(bad) == 1 else f"none of its first {len(bad)} rows is a clip"
        raise ValueError(f"{path}: {every}: {bad[0].fault}")


class _Header(ValueError):
    """The header of a table is wrong."""


def _check_header(path: str, content: dict[str, Any]) -> None:
    try:
        check_columns(content)
    except ValueError as error:
        raise _Header(f"{path}: {error}") from None


def write_manifest(rows: Iterable[Row], path: str) -> int:
    """Writes rows as JSON Lines, whole or not at all; how many there were. Videos become absolute paths or URIs."""
    count = 0
    with tempfile.TemporaryDirectory(prefix="hbi-manifest-") as folder:
        staging = Path(folder) / "manifest.jsonl"
        with staging.open("w", encoding="ascii") as stream:
            for row in rows:
                row = row if row.fault else replace(row, video=storage.absolute(row.video))
                stream.write(row.line() + "\n")
                count += 1
        if not count:
            raise ValueError(f"{path}: there is no clip to write")
        storage.put_file(str(staging), path, move=True)
    return count


def _name(video: str) -> str:
    """The video's name without its folders and its last extension."""
    name = re.split(r"[?#]", video)[0] if re.match(r"https?://", video) else video
    name = name.rstrip("/").rsplit("/", 1)[-1]
    return os.path.splitext(name)[0] or name  # noqa: PTH122
