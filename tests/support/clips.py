"""A few small videos and the manifest over them, made in a moment."""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from hbi.pipelines.corpus.render import SIDE, encode


@cache
def video(seed: int, frames: int = 14) -> bytes:
    """An mp4 of noise that drifts, different for each seed."""
    noise = np.random.default_rng(seed).integers(0, 255, (SIDE // 8, SIDE // 8, 3), dtype=np.uint8)
    picture = noise.repeat(8, 0).repeat(8, 1)
    return encode([np.roll(picture, 5 * i, axis=1) for i in range(frames)])


def write_manifest(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as JSON Lines; ASCII, so that any file name survives."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_clips(folder: Path, count: int) -> str:
    """`count` clips over five videos, every fourth one of the test split; the path of their manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(5):
        (folder / f"{seed}.mp4").write_bytes(video(seed))
    rows = [
        {
            "video": f"{i % 5}.mp4",
            "id": f"clip {i}",
            "captions": [f"noise number {i}"],
            "split": "test" if i % 4 == 3 else "train",
        }
        for i in range(count)
    ]
    return write_manifest(folder / "manifest.jsonl", rows)
