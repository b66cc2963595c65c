"""Clips that repeat earlier ones are left out: exact and near duplicates over the whole corpus.

Which clip is the first of its kind is known only when all have been seen. So there are two passes: first every shard
is made in `OUT/.first`, with the fingerprint of each sample in its record; then the fingerprints are compared in the
order of the manifest, and each shard is copied to its place without the samples that repeat an earlier one. Workers
do not matter to either.
"""

import heapq
from collections import defaultdict
from collections.abc import Iterator
from typing import IO

from hbi.infra import storage
from hbi.pipelines.sample import ShardInfo, read_shard
from hbi.pipelines.sharding.filters import FilterSettings, Fingerprint, duplicates
from hbi.pipelines.sharding.plan import Plan, ShardPlan
from hbi.pipelines.sharding.records import Failure, ShardManifest, read_records
from hbi.pipelines.sharding.shards import ShardWriter, commit, stats_of

FIRST = ".first"


def find_duplicates(out: str, plan: Plan, filters: FilterSettings) -> dict[int, str]:
    """Row numbers of the samples that repeat an earlier one, with the reason.

    Holds one fingerprint per sample in memory, some 200 bytes each: the one thing here that grows with the corpus.
    """
    return duplicates(_fingerprints(out, plan), filters)


def _fingerprints(out: str, plan: Plan) -> Iterator[tuple[int, Fingerprint]]:
    """All fingerprints in manifest order: within a split the shards are in order, and the splits are merged."""
    names: dict[str, list[str]] = defaultdict(list)
    for shard_plan in plan.shards:
        names[shard_plan.split].append(shard_plan.name)

    def of_split(split: str) -> Iterator[tuple[int, Fingerprint]]:
        for name, record in read_records(storage.join(out, FIRST), names[split]):
            assert record is not None, f"{name} was not made"
            yield from record.fingerprints

    return heapq.merge(*map(of_split, names), key=lambda numbered: numbered[0])


def without_duplicates(out: str, shard_plan: ShardPlan, duplicates: dict[int, str]) -> ShardManifest:
    """Copies a shard of the first pass to its place, without the samples that repeat earlier ones."""
    ((_, first),) = read_records(storage.join(out, FIRST), [shard_plan.name])
    assert first is not None, f"{shard_plan.name} was not made"

    def fill(stream: IO[bytes], _: str) -> ShardManifest:
        failures = list(first.failures)
        clips = []
        with ShardWriter(stream) as writer:
            if first.shard.samples:
                with storage.open_file(storage.join(out, FIRST, shard_plan.name)) as source:
                    for sample in read_shard(source):
                        reason = duplicates.get(int(sample.key))
                        if reason is not None:
                            failures.append(Failure(sample.key, sample.id, sample.source, "filter", reason))
                            continue
                        writer.add(sample)
                        clips.append(stats_of(sample))
        failures.sort(key=lambda failure: failure.key)
        return ShardManifest(
            ShardInfo(shard_plan.name, shard_plan.split, len(clips), 0, ""), shard_plan.rows, failures, clips
        )

    return commit(out, shard_plan.name, fill)


def delete_first_pass(out: str, plan: Plan) -> None:
    """Removes the tars of the first pass; their records stay, so that a lost shard can be made again by itself."""
    for shard_plan in plan.shards:
        storage.delete(storage.join(out, FIRST, shard_plan.name))
