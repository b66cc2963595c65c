"""Clips that repeat earlier ones are left out: exact and near duplicates over the whole corpus.

Which clip is the first of its kind is known only when all have been seen. So there are two passes: first every shard
is made in `OUT/.first`, with the fingerprint of each sample in its record; then the fingerprints are compared in the
order of the manifest, and each shard is copied to its place without the samples that repeat an earlier one. Workers
do not matter to either.

Fingerprints are compared in parts, by tasks that pass each other files in `OUT/.first/.compared`: no process holds
more than a part, and a copy reads what concerns its own rows. The files are the same whenever they are written, and a
run that was killed writes them anew.
"""

import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import IO, Any

import numpy as np
from tqdm import tqdm

from hbi.infra import storage
from hbi.pipelines.sample import ShardInfo, read_shard
from hbi.pipelines.sharding.compare import Positions, first_of_each, near_duplicates, nearest, packed
from hbi.pipelines.sharding.filters import HASH_FRAMES, FilterSettings
from hbi.pipelines.sharding.plan import Plan, ShardPlan, Slice, slices
from hbi.pipelines.sharding.records import Failure, ShardManifest, read_records, sizes_of, unfinished
from hbi.pipelines.sharding.sections import READERS, Records, read_section, read_sections, write_sections
from hbi.pipelines.sharding.shards import ShardWriter, commit, stats_of
from hbi.pipelines.sharding.tasks import on_tasks

FIRST = ".first"
COMPARED = ".compared"
PART_ROWS, PARTS = 2**18, 64
"""A part has so many rows at least, and there are so many parts at most."""
SECTIONS = 64
"""Of the repeats of a part: a copy reads those of its rows."""
DIGEST = np.dtype([("row", "<i8"), ("digest", "<u8", (4,))])
HASH = np.dtype([("row", "<i8"), ("hash", "<u8", (HASH_FRAMES,))])
REPEAT = np.dtype([("row", "<i8"), ("first", "<i8"), ("near", "?")])
NONE = np.iinfo(np.int64).max
"""Instead of the number of an earlier row."""


