"""What a corpus costs its driver beside the decoding: CPU, memory and requests of a plan, a resume, and duplicates.

python -m benchmarks.scale [--sizes 10000 1000000]

No video is read. The output lies in a folder that is asked as object storage is, and counts what it is asked: an object
is a request, and so are a thousand names of a listing. Each step is a process of its own:

    plan                 the manifest is read, and the plan written
    resume               every shard is found made, and the index written; above 10,000 shards workers share this
    duplicates           fingerprints of which a tenth repeats, the same or nearly (near 4), in one process
    duplicates, driver   the same by tasks of Ray, if there are several parts: what the driver has of it
    duplicates, loop     the loop of `scale_loop` over the same fingerprints

What 100 million clips would cost is the straight line through the smallest and the largest size, of whoever does the
work: a law, and no measurement. Of duplicates it is the comparing of parts with each other, which is quadratic: what
a pair of them takes, by the number of pairs.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from benchmarks.report import MEBIBYTE, ROOT, forget_peak, report, resident
from benchmarks.scale_loop import plain_duplicates
from hbi.infra import storage
from hbi.infra.ray_runtime import ray_running
from hbi.pipelines.sample import ShardInfo
from hbi.pipelines.sharding import compare
from hbi.pipelines.sharding.account import MANY, Accountant
from hbi.pipelines.sharding.dedup import FIRST, PART_ROWS, find_duplicates
from hbi.pipelines.sharding.filters import FilterSettings, Fingerprint
from hbi.pipelines.sharding.plan import Plan, plan, slices
from hbi.pipelines.sharding.records import ClipStats, ShardManifest, read_records, record_path
from hbi.pipelines.sharding.settings import ShardSettings

LISTED = 1000
"""Names in one answer of S3 to a listing."""
FAR = 100_000_000
OUT = "s3://corpus/out"
FILTERS = FilterSettings(same=True, near=4)


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

    def find(self, path: str, *args: Any, prefix: str = "", **options: Any) -> Any:
        found: dict[str, Any] = super().find(path, *args, **options)  # type: ignore[assignment]
        found = {name: info for name, info in found.items() if name.startswith(f"{path}/{prefix}")}
        self.requests["LIST"] += max(1, -(-len(found) // LISTED))
        return found


def drive(folder: str, what: str) -> None:
    """One step in this process: prints CPU seconds, peak MiB and requests."""
    remote = Counted(folder)
    storage._s3 = lambda pid: remote  # pyright: ignore[reportAttributeAccessIssue]
    steps: dict[str, Callable[[], Any]] = {
        "plan": _plan,
        "resume": _resume,
        "duplicates": lambda: find_duplicates(OUT, _plan(), FILTERS, spread=False),
        "duplicates, driver": lambda: find_duplicates(f"{folder}/corpus/out", _plan(), FILTERS),
        "duplicates, loop": _loop,
    }
    with ray_running() if what == "duplicates, driver" else nullcontext():
        begin = forget_peak()
        clock = time.process_time()
        steps[what]()
        seconds = time.process_time() - clock
        peak = (resident("VmHWM") - begin) / MEBIBYTE
    found = {"cpu_seconds": round(seconds, 3), "peak_mib": round(peak, 1)}
    print(json.dumps({**found, "requests": dict(remote.requests)}))


def _plan() -> Plan:
    settings = ShardSettings()
    return plan("s3://corpus/manifest.jsonl", OUT, settings.identity(), settings.samples_per_shard)


def _resume() -> None:
    planned = _plan()
    accountant = Accountant(OUT, len(planned.shards) > MANY)
    accounts = list(map(accountant.account, slices(planned.shards)))
    assert not any(found.missing for found in accounts), "shards are missing"
    accountant.write_index(planned, accounts)


def _loop() -> None:
    names = [shard_plan.name for shard_plan in _plan().shards]
    records = (record for _, record in read_records(f"{OUT}/{FIRST}", names) if record is not None)
    plain_duplicates((found for record in records for found in record.fingerprints), FILTERS)


def look_back_seconds(rows: int) -> float:
    """CPU that it takes to compare a part of so many rows with an earlier one."""
    words = np.random.default_rng(0).integers(0, 2**64, (2 * rows, 3), dtype=np.uint64)
    assert FILTERS.near is not None
    clock = time.process_time()
    compare.nearest(words[:rows], words[rows:], 3 * FILTERS.near)
    return time.process_time() - clock


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
    """What a finished run leaves: for each shard a record, and a tar of the recorded length; the first pass's too."""
    out = folder / "corpus" / "out"
    stats = ClipStats(10.0, 25.0, 1280, 720, 11, "pyav")
    plan = json.loads((out / ".plan" / "plan.json").read_bytes())
    fingerprints = enumerate(fingerprints_of(plan["rows"]))
    for name, split, rows, *_ in plan["units"]:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(b"t")
        record = ShardManifest(ShardInfo(name, split, rows, 1, "0" * 64), rows, [], [stats] * rows)
        storage.write_bytes(record_path(str(out), name), record.json(), durable=False)
        first = replace(record, fingerprints=list(islice(fingerprints, rows)))
        storage.write_bytes(record_path(str(out / FIRST), name), first.json(), durable=False)


def fingerprints_of(rows: int) -> Iterator[Fingerprint]:
    """Of which one in twenty is that of an earlier row, and one in twenty differs from it in a few bits."""
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**64, (rows, 7), dtype=np.uint64)
    kind, earlier = rng.random(rows), (rng.random(rows) * np.arange(rows)).astype(int)
    for row in np.flatnonzero(kind < 0.1).tolist():
        words[row] = words[earlier[row]]
        if kind[row] < 0.05:
            words[row, 3] ^= np.uint64(1)
            words[row, 4:] ^= np.uint64(1) << rng.integers(0, 64, 3, dtype=np.uint64)
    for row in words:
        text = row.tobytes().hex()
        yield Fingerprint(text[:64], text[64:])


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
                for what in ("resume", "duplicates", "duplicates, driver", "duplicates, loop"):
                    if what != "duplicates, driver" or clips > PART_ROWS:
                        found[f"{what} of {clips}"] = _measured(folder, what)
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
        rows = min(PART_ROWS, most)
        found["a pair of parts"] = {"rows": rows, "cpu_seconds": round(look_back_seconds(rows), 3)}
        pairs = (FAR / rows) ** 2 / 2
        found[f"pairs of parts of {FAR} by the law"] = {
            "cpu_seconds": round(found["a pair of parts"]["cpu_seconds"] * pairs)
        }
        return found


def _flat(measured: dict[str, Any]) -> dict[str, float]:
    return {
        **{name: measured[name] for name in ("cpu_seconds", "peak_mib")},
        **measured["requests"],
    }


def _measured(folder: str, what: str) -> dict[str, Any]:
    code = f"from benchmarks.scale import drive; drive({folder!r}, {what!r})"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(ran.stdout)


def main() -> None:
    bench = tyro.cli(Bench, description=__doc__)
    results = bench.run()
    for name, found in results.items():
        requests = ", ".join(f"{count} {kind}" for kind, count in found.get("requests", {}).items())
        print(f"{name:36} {found['cpu_seconds']:9} s of CPU  {found.get('peak_mib', ''):9} MiB  {requests}")
    report("scale", results, sizes=list(bench.sizes))


if __name__ == "__main__":
    main()
