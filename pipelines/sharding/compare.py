"""Which rows repeat earlier ones, over arrays: the arithmetic of `dedup`, without files.

Positions stand for rows: arrays are in the order of the manifest. The first of a kind stays, and only rows that stay
are compared with, so a chain of small differences is not all one.

Hashes are compared by Hamming distance. Of d + 1 bands of their bits, two that differ in at most d bits agree in one
band at least (pigeonhole): only those that share a band are compared, and none is missed. A band has bits of every
frame, so that clips whose first picture is black are not all in one. What is compared is quadratic in the rows that
stay, divided by what a band tells apart; what is rejected costs no more than its own comparison, however many there
are of a kind.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from hbi.pipelines.sharding.filters import HASH_BITS, HASH_FRAMES

Hashes = NDArray[np.uint64]
"""[rows, HASH_FRAMES]: 64 bits each, in the order of `packed`."""
Positions = NDArray[np.int64]

BITS = HASH_BITS * HASH_FRAMES
LEAF = 512
"""So few rows are compared all with all."""
PAIRS = 2**18
"""Pairs that are looked at in one go: what a processor's cache holds."""
CROWDED = 4
"""How much longer a pair takes that is found by a band than one of all with all."""


def packed(hashes: list[str], most: int) -> Hashes:
    """Hashes in hexadecimal as words, their bits dealt out to the bands of a distance of `most` bits."""
    words = np.frombuffer(bytes.fromhex("".join(hashes)), np.uint8).reshape(-1, BITS // 8)
    order = np.concatenate([np.arange(band, BITS, most + 1) for band in range(most + 1)])
    dealt = np.empty_like(words)
    for start in range(0, len(words), PAIRS // BITS):
        some = slice(start, start + PAIRS // BITS)
        dealt[some] = np.packbits(np.unpackbits(words[some], axis=1)[:, order], axis=1)
    return dealt.view(">u8").astype(np.uint64)


def first_of_each(digests: NDArray[np.uint64], rows: Positions) -> Positions:
    """For each row the earliest row with its digest [rows, words]; rows: in any order."""
    order = np.lexsort((rows, *digests.T))
    begins = np.ones(len(rows), bool)
    begins[1:] = (digests[order[1:]] != digests[order[:-1]]).any(1)
    first = np.empty_like(rows)
    first[order] = rows[order[begins]][np.cumsum(begins) - 1]
    return first


def near_duplicates(hashes: Hashes, most: int) -> Positions:
    """For each row the earliest that stays and differs in at most `most` bits; -1 for the rows that stay.

    By halves: what stays of the first decides about the second, and what that leaves is decided within it.
    """
    if len(hashes) <= LEAF:
        return _all_with_all(hashes, most)
    half = len(hashes) // 2
    first = np.empty(len(hashes), np.int64)
    first[:half] = near_duplicates(hashes[:half], most)
    kept = np.flatnonzero(first[:half] < 0)
    like = nearest(hashes[half:], hashes[kept], most)
    first[half:] = np.where(like < 0, -1, kept[like])
    rest = half + np.flatnonzero(like < 0)
    inner = near_duplicates(hashes[rest], most)
    first[rest] = np.where(inner < 0, -1, rest[inner] if len(rest) else rest)
    return first


def _all_with_all(hashes: Hashes, most: int) -> Positions:
    first = np.full(len(hashes), -1, np.int64)
    for row, other in np.argwhere(np.tril(_within(hashes, hashes, most), -1)).tolist():
        if first[row] < 0 and first[other] < 0:
            first[row] = other
    return first


def _within(hashes: Hashes, others: Hashes, most: int) -> NDArray[np.bool_]:
    """Whether each hash differs from each other one in at most `most` bits, [hashes, others]."""
    differ = (np.bitwise_count(hashes[:, None, word] ^ others[:, word]) for word in range(HASH_FRAMES))
    return sum(differ) <= most  # pyright: ignore[reportReturnType, reportOperatorIssue]


def nearest(hashes: Hashes, kept: Hashes, most: int) -> Positions:
    """For each hash the earliest of `kept` that differs in at most `most` bits; -1 where there is none."""
    found = np.full(len(hashes), -1, np.int64)
    if not len(kept):
        return found
    crowded = _crowded(hashes, kept, most)
    for some in np.array_split(np.flatnonzero(crowded), np.count_nonzero(crowded) * len(kept) // PAIRS + 1):
        near = _within(hashes[some], kept, most)
        found[some] = np.where(near.any(1), near.argmax(1), -1)
    others = np.flatnonzero(~crowded)
    found[others] = _nearest_by_bands(hashes[others], kept, most)
    return found


def _crowded(hashes: Hashes, kept: Hashes, most: int) -> NDArray[np.bool_]:
    """Which hashes share bands with so many that comparing them with all is quicker."""
    pairs = np.zeros(len(hashes), np.int64)
    for keys, asked in _bands(hashes, kept, most):
        pairs += np.bincount(keys, minlength=int(asked.max(initial=0)) + 1)[asked]
    return pairs * CROWDED > len(kept)


def _nearest_by_bands(hashes: Hashes, kept: Hashes, most: int) -> Positions:
    none = len(kept)
    found = np.full(len(hashes), none, np.int64)
    for keys, asked in _bands(hashes, kept, most):
        begins = np.concatenate([[0], np.cumsum(np.bincount(keys, minlength=int(asked.max(initial=0)) + 1))])
        order, asking = _sorted(keys), _sorted(asked)
        ours, others, asked = hashes[asking, 0], kept[order, 0], asked[asking]
        for query, place in _pairs(begins[asked], begins[asked + 1]):
            close = np.flatnonzero(np.bitwise_count(ours.take(query) ^ others.take(place)) <= most)
            query, place = asking[query[close]], order[place[close]]
            near = np.bitwise_count(hashes[query] ^ kept[place]).sum(1) <= most
            np.minimum.at(found, query[near], place[near])
    return np.where(found == none, -1, found)


def _bands(hashes: Hashes, kept: Hashes, most: int) -> Iterator[tuple[Positions, Positions]]:
    """The bits of each band of `kept` and of `hashes`, as numbers; no more bits than tell `kept` apart."""
    low = 0
    for band in range(most + 1):
        width = len(range(band, BITS, most + 1))
        bits = min(width, len(kept).bit_length() + 1)
        yield _band(kept, low, bits), _band(hashes, low, bits)
        low += width


def _band(hashes: Hashes, low: int, bits: int) -> Positions:
    """Bits `low` to `low + bits`, the first of a word its highest."""
    word, offset = divmod(low, HASH_BITS)
    high = hashes[:, word] << np.uint64(offset)
    if offset + bits > HASH_BITS:
        high |= hashes[:, word + 1] >> np.uint64(HASH_BITS - offset)
    return (high >> np.uint64(HASH_BITS - bits)).astype(np.int64)


def _sorted(keys: Positions) -> Positions:
    """The order of small numbers; numpy sorts the smallest by their digits."""
    small = len(keys) == 0 or int(keys.max()) < 2**16
    return np.argsort(keys.astype(np.uint16), kind="stable") if small else np.argsort(keys)


def _pairs(begins: Positions, ends: Positions) -> Iterator[tuple[Positions, Positions]]:
    """Every place from `begins[i]` to `ends[i]`, with its i; about PAIRS at a time."""
    counts = ends - begins
    sums = np.concatenate([[0], np.cumsum(counts)])
    start = 0
    while start < len(counts):
        stop = max(start + 1, int(np.searchsorted(sums, sums[start] + PAIRS, "right")) - 1)
        query = np.repeat(np.arange(start, stop), counts[start:stop])
        place = np.arange(sums[start], sums[stop]) + (begins - sums[:-1])[query]
        yield query, place
        start = stop
