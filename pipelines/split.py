"""Long videos become clips: a manifest of videos in, a manifest of clips out.

By fixed stride, or at the boundaries of shots. Rows that have `start` and `end` are cut within them. Every row comes
out as one clip or more: what cannot be read stays as it is, and fails with its reason when shards are made.
"""

import itertools
import json
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, Literal

from hbi.infra import storage
from hbi.infra.nodes import require_shared
from hbi.infra.ray_runtime import ray_running
from hbi.infra.scratch import claim_scratch, scratch_swept
from hbi.model.config import FrameSettings
from hbi.pipelines.decoding.clip import DecodeError
from hbi.pipelines.decoding.decoder import Decoder
from hbi.pipelines.manifest import Row, read_manifest, write_manifest
from hbi.pipelines.sharding.workers import on_workers


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
            raise ValueError(f"--by {self.by}: must be stride or shots")
        if not 0 < self.min_seconds <= self.seconds:
            raise ValueError(
                f"--min-seconds {self.min_seconds:g}: must be above 0 and at most --seconds ({self.seconds:g})"
            )


WAVE = 2000
"""Rows given to Ray Data at once."""


def split_manifest(manifest: str, out: str, settings: SplitSettings) -> int:
    """Writes the manifest of clips (JSON Lines); how many there are. Videos are read on every CPU of the cluster.

    Uses the Ray that is running, or starts one and stops it. Raises ValueError as `read_manifest` does, and for a local
    manifest that not all nodes see.
    """
    rows = read_manifest(manifest)
    first = next(rows, None)  # a manifest that will not do is told before Ray starts
    with ray_running():
        require_shared({"MANIFEST": storage.parent(storage.absolute(manifest))})
        with scratch_swept():
            return write_manifest(_split_all(itertools.chain([first] if first else [], rows), settings), out)


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


class Splitter:
    """A worker with a decoder of its own: cuts the video of each row that it gets."""

    def __init__(self, settings: SplitSettings) -> None:
        claim_scratch()
        self.settings = settings
        self.decoder = Decoder(FrameSettings(), settings.clip_timeout, settings.clip_memory << 20)

    def __call__(self, given: dict[str, Any]) -> dict[str, Any]:
        clips = cut(Row(**json.loads(given["row"])), self.decoder, self.settings)
        return {"number": given["number"], "clips": json.dumps([asdict(clip) for clip in clips])}


def _split_all(rows: Iterable[Row], settings: SplitSettings) -> Iterator[Row]:
    """The clips of all rows, in the order of the rows, whichever is ready first."""
    rows = iter(rows)
    while wave := list(itertools.islice(rows, WAVE)):
        # Escaped to ASCII: file names that are not UTF-8 come back as they were.
        given = [
            {"number": number, "row": json.dumps(asdict(row), default=str)} for number, row in enumerate(wave)
        ]
        ready: dict[int, str] = {}
        following = 0
        for answer in on_workers(Splitter, (settings,), given):
            ready[answer["number"]] = answer["clips"]
            while following in ready:
                yield from (Row(**clip) for clip in json.loads(ready.pop(following)))
                following += 1
        assert following == len(wave), f"{len(wave) - following} rows were not cut"


def cut(row: Row, decoder: Decoder, settings: SplitSettings) -> list[Row]:
    """The clips of a row; the row itself where its video cannot be read, or it means none."""
    if row.fault:
        return [row]
    try:
        with tempfile.TemporaryDirectory(prefix="hbi-split-") as folder:
            path = storage.local_copy(row.video, folder)
            duration = decoder.probe(path).duration
            shots = settings.by == "shots"
            cuts = decoder.cuts(path, settings.threshold, settings.min_seconds) if shots else []
            return pieces(row, duration, cuts, settings)
    except (DecodeError, OSError):
        return [row]
