"""Which sample goes to which rank in which step.

The order of an epoch is a pure function of the seed and the epoch: shards are permuted, samples are shuffled
inside windows of a few shards, and the ranks get contiguous parts. Where a run stands is therefore a handful of
numbers (`LoaderState`), and the number of loader workers changes nothing.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int


def epoch_order(samples: Sequence[int], seed: int, epoch: int, shuffle_window: int) -> Int[np.ndarray, "n 2"]:
    """Every (shard, index) once: shards permuted, then samples shuffled inside windows of `shuffle_window` shards."""
    generator = np.random.default_rng([seed, epoch])
    shards = generator.permutation(len(samples))
    parts = [np.empty((0, 2), np.int32)]
    for start in range(0, len(shards), shuffle_window):
        ids = [
            np.stack([np.full(samples[s], s), np.arange(samples[s])], 1)
            for s in shards[start : start + shuffle_window]
        ]
        parts.append(generator.permutation(np.concatenate(ids).astype(np.int32)))
    return np.concatenate(parts)


def partition(
    order: Int[np.ndarray, "n 2"], world_size: int, batch: int
) -> list[list[Int[np.ndarray, "_ 2"]]]:
    """[rank][step]: contiguous parts, every rank the same number of steps.

    `batch` is the global batch: no step has more clips, and two steps differ by one at most. In each step the ranks
    differ by one at most, and so they do over the epoch: who has one more goes round. A batch is empty for a rank
    where a step has fewer clips than there are ranks.
    """
    steps = -(-len(order) // batch)
    if not steps:
        return [[] for _ in range(world_size)]
    sizes = np.full(steps, len(order) // steps)
    sizes[: len(order) % steps] += 1
    over = sizes % world_size
    turn = (np.cumsum(over) - over) % world_size
    shares = [sizes // world_size + ((rank - turn) % world_size < over) for rank in range(world_size)]
    ends = np.cumsum([share.sum() for share in shares])
    return [
        np.split(order[end - share.sum() : end], np.cumsum(share)[:-1])
        for share, end in zip(shares, ends, strict=True)
    ]


@dataclass(frozen=True)
class LoaderState:
    """Where a run stands in its data."""

    epoch: int = 0
    """Epochs that are over."""
    done: tuple[tuple[int, int, int], ...] = ()
    """(world size, global batch, steps taken), one for each number of workers that worked at this epoch, in turn."""

    def advanced(self, world_size: int, batch: int) -> "LoaderState":
        """One step later."""
        *before, last = self.done or ((world_size, batch, 0),)
        if last[:2] == (world_size, batch):
            return replace(self, done=(*before, (world_size, batch, last[2] + 1)))
        return replace(self, done=(*self.done, (world_size, batch, 1)))

    def next_epoch(self) -> "LoaderState":
        """The start of the following epoch."""
        return LoaderState(self.epoch + 1)

    def remaining(
        self, order: Int[np.ndarray, "n 2"], world_size: int, batch: int
    ) -> list[list[Int[np.ndarray, "_ 2"]]]:
        """[rank][step] of what the epoch still holds: the same partition going on, or the remainder split anew."""
        for turn, (was_world_size, was_batch, steps) in enumerate(self.done, 1):
            rest = [part[steps:] for part in partition(order, was_world_size, was_batch)]
            if turn == len(self.done) and (was_world_size, was_batch) == (world_size, batch):
                return rest
            order = np.concatenate([order[:0], *(ids for part in rest for ids in part)])
        return partition(order, world_size, batch)


def caption_number(captions: int, seed: int, epoch: int, key: str) -> int:
    """Which caption a clip shows in an epoch: each of them once, in an order of the clip's own, then anew."""
    if captions == 1:
        return 0
    turn, place = divmod(epoch, captions)
    return int(np.random.default_rng([seed, turn, zlib.crc32(key.encode())]).permutation(captions)[place])
