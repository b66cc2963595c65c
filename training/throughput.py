"""How fast a run is: clips per second, time left, share of time waiting for data, share of the chip's peak."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode

from hbi.model.config import ModelConfig
from hbi.model.hbi import HBI

T = TypeVar("T")

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


@lru_cache(maxsize=8)
def flops_per_clip(config: ModelConfig) -> float:
    """Operations of a training step on one clip with its caption: three times those of the forward pass.

    Counted by torch on tensors without content: the towers and the levels. The predictors are small beside them. What
    checkpointing computes again does not count: it is the model's work, not the machine's. Nor does the loss, which
    grows with the batch.
    """
    clips, size = 2, config.towers.image_size
    with torch.device("meta"):
        model = HBI(config)
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        text_mask = torch.ones(clips, config.words, dtype=torch.bool)
        words, _ = model.encode_text(torch.ones(clips, config.words, dtype=torch.int64), text_mask)
        model.text_levels(words, text_mask)
        video_mask = torch.ones(clips, config.frames, dtype=torch.bool)
        video = torch.zeros(clips, config.frames, size, size, 3, dtype=torch.uint8)
        model.video_levels(model.encode_video(video, video_mask), video_mask)
    return 3 * counter.get_total_flops() / clips


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


class Throughput:
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
