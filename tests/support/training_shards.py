"""Shards and settings for the training tests: tiny clips whose captions tell them apart, without a video decoder."""

import hashlib
import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hbi.model.config import ModelConfig, TowerConfig
from hbi.pipelines.sample import Sample, ShardIndex, members_of
from hbi.training.settings import (
    CheckpointSettings,
    ComputeSettings,
    DataSettings,
    OptimSettings,
    TrackingSettings,
    TrainConfig,
)

FRAMES, SIZE = 4, 16
COLOURS = ("red", "green", "blue", "grey")


def asked(number: int) -> list[dict[str, str]]:
    """What may be asked of a clip, and the answers."""
    colour, way = COLOURS[number % 4], ("brighter", "darker")[number // 4 % 2]
    return [
        {"question": "what colour is it?", "answer": colour},
        {"question": "how does it change?", "answer": way},
        {"question": "is it red?", "answer": "yes" if colour == "red" else "no"},
    ]


def sample(number: int, frames: int = FRAMES, size: int = SIZE, captions: list[str] | None = None) -> Sample:
    """A clip of one colour that gets brighter or darker, with two captions that say so."""
    colour, way = COLOURS[number % 4], ("brighter", "darker")[number // 4 % 2]
    levels = np.linspace(60, 240, frames)[:: 1 if way == "brighter" else -1]
    channels = {"red": [1, 0, 0], "green": [0, 1, 0], "blue": [0, 0, 1], "grey": [1, 1, 1]}[colour]
    jpegs = []
    for level in levels:
        image = np.broadcast_to(np.array(channels) * level + number % 7, (size, size, 3)).astype(np.uint8)
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, "JPEG", quality=90)
        jpegs.append(stream.getvalue())
    if captions is None:
        captions = [f"{colour} gets {way} {number}", f"clip {number} turns {way}, it is {colour}"]
    times = [float(i) for i in range(frames)]
    return Sample(
        f"{number:09d}", f"clip-{number}", captions, [], f"{number}.mp4", 0.0, 4.0, 1.0, 4.0, times, size, size, "made",
        frames=jpegs,
    )  # fmt: skip


def write_shard(path: Path, samples: list[Sample]) -> dict[str, Any]:
    with tarfile.open(path, "w") as tar:
        for made in samples:
            for name, content in members_of(made):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    split = path.name.rsplit("-", 1)[0]
    return {
        "name": path.name,
        "split": split,
        "samples": len(samples),
        "bytes": len(content),
        "sha256": digest,
    }


def make_shards(
    folder: Path, frames: int = FRAMES, size: int = SIZE, questions: bool = False, **splits: list[int]
) -> ShardIndex:
    """A shard folder: `train=[5, 3]` is two shards of five and three clips; with their questions, if asked for."""
    folder.mkdir(parents=True, exist_ok=True)
    shards, number = [], 0
    for split, counts in splits.items():
        for i, count in enumerate(counts):
            samples = [sample(number + k, frames, size) for k in range(count)]
            if questions:
                samples = [replace(made, qa=asked(number + k)) for k, made in enumerate(samples)]
            shards.append(write_shard(folder / f"{split}-{i:06d}.tar", samples))
            number += count
    settings = {"frames": frames, "size": size, "choice": "uniform", "fps": 1.0}
    index = {"version": 1, "settings": settings, "samples": number, "failures": 0, "shards": shards}
    (folder / "index.json").write_text(json.dumps(index))
    return ShardIndex.read(str(folder))


def tiny_model(**changes: Any) -> ModelConfig:
    towers = TowerConfig(
        image_size=SIZE, patch_size=8, vision_width=16, vision_layers=1, vision_heads=2,
        text_width=16, text_layers=1, text_heads=2, vocab_size=300, context=12, dim=16,
    )  # fmt: skip
    return replace(
        ModelConfig(towers=towers, words=12, frames=FRAMES, temporal_layers=1, predictor_width=4), **changes
    )


def tiny_run(**data: Any) -> TrainConfig:
    """Two epochs of a model that trains in a second."""
    return TrainConfig(
        name="tiny",
        model=tiny_model(),
        data=DataSettings(**{"batch": 8, "shuffle_window": 2, "workers": 0, **data}),
        optim=OptimSettings(lr=3e-3, backbone_lr=3e-3, epochs=2),
        compute=ComputeSettings(bf16=False),
        checkpoint=CheckpointSettings(every_steps=3),
        tracking=TrackingSettings(enabled=False, every_steps=1),
    )
