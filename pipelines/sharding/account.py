"""What became of every row, from the commit records: read a slice of shards at a time, each record once.

At the end they become `OUT/index.json` and `OUT/failures.jsonl`. The index of a large folder lies in parts, one a slice
(`OUT/index/<slice>.json`), which `index.json` names with their digests.
"""

import gzip
import hashlib
import io
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hbi.infra import storage
from hbi.pipelines.sample import FAILURES_NAME, INDEX_NAME, PARTS_FOLDER
from hbi.pipelines.sharding.plan import VERSION, Plan, ShardPlan, Slice
from hbi.pipelines.sharding.records import ShardManifest, read_records, staging_folder, unfinished
from hbi.pipelines.sharding.report import Page
from hbi.pipelines.sharding.summary import Summary
from hbi.pipelines.sharding.verify import verified

MANY = 10_000
"""Shards above which their records are read on Ray, and the index lies in parts."""


@dataclass
class Account:
    """What the records of a slice say; it goes from a worker to the driver."""

    summary: Summary
    page: Page = field(default_factory=Page)
    missing: list[ShardPlan] = field(default_factory=list)
    """Shards that have no record, or none that is true."""
    damaged: int = 0
    """How many of them have a record, and a tar of other bytes."""
    index: list[dict[str, Any]] = field(default_factory=list)
    """Entries of `index.json`: of the shards with samples, or of the part that lists them."""
    failures: bytes = b""
    """Lines of `failures.jsonl`, compressed."""


@dataclass(frozen=True)
class Accountant:
    """Reads the records of an output; it travels to the workers."""

    out: str
    """The shard folder."""
    parts: bool
    """Whether the index lies in parts."""
    verify: bool = False
    """Read the tars too; a record whose tar has other bytes is not true."""
    ended: bool = False
    """All was made that could be: every record counts, unverified, also one of rows that the storage refused."""

    def account(self, shards: Slice) -> Account:
        """The account of a slice; if nothing of it is missing, its part of the index is written."""
        found = Account(Summary(self.out))
        with io.BytesIO() as lines:
            with gzip.open(lines, "wb", compresslevel=1) as stream:
                for shard_plan, record, damaged in self._records(shards.shards):
                    found.damaged += damaged
                    if record is None:
                        found.missing.append(shard_plan)
                    else:
                        _add(found, record, stream)
            found.failures = lines.getvalue()
        if self.parts and found.index and not found.missing:
            found.index = [self._write_part(shards.name, found)]
        return found

    def _records(
        self, shard_plans: list[ShardPlan]
    ) -> Iterator[tuple[ShardPlan, ShardManifest | None, bool]]:
        """Each shard, its record if that counts, and whether it does not for a tar of other bytes."""
        if self.ended:
            recorded = read_records(self.out, [shard_plan.name for shard_plan in shard_plans])
            for shard_plan, (_, record) in zip(shard_plans, recorded, strict=True):
                yield shard_plan, record, False
        elif self.verify:
            finished = list(unfinished(self.out, shard_plans))
            for (shard_plan, before), (_, record) in zip(finished, verified(self.out, finished), strict=True):
                yield shard_plan, record, record is not before
        else:
            for shard_plan, record in unfinished(self.out, shard_plans):
                yield shard_plan, record, False

    def _write_part(self, name: str, found: Account) -> dict[str, Any]:
        part = f"{PARTS_FOLDER}/{name}.json"
        content = (json.dumps({"shards": found.index}, indent=1) + "\n").encode()
        storage.write_bytes(storage.join(self.out, part), content)
        digest = hashlib.sha256(content).hexdigest()
        return {
            "name": part,
            "shards": len(found.index),
            "samples": found.summary.samples,
            "bytes": found.summary.bytes,
            "sha256": digest,
        }

    def write_index(self, plan: Plan, accounts: Iterable[Account]) -> None:
        """Writes `failures.jsonl` and `index.json` from the accounts of all slices, in order.

        AssertionError if a row of the manifest is unaccounted for.
        """
        entries: list[dict[str, Any]] = []
        samples = failed = 0
        with tempfile.TemporaryDirectory(prefix="hbi-index-", dir=staging_folder(self.out)) as folder:
            staging = Path(folder) / FAILURES_NAME
            with staging.open("wb") as stream:
                for found in accounts:
                    assert not found.missing, f"{found.missing[0].name} has no commit record"
                    samples += found.summary.samples
                    failed += found.summary.rows - found.summary.samples
                    entries += found.index
                    with gzip.open(io.BytesIO(found.failures)) as lines:
                        shutil.copyfileobj(lines, stream)
            assert samples + failed == plan.rows, (
                f"{samples} samples and {failed} failures of {plan.rows} rows"
            )
            storage.put_file(str(staging), storage.join(self.out, FAILURES_NAME), move=True)
        index = {
            "version": VERSION,
            "settings": plan.identity["settings"],
            "manifest": {"rows": plan.rows, "sha256": plan.identity["manifest"]},
            "samples": samples,
            "failures": failed,
            "parts" if self.parts else "shards": entries,
        }
        storage.write_bytes(storage.join(self.out, INDEX_NAME), (json.dumps(index, indent=1) + "\n").encode())


def _add(found: Account, record: ShardManifest, stream: gzip.GzipFile) -> None:
    """Takes a finished shard into account."""
    found.summary.add(record)
    found.page.add(record)
    if record.shard.samples:
        found.index.append(asdict(record.shard))
    for failure in record.failures:
        row = asdict(failure)
        del row["passing"]
        stream.write(json.dumps(row).encode() + b"\n")
