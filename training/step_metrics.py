"""What the ranks measure in each step, summed over them and read late."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from jaxtyping import Bool
from torch import Tensor

from hbi.training.data.batch import Batch
from hbi.training.parallel import Process

logger = logging.getLogger(__name__)
NAMED_CLIPS = 8
"""Clips of a rank that an error names."""
COUNTS = ("clips", "unread", "uncaptioned", "wait_seconds", "stop")


class StepMetrics:
    """The numbers of each step over all ranks, read late enough that no step waits for its own."""

    def __init__(self, process: Process, stop: Callable[[], bool]) -> None:
        """stop: whether this rank was asked for an early end."""
        self.process, self.stop = process, stop
        self.stopping = False
        """Whether any rank was, as of the last step that was read: the same on all of them."""
        self.pending: list[tuple[int, list[str], Tensor, torch.cuda.Event | None]] = []
        self.clips: dict[int, tuple[Batch, Tensor]] = {}
        """This rank's batch, and which of its clips came out of the encoders as numbers, of the steps that are not
        read yet and the last one that is."""
        self.damage: dict[str, tuple[int, str]] = {}
        """Of each shard with samples that this rank could not read: how many, and the first reason."""
        self.unread = self.uncaptioned = 0
        self.sums: Counter[str] = Counter()
        self.counted: Counter[str] = Counter()
        """Steps that had each number: those of a head come with its own steps alone."""

    def add(
        self,
        step: int,
        batch: Batch,
        wait: float,
        losses: dict[str, Tensor],
        norm: Tensor,
        finite: Bool[Tensor, " batch"],
    ) -> None:
        """Adds the ranks' numbers of a step; one collective. finite: which clips the encoders made numbers of."""
        for shard, reason in batch.bad:
            count, first = self.damage.get(shard, (0, reason))
            if not count:
                logger.warning(
                    "%s: passed over: %s (more of this shard is counted, not logged)", shard, reason
                )
            self.damage[shard] = (count + 1, first)
        self.clips[step] = replace(batch, video=batch.video[:0]), finite
        means = torch.stack([*losses.values(), norm.to(losses["loss"].dtype)]) / self.process.world_size
        counts = [len(batch.video), len(batch.bad), batch.uncaptioned, wait, self.stop()]
        counted = torch.tensor(counts, dtype=means.dtype, device=means.device)
        values = self.process.all_reduce(torch.cat([means, counted]))
        names = [*losses, "gradient_norm", *COUNTS]
        if values.device.type == "cuda":
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            host.copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self.pending.append((step, names, host, event))
        else:
            self.pending.append((step, names, values, None))

    def read(self, keep: int = 0) -> Iterator[tuple[int, dict[str, float]]]:
        """(step, its numbers) of all steps but the last `keep`, and takes them into the sums."""
        while len(self.pending) > keep:
            step, names, values, event = self.pending.pop(0)
            if event is not None:
                event.synchronize()
            numbers = dict(zip(names, values.tolist(), strict=True))
            self.stopping |= numbers["stop"] > 0
            self.unread += round(numbers["unread"])
            self.uncaptioned += round(numbers["uncaptioned"])
            self.sums.update(numbers)
            self.counted.update(numbers.keys())
            self.clips = {s: clips for s, clips in self.clips.items() if s >= step}
            yield step, numbers

    def suspects(self, step: int) -> str | None:
        """The clips of this rank that became no numbers in a step, with their shards; where there is none, all."""
        batch, finite = self.clips[step]
        broken = [clip for clip, good in zip(batch.ids, finite.tolist(), strict=True) if not good]
        named = broken or batch.ids
        if not named:
            return None
        more = f" and {len(named) - NAMED_CLIPS} more" if len(named) > NAMED_CLIPS else ""
        what = "clips without finite tokens" if broken else "clips"
        return f"{what} {', '.join(named[:NAMED_CLIPS])}{more} (of {', '.join(batch.shards)})"

    def take(self) -> tuple[dict[str, float], float, float]:
        """Mean losses, clips, and seconds of waiting for data since the last call, over all ranks."""
        sums, counted = self.sums, self.counted
        self.sums, self.counted = Counter(), Counter()
        means = {name: value / counted[name] for name, value in sums.items() if name not in COUNTS}
        return means, sums["clips"], sums["wait_seconds"]
