"""The decoders side by side on real clips: speed by codec, and where their frames differ from a full decode.

    HBI_MEDIA=folder python -m benchmarks.decoders

Each decoder gives 12 uniform frames, fitted to 224 pixels, of every clip of the folder's manifest: decord by itself,
PyAV as the pipeline uses it, and `checked`, which is `--decoder decord`. The reference is every frame of a sequential
PyAV decode. A decoder that hangs on a clip is ended and counted as failed.
"""

import io
import json
import os
import sys
import time
from collections import defaultdict
from multiprocessing import TimeoutError as PoolTimeout
from multiprocessing import get_context
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from PIL import Image

from benchmarks.report import report
from hbi.model.frames import FrameSettings, resize_crop, sample_indices

SETTINGS = FrameSettings(num_frames=12, size=224)
THUMB = 56
"""Side of the pictures that are compared."""
SAME = 1.0
"""Mean difference (of 255) up to which two decodes show the same frame: inverse transforms differ in rounding."""


def by_decord(data: bytes, aspect: float) -> list[np.ndarray]:
    """decord as its manual says."""
    import decord

    reader = decord.VideoReader(io.BytesIO(data), ctx=decord.cpu(0), num_threads=1)
    picks = sample_indices(np.arange(len(reader)), SETTINGS)
    frames = [resize_crop(frame, SETTINGS.size, aspect) for frame in reader.get_batch(picks).asnumpy()]
    reader.seek(0)
    return frames


def by_pyav(data: bytes, aspect: float) -> list[np.ndarray]:
    """What the pipeline does."""
    from hbi.pipelines.decoding.clip import decode_clip

    return decode_clip(data, SETTINGS).frames


def by_checked_decord(data: bytes, aspect: float) -> list[np.ndarray]:
    """`--decoder decord`: decord where its answer is PyAV's, PyAV elsewhere."""
    from hbi.pipelines.decoding.clip import decode_clip

    return decode_clip(data, SETTINGS, decoders=("decord",)).frames


def by_reference(data: bytes, aspect: float) -> list[np.ndarray]:
    """Every frame decoded in order, then the choice among them."""
    from hbi.pipelines.decoding.container import opened
    from hbi.pipelines.decoding.picture import Picture

    def frames() -> Any:
        with opened(io.BytesIO(data)) as (container, stream):
            yield from container.decode(stream)

    picks = set(sample_indices(np.arange(sum(1 for _ in frames())), SETTINGS).tolist())
    picture = Picture(SETTINGS.size, aspect)
    for index, frame in enumerate(frames()):
        if index in picks:
            picture.add(frame)
    return picture.frames


DECODERS = {"decord": by_decord, "pyav": by_pyav, "checked": by_checked_decord, "reference": by_reference}


def run(name: str, path: str) -> tuple[float, np.ndarray]:
    """Seconds for a clip's frames, and thumbnails of them, uint8 [frames, THUMB, THUMB]."""
    import av

    data = Path(path).read_bytes()
    with av.open(io.BytesIO(data), "r", metadata_errors="replace") as container:
        stream = container.streams.best("video")
        aspect = float(getattr(stream, "sample_aspect_ratio", None) or 1)
    begin = time.perf_counter()
    frames = DECODERS[name](data, aspect)
    seconds = time.perf_counter() - begin
    small = [
        Image.fromarray(frame).convert("L").resize((THUMB, THUMB), Image.Resampling.BOX) for frame in frames
    ]
    return seconds, np.stack([np.asarray(image) for image in small])


class Worker:
    """One process that decodes, replaced when a decoder hangs or kills it."""

    def __init__(self, limit_seconds: float) -> None:
        self.limit_seconds = limit_seconds
        self.pool: Pool | None = None

    def __call__(self, name: str, path: str) -> tuple[float, np.ndarray] | str:
        if self.pool is None:
            self.pool = get_context("spawn").Pool(1)
            self.pool.apply(_warm)
        try:
            return self.pool.apply_async(run, (name, path)).get(self.limit_seconds)
        except PoolTimeout:
            self.end()
            return f"no end after {self.limit_seconds:g} s"
        except Exception as error:  # whatever a decoder throws is its result
            return f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"

    def end(self) -> None:
        if self.pool is not None:
            self.pool.terminate()
            self.pool.join()
            self.pool = None


def _warm() -> None:
    import av  # noqa: F401
    import decord  # noqa: F401


def main(media: str = "", repeats: int = 2, limit_seconds: float = 60.0, only: str = "") -> None:
    """media: folder with manifest.jsonl, by default the environment's HBI_MEDIA. only: ids that contain it."""
    folder = Path(media or os.environ.get("HBI_MEDIA", ""))
    if not (folder / "manifest.jsonl").is_file():
        print("skipped: needs real clips (set HBI_MEDIA to a folder with manifest.jsonl)")
        return
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    rows = [row for row in rows if only in row["id"]]
    totals: dict[str, dict[str, dict[str, float]]] = defaultdict(
        lambda: {name: {"clips": 0, "failed": 0, "wrong_frames": 0, "seconds": 0.0} for name in DECODERS}
    )
    wrong: dict[str, dict[str, str]] = defaultdict(dict)
    worker = Worker(limit_seconds)
    try:
        for number, row in enumerate(rows, 1):
            print(f"{number}/{len(rows)} {row['id']}", end="\r", file=sys.stderr, flush=True)
            path = str(folder / row["video"])
            reference = worker("reference", path)
            for name in DECODERS:
                results = [worker(name, path) for _ in range(repeats if name != "reference" else 1)]
                total = totals[row["codec"]][name]
                total["clips"] += 1
                found = results[-1]
                if isinstance(found, str):
                    total["failed"] += 1
                    wrong[row["id"]][name] = found
                    continue
                total["seconds"] += min(result[0] for result in results if not isinstance(result, str))
                if not isinstance(reference, str) and (bad := _differing(found[1], reference[1])):
                    total["wrong_frames"] += bad
                    wrong[row["id"]][name] = f"{bad} of {len(reference[1])} frames differ"
    finally:
        worker.end()
    results = {}
    for codec, by_name in sorted(totals.items()):
        for name, total in by_name.items():
            decoded = total["clips"] - total["failed"]
            speed = 12 * decoded / total["seconds"] if total["seconds"] else 0.0
            rounded = {"seconds": round(total["seconds"], 3), "frames_per_second": round(speed, 1)}
            results[f"{codec}_{name}"] = total | rounded
            print(
                f"{codec:12} {name:10} {int(total['clips']):4} clips  {int(total['failed']):3} failed  "
                f"{int(total['wrong_frames']):3} wrong frames  {speed:7.1f} chosen frames/s"
            )
    for id, by_name in wrong.items():
        for name, what in by_name.items():
            print(f"{id}: {name}: {what}")
    report("decoders", {"by_codec": results, "wrong": wrong}, clips=len(rows), repeats=repeats)


def _differing(found: np.ndarray, reference: np.ndarray) -> int:
    """How many of the reference's frames were not given."""
    if len(found) != len(reference):
        return abs(len(found) - len(reference)) or len(reference)
    difference = np.abs(found.astype(np.int16) - reference).mean(axis=(1, 2))
    return int((difference > SAME).sum())


if __name__ == "__main__":
    tyro.cli(main)
