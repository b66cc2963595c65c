"""The loop that `scale` is compared with: which clips repeat earlier ones, by a dict of digests and one for each band.

Tests hold the sharding's own pass equal to it.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import pairwise

from hbi.pipelines.sharding.filters import HASH_BITS, HASH_FRAMES, FilterSettings, Fingerprint


def plain_duplicates(
    fingerprints: Iterable[tuple[int, Fingerprint]], settings: FilterSettings
) -> dict[int, str]:
    """The rows that repeat an earlier one, with the reason. fingerprints: by row number, in the order of rows.

    The first of a kind stays. Only rows that stay are compared with, so a chain of small differences is not all one.
    """
    repeated: dict[int, str] = {}
    same: dict[str, int] = {}
    near = _Near(settings.near) if settings.near is not None else None
    for number, found in fingerprints:
        if settings.same:
            first = same.setdefault(found.digest, number)
            if first != number:
                repeated[number] = f"the same bytes and times as row {first + 1}"
                continue
        if near is not None:
            like = near.find(int(found.hash, 16))
            if like is not None:
                repeated[number] = f"nearly the same pictures as row {like + 1}"
                continue
            near.add(int(found.hash, 16), number)
    return repeated


class _Near:
    """Hashes that can be searched by Hamming distance without comparing all with all.

    Of d + 1 bands of the bits, two hashes that differ in at most d bits agree in one band at least (pigeonhole): only
    those that share a band are compared, and none is missed.
    """

    def __init__(self, bits: int) -> None:
        import numpy as np

        self.most = bits * HASH_FRAMES
        edges = np.linspace(0, HASH_BITS * HASH_FRAMES, self.most + 2).round().astype(int).tolist()
        self.bands = [(low, (1 << (high - low)) - 1) for low, high in pairwise(edges)]
        self.rows: list[dict[int, list[tuple[int, int]]]] = [defaultdict(list) for _ in self.bands]

    def find(self, hash: int) -> int | None:
        """The earliest row that is near enough; None if there is none."""
        return min(
            (row for row, other in self._candidates(hash) if (hash ^ other).bit_count() <= self.most),
            default=None,
        )

    def add(self, hash: int, row: int) -> None:
        for (shift, mask), rows in zip(self.bands, self.rows, strict=True):
            rows[hash >> shift & mask].append((row, hash))

    def _candidates(self, hash: int) -> Iterator[tuple[int, int]]:
        for (shift, mask), rows in zip(self.bands, self.rows, strict=True):
            yield from rows.get(hash >> shift & mask, ())
