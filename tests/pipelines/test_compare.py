"""Repeats are found as by a plain loop over all rows, however they are cut into halves, bands, parts and tasks."""

import hashlib
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.scale_loop import plain_duplicates
from hbi.infra import storage
from hbi.pipelines.sample import ShardInfo
from hbi.pipelines.sharding import compare
from hbi.pipelines.sharding.dedup import FIRST, find_duplicates
from hbi.pipelines.sharding.filters import FilterSettings, Fingerprint
from hbi.pipelines.sharding.plan import Plan, ShardPlan
from hbi.pipelines.sharding.records import ShardManifest, record_path

RNG = np.random.default_rng(0)
SCENES = [int.from_bytes(RNG.bytes(24)) for _ in range(6)]
Drawn = list[tuple[int, set[int], int]]
DRAWN = st.lists(
    st.tuples(st.integers(0, 5), st.sets(st.integers(0, 191), max_size=9), st.integers(0, 12)), max_size=40
)
"""Of each row: a scene, the bits that differ from it, a file."""


def fingerprints_of(drawn: Drawn) -> list[Fingerprint]:
    """Clusters; and chains, since flipped bits of one row may be those of the next and some more."""
    hashes = [SCENES[scene] ^ sum(1 << bit for bit in flipped) for scene, flipped, _ in drawn]
    digests = [hashlib.sha256(bytes([file])).hexdigest() for *_, file in drawn]
    return [Fingerprint(digest, f"{hash:048x}") for digest, hash in zip(digests, hashes, strict=True)]


def all_with_all(found: list[Fingerprint], filters: FilterSettings) -> dict[int, str]:
    """The rule, in so many words."""
    reasons: dict[int, str] = {}
    kept: list[int] = []
    for row, mine in enumerate(found):
        same = [other for other in range(row) if found[other].digest == mine.digest]
        if filters.same and same:
            reasons[row] = f"the same bytes and times as row {min(same) + 1}"
            continue
        if filters.near is not None:
            most = 3 * filters.near
            hashes = {other: int(found[other].hash, 16) ^ int(mine.hash, 16) for other in kept}
            near = [other for other, differ in hashes.items() if differ.bit_count() <= most]
            if near:
                reasons[row] = f"nearly the same pictures as row {min(near) + 1}"
                continue
        kept.append(row)
    return reasons


def write_first_pass(out: Path, found: list[Fingerprint], per_shard: int) -> Plan:
    """The records of a first pass: rows in two splits, and between them rows that failed."""
    splits: dict[str, list[tuple[int, Fingerprint]]] = {"train": [], "test": []}
    for number, fingerprint in enumerate(found):
        splits["test" if number % 3 == 1 else "train"].append((2 * number, fingerprint))
    plans = []
    for split, rows in splits.items():
        for start in range(0, len(rows), per_shard):
            some, name = rows[start : start + per_shard], f"{split}-{start // per_shard:06d}.tar"
            plans.append(ShardPlan(name, split, len(some), "", 0, 0))
            record = ShardManifest(ShardInfo(name, split, len(some), 1, ""), len(some), [], [], some)
            storage.write_bytes(record_path(str(out / FIRST), name), record.json(), durable=False)
    return Plan({}, 2 * len(found), plans)


@settings(deadline=None, max_examples=60)  # a busy machine is slow
@given(DRAWN, st.booleans(), st.none() | st.integers(0, 3), st.sampled_from([3, 16, 1000]))
def test_the_pass_finds_what_comparing_all_with_all_does(
    drawn: Drawn, same: bool, near: int | None, part_rows: int
) -> None:
    filters, found = FilterSettings(same=same, near=near), fingerprints_of(drawn)
    wanted = all_with_all(found, filters)
    assert plain_duplicates(enumerate(found), filters) == wanted
    if not filters.compares:
        return
    with tempfile.TemporaryDirectory() as folder:
        planned = write_first_pass(Path(folder), found, 4)
        comparison = find_duplicates(folder, planned, filters, spread=False, part_rows=part_rows)
        rows = [2 * number for number in range(len(found))]
        reasons = comparison.reasons(rows)
        assert {row: text for row in rows for _, text in comparison.reasons([row]).items()} == reasons
    # Rows have other numbers there: every second one failed.
    assert reasons == {
        2 * row: f"{text.rpartition(' ')[0]} {2 * int(text.rpartition(' ')[2]) - 1}"
        for row, text in wanted.items()
    }


@pytest.mark.parametrize("crowded", [0, 4, 10**9])
@pytest.mark.parametrize("near", [0, 1, 4, 16])
def test_halves_bands_and_crowds_change_nothing(
    near: int, crowded: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By bands alone, all with all alone, and each where it is quicker; in small pieces."""
    monkeypatch.setattr(compare, "CROWDED", crowded)
    monkeypatch.setattr(compare, "LEAF", 5)
    monkeypatch.setattr(compare, "PAIRS", 200)
    rng = np.random.default_rng(near)
    hashes = [int.from_bytes(rng.bytes(24)) for _ in range(60)]
    for _ in range(140):
        flips = sum(1 << int(bit) for bit in rng.choice(192, rng.integers(0, 5 * near + 2), replace=False))
        hashes.append(hashes[rng.integers(0, len(hashes))] ^ flips)
    order = rng.permutation(len(hashes))
    found = [Fingerprint("", f"{hashes[place]:048x}") for place in order]
    wanted = all_with_all(found, FilterSettings(near=near))
    first = compare.near_duplicates(compare.packed([one.hash for one in found], 3 * near), 3 * near)
    assert {
        row: f"nearly the same pictures as row {like + 1}"
        for row, like in enumerate(first.tolist())
        if like >= 0
    } == wanted
    assert len(wanted) > 20


def test_a_clip_that_is_there_a_million_times_costs_a_comparison_each() -> None:
    """Copies with a little noise: were all pairs written down, they would not fit into memory."""
    rng = np.random.default_rng(0)
    hashes = np.tile(rng.integers(0, 2**64, (1, 3), dtype=np.uint64), (200_000, 1))
    for _ in range(3):
        hashes[np.arange(1, 200_000), rng.integers(0, 3, 199_999)] ^= np.uint64(1) << rng.integers(
            0, 64, 199_999
        ).astype(np.uint64)
    first = compare.near_duplicates(hashes, 12)
    assert first[0] == -1 and (first[1:] == 0).all()
