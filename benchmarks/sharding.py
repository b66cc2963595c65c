"""`hbi shard` beside two loops that make the same tars of the same clips with a process per core.

python -m benchmarks.sharding [MANIFEST]

The user's loop is what one writes in an afternoon: plain PyAV, decode up to the last frame wanted, resize, JPEG, tar.
It turns nothing upright, says no times and ends with its first hang. The bare loop is ours without its walls: same
decoder, same bytes, but no child to contain a hang, no failures, no digests, no records, no Ray. The loops' processes
are started and warm before their clocks run. All take turns, so that a busy machine is busy for all; on one, read the
CPU seconds, which are those of all processes of a side. Without a manifest the made corpus is made first. The start
of Ray and its workers (a run of one clip) is reported apart, as that of the loops' processes is left out; all else
counts as ours: the plan, the records, the index.

--video2dataset PYTHON adds video2dataset on the first hundred clips, by an interpreter that has it. Its pins exclude
ours, and it calls ffmpeg: `pip install video2dataset 'pyarrow<20' imageio-ffmpeg` in a venv of its own, and ffmpeg's
link beside that Python. It makes no JPEGs of so many frames: it is asked for videos of that size and as many frames.
"""

import hashlib
import io
import multiprocessing
import os
import statistics
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from PIL import Image

from benchmarks.report import report
from benchmarks.sharding_others import user_tar, video2dataset_seconds
from hbi.infra.ray_runtime import ray_running
from hbi.pipelines.corpus.make import make_corpus
from hbi.pipelines.decoding.clip import DecodeError, decode_clip
from hbi.pipelines.decoding.worker import encode_jpeg
from hbi.pipelines.manifest import read_manifest, write_manifest
from hbi.pipelines.sample import Sample
from hbi.pipelines.sharding import run
from hbi.pipelines.sharding.plan import ShardPlan, plan, read_rows
from hbi.pipelines.sharding.settings import ShardSettings
from hbi.pipelines.sharding.shards import ShardWriter
from hbi.pipelines.sharding.summary import Summary

SAME = 4.0
"""Mean difference (of 255) up to which two JPEGs show the same frame."""
Work = Callable[[str, str, ShardSettings, ShardPlan], None]
"""Makes the tar of a plan. Arguments: where the plan lies, where the tar goes, settings, the plan."""


# --- The user's loop ------------------------------------------------------------------------------------------------


def user_work(planned: str, out: str, settings: ShardSettings, shard_plan: ShardPlan) -> None:
    """The rows of a plan to the user's loop."""
    rows = [(key, row.video, row.captions) for key, row in read_rows(planned, shard_plan)]
    user_tar(f"{out}/{shard_plan.name}", rows, settings.frames, settings.size, settings.jpeg_quality)


# --- The bare loop --------------------------------------------------------------------------------------------------


def bare_work(planned: str, out: str, settings: ShardSettings, shard_plan: ShardPlan) -> None:
    """The rows of a plan, decoded in this process."""
    with Path(out, shard_plan.name).open("wb") as stream, ShardWriter(stream) as writer:
        for key, row in read_rows(planned, shard_plan):
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


def worker(
    work: Work, out: str, settings: ShardSettings, shard_plans: "Queue[ShardPlan | None]", ready: Barrier
) -> None:
    """Makes tars until there are no more."""
    encode_jpeg(np.zeros((8, 8, 3), np.uint8), 95)  # what is imported at first use
    import av

    av.logging.set_level(None)
    ready.wait()
    while (shard_plan := shard_plans.get()) is not None:
        work(out, out, settings, shard_plan)


def time_loop(work: Work, manifest: str, out: str, settings: ShardSettings, processes: int) -> float:
    """Seconds of a loop from the first clip to the last."""
    planned = plan(manifest, out, settings.identity(), settings.samples_per_shard)
    context = multiprocessing.get_context("spawn")
    shard_plans: Queue[ShardPlan | None] = context.Queue()
    ready = context.Barrier(processes + 1)
    workers = [
        context.Process(target=worker, args=(work, out, settings, shard_plans, ready), daemon=True)
        for _ in range(processes)
    ]
    for process in workers:
        process.start()
    for shard_plan in [*planned.shards, *[None] * processes]:
        shard_plans.put(shard_plan)
    ready.wait()
    begin = time.perf_counter()
    for process in workers:
        process.join()
    return time.perf_counter() - begin


# --- All beside each other ------------------------------------------------------------------------------------------