@dataclass(frozen=True)
class Comparison:
    """The fingerprints of a first pass, compared; it travels to the workers, who say the rest."""

    out: str
    """The shard folder."""
    filters: FilterSettings
    slices: tuple[str, ...]
    """Names of the slices of its plan."""
    parts: int
    """Parts of the fingerprints: by their digests, and by their rows."""
    part_rows: int
    """Rows of the manifest in a part of the latter."""

    def reasons(self, rows: list[int]) -> dict[int, str]:
        """Why rows are left out, by their numbers: those of `rows` that repeat an earlier one."""
        wanted = np.array(rows, np.int64)
        found = [
            read_section(self._place("repeats", part), REPEAT, section, SECTIONS)
            for part, section in sorted({(row // self.part_rows, self._section(row)) for row in rows})
        ]
        texts = "the same bytes and times as row", "nearly the same pictures as row"
        return {
            row: f"{texts[near]} {first + 1}"
            for repeats in found
            for row, first, near in repeats[np.isin(repeats["row"], wanted)].tolist()
        }

    def scatter(self, shards: Slice) -> None:
        """The fingerprints of a slice, sorted into parts."""
        rows: list[int] = []
        digests: list[str] = []
        hashes: list[str] = []
        for name, record in read_records(
            storage.join(self.out, FIRST), [plan.name for plan in shards.shards]
        ):
            assert record is not None, f"{name} was not made"
            for row, found in record.fingerprints:
                rows.append(row)
                digests.append(found.digest)
                hashes.append(found.hash)
        if self.filters.same:
            records = np.empty(len(rows), DIGEST)
            records["row"] = rows
            records["digest"] = np.frombuffer(bytes.fromhex("".join(digests)), "<u8").reshape(-1, 4)
            part = (records["digest"][:, 0] % np.uint64(self.parts)).astype(np.int64)
            write_sections(self._place("digests", shards.name), records, part, self.parts)
        if self.filters.near is not None:
            records = np.empty(len(rows), HASH)
            records["row"] = rows
            records["hash"] = packed(hashes, self._most)
            part = records["row"] // self.part_rows
            write_sections(self._place("hashes", shards.name), records, part, self.parts)

    def same(self, part: int) -> None:
        """The rows of a part, by digest, that have an earlier row's, sorted into parts by row."""
        found = read_sections(map(partial(self._place, "digests"), self.slices), DIGEST, part, self.parts)
        repeats = _repeats(found["row"], first_of_each(found["digest"], found["row"]), near=False)
        write_sections(self._place("same", part), repeats, repeats["row"] // self.part_rows, self.parts)

    def gather(self, part: int) -> None:
        """What is left of the rows of a part, in their order."""
        repeats = self._same(part)
        if self.filters.near is None:
            self._finish(part, repeats)
            return
        found = read_sections(map(partial(self._place, "hashes"), self.slices), HASH, part, self.parts)
        found = found[np.isin(found["row"], repeats["row"], invert=True)]
        self._write("left", part, found[np.argsort(found["row"])])

    def look_back(self, pair: tuple[int, int]) -> Positions:
        """For each row left of a part the earliest row near it that stays of an earlier part; NONE where none is."""
        part, earlier = pair
        left, kept = self._read("left", part), self._read("kept", earlier)
        like = nearest(left["hash"], kept["hash"], self._most)
        return np.append(kept["row"], NONE)[like]

    def settle(self, known: tuple[int, Positions | None]) -> None:
        """Decides about the rows left of a part, given the earliest row near each that stays of earlier parts."""
        part, found = known
        left = self._read("left", part)
        first = np.full(len(left), NONE) if found is None else found.copy()
        alone = np.flatnonzero(first == NONE)
        like = near_duplicates(left["hash"][alone], self._most)
        self._write("kept", part, left[alone[like < 0]])
        first[alone] = np.append(left["row"][alone], NONE)[like]
        self._finish(part, np.concatenate([self._same(part), _repeats(left["row"], first, near=True)]))

    @property
    def _most(self) -> int:
        """Bits in which near hashes may differ."""
        assert self.filters.near is not None
        return self.filters.near * HASH_FRAMES

    def _same(self, part: int) -> Records:
        places = [self._place("same", number) for number in range(self.parts)] if self.filters.same else []
        return read_sections(places, REPEAT, part, self.parts)

    def _finish(self, part: int, repeats: Records) -> None:
        write_sections(self._place("repeats", part), repeats, self._section(repeats["row"]), SECTIONS)

    def _section(self, row: Any) -> Any:
        return row % self.part_rows * SECTIONS // self.part_rows

    def _write(self, kind: str, part: int, records: Records) -> None:
        write_sections(self._place(kind, part), records, np.zeros(len(records), np.int64), 1)

    def _read(self, kind: str, part: int) -> Records:
        return read_section(self._place(kind, part), HASH, 0, 1)

    def _place(self, kind: str, name: str | int) -> str:
        return storage.join(self.out, FIRST, COMPARED, kind, str(name))


def _repeats(rows: Positions, first: Positions, near: bool) -> Records:
    """The rows that have an earlier one."""
    again = (first != rows) & (first != NONE)
    repeats = np.empty(np.count_nonzero(again), REPEAT)
    repeats["row"], repeats["first"], repeats["near"] = rows[again], first[again], near
    return repeats


def find_duplicates(
    out: str, plan: Plan, filters: FilterSettings, spread: bool = True, part_rows: int = PART_ROWS
) -> Comparison:
    """Compares the fingerprints of a first pass that is whole: in this process if they are one part, else on Ray.

    spread: False for this process alone. part_rows: the least rows of a part. Raises what storage raises; ShardError
    where Ray fails.
    """
    of_plan = slices(plan.shards)
    rows = max(part_rows, -(-plan.rows // PARTS))
    parts = -(-plan.rows // rows)
    comparison = Comparison(out, filters, tuple(found.name for found in of_plan), parts, rows)
    near = filters.near is not None
    steps = len(of_plan) + parts * (filters.same + 1) + near * parts * (parts + 1) // 2
    with tqdm(total=steps, unit="step", desc="duplicates", leave=False, mininterval=1, disable=None) as bar:

        def each(work: Any, items: Iterable[Any]) -> Iterator[Any]:
            for found in on_tasks(work, items, spread and parts > 1):
                bar.update()
                yield found

        list(each(comparison.scatter, of_plan))
        if filters.same:
            list(each(comparison.same, range(parts)))
        list(each(comparison.gather, range(parts)))
        for part in range(parts) if near else ():
            found: Positions | None = None
            for like in each(comparison.look_back, ((part, earlier) for earlier in range(part))):
                found = like if found is None else np.minimum(found, like)
            list(each(comparison.settle, [(part, found)]))
    return comparison


def lacking(out: str, plan: Plan, missing: list[ShardPlan], spread: bool) -> list[ShardPlan]:
    """The shards of which the first pass lacks what is needed to make the `missing` ones of `out`, in order.

    Of the others only the fingerprints are needed, which lie in their records.
    """
    wanted = {shard_plan.name for shard_plan in missing}
    others = [shard_plan for shard_plan in plan.shards if shard_plan.name not in wanted]
    asked = [(some, True) for some in slices(missing)] + [(some, False) for some in slices(others)]
    found = on_tasks(partial(_lacking, storage.join(out, FIRST)), asked, spread)
    return [shard_plan for some in found for shard_plan in some]


def _lacking(first: str, asked: tuple[Slice, bool]) -> list[ShardPlan]:
    shards, tars = asked
    return [shard_plan for shard_plan, record in unfinished(first, shards.shards, tars) if record is None]


def without_duplicates(out: str, shard_plan: ShardPlan, comparison: Comparison) -> ShardManifest:
    """Copies a shard of the first pass to its place, without the samples that repeat earlier ones."""
    ((_, first),) = read_records(storage.join(out, FIRST), [shard_plan.name])
    assert first is not None, f"{shard_plan.name} was not made"

    def fill(stream: IO[bytes], _: str) -> ShardManifest:
        reasons = comparison.reasons([row for row, _ in first.fingerprints])
        failures = list(first.failures)
        clips = []
        with ShardWriter(stream) as writer:
            if first.shard.samples:
                with storage.open_file(storage.join(out, FIRST, shard_plan.name)) as source:
                    for sample in read_shard(source):
                        reason = reasons.get(int(sample.key))
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


def delete_first_pass(out: str, plan: Plan, spread: bool = False) -> None:
    """Removes the tars of the first pass; their records stay, so that a lost shard can be made again by itself."""
    first = storage.join(out, FIRST)
    list(on_tasks(partial(_delete_tars, first), slices(plan.shards), spread))
    compared = storage.join(first, COMPARED)
    _delete(storage.list_files(compared, recursive=True))
    if not storage.is_remote(out):
        shutil.rmtree(compared, ignore_errors=True)


def _delete_tars(first: str, shards: Slice) -> None:
    _delete(sizes_of(first, [shard_plan.name for shard_plan in shards.shards]))


def _delete(places: Iterable[str]) -> None:
    with ThreadPoolExecutor(READERS) as workers:
        list(workers.map(storage.delete, places))
