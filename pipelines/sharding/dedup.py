"""Clips that repeat earlier ones are left out: exact and near duplicates over the whole corpus.

Which clip is the first of its kind is known only when all have been seen. So there are two passes: first every shard
is made in `OUT/.first`, with a print of each sample in its record; then the prints are compared in manifest order,
and each shard is copied to its place without the samples that repeat an earlier one. Workers do not matter to either.
"""

import heapq
from collections import defaultdict
from collections.abc import Iterator
from typing import IO

from hbi.infra import storage
from hbi.pipelines.sample import ShardInfo, read_shard
from hbi.pipelines.sharding.filters import FilterSettings, Print, duplicates
from hbi.pipelines.sharding.plan import Plan, Unit
from hbi.pipelines.sharding.records import Failure, Record, read_records
from hbi.pipelines.sharding.shards import ShardWriter, commit, facts_of

FIRST = ".first"


def repeats_of(out: str, plan: Plan, filters: FilterSettings) -> dict[int, str]:
    """Row numbers of the samples that repeat an earlier one, with the reason.

    Holds one print per sample in memory, some 200 bytes each: the one thing here that grows with the corpus.
    """
    return duplicates(_prints(out, plan), filters)


def _prints(out: str, plan: Plan) -> Iterator[tuple[int, Print]]:
    """All prints in manifest order: within a split the units are in order, and the splits are merged."""
    names: dict[str, list[str]] = defaultdict(list)
    for unit in plan.units:
        names[unit.split].append(unit.name)

    def of_split(split: str) -> Iterator[tuple[int, Print]]:
        for name, record in read_records(storage.join(out, FIRST), names[split]):
            assert record is not None, f"{name} was not made"
            yield from record.prints

    return heapq.merge(*map(of_split, names), key=lambda numbered: numbered[0])


def thin_shard(out: str, unit: Unit, repeats: dict[int, str]) -> Record:
    """Copies a shard of the first pass to its place, without the samples that repeat earlier ones."""
    ((_, first),) = read_records(storage.join(out, FIRST), [unit.name])
    assert first is not None, f"{unit.name} was not made"

    def fill(stream: IO[bytes], _: str) -> Record:
        failures = list(first.failures)
        clips = []
        with ShardWriter(stream) as writer:
            if first.shard.samples:
                with storage.open_file(storage.join(out, FIRST, unit.name)) as source:
                    for sample in read_shard(source):
                        reason = repeats.get(int(sample.key))
                        if reason is not None:
                            failures.append(Failure(sample.key, sample.id, sample.source, "filter", reason))
                            continue
                        writer.add(sample)
                        clips.append(facts_of(sample))
        failures.sort(key=lambda failure: failure.key)
        return Record(ShardInfo(unit.name, unit.split, len(clips), 0, ""), unit.rows, failures, clips)

    return commit(out, unit.name, fill)


def forget_tars(out: str, plan: Plan) -> None:
    """Removes the tars of the first pass; their records stay, so that a lost shard can be made again by itself."""
    for unit in plan.units:
        storage.delete(storage.join(out, FIRST, unit.name))
