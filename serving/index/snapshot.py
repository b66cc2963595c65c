"""One version of the index's table, for reading; and the segments of many clips, in memory for scanning."""

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from hbi.serving.index.rows import (
    CLIP_COLUMNS,
    SEGMENT_COLUMNS,
    SEGMENTS,
    Clip,
    any_of,
    clip_of,
    reaching,
)

if TYPE_CHECKING:
    from lancedb.table import Table


class Snapshot:
    """One version of the table, for reading. Rows are named by row ids, which stay the same between versions."""

    def __init__(self, folder: str, table: "Table", dim: int, before: "Snapshot | None" = None) -> None:
        """before: an older version of the same table, whose scanned segments are taken over."""
        self.folder = folder
        self.dim = dim
        self.version: int = table.version
        self.rows: int = table.count_rows()
        self.indexed = any(SEGMENT_COLUMNS[0] in index.columns for index in table.list_indices())
        """Whether there is an ANN index over the segments."""
        self._table = table
        self._before = before.scan if before is not None else None
        self._lock = threading.Lock()
        self._scan: SegmentScan | None = None

    @property
    def scan(self) -> "SegmentScan | None":
        """What has been read of the segments, if anything."""
        return self._scan or self._before

    def segments(self) -> "SegmentScan":
        """The segments of every clip, in memory: read at the first call, and then only what is new."""
        with self._lock:
            if self._scan is None:
                self._scan = self._read_segments(self._before)
                self._before = None
            return self._scan

    def _read_segments(self, before: "SegmentScan | None") -> "SegmentScan":
        if before is None:
            with reaching(self.folder):
                query = self._table.search().select([*SEGMENT_COLUMNS, "segment_weights"]).with_row_id(True)
                batches = query.limit(None).to_batches(batch_size=4096)
                scan = SegmentScan.empty(self.dim, self.rows + self.rows // 16 + 256)
                for batch in batches:
                    scan = scan.plus(*self._vectors(pa.Table.from_batches([batch])))
            return scan
        rows = self.all_rows()
        scan = before.only(rows)
        new = np.setdiff1d(rows, scan.present_rows)
        for first in range(0, len(new), 4096):
            columns = ["_rowid", *SEGMENT_COLUMNS, "segment_weights"]
            scan = scan.plus(*self._vectors(self._take(new[first : first + 4096], columns)))
        return scan

    def segments_of_rows(self, rows: np.ndarray) -> "SegmentScan":
        """The segments of some clips, from disk; those that are gone are left out."""
        found = self._vectors(self._take(rows, ["_rowid", *SEGMENT_COLUMNS, "segment_weights"]))
        return SegmentScan.empty(self.dim, len(found[0])).plus(*found)

    def rows_where(self, where: str) -> np.ndarray:
        """The row ids of the clips of which a condition is true."""
        with reaching(self.folder):
            query = self._table.search().where(where).select(["id"]).with_row_id(True)
            return query.limit(None).to_arrow()["_rowid"].to_numpy()

    def nearest(
        self, words: np.ndarray, count: int, probes: int, where: str | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """For each segment column each word's nearest clips: word numbers, row ids, inner products."""
        for column in SEGMENT_COLUMNS:
            with reaching(self.folder):
                query: Any = self._table.search(words.astype(np.float32), vector_column_name=column)
                query = query.distance_type("dot").nprobes(probes).limit(count).with_row_id(True)
                if where:
                    query = query.where(where)
                found = query.select(["_rowid", "_distance"]).to_arrow()
            number = (
                found["query_index"].to_numpy()
                if "query_index" in found.column_names
                else np.zeros(len(found))
            )
            yield number.astype(int), found["_rowid"].to_numpy(), 1 - found["_distance"].to_numpy()

    def all_rows(self) -> np.ndarray:
        """The row ids of every clip."""
        with reaching(self.folder):
            query = self._table.search().select(["id"]).with_row_id(True)
            return query.limit(None).to_arrow()["_rowid"].to_numpy()

    def tokens(self, rows: np.ndarray) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
        """Row ids that are there, their frame tokens [frames, dim] and weight logits [frames]."""
        found = self._take(rows, ["_rowid", "tokens", "logits"])
        tokens = [
            np.frombuffer(part.as_buffer(), np.float16).reshape(-1, self.dim) for part in found["tokens"]
        ]
        logits = [np.asarray(part.as_py(), np.float32) for part in found["logits"]]
        return found["_rowid"].to_numpy(), tokens, logits

    def frames(self, row: int) -> np.ndarray:
        """The frames of a clip, each by itself, float16 [frames, dim]. KeyError where it is gone."""
        found = self._take(np.asarray([row]), ["_rowid", "frames"])["frames"]
        if not len(found):
            raise KeyError(row)
        return np.frombuffer(found[0].as_buffer(), np.float16).reshape(-1, self.dim)

    def clips(self, rows: Sequence[int]) -> list[Clip]:
        """The clips of row ids, in their order; rows that are gone are left out."""
        found = self._take(np.asarray(rows), ["_rowid", *CLIP_COLUMNS])
        by_row = {row["_rowid"]: clip_of(row) for row in found.to_pylist()}
        return [by_row[row] for row in map(int, rows) if row in by_row]

    def row(self, id: str) -> int:
        """The row of a clip; KeyError if it is not held."""
        with reaching(self.folder):
            query = self._table.search().where(any_of("id", [id])).select(["id"]).with_row_id(True)
            found = query.limit(1).to_arrow()["_rowid"].to_pylist()
        if not found:
            raise KeyError(id)
        return found[0]

    def clip(self, id: str) -> Clip:
        """A clip by its id; KeyError if it is not held."""
        found = self.clips([self.row(id)])
        if not found:
            raise KeyError(id)
        return found[0]

    def thumbnails(self, id: str) -> list[bytes]:
        """The small JPEGs of a clip's frames; KeyError if it is not held."""
        return self._take(np.asarray([self.row(id)]), ["_rowid", "thumbnails"])["thumbnails"].to_pylist()[0]

    def counts(self, column: str) -> dict[str, int]:
        """How many clips each value of a text column has."""
        with reaching(self.folder):
            values = self._table.search().select([column]).limit(None).to_arrow()[column]
        counted = values.value_counts().to_pylist()
        return {entry["values"]: entry["counts"] for entry in counted}

    def captions(self, limit: int) -> list[str]:
        """The first caption of at most `limit` clips that have one, each sentence once."""
        with reaching(self.folder):
            query = self._table.search().where("array_length(captions) > 0").select(["captions"])
            found = query.limit(limit).to_arrow()["captions"].to_pylist()
        return list(dict.fromkeys(captions[0] for captions in found))

    def request_sources(self) -> list[str]:
        """The sources of the clips that were added while serving."""
        with reaching(self.folder):
            query = self._table.search().where("starts_with(part, 'request:')").select(["source"])
            return [os.fsdecode(source) for source in query.limit(None).to_arrow()["source"].to_pylist()]

    def ids(self) -> Iterable[tuple[str, str, float, float]]:
        """Id, source, start and end of every clip."""
        with reaching(self.folder):
            found = self._table.search().select(["id", "source", "start", "end"]).limit(None).to_arrow()
        columns = (found[name].to_pylist() for name in ("id", "source", "start", "end"))
        return (
            (id, os.fsdecode(source), start, end) for id, source, start, end in zip(*columns, strict=True)
        )

    def _take(self, rows: np.ndarray, columns: list[str]) -> pa.Table:
        with reaching(self.folder):
            query = self._table.take_row_ids([int(row) for row in rows]).select(columns[1:]).with_row_id()
            return query.to_arrow()

    def _vectors(self, found: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        parts = [_matrix(found[column], self.dim) for column in SEGMENT_COLUMNS]
        weights = _matrix(found["segment_weights"], SEGMENTS)
        return found["_rowid"].to_numpy(), np.stack(parts, axis=1), weights


@dataclass
class _Tail:
    """The first place of shared arrays that no version has written to."""

    filled: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True)
class SegmentScan:
    """The segments of many clips in memory: 3 KB a clip of 512 channels. Versions share what they have in common."""

    rows: np.ndarray
    """Row id of each place, int64 [capacity]."""
    vectors: torch.Tensor
    """bfloat16 [capacity, SEGMENTS, dim]: half of float32, and a matrix product that needs no conversion."""
    weights: torch.Tensor
    """float32 [capacity, SEGMENTS]."""
    used: int
    """Places that are filled."""
    present: np.ndarray
    """bool [used]: false where the clip is gone."""
    tail: "_Tail"
    """How far the arrays are filled by any version that shares them."""

    @staticmethod
    def empty(dim: int, capacity: int) -> "SegmentScan":
        """No clip, and places for `capacity`."""
        capacity = max(16, capacity)
        vectors = torch.zeros(capacity, SEGMENTS, dim, dtype=torch.bfloat16)
        weights = torch.zeros(capacity, SEGMENTS)
        return SegmentScan(np.zeros(capacity, np.int64), vectors, weights, 0, np.zeros(0, bool), _Tail())

    @property
    def present_rows(self) -> np.ndarray:
        """Row ids of the clips that are there."""
        return self.rows[: self.used][self.present]

    def only(self, rows: np.ndarray) -> "SegmentScan":
        """The same without the clips that are not among `rows`; copied only when half of the places are idle."""
        present = self.present & np.isin(self.rows[: self.used], rows)
        if 2 * int(present.sum()) >= self.used or self.used < 1024:
            return replace(self, present=present)
        kept = np.flatnonzero(present)
        fresh = SegmentScan.empty(self.vectors.shape[2], len(kept))
        return fresh.plus(self.rows[kept], self.vectors[kept], self.weights[kept])

    def plus(self, rows: np.ndarray, vectors: Any, weights: Any) -> "SegmentScan":
        """The same with more clips, written behind those that are there: an older version does not look there."""
        used = self.used + len(rows)
        with self.tail.lock:
            in_place = used <= len(self.rows) and self.tail.filled == self.used
            if in_place:
                self.tail.filled = used
        if in_place:
            scan = self
        else:
            scan = SegmentScan.empty(self.vectors.shape[2], used + used // 8)
            scan.rows[: self.used] = self.rows[: self.used]
            scan.vectors[: self.used] = self.vectors[: self.used]
            scan.weights[: self.used] = self.weights[: self.used]
            scan.tail.filled = used
        scan.rows[self.used : used] = rows
        scan.vectors[self.used : used] = torch.as_tensor(vectors)
        scan.weights[self.used : used] = torch.as_tensor(weights)
        return replace(scan, used=used, present=np.concatenate([self.present, np.ones(len(rows), bool)]))


def _matrix(column: pa.ChunkedArray, width: int) -> np.ndarray:
    parts = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    return np.concatenate(parts).reshape(-1, width) if parts else np.zeros((0, width))
