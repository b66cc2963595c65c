"""Whether the tars of a shard folder are still those that were written: their digests against their records."""

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

from hbi.infra import storage
from hbi.pipelines.sharding.plan import ShardPlan
from hbi.pipelines.sharding.records import ShardManifest

READERS = 4
"""Tars that are read at a time."""


def is_whole(out: str, record: ShardManifest) -> bool:
    """Whether a recorded shard's tar has the bytes that were recorded; one without samples has no tar."""
    if not record.shard.samples:
        return True
    try:
        with storage.open_file(storage.join(out, record.shard.name)) as stream:
            return hashlib.file_digest(cast(Any, stream), "sha256").hexdigest() == record.shard.sha256
    except FileNotFoundError:
        return False


def verified(
    out: str, finished: Iterable[tuple[ShardPlan, ShardManifest | None]]
) -> Iterator[tuple[ShardPlan, ShardManifest | None]]:
    """The shards as `records.unfinished` has them, None instead of a record whose tar has other bytes.

    Raises StorageError as reading does.
    """
    with ThreadPoolExecutor(READERS) as readers:
        shards = list(finished)
        whole = readers.map(lambda shard: shard[1] is not None and is_whole(out, shard[1]), shards)
        for (shard_plan, record), right in zip(shards, whole, strict=True):
            yield shard_plan, record if right else None
