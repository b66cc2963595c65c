"""The index: a LanceDB table, one row a clip, in a local folder or under s3://.

    INDEX/index.json     what made it: the model, its digest, the settings of the shards
    INDEX/clips.lance    the table: who a clip is, its frame tokens, three segment vectors, thumbnails
    INDEX/uploads/       videos that came with a request

Tokens are unit vectors in float16: 12 frames of 512 channels take 12.3 KB, the segments that find candidates 3 KB.
Every write is one commit: it is whole or absent, it survives whoever made it, and other readers see it. A reader
works on a `Snapshot`, a version of the table that does not change under its feet.
"""

import json
import os
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from hbi.infra import storage
from hbi.serving.index.rows import (
    SEGMENT_COLUMNS,
    SEGMENTS,
    IndexUnavailable,
    any_of,
    not_of,
    reaching,
    schema,
)
from hbi.serving.index.snapshot import Snapshot

if TYPE_CHECKING:
    from lancedb.table import Table

INDEX_NAME = "index.json"
TABLE_NAME = "clips"
UPLOADS = "uploads"
FORMAT = 3
MADE = b"made"
"""A random word in the table's schema."""
SCANNED_BYTES = 3 * 2**30
"""Up to so many a reader holds every segment (a million clips of 512 channels) and looks at all; above, an ANN index is
built over them. It needs less memory, finds less, and is not always faster (benchmarks/search.py --ann: at 250,000
clips of 512 channels 2/3 of the time, at a million of 64 channels twice of it)."""
ROWS_OF_A_PARTITION = 256
"""Clips of a partition of the ANN index, about."""
STALE_ROWS = 0.05
"""The share of rows outside the ANN index at which it is brought up to date (they are scanned until then)."""
PATIENCE = {
    "connect_timeout": "3s",
    "timeout": "10s",
    "client_max_retries": "3",
    "client_retry_timeout": "5",
}
"""How long a request to object storage may take and is tried again where people wait for it: they are told of an
outage and ask again. `hbi index` has LanceDB's own patience of three minutes."""
LOOK_SECONDS = 10.0
"""How long such people wait for the newest version of the table: LanceDB asks a server that accepts and says nothing
many times, each for its `timeout`."""
KEPT = timedelta(minutes=10)
"""How long an old version of the table stays readable."""


class IdInUse(ValueError):
    """A clip of that id is in the index; the message is the id."""


@dataclass(frozen=True)
class IndexMetadata:
    """What made an index: a query must be encoded by the same model, a new video cut by the same settings."""

    model: str
    """A model folder, or a pinned registry version (`models:/hbi/3`)."""
    digest: str
    """SHA-256 over the model's settings and weights: what it is, whatever it is called."""
    tracking: str
    """The MLflow store in which a `models:/` name is looked up."""
    shards: dict[str, Any]
    """The settings of the shards (frames, size, …)."""
    dim: int
    """Channels of a token."""
    complete: bool = True
    """Whether the last `hbi index` came to its end."""

    @staticmethod
    def read(folder: str) -> "IndexMetadata":
        """ValueError says what the folder is instead of an index, and what to do."""
        path = storage.join(folder, INDEX_NAME)
        try:
            about = json.loads(storage.read_bytes(path))
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(f"{folder}: not an index (no {INDEX_NAME}): make one with `hbi index`") from None
        except ValueError as error:
            raise ValueError(f"{path}: not the file of an index ({error}): make the index anew") from None
        if isinstance(about, dict) and isinstance(about.get("shards"), list):
            raise ValueError(
                f"{folder}: a folder of shards, not an index: make one of it with `hbi index MODEL {folder} INDEX`"
            )
        if not isinstance(about, dict) or about.get("version") != FORMAT:
            version = about.get("version") if isinstance(about, dict) else None
            raise ValueError(
                f"{folder}: an index of format {version}, this hbi reads {FORMAT}: make it anew from its shards, "
                "`hbi index MODEL SHARDS` into a new folder"
            )
        return IndexMetadata(**{name: about[name] for name in IndexMetadata.__dataclass_fields__})

    def write(self, folder: str) -> None:
        """Puts `index.json` into the folder."""
        about = {"version": FORMAT, **asdict(self)}
        storage.write_bytes(storage.join(folder, INDEX_NAME), json.dumps(about, indent=1).encode())


