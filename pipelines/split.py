"""Long videos become clips: a manifest of videos in, a manifest of clips out.

By fixed stride, or at the boundaries of shots. Rows that have `start` and `end` are cut within them. Every row comes
out as one clip or more: what cannot be read stays as it is, and fails with its reason when shards are made.
"""

import os
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from queue import SimpleQueue
from typing import Literal

from hbi.infra import storage
from hbi.model.frames import FrameSettings
from hbi.pipelines.decoding.clip import DecodeError
from hbi.pipelines.decoding.decoder import Decoder
from hbi.pipelines.manifest import Row, read_manifest, write_manifest


@dataclass(frozen=True)
class SplitSettings:
    """How videos are cut."""

    by: Literal["stride", "shots"] = "stride"
    """`stride`: every `seconds`; `shots`: where the picture changes."""
    seconds: float = 10.0
    """Length of a clip; with `shots` the longest clip, longer shots are cut evenly."""
    min_seconds: float = 1.0
    """Shortest clip: what is left over joins the clip before it; a shot ends no sooner."""
    threshold: float = 27.0
    """How much the picture must change at a boundary (PySceneDetect's content detector, 0 to 255)."""
    clip_timeout: float = 600.0
    """Seconds that one video may take."""
    clip_memory: int = 2048
    """MiB that one video may take."""

    def __post_init__(self) -> None:
        if self.by not in ("stride", "shots"):
            raise ValueError(f"split: by is {self.by!r}, must be stride or shots")
        if not 0 < self.min_seconds <= self.seconds:
            raise ValueError(
                f"split: min_seconds is {self.min_seconds}, must be above 0 and at most seconds ({self.seconds})"
            )


def split_manifest(manifest: str, out: str, settings: SplitSettings, workers: int | None = None) -> int:
    """Writes the manifest of clips (JSON Lines); how many there are. workers: videos read at a time, one per core.

    Raises ValueError as `read_manifest` does.
    """
    return write_manifest(_split_all(read_manifest(manifest), settings, workers or os.cpu_count() or 1), out)


def pieces(row: Row, duration: float, cuts: Iterable[float], settings: SplitSettings) -> list[Row]:
    """The clips of a row, in order and without gaps. cuts: when new shots begin, in seconds (none for a stride)."""
    start = row.start or 0.0
    end = duration if row.end is None else min(row.end, duration)
    least = settings.min_seconds
    edges = [start, *(cut for cut in cuts if start + least <= cut <= end - least), end]
    times: list[tuple[float, float]] = []
    for low, high in pairwise(edges):
        times += list(_strides(low, high, settings))
    if len(times) <= 1:
        return [row]
    digits = max(3, len(str(len(times) - 1)))
    extra = row.extra | {"cut_from": row.id}
    return [
        replace(row, id=f"{row.id}-{number:0{digits}d}", start=low, end=high, extra=extra)
        for number, (low, high) in enumerate(times)
    ]


def _strides(low: float, high: float, settings: SplitSettings) -> Iterator[tuple[float, float]]:
    count = max(1, int((high - low) / settings.seconds + 1e-9))
    if settings.by == "shots":
        # A long shot in equal parts.
        count += (high - low) / settings.seconds - count > 1e-9
        step = (high - low) / count
    else:
        step = settings.seconds
        count += high - low - count * step >= settings.min_seconds
    edges = [round(low + number * step, 6) for number in range(count)] + [round(high, 6)]
    yield from pairwise(edges)


def _split_all(rows: Iterator[Row], settings: SplitSettings, workers: int) -> Iterator[Row]:
    """The clips of all rows, in the order of the rows, `workers` videos at a time."""
    idle: SimpleQueue[Decoder] = SimpleQueue()
    decoders = [
        Decoder(FrameSettings(), settings.clip_timeout, settings.clip_memory << 20) for _ in range(workers)
    ]
    for decoder in decoders:
        idle.put(decoder)

    def cut(row: Row) -> list[Row]:
        decoder = idle.get()
        try:
            return _cut(row, decoder, settings)
        finally:
            idle.put(decoder)

    waiting: deque[Future[list[Row]]] = deque()
    try:
        with ThreadPoolExecutor(workers) as threads:
            for row in rows:
                waiting.append(threads.submit(cut, row))
                if len(waiting) > 2 * workers:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
    finally:
        for decoder in decoders:
            decoder.close()


def _cut(row: Row, decoder: Decoder, settings: SplitSettings) -> list[Row]:
    try:
        with tempfile.TemporaryDirectory(prefix="hbi-split-") as folder:
            path = storage.local_copy(row.video, folder)
            duration = decoder.probe(path).duration
            shots = settings.by == "shots"
            cuts = decoder.cuts(path, settings.threshold, settings.min_seconds) if shots else []
            return pieces(row, duration, cuts, settings)
    except (DecodeError, OSError):
        return [row]
