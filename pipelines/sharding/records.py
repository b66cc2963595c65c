"""Commit records: what became of each row of a shard. Only what is recorded counts.

A record is written last, to `OUT/.done/<shard>.json`. At the end the records, read as a stream, become
`OUT/index.json` and `OUT/failures.jsonl`; a later run makes what has no record, or none that is true.
"""

import json
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hbi.infra import storage
from hbi.pipelines.sample import FAILURES_NAME, INDEX_NAME, ShardInfo
from hbi.pipelines.sharding.filters import Fingerprint
from hbi.pipelines.sharding.plan import VERSION, Plan, ShardPlan

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


def read_records(out: str, names: list[str]) -> Iterator[tuple[str, ShardManifest | None]]:
    """The commit records of the named shards, in order, a few read ahead; None where one is missing or broken."""

    # Whose length is known is one request; without it a whole answer could not be told from half a one.
    sizes = storage.list_sizes(storage.join(out, DONE)) if len(names) > 1 and storage.is_remote(out) else {}

    def read(name: str) -> ShardManifest | None:
        place = record_path(out, name)
        with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
            if place in sizes:
                return ShardManifest.parse(storage.read_range(place, 0, sizes[place]))
            return ShardManifest.parse(storage.read_bytes(place))
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
    there = storage.list_sizes(folder)
    recorded = {path.rsplit("/", 1)[-1] for path in storage.list_files(storage.join(folder, DONE))}
    by_name = {shard_plan.name: shard_plan for shard_plan in shard_plans}
    kept = [shard_plan.name for shard_plan in shard_plans if f"{shard_plan.name}.json" in recorded]
    for name, record in read_records(folder, kept):
        shard_plan = by_name.pop(name)
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
    for shard_plan in by_name.values():
        yield shard_plan, None


def write_index(out: str, plan: Plan) -> Iterator[ShardManifest]:
    """Yields every commit record, by name, and writes `failures.jsonl` and `index.json` from them at the end.

    AssertionError if a row of the manifest is unaccounted for.
    """
    names = sorted(shard_plan.name for shard_plan in plan.shards)
    shards: list[dict[str, Any]] = []
    samples = failed = 0
    with tempfile.TemporaryDirectory(prefix="hbi-index-", dir=staging_folder(out)) as folder:
        staging = Path(folder) / FAILURES_NAME
        with staging.open("wb") as stream:
            for name, record in read_records(out, names):
                assert record is not None, f"{name} has no commit record"
                yield record
                samples += record.shard.samples
                if record.shard.samples:
                    shards.append(asdict(record.shard))
                for failure in record.failures:
                    failed += 1
                    row = asdict(failure)
                    del row["passing"]
                    stream.write(json.dumps(row).encode() + b"\n")
        assert samples + failed == plan.rows, f"{samples} samples and {failed} failures of {plan.rows} rows"
        storage.put_file(str(staging), storage.join(out, FAILURES_NAME), move=True)
    index = {
        "version": VERSION,
        "settings": plan.identity["settings"],
        "manifest": {"rows": plan.rows, "sha256": plan.identity["manifest"]},
        "samples": samples,
        "failures": failed,
        "shards": shards,
    }
    storage.write_bytes(storage.join(out, INDEX_NAME), (json.dumps(index, indent=1) + "\n").encode())
