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


def shares(samples: int, world_size: int, batch: int) -> Int[np.ndarray, "ranks steps"]:
    """How many clips each rank has in each step.

    `batch` is the global batch: no step has more clips, and two steps differ by one at most. In each step the ranks
    differ by one at most, and so they do over the epoch: who has one more goes round. A rank has none where a step has
    fewer clips than there are ranks.
    """
    steps = -(-samples // batch)
    sizes = np.full(steps, samples // max(1, steps))
    sizes[: samples % max(1, steps)] += 1
    over = sizes % world_size
    turn = (np.cumsum(over) - over) % world_size
    return sizes // world_size + ((np.arange(world_size)[:, None] - turn) % world_size < over)


def part_of(
    order: Int[np.ndarray, "n 2"], dealt: Int[np.ndarray, "ranks steps"], rank: int
) -> list[Int[np.ndarray, "_ 2"]]:
    """[step]: a rank's contiguous part of the epoch, as `shares` has dealt it."""
    end, mine = dealt[: rank + 1].sum(), dealt[rank]
    return np.split(order[end - mine.sum() : end], np.cumsum(mine)[:-1]) if len(mine) else []


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
        self, order: Int[np.ndarray, "n 2"], rank: int, world_size: int, batch: int
    ) -> list[Int[np.ndarray, "_ 2"]]:
        """[step] of what the epoch still holds for a rank: the same deal going on, or the remainder dealt anew."""
        for turn, (was_world_size, was_batch, steps) in enumerate(self.done, 1):
            dealt = shares(len(order), was_world_size, was_batch)
            if turn == len(self.done) and (was_world_size, was_batch) == (world_size, batch):
                return part_of(order, dealt, rank)[steps:]
            rest = [ids for other in range(was_world_size) for ids in part_of(order, dealt, other)[steps:]]
            order = np.concatenate([order[:0], *rest])
        return part_of(order, shares(len(order), world_size, batch), rank)


def caption_number(captions: int, seed: int, epoch: int, key: str) -> int:
    """Which caption a clip shows in an epoch: each of them once, in an order of the clip's own, then anew."""
    if captions == 1:
        return 0
    turn, place = divmod(epoch, captions)
    return int(np.random.default_rng([seed, turn, zlib.crc32(key.encode())]).permutation(captions)[place])
