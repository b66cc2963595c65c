"""How fast a run is: clips per second, time left, share of time waiting for data, share of the chip's peak."""

import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from hbi.model.config import ModelConfig
from hbi.training.data.loader import Batch
from hbi.training.parallel import Place

T = TypeVar("T")
log = logging.getLogger(__name__)

PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "V100": 125e12,
    "T4": 65e12,
}
"""Dense half-precision peaks of the makers' data sheets, in operations a second."""


def flops_per_clip(model: ModelConfig) -> float:
    """Operations of a training step on one clip with its caption: three times those of the forward pass.

    A block of width w over n tokens costs 2 n (4 w^2 + 2 w m) for its matrices (m the MLP's width) and 4 n^2 w for
    its attention. What checkpointing computes again does not count: it is the model's work, not the machine's.
    """
    towers = model.towers

    def blocks(layers: int, tokens: int, width: int, hidden: int) -> float:
        hidden = hidden or 4 * width
        return layers * (2 * tokens * (4 * width * width + 2 * width * hidden) + 4 * tokens * tokens * width)

    patches = (towers.image_size // towers.patch_size) ** 2
    frame = blocks(towers.vision_layers, patches + 1, towers.vision_width, towers.vision_mlp)
    frame += (
        2 * patches * 3 * towers.patch_size**2 * towers.vision_width + 2 * towers.vision_width * towers.dim
    )
    text = blocks(towers.text_layers, model.words, towers.text_width, towers.text_mlp)
    text += 2 * model.words * towers.text_width * towers.dim
    return 3 * (model.frames * frame + text + blocks(model.temporal_layers, model.frames, towers.dim, 0))


def peak_flops(device: torch.device, bf16: bool = False) -> float:
    """The device's peak by its name, or, where that is not known, the best of three matrix products in the precision
    that is computed in."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, peak in PEAK_FLOPS.items():
            if part in name:
                return peak
    size, best = 1024 if device.type == "cpu" else 8192, 0.0
    matrix = torch.ones(size, size, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    for _ in range(3):
        start = time.perf_counter()
        float((matrix @ matrix)[0, 0])
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def memory_bytes(device: torch.device) -> int:
    """Most memory held so far: on the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def clock(seconds: float) -> str:
    """1:02:03, or 2:03 under an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Meter:
    """Time of the steps since the last reading."""

    def __init__(self, steps_left: int):
        self.steps_left = steps_left
        self.start, self.steps = time.perf_counter(), 0
        self.wait = 0.0
        """Seconds that the current batch was waited for."""

    def waiting(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches, each with the time until it is there."""
        iterator = iter(batches)
        while True:
            start = time.perf_counter()
            batch = next(iterator, None)
            self.wait = time.perf_counter() - start
            if batch is None:
                return
            self.steps += 1
            self.steps_left -= 1
            yield batch

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in here (evaluation, checkpoints) is not the steps'."""
        began = time.perf_counter()
        yield
        self.start += time.perf_counter() - began

    def read(self) -> tuple[float, float]:
        """Seconds since the last reading, and seconds left at this pace."""
        now = time.perf_counter()
        seconds = now - self.start
        left = seconds / max(1, self.steps) * max(0, self.steps_left)
        self.start, self.steps = now, 0
        return seconds, left


COUNTS = ("clips", "unread", "uncaptioned", "wait_seconds")


class Ledger:
    """The numbers of each step over all ranks, read late enough that no step waits for its own."""

    def __init__(self) -> None:
        self.pending: list[tuple[int, list[str], Tensor, torch.cuda.Event | None]] = []
        self.shards: dict[int, list[str]] = {}
        """Shards of this rank's batch, of the steps that are not read yet and the last one that is."""
        self.damage: dict[str, tuple[int, str]] = {}
        """Of each shard with samples that this rank could not read: how many, and the first reason."""
        self.unread = self.uncaptioned = 0
        self.sums: Counter[str] = Counter()
        self.steps = 0

    def add(
        self, step: int, batch: Batch, wait: float, losses: dict[str, Tensor], norm: Tensor, place: Place
    ) -> None:
        """Adds the ranks' numbers of a step; one collective."""
        for shard, reason in batch.bad:
            count, first = self.damage.get(shard, (0, reason))
            if not count:
                log.warning("%s: passed over: %s (more of this shard is counted, not logged)", shard, reason)
            self.damage[shard] = (count + 1, first)
        self.shards[step] = batch.shards
        means = torch.stack([*losses.values(), norm.to(losses["loss"].dtype)]) / place.world
        counts = torch.tensor(
            [len(batch.captions), len(batch.bad), batch.uncaptioned, wait], dtype=means.dtype
        )
        values = place.total(torch.cat([means, counts.to(means.device)]))
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
            self.unread += round(numbers["unread"])
            self.uncaptioned += round(numbers["uncaptioned"])
            self.sums.update(numbers)
            self.steps += 1
            self.shards = {s: shards for s, shards in self.shards.items() if s >= step}
            yield step, numbers

    def take(self) -> tuple[dict[str, float], float, float]:
        """Mean losses, clips, and seconds of waiting for data since the last call, over all ranks."""
        sums, steps = self.sums, self.steps
        self.sums, self.steps = Counter(), 0
        means = {name: value / steps for name, value in sums.items() if name not in COUNTS}
        return means, sums["clips"], sums["wait_seconds"]