class Cpu:
    """CPU seconds of this process and all below it, looked at five times a second: `with Cpu() as cpu`."""

    def __enter__(self) -> "Cpu":
        self._seen: dict[int, float] = {}
        self._look()
        self._begin, self._over = dict(self._seen), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._look()
        self.seconds = sum(self._seen.values()) - sum(self._begin.values())

    def _watch(self) -> None:
        while not self._over.wait(0.2):
            self._look()

    def _look(self) -> None:
        parents, taken = {}, {}
        for process in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = process.read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue  # it ended
            pid = int(process.parent.name)
            parents[pid], taken[pid] = (
                int(fields[1]),
                (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"),
            )
        for pid, seconds in taken.items():
            above: int | None = pid
            while above not in (None, os.getpid()):
                above = parents.get(above)
            if above is not None:
                self._seen[pid] = seconds


def digests(out: str) -> dict[str, str]:
    """Of all tars that hold samples."""
    tars = sorted(Path(out).glob("*.tar"))
    return {
        tar.name: hashlib.sha256(tar.read_bytes()).hexdigest() for tar in tars if tar.stat().st_size > 10240
    }


def frames_of(out: str) -> dict[str, list[bytes]]:
    """The JPEGs of each sample in a folder of tars, by its key."""
    found: dict[str, list[bytes]] = {}
    for path in sorted(Path(out).glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".jpg") and (content := tar.extractfile(member)):
                    found.setdefault(member.name.split(".")[0], []).append(content.read())
    return found


def same_frames(theirs: str, ours: str) -> int:
    """Of how many of our samples the other tars hold the same frames, as far as one sees."""
    other = frames_of(theirs)
    return sum(
        len(jpegs) == len(other.get(key, []))
        and all(difference(*pair) < SAME for pair in zip(jpegs, other[key], strict=True))
        for key, jpegs in frames_of(ours).items()
    )


def difference(one: bytes, two: bytes) -> float:
    """Mean difference of two JPEGs, of 255."""
    first, second = (np.asarray(Image.open(io.BytesIO(jpeg)), dtype=np.int16) for jpeg in (one, two))
    return float(np.abs(first - second).mean()) if first.shape == second.shape else 255.0


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

    video2dataset: str = ""
    """A Python that has video2dataset; empty: without it."""

    def run(self) -> dict[str, Any]:
        """All sides in turn; their medians, and the medians of the turns' ratios."""
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        with tempfile.TemporaryDirectory(prefix="hbi-bench-") as folder:
            manifest = self.manifest
            if not manifest:
                for _ in make_corpus(folder, self.clips):
                    pass
                manifest = f"{folder}/manifest.jsonl"
            with ray_running():
                turns = Turns(folder, manifest, ShardSettings(samples_per_shard=self.samples_per_shard))
                for turn in range(self.repeats):
                    turns.take(turn, self.video2dataset)
            return turns.results()


class Turns:
    """What each side took in each turn: wall and CPU seconds."""

    def __init__(self, folder: str, manifest: str, settings: ShardSettings) -> None:
        self.folder, self.manifest, self.settings = folder, manifest, settings
        self.taken: dict[str, list[tuple[float, float]]] = {}
        self.summary = Summary("")
        self.counts: dict[str, float] = {}
        few = f"{folder}/few.jsonl"
        write_manifest(islice(read_manifest(manifest), 1), few)
        run.shard(few, f"{folder}/first", settings)  # what a process imports once
        with Cpu() as cpu:
            self.start = run.shard(few, f"{folder}/few", settings).start_seconds
        self.start_cpu = cpu.seconds

    def take(self, turn: int, python: str) -> None:
        """One turn of each side. python: one that has video2dataset, or nothing."""
        cores = len(os.sched_getaffinity(0))
        outs = {side: f"{self.folder}/{side}{turn}" for side in ("user", "bare", "ours", "video2dataset")}
        loops: dict[str, Work] = {"user": user_work, "bare": bare_work}
        for side, work in loops.items():
            with Cpu() as cpu:
                seconds = time_loop(work, self.manifest, outs[side], self.settings, cores)
            self._note(side, seconds, cpu.seconds)
        begin = time.perf_counter()
        with Cpu() as cpu:
            self.summary = run.shard(self.manifest, outs["ours"], self.settings)
        seconds = time.perf_counter() - begin - self.summary.start_seconds
        self._note("ours", seconds, cpu.seconds - self.start_cpu)
        assert digests(outs["bare"]) == digests(outs["ours"]), "the tars differ"
        if not turn:
            self.counts["user_same_frames"] = same_frames(outs["user"], outs["ours"])
        if python:
            videos = [row.video for row in islice(read_manifest(self.manifest), 100)]
            rate = self.settings.frames * self.summary.samples / self.summary.clip_seconds
            count, taken = video2dataset_seconds(
                python, videos, outs["video2dataset"], rate, self.settings.size
            )
            self.counts["video2dataset_clips_per_second"] = round(count / taken, 2)
            over = self.counts["video2dataset_clips_per_second"]
            self.counts["over_video2dataset"] = round(self.summary.rows / seconds / over, 2)

    def _note(self, side: str, seconds: float, cpu_seconds: float) -> None:
        self.taken.setdefault(side, []).append((seconds, cpu_seconds))

    def results(self) -> dict[str, Any]:
        """Speeds, and how many times as fast as each other side ours is."""
        found: dict[str, Any] = {"rows": self.summary.rows, "samples": self.summary.samples, **self.counts}
        for side, turns in self.taken.items():
            for measure, name in enumerate(("", "_cpu")):
                rate = self.summary.rows / statistics.median(turn[measure] for turn in turns)
                found[f"{side}_clips_per{name}_second"] = round(rate, 2)
                if side != "ours":
                    pairs = zip(turns, self.taken["ours"], strict=True)
                    ratios = [theirs[measure] / ours[measure] for theirs, ours in pairs]
                    found[f"over_{side}{name}"] = round(statistics.median(ratios), 3)
                    found[f"over_{side}{name}_by_turn"] = [round(ratio, 3) for ratio in ratios]
        starts = {"start_seconds": round(self.start, 2), "start_cpu_seconds": round(self.start_cpu, 2)}
        return found | starts | {"same_bytes": True}


def main() -> None:
    bench = tyro.cli(Bench, description=__doc__)
    results = bench.run()
    print(
        f"hbi shard {results['ours_clips_per_second']} clips/s (its start, {results['start_seconds']} s, apart)"
        f": {results['over_user']} of the user's loop ({results['over_user_cpu']} by CPU seconds),"
        f" {results['over_bare']} ({results['over_bare_cpu']}) of the bare loop"
    )
    report(
        "sharding", results, manifest=bench.manifest or f"made corpus of {bench.clips}", repeats=bench.repeats
    )


if __name__ == "__main__":
    main()
