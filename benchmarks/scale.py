"""What a corpus costs its driver before a clip is decoded: CPU, memory and storage requests of a plan and a resume.

python -m benchmarks.scale [--sizes 10000 1000000]

No video is read. The output lies in a folder that is asked as object storage is, and counts what it is asked: an object
is a request, and so are a thousand names of a listing. Each step is a process of its own. A resume finds every shard
made: the plan and the records are read, and nothing is left to do. What 100 million clips would cost is the straight
line through the smallest and the largest size: a law, and no measurement.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from benchmarks.report import MEBIBYTE, ROOT, report
from hbi.infra import storage
from hbi.pipelines.sample import ShardInfo
from hbi.pipelines.sharding.plan import Plan, plan
from hbi.pipelines.sharding.records import ClipStats, ShardManifest, record_path, unfinished
from hbi.pipelines.sharding.settings import ShardSettings

LISTED = 1000
"""Names in one answer of S3 to a listing."""
FAR = 100_000_000


class Counted(DirFileSystem):
    """A folder that is asked as s3fs asks S3, and counts the requests."""

    def __init__(self, folder: str) -> None:
        super().__init__(path=folder, fs=LocalFileSystem(auto_mkdir=True))
        self.requests: Counter[str] = Counter()

    def info(self, path: str, **options: Any) -> Any:
        self.requests["HEAD"] += 1
        return super().info(path)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> Any:
        self.requests["GET"] += 1
        return super().cat_file(path, start=start, end=end)

    def pipe_file(self, path: str, value: bytes, **options: Any) -> Any:
        self.requests["PUT"] += 1
        return super().pipe_file(path, value)

    def put_file(self, lpath: str, rpath: str, **options: Any) -> Any:
        self.requests["PUT"] += 1
        return super().put_file(lpath, rpath)

    def find(self, path: str, *args: Any, **options: Any) -> Any:
        found = super().find(path, *args, **options)
        self.requests["LIST"] += max(1, -(-len(found) // LISTED))
        return found


def drive(folder: str, what: str) -> None:
    """One step in this process: prints CPU seconds, peak MiB and requests."""
    remote = Counted(folder)
    storage._s3 = lambda pid: remote  # pyright: ignore[reportAttributeAccessIssue]
    steps: dict[str, Callable[[], Any]] = {"plan": _plan, "resume": _resume}
    begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    clock = time.process_time()
    steps[what]()
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - begin) * 1024 / MEBIBYTE
    found = {"cpu_seconds": round(time.process_time() - clock, 3), "peak_mib": round(peak, 1)}
    print(json.dumps({**found, "requests": dict(remote.requests)}))


def _plan() -> Plan:
    settings = ShardSettings()
    return plan(
        "s3://corpus/manifest.jsonl", "s3://corpus/out", settings.identity(), settings.samples_per_shard
    )


def _resume() -> None:
    missing = [shard for shard, record in unfinished("s3://corpus/out", _plan().shards) if record is None]
    assert not missing, f"{len(missing)} shards are missing"


def write_manifest(folder: Path, clips: int) -> None:
    """As many rows, of an ordinary length."""
    (folder / "corpus").mkdir()
    with (folder / "corpus" / "manifest.jsonl").open("w") as stream:
        for i in range(clips):
            caption = f"a person does something in front of a camera, number {i}"
            stream.write(
                f'{{"video": "s3://videos/{i % 1000:03d}/{i:09d}.mp4", "captions": ["{caption}"]}}\n'
            )


def write_records(folder: Path) -> None:
    """What a finished run leaves: for each shard a record, and a tar of the recorded length."""
    out = folder / "corpus" / "out"
    (out / ".done").mkdir()
    stats = ClipStats(10.0, 25.0, 1280, 720, 11, "pyav")
    units = json.loads((out / ".plan" / "plan.json").read_bytes())["units"]
    for name, split, rows, *_ in units:
        (out / name).write_bytes(b"t")
        record = ShardManifest(ShardInfo(name, split, rows, 1, "0" * 64), rows, [], [stats] * rows)
        Path(record_path(str(out), name)).write_bytes(record.json())


@dataclass(frozen=True)
class Bench:
    """What to measure."""

    sizes: tuple[int, ...] = (10_000, 1_000_000)
    """Clips of each corpus."""

    def run(self) -> dict[str, Any]:
        """For each size, each step's CPU seconds, peak MiB and requests."""
        found: dict[str, Any] = {}
        for clips in self.sizes:
            with tempfile.TemporaryDirectory(prefix="hbi-bench-") as folder:
                write_manifest(Path(folder), clips)
                found[f"plan of {clips}"] = _measured(folder, "plan")
                write_records(Path(folder))
                found[f"resume of {clips}"] = _measured(folder, "resume")
        least, most = min(self.sizes), max(self.sizes)
        for what in ("plan", "resume"):
            ends = [_flat(found[f"{what} of {clips}"]) for clips in (least, most)]
            slopes = {name: (ends[1][name] - ends[0][name]) / max(1, most - least) for name in ends[1]}
            law = {name: round(ends[1][name] + slope * (FAR - most)) for name, slope in slopes.items()}
            found[f"{what} of {FAR} by the law"] = {
                "cpu_seconds": law.pop("cpu_seconds"),
                "peak_mib": law.pop("peak_mib"),
                "requests": law,
            }
        return found


def _flat(measured: dict[str, Any]) -> dict[str, float]:
    return {**{name: measured[name] for name in ("cpu_seconds", "peak_mib")}, **measured["requests"]}


def _measured(folder: str, what: str) -> dict[str, Any]:
    code = f"from benchmarks.scale import drive; drive({folder!r}, {what!r})"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(ran.stdout)


def main() -> None:
    bench = tyro.cli(Bench, description=__doc__)
    results = bench.run()
    for name, found in results.items():
        requests = ", ".join(f"{count} {kind}" for kind, count in found["requests"].items())
        print(f"{name:32} {found['cpu_seconds']:9} s of CPU  {found['peak_mib']:9} MiB  {requests}")
    report("scale", results, sizes=list(bench.sizes))


if __name__ == "__main__":
    main()
