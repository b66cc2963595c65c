"""What `hbi shard` costs over the barest loop: same decoder, same frames, same JPEGs, same tars, a process per core.

python -m benchmarks.sharding [MANIFEST]

The bare loop decodes in its own processes, started and warm before its clock runs: no child to contain a hang, no
failures, no digests, no records, no Ray. Both run in turn, several times over, so that a busy machine is busy for
both. Without a manifest the made corpus is made first. The start of Ray and its workers is reported apart, as that
of the bare loop's processes is left out; all else counts as ours: the plan, the records, the index.
"""

import hashlib
import multiprocessing
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks.report import report
from hbi.infra.ray_runtime import ray_running
from hbi.pipelines.corpus.make import make_corpus
from hbi.pipelines.decoding.clip import DecodeError, decode_clip
from hbi.pipelines.decoding.worker import encode_jpeg
from hbi.pipelines.sample import Sample
from hbi.pipelines.sharding import run
from hbi.pipelines.sharding.plan import ShardPlan, plan, read_rows
from hbi.pipelines.sharding.settings import ShardSettings
from hbi.pipelines.sharding.shards import ShardWriter
from hbi.pipelines.sharding.summary import Summary


def bare_worker(
    out: str, settings: ShardSettings, shard_plans: "Queue[ShardPlan | None]", ready: Barrier
) -> None:
    """Makes tars until there are no more."""
    encode_jpeg(np.zeros((8, 8, 3), np.uint8), 95)  # what is imported at first use
    import av

    av.logging.set_level(None)
    ready.wait()
    while (shard_plan := shard_plans.get()) is not None:
        with Path(out, shard_plan.name).open("wb") as stream, ShardWriter(stream) as writer:
            for key, row in read_rows(out, shard_plan):
                try:
                    clip = decode_clip(row.video, settings.frame_settings, row.start, row.end)
                except DecodeError:
                    continue
                jpegs = [encode_jpeg(frame, settings.jpeg_quality) for frame in clip.frames]
                writer.add(Sample(
                    key=key, id=row.id, captions=row.captions, qa=row.qa, source=row.video, start=clip.start,
                    end=clip.end, fps=clip.fps, duration=clip.duration, timestamps=clip.timestamps, width=clip.width,
                    height=clip.height, decoder=clip.decoder, truncated=clip.truncated, picture=clip.picture,
                    timing=clip.timing, extra=row.extra, frames=jpegs,
                ))  # fmt: skip


def bare_loop(manifest: str, out: str, settings: ShardSettings, processes: int) -> float:
    """Seconds from the first clip to the last."""
    planned = plan(manifest, out, settings.identity(), settings.samples_per_shard)
    context = multiprocessing.get_context("spawn")
    shard_plans: Queue[ShardPlan | None] = context.Queue()
    ready = context.Barrier(processes + 1)
    workers = [
        context.Process(target=bare_worker, args=(out, settings, shard_plans, ready), daemon=True)
        for _ in range(processes)
    ]
    for worker in workers:
        worker.start()
    for shard_plan in [*planned.shards, *[None] * processes]:
        shard_plans.put(shard_plan)
    ready.wait()
    begin = time.perf_counter()
    for worker in workers:
        worker.join()
    return time.perf_counter() - begin


def digests(out: str) -> dict[str, str]:
    """Of all tars that hold samples."""
    tars = sorted(Path(out).glob("*.tar"))
    return {
        tar.name: hashlib.sha256(tar.read_bytes()).hexdigest() for tar in tars if tar.stat().st_size > 10240
    }


@dataclass(frozen=True)
class Bench:
    """What to measure."""

    manifest: tyro.conf.Positional[str] = ""
    """A manifest; empty: the made corpus."""
    clips: int = 2000
    """Clips of the made corpus."""
    repeats: int = 5
    """How often each side runs."""
    samples_per_shard: int = 100
    """Manifest rows per tar."""

    def run(self) -> dict[str, Any]:
        """Both sides in turn; their medians, and the median of the turns' ratios."""
        settings = ShardSettings(samples_per_shard=self.samples_per_shard)
        cores = len(os.sched_getaffinity(0))
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        with tempfile.TemporaryDirectory(prefix="hbi-bench-") as folder:
            manifest = self.manifest
            if not manifest:
                for _ in make_corpus(folder, self.clips):
                    pass
                manifest = f"{folder}/manifest.jsonl"
            bare, ours = [], []
            summary = Summary("")
            begin = time.perf_counter()
            with ray_running():
                start = time.perf_counter() - begin
                for turn in range(self.repeats):
                    bare.append(bare_loop(manifest, f"{folder}/bare{turn}", settings, cores))
                    begin = time.perf_counter()
                    summary = run.shard(manifest, f"{folder}/ours{turn}", settings)
                    ours.append(time.perf_counter() - begin - summary.start_seconds)
                    start += 0 if turn else summary.start_seconds
                    assert digests(f"{folder}/bare{turn}") == digests(f"{folder}/ours{turn}"), (
                        "the tars differ"
                    )
            turns = [b / o for b, o in zip(bare, ours, strict=True)]
            return {
                "rows": summary.rows,
                "samples": summary.samples,
                "bare_clips_per_second": round(summary.rows / statistics.median(bare), 2),
                "ours_clips_per_second": round(summary.rows / statistics.median(ours), 2),
                "efficiency": round(statistics.median(turns), 3),
                "efficiency_by_turn": [round(turn, 3) for turn in turns],
                "ray_start_seconds": round(start, 2),
                "same_bytes": True,
            }


def main() -> None:
    bench = tyro.cli(Bench, description=__doc__)
    results = bench.run()
    print(
        f"bare {results['bare_clips_per_second']} clips/s, hbi shard {results['ours_clips_per_second']} clips/s:"
        f" efficiency {results['efficiency']} (Ray's start, {results['ray_start_seconds']} s, apart)"
    )
    report(
        "sharding", results, manifest=bench.manifest or f"made corpus of {bench.clips}", repeats=bench.repeats
    )


if __name__ == "__main__":
    main()
