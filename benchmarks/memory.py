"""Whether `hbi shard` grows with the corpus: peak memory of driver, workers and decoders, and time per clip.

python -m benchmarks.memory [--sizes 1000 4000 16000]

Each size is a run of its own: a manifest that repeats a few made clips under different ids, a driver process, a Ray.
Memory is the resident size, looked at ten times a second over the whole life of the run. Time per clip leaves out
what happens once (Ray's start, the first start of workers and decoders): a small run goes before the one that is
timed.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import psutil
import tyro

from benchmarks.report import MEBIBYTE, ROOT, report
from hbi.infra.ray_runtime import ray_running
from hbi.pipelines.corpus.make import make_corpus
from hbi.pipelines.sharding import run
from hbi.pipelines.sharding.settings import ShardSettings

LOOK_SECONDS = 0.1
VIDEOS = 50


def drive(manifest: str, warm: str, folder: str) -> None:
    """The driver of one size: prints rows and seconds."""
    settings = ShardSettings(frames=4, size=112)
    with ray_running():
        run.shard(warm, f"{folder}/warm", settings)
        summary = run.shard(manifest, f"{folder}/out", settings)
    seconds = summary.plan_seconds + summary.work_seconds
    print(json.dumps({"rows": summary.rows, "samples": summary.samples, "seconds": seconds}))


def kind_of(process: psutil.Process, driver: int) -> str | None:
    """Which of our processes it is; None for Ray's own."""
    try:
        command = " ".join(process.cmdline())
    except psutil.Error:
        return None
    if process.pid == driver:
        return "driver"
    if "hbi.pipelines.decoding.worker" in command:
        return "decoder"
    return "worker" if command.startswith("ray::Map") else None


def watch(driver: "subprocess.Popen[str]") -> dict[str, float]:
    """Peak MiB of the driver, of the largest worker and of the largest decoder, until the driver ends."""
    peaks: dict[str, float] = {"driver": 0.0, "worker": 0.0, "decoder": 0.0}
    parent = psutil.Process(driver.pid)
    while driver.poll() is None:
        try:
            processes = [parent, *parent.children(recursive=True)]
        except psutil.Error:
            break
        for process in processes:
            kind = kind_of(process, driver.pid)
            if kind is not None:
                try:
                    peaks[kind] = max(peaks[kind], process.memory_info().rss / MEBIBYTE)
                except psutil.Error:
                    continue
        time.sleep(LOOK_SECONDS)
    return {name: round(peak, 1) for name, peak in peaks.items()}


def repeated(rows: list[dict[str, Any]], clips: int, path: Path) -> str:
    """A manifest of `clips` rows over the videos of `rows`."""
    with path.open("w") as lines:
        for number, row in enumerate(islice(cycle(rows), clips)):
            lines.write(json.dumps(row | {"id": f"clip {number}", "split": "train"}) + "\n")
    return str(path)


@dataclass(frozen=True)
class Bench:
    """What to measure."""

    sizes: tuple[int, ...] = (1000, 4000, 16000)
    """Clips of each run."""
    manifest: str = ""
    """Whose videos to repeat; empty: fifty clips of the made corpus."""

    repeats: int = 3
    """Runs of each size, in turn with the others: a machine that is busy for a while is busy for all."""

    def run(self) -> dict[str, Any]:
        """Largest peaks and median time per clip by size, and the largest over the smallest of each."""
        found: dict[int, list[dict[str, float]]] = {size: [] for size in self.sizes}
        with tempfile.TemporaryDirectory(prefix="hbi-bench-") as folder:
            manifest = Path(self.manifest or f"{folder}/manifest.jsonl")
            if not self.manifest:
                for _ in make_corpus(folder, VIDEOS):
                    pass
            rows = [json.loads(line) for line in manifest.read_text().splitlines()]
            for row in rows:
                row["video"] = str(manifest.parent / row["video"])
            for size in self.sizes * self.repeats:
                found[size].append(run_of(size, rows, folder))
                print(f"{size:>6} clips  {found[size][-1]}", flush=True)
        by_size = {
            size: {
                name: statistics.median(run[name] for run in runs)
                if name == "milliseconds_per_clip"
                else max(run[name] for run in runs)
                for name in runs[0]
            }
            for size, runs in found.items()
        }
        spread = {
            name: round(max(f[name] for f in by_size.values()) / min(f[name] for f in by_size.values()), 3)
            for name in by_size[self.sizes[0]]
        }
        return {"by_clips": by_size, "largest_over_smallest": spread}


def run_of(size: int, rows: list[dict[str, Any]], folder: str) -> dict[str, float]:
    """One run over so many clips: peaks in MiB, and milliseconds per clip."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        large = repeated(rows, size, Path(place, "manifest.jsonl"))
        small = repeated(rows, 200, Path(place, "warm.jsonl"))
        driver = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.memory", "drive", large, small, place],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        peaks = watch(driver)
        output, _ = driver.communicate()
    if driver.returncode:
        raise RuntimeError(f"the run of {size} clips failed with exit status {driver.returncode}")
    said = json.loads(output.splitlines()[-1])
    assert said["samples"] == said["rows"] == size, said
    return {**peaks, "milliseconds_per_clip": round(1000 * said["seconds"] / size, 3)}


def main() -> None:
    if sys.argv[1:2] == ["drive"]:
        drive(*sys.argv[2:])
        return
    bench = tyro.cli(Bench, description=__doc__)
    report("memory", bench.run(), sizes=bench.sizes, repeats=bench.repeats, unit="MiB resident")


if __name__ == "__main__":
    main()
