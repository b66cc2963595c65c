"""Every benchmark runs on a tiny size, as a user calls it, and finds what it is there to compare."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hbi.infra.mlflow.runs import runs_table

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def bench(name: str, *arguments: str) -> dict[str, Any]:
    """The results of `python -m benchmarks.NAME`."""
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *arguments],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True, capture_output=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["bench"] == name and line["commit"]
    return line["results"]


def test_every_benchmark_is_run_by_a_test() -> None:
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    paths = (ROOT / "benchmarks").glob("*.py")
    files = {path.stem for path in paths if "tyro.cli(" in path.read_text()}
    called = {name for name in files if re.search(rf'bench\(\s*"{name}"|\b{name}\.(main|Bench)\(', tests)}
    assert files == called


def test_ablation(tmp_path: Path) -> None:
    arguments = (
        "--clips",
        "40",
        "--steps",
        "2",
        "--batch",
        "8",
        "--seeds",
        "1",
        "--matches",
        "1",
        "--out",
        str(tmp_path),
    )
    rows = ("1 mean pooling", "2 weighted token-wise similarity")
    found = bench("ablation", *arguments, "--rows", "0", "1")
    assert tuple(found) == rows and all(0 <= found[row]["t2v R@1"][0] <= 100 for row in rows)
    assert (tmp_path / "moments" / "ablation.svg").read_text().startswith("<?xml")
    measured = (tmp_path / "moments" / "results.jsonl").read_text()
    assert bench("ablation", *arguments, "--rows", "0", "1") == found
    assert (tmp_path / "moments" / "results.jsonl").read_text() == measured, (
        "what is measured is not measured again"
    )
    assert "1 mean pooling, seed 0" in runs_table(uri=f"sqlite:///{tmp_path}/mlflow.db", width=400)


def test_decoders(media: Path) -> None:
    found = bench("decoders", "--media", str(media), "--only", "gif_bolt", "--repeats", "1")
    assert found["by_codec"] and all(row["clips"] == 1 for row in found["by_codec"].values())


def test_loading() -> None:
    found = bench(
        "loading", "--clips", "16", "--frames", "2", "--size", "32", "--batch", "4", "--step-seconds", "0.001",
        "--workers", "0", "1", "--towers", "small",
    )  # fmt: skip
    assert found.keys() == {"0 workers", "1 workers", "checkpoint, small"}
    assert found["checkpoint, small"]["mebibytes"] > 0


def test_memory() -> None:
    found = bench("memory", "--sizes", "20", "--repeats", "1")
    assert found["by_clips"]["20"].keys() == {"driver", "worker", "decoder", "milliseconds_per_clip"}
    assert all(value > 0 for value in found["by_clips"]["20"].values())


def test_scale() -> None:
    found = bench("scale", "--sizes", "200", "1200")
    plans, resumes = (found[f"{what} of 1200"]["requests"] for what in ("plan", "resume"))
    assert plans["PUT"] == 2  # one part of the plan, and the plan
    # The manifest, the plan, and each of the twelve shards once; the lists of the tars and of the records.
    assert (resumes["GET"], resumes["LIST"], resumes["PUT"]) == (14, 2, 2)
    assert found["resume of 100000000 by the law"]["requests"]["GET"] == 1_000_002
    assert (
        found["duplicates of 1200"]["requests"]["GET"] >= 12
        and found["duplicates, loop of 1200"]["peak_mib"] > 0
    )


def test_sharding() -> None:
    found = bench("sharding", "--clips", "20", "--repeats", "1", "--samples-per-shard", "10")
    assert found["rows"] == found["samples"] == found["user_same_frames"] == 20 and found["same_bytes"]
    assert found["over_user"] > 0 and found["over_bare"] > 0  # of CPU, Ray's start is more than 20 clips take


def test_step() -> None:
    found = bench("step", "--batch", "2", "--frames", "2", "--words", "4", "--turns", "1", "--cases", "ours")
    assert found["ours"]["seconds"] > 0 and found["ours"]["times_faster"] > 0


def test_exchange() -> None:
    found = bench("exchange", "--ranks", "2", "--clips", "3", "--dim", "8")
    gathered, ring = found["gather, 2 ranks"], found["ring, 2 ranks"]
    assert ring["loss"] == pytest.approx(gathered["loss"], rel=1e-5)
    assert gathered["peak_mib"] >= 0 and ring["cpu_seconds"] > 0


def test_tracking() -> None:
    found = bench("tracking", "--calls", "3", "--step-milliseconds", "0.1")
    assert {"none", "http, server dead: Tracker.metrics"} <= found.keys()


def test_films() -> None:
    found = bench("films", "--minutes", "1", "--clips", "2", "--repeats", "1")
    assert found.keys() == {"film_megabytes", "local_dense", "local_sparse"}
    assert all(found[kind]["ours_megabytes"] > 1 and found[kind]["cpu_ratio"] > 0 for kind in list(found)[1:])
