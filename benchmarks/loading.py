"""How long a training step waits for its data, by loader workers; and how long a checkpoint holds training up.

python -m benchmarks.loading

The step is replaced by sleep of the given length, so that what is measured is the loader. Shards are made of noise.
"""

import io
import json
import tarfile
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.report import report
from benchmarks.step import TOWERS
from hbi.model.config import ModelConfig
from hbi.model.hbi import HBI
from hbi.pipelines.sample import ShardIndex
from hbi.training.checkpoint import Checkpoints, Progress, State, write_checkpoint
from hbi.training.data.loader import Loader
from hbi.training.data.order import LoaderState
from hbi.training.optim import make_optimizer
from hbi.training.parallel import Process
from hbi.training.settings import DataSettings, OptimSettings, TrainConfig
from hbi.training.throughput import Throughput

HERE = Process(0, 1, torch.device("cpu"))


def make_shards(folder: Path, clips: int, frames: int, size: int, per_shard: int = 64) -> ShardIndex:
    """Shards of smooth noise (white noise would be no JPEG that a camera makes)."""
    generator = np.random.default_rng(0)
    shards = []
    for start in range(0, clips, per_shard):
        path = folder / f"train-{start // per_shard:06d}.tar"
        count = min(per_shard, clips - start)
        with tarfile.open(path, "w") as tar:
            for number in range(start, start + count):
                text = {"captions": [f"clip {number}"], "timestamps": list(range(frames))}
                members = {"json": json.dumps(text).encode()}
                for i in range(frames):
                    coarse = Image.fromarray(
                        generator.integers(0, 256, (size // 8, size // 8, 3), dtype=np.uint8)
                    )
                    stream = io.BytesIO()
                    coarse.resize((size, size), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=95)
                    members[f"{i:02d}.jpg"] = stream.getvalue()
                for extension, content in members.items():
                    member = tarfile.TarInfo(f"{number:09d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        shards.append(
            {
                "name": path.name,
                "split": "train",
                "samples": count,
                "bytes": path.stat().st_size,
                "sha256": "",
            }
        )
    settings = {"frames": frames, "size": size}
    (folder / "index.json").write_text(json.dumps({"version": 1, "settings": settings, "shards": shards}))
    return ShardIndex.read(str(folder))


def wait_share(index: ShardIndex, config: TrainConfig, step_seconds: float) -> dict[str, float]:
    """One epoch through the loader, after the first batch: what a step waits, and clips per second."""
    loader = Loader(index, config, HERE)
    meter, waits, clips, first = Throughput(0), [], 0, 0.0
    began = time.perf_counter()
    for number, batch in enumerate(meter.waiting(loader.batches(LoaderState()))):
        if number == 0:
            first, began = meter.wait, time.perf_counter()
        else:
            waits.append(meter.wait)
            clips += len(batch.captions)
        time.sleep(step_seconds)
    seconds = time.perf_counter() - began
    loader.close()
    return {
        "first_batch_seconds": round(first, 3),
        "wait_seconds_per_step": round(sum(waits) / len(waits), 4),
        "wait_share": round(sum(waits) / seconds, 4),
        "clips_per_second": round(clips / seconds, 1),
    }


def checkpoint_seconds(towers: str) -> dict[str, float]:
    """How long training stands still for one checkpoint, and its size."""
    config = TrainConfig(model=ModelConfig(towers=TOWERS[towers]))
    model = HBI(config.model)
    optimizer = make_optimizer(model, OptimSettings())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = State(model, optimizer, None, HERE)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(folder, 1, "val/t2v/R@1", HERE)
        start = time.perf_counter()
        checkpoints.save(
            lambda part: write_checkpoint(part, state, Progress(1), None, config, {"data": ""}), Progress(1)
        )
        seconds = time.perf_counter() - start
        size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    return {"seconds": round(seconds, 3), "mebibytes": round(size / 2**20, 1)}


@dataclass(frozen=True)
class Bench:
    """What to measure: data wait by loader workers, and checkpoint time by towers."""

    clips: int = 512
    """In the made shards."""
    frames: int = 12
    """Of a clip."""
    size: int = 224
    """Of a frame."""
    batch: int = 16
    """Clips in a step."""
    step_seconds: float = 0.2
    """How long a step takes."""
    workers: tuple[int, ...] = (0, 1, 2, 4)
    """Numbers of loader workers; 0 reads in the training process."""
    towers: tuple[str, ...] = ("small", "b32")
    """small, b32 or b16: the models whose checkpoint is written."""

    def run(self) -> None:
        results: dict[str, Any] = {}
        model = ModelConfig(towers=replace(TOWERS["small"], image_size=self.size), frames=self.frames)
        with tempfile.TemporaryDirectory() as folder:
            index = make_shards(Path(folder), self.clips, self.frames, self.size)
            for count in self.workers:
                config = TrainConfig(model=model, data=DataSettings(batch=self.batch, workers=count))
                found = results[f"{count} workers"] = wait_share(index, config, self.step_seconds)
                print(
                    f"{count} loader workers: a step waits {1000 * found['wait_seconds_per_step']:.0f} ms "
                    f"({found['wait_share']:.1%} of the time), {found['clips_per_second']} clips/s",
                    flush=True,
                )
        for name in self.towers:
            found = results[f"checkpoint, {name}"] = checkpoint_seconds(name)
            print(f"checkpoint of {name}: {found['seconds']} s, {found['mebibytes']} MiB", flush=True)
        settings = {name: value for name, value in asdict(self).items() if name not in ("workers", "towers")}
        report("loading", results, **settings)


if __name__ == "__main__":
    import tyro

    tyro.cli(Bench, description=__doc__).run()