class ClipTable:
    """An index folder, opened. Safe to use from several threads; writers in several processes do not lose rows."""

    def __init__(
        self, folder: str, metadata: IndexMetadata, table: "Table", database: Any, patient: bool
    ) -> None:
        """patient: for whoever makes the index and can wait."""
        self.folder = folder
        self.metadata = metadata
        self._patient = patient
        self._table = table
        self._made = _made(table)
        self._database = database
        self._snapshot: Snapshot | None = None
        self._looked = 0.0
        self._failure: tuple[float, str] | None = None
        self._lock = threading.Lock()

    @classmethod
    def create(cls, folder: str, metadata: IndexMetadata) -> "ClipTable":
        """An empty index; it takes the place of a table that lies in the folder."""
        folder = storage.absolute(folder)
        metadata.write(folder)
        with reaching(folder):
            database = _connect(folder, {})
            options = {"new_table_enable_stable_row_ids": "true"}
            columns = schema(metadata.dim).with_metadata({MADE: uuid.uuid4().hex})
            table = database.create_table(
                TABLE_NAME, schema=columns, mode="overwrite", storage_options=options
            )
        return cls(folder, metadata, table, database, patient=True)

    @classmethod
    def open(cls, folder: str, unfinished: bool = False) -> "ClipTable":
        """ValueError says why the folder is no index. unfinished: for whoever makes it, with more patience."""
        folder = storage.absolute(folder)
        metadata = IndexMetadata.read(folder)
        if not metadata.complete and not unfinished:
            raise ValueError(
                f"{folder}: not finished: run the same `hbi index` again, it does what is missing"
            )
        with reaching(folder):
            database = _connect(folder, {} if unfinished else PATIENCE)
            try:
                table = database.open_table(TABLE_NAME)
            except (ValueError, FileNotFoundError) as error:
                if "not found" not in str(error):
                    raise
                raise ValueError(
                    f"{folder}: its table is gone: make the index anew with `hbi index`"
                ) from None
        return cls(folder, metadata, table, database, patient=unfinished)

    @property
    def uploads(self) -> str:
        """The folder of the videos that came with a request."""
        return storage.join(self.folder, UPLOADS)

    def snapshot(self, seconds: float = 0.0) -> Snapshot:
        """A version to read from: the newest, or one that was the newest at most so many seconds ago.

        IndexUnavailable where it cannot be found, or could not at most so many seconds ago.
        """
        asked = time.monotonic()
        with self._lock:
            # Whoever waited while another looked has that one's answer: an outage is not waited for in turns.
            if self._failure is not None and self._failure[0] >= asked - seconds:
                raise IndexUnavailable(self._failure[1])
            started = time.monotonic()
            if self._snapshot is not None and (self._looked >= asked or started - self._looked < seconds):
                return self._snapshot
            try:
                self._snapshot = self._newest() if self._patient else self._newest_soon()
            except IndexUnavailable as error:
                self._failure = (time.monotonic(), str(error))
                self._looked = 0.0  # what was wanted was not seen: the next one looks, too
                raise
            self._looked = started
            return self._snapshot

    def _newest_soon(self) -> Snapshot:
        """`_newest`; IndexUnavailable where it takes longer than LOOK_SECONDS."""
        found: Future[Snapshot] = Future()

        def look() -> None:
            try:
                found.set_result(self._newest())
            except BaseException as error:
                found.set_exception(error)

        threading.Thread(target=look, name="look", daemon=True).start()
        try:
            return found.result(LOOK_SECONDS)
        except TimeoutError:
            raise IndexUnavailable(
                f"{self.folder}: the index does not answer within {LOOK_SECONDS:g} s"
            ) from None

    def _newest(self) -> Snapshot:
        with reaching(self.folder):
            # A handle of its own finds the newest version; the pinned one is left to whoever still reads from it.
            try:
                newest = self._database.open_table(TABLE_NAME)
            except ValueError as error:  # deleted by someone
                raise OSError(str(error)) from None
            self._require_same(newest)
            if self._snapshot is not None and newest.version == self._snapshot.version:
                return self._snapshot
            newest.checkout(newest.version)
            return Snapshot(self.folder, newest, self.metadata.dim, self._snapshot)

    def _checkout_latest(self) -> None:
        self._table.checkout_latest()
        self._require_same(self._table)

    def _require_same(self, table: "Table") -> None:
        """IndexUnavailable where somebody made another table in the place of the one that was opened: its rows have
        the same numbers, and its model may be another."""
        if _made(table) != self._made:
            raise IndexUnavailable(
                f"{self.folder}: another index was made in its place: whatever serves it must be started anew"
            )

    def add(self, rows: pa.Table, replace: bool = False) -> None:
        """Adds clips in one commit; IdInUse for an id that is held, unless `replace` puts the new in its place."""
        ids, part = rows["id"].to_pylist(), rows["part"][0].as_py()
        with reaching(self.folder):
            self._checkout_latest()
            held = self._held(ids)
            if held and not replace:
                raise IdInUse(min(held))
            self._table.add(rows)
            if held:  # first the new, then without the old: at no time is there none
                self._table.delete(f"{any_of('id', sorted(held))} AND {not_of('part', part)}")

    def remove(self, ids: Sequence[str]) -> None:
        """Removes clips in one commit; KeyError names one that is not held."""
        with reaching(self.folder):
            self._checkout_latest()
            if missing := set(ids) - self._held(ids):
                raise KeyError(min(missing))
            self._table.delete(any_of("id", ids))

    def _held(self, ids: Sequence[str]) -> set[str]:
        """Those of `ids` that the table holds."""
        found: set[str] = set()
        for first in range(0, len(ids), 1000):
            part = any_of("id", ids[first : first + 1000])
            found |= set(
                self._table.search().where(part).select(["id"]).limit(None).to_arrow()["id"].to_pylist()
            )
        return found

    def maintain(self) -> None:
        """Puts small files together and brings the ANN index up to date; does nothing where that is not worth it.

        May run beside adding and removing. Searches stay right meanwhile: rows outside the ANN index are scanned.
        """
        with reaching(self.folder):
            self._checkout_latest()
            rows = self._table.count_rows()
            have = {column for index in self._table.list_indices() for column in index.columns}
            scanned_rows = SCANNED_BYTES // (SEGMENTS * self.metadata.dim * 2)  # bfloat16
            if rows > scanned_rows and "id" not in have:
                self._table.optimize(cleanup_older_than=KEPT)
                self._index(rows)
                return
            if not have:
                stats: Any = self._table.stats()  # a dict, whatever its annotation says
                stale = stats["fragment_stats"]["num_small_fragments"] > 20
            else:
                about = self._table.index_stats(f"{SEGMENT_COLUMNS[0]}_idx")
                stale = about is not None and about.num_unindexed_rows > STALE_ROWS * rows
            if stale:
                self._table.optimize(cleanup_older_than=KEPT)

    def _index(self, rows: int) -> None:
        """The ANN index over each segment, and one over ids."""
        from lancedb.index import BTree, IvfSq

        partitions = max(2, rows // ROWS_OF_A_PARTITION)
        for column in SEGMENT_COLUMNS:
            # Few rounds of k-means on a sample: where a partition ends matters little, as several are looked into.
            ann = IvfSq(distance_type="dot", num_partitions=partitions, max_iterations=10, sample_rate=32)
            self._table.create_index(column, config=ann)
        self._table.create_index("id", config=BTree())

    def about_ann(self) -> str:
        """How segments are found, in a few words."""
        with reaching(self.folder):
            if not any(SEGMENT_COLUMNS[0] in index.columns for index in self._table.list_indices()):
                return "all segments scanned"
            about = self._table.index_stats(f"{SEGMENT_COLUMNS[0]}_idx")
        return f"ANN index over {about.num_indexed_rows} clips" if about else "ANN index"

    def parts(self) -> set[str]:
        """The parts that are in it."""
        with reaching(self.folder):
            self._checkout_latest()
            column = self._table.search().select(["part"]).limit(None).to_arrow()["part"]
            return set(column.unique().to_pylist())


def _made(table: "Table") -> bytes | None:
    """What tells a table from another one that is made in its place."""
    return (table.schema.metadata or {}).get(MADE)


def _connect(folder: str, patience: Mapping[str, str]) -> Any:
    """The database in a folder; the AWS_* variables say where s3:// is."""
    os.environ.setdefault("LANCEDB_LOG", "error")  # it warns of every table that is made
    import lancedb

    if not storage.is_remote(folder):
        return lancedb.connect(folder)
    options = dict(patience)
    if endpoint := os.environ.get("AWS_ENDPOINT_URL"):
        options |= {"aws_endpoint": endpoint, "allow_http": str(endpoint.startswith("http:")).lower()}
    return lancedb.connect(folder, storage_options=options or None)
