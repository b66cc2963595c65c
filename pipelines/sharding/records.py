"""Commit records: what became of each row of a shard. Only what is recorded counts.

A record is written last, to `OUT/.done/<shard>.json`; a later run makes what has no record, or none that is true.
"""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hbi.infra import storage
from hbi.pipelines.sample import ShardInfo
from hbi.pipelines.sharding.filters import Fingerprint
from hbi.pipelines.sharding.plan import ShardPlan

DONE = ".done"
STAGING = ".staging"


@dataclass(frozen=True)
class Failure:
    """A manifest row that has no sample."""

    key: str
    """Number of the row, as in sample keys."""
    id: str
    """The manifest's id."""
    video: str
    """Path or URI."""
    stage: str
    """`manifest`, `read`, `decode` or `filter`."""
    reason: str
    """What went wrong, in one line."""
    passing: bool = False
    """The storage failed, not the clip: the next run tries this shard again."""


@dataclass(frozen=True)
class ClipStats:
    """What the summary and the report say about a sample."""

    seconds: float
    fps: float
    width: int
    height: int
    words: int
    """Words of its first caption; 0 without captions."""
    decoder: str
    truncated: bool = False
    """Its source breaks off before its end."""
    captions: int = -1
    """How many it has; -1 in records of an older version, which do not say."""


@dataclass(frozen=True)
class ShardManifest:
    """The commit record of a shard: its rows are samples or failures."""

    shard: ShardInfo
    """As the index will list it; `samples` 0 and no tar if every row failed."""
    rows: int
    """Manifest rows: samples plus failures."""
    failures: list[Failure]
    """In manifest order."""
    clips: list[ClipStats]
    """One a sample, in manifest order."""
    fingerprints: list[tuple[int, Fingerprint]] = field(default_factory=list)
    """Where clips are compared with each other: one a sample, with the number of its row."""

    @staticmethod
    def parse(content: bytes) -> "ShardManifest":
        """From JSON; ValueError, KeyError or TypeError if it is none."""
        record = json.loads(content)
        return ShardManifest(
            ShardInfo(**record["shard"]),
            record["rows"],
            [Failure(**failure) for failure in record["failures"]],
            [ClipStats(*clip) for clip in record["clips"]],
            [(row, Fingerprint(digest, hash)) for row, digest, hash in record["fingerprints"]],
        )

    def json(self) -> bytes:
        """The inverse of `parse`."""
        content = asdict(self)
        content["clips"] = [list(clip.values()) for clip in content["clips"]]
        content["fingerprints"] = [[row, *found.values()] for row, found in content["fingerprints"]]
        return json.dumps(content).encode()


def record_path(out: str, shard: str) -> str:
    """Where the commit record of a shard lies."""
    return storage.join(out, DONE, f"{shard}.json")


def staging_folder(folder: str) -> str | None:
    """A place for unfinished files: beside the output, so that putting one in place is a rename."""
    if storage.is_remote(folder):
        return None
    staging = storage.join(folder, STAGING)
    Path(staging).mkdir(parents=True, exist_ok=True)
    return staging


def sizes_of(folder: str, names: list[str]) -> dict[str, int]:
    """Bytes of the files of these names in a folder, by path, where they are there: one list of what begins alike."""
    places = [storage.join(folder, name) for name in names]
    if storage.is_remote(folder):
        there = storage.list_sizes(folder, prefix=os.path.commonprefix(names))  # noqa: RUF071 (of names)
        return {place: there[place] for place in places if place in there}
    return {place: storage.size(place) for place in places if storage.exists(place)}


def read_records(out: str, names: list[str]) -> Iterator[tuple[str, ShardManifest | None]]:
    """The commit records of the named shards, in order, a few read ahead; None where one is missing or broken."""
    # Whose length is known is one request; without it a whole answer could not be told from half a one.
    listed = storage.is_remote(out) and len(names) > 1
    sizes = sizes_of(storage.join(out, DONE), [f"{name}.json" for name in names]) if listed else {}

    def read(name: str) -> ShardManifest | None:
        place = record_path(out, name)
        with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
            if not listed:
                return ShardManifest.parse(storage.read_bytes(place))
            if place in sizes:
                return ShardManifest.parse(storage.read_range(place, 0, sizes[place]))
        return None

    ahead = 32 if storage.is_remote(out) else 1
    with ThreadPoolExecutor(ahead) as readers:
        for start in range(0, len(names), ahead * 4):
            batch = names[start : start + ahead * 4]
            yield from zip(batch, readers.map(read, batch), strict=True)


def unfinished(
    folder: str, shard_plans: list[ShardPlan], tars: bool = True
) -> Iterator[tuple[ShardPlan, ShardManifest | None]]:
    """Every planned shard with the record of its finished shard in `folder`, or None where it is to be made.

    tars: whether the tar must be there, as long as recorded; False asks for its record only.
    """
    names = [shard_plan.name for shard_plan in shard_plans]
    there = sizes_of(folder, names) if tars else {}
    for shard_plan, (name, record) in zip(shard_plans, read_records(folder, names), strict=True):
        whole = (
            record is not None
            and record.rows == shard_plan.rows
            and (
                not tars
                or not record.shard.samples
                or there.get(storage.join(folder, name)) == record.shard.bytes
            )
            and not any(failure.passing for failure in record.failures)
        )
        yield shard_plan, record if whole else None
