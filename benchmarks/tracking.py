"""What tracking costs the one who calls it: our Tracker beside MLflow's own log_metrics, over sqlite and over HTTP.

    python -m benchmarks.tracking --calls 200

A step computes for a few milliseconds and tracks ten metrics, as each of the loggers does it; `none` tracks nothing.
Reported are the call (median, 99th percentile, longest) and the step around it (median, and the whole loop against
`none`). The last row is our Tracker while the server is dead, where MLflow's own call would try for four minutes.
"""

import os
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import tyro

from benchmarks.report import report
from hbi.infra.mlflow import store
from hbi.infra.mlflow.tracker import Tracker

METRICS = {f"train/metric_{number}": 0.5 * number for number in range(10)}

Log = Callable[[int], object]


def main(calls: int = 200, step_milliseconds: float = 5.0) -> None:
    """Measures all loggers, prints a table, and one JSON line."""
    torch.set_num_threads(1)  # threads that wait for each other would hide what is measured
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    results: dict[str, Any] = {}
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        size = _size_for(step_milliseconds / 1000)
        results["none"] = _measure(lambda step: None, calls, size)
        _show("none", results)
        sqlite = store.tracking_uri(str(folder / "local"))
        _loggers("sqlite", sqlite, folder, calls, size, results)
        with _server(folder / "server") as (uri, process):
            _loggers("http", uri, folder, calls, size, results)
            tracker = Tracker(uri, "bench", "dead", folder / "outbox")
            _kill(process)
            results["http, server dead: Tracker.metrics"] = _measure(
                lambda step: tracker.metrics(METRICS, step), calls, size
            )
            tracker.close()
            _show("http, server dead: Tracker.metrics", results)
    report(
        "tracking", results, calls=calls, metrics_per_call=len(METRICS), step_milliseconds=step_milliseconds
    )


def _loggers(where: str, uri: str, folder: Path, calls: int, size: int, results: dict[str, Any]) -> None:
    """The three ways to one store."""
    import mlflow

    mlflow.set_tracking_uri(uri)
    experiment = store.experiment_id(uri, "bench")
    with mlflow.start_run(experiment_id=experiment):
        ways: dict[str, Log] = {
            "mlflow.log_metrics": lambda step: mlflow.log_metrics(METRICS, step=step),
            "mlflow.log_metrics(synchronous=False)": lambda step: mlflow.log_metrics(
                METRICS, step=step, synchronous=False
            ),
        }
        for name, log in ways.items():
            results[f"{where}: {name}"] = _measure(log, calls, size)
            _show(f"{where}: {name}", results)
        mlflow.flush_async_logging()
    with Tracker(uri, "bench", "ours", folder / "outbox") as tracker:
        results[f"{where}: Tracker.metrics"] = _measure(
            lambda step: tracker.metrics(METRICS, step), calls, size
        )
    _show(f"{where}: Tracker.metrics", results)
    held = store.client(uri).get_metric_history(tracker.run_id, "train/metric_9")
    assert len(held) == calls + 1, "the tracker lost a metric"


def _measure(log: Log, calls: int, size: int) -> dict[str, float]:
    """Seconds of `log` and of the step around it."""
    compute = _work(size)
    log(0)
    inside, whole = [], []
    begin = time.perf_counter()
    for step in range(1, calls + 1):
        start = time.perf_counter()
        compute()
        middle = time.perf_counter()
        log(step)
        end = time.perf_counter()
        inside.append(end - middle)
        whole.append(end - start)
    total = time.perf_counter() - begin
    return {
        "call_median_us": 1e6 * statistics.median(inside),
        "call_p99_us": 1e6 * sorted(inside)[int(0.99 * (calls - 1))],
        "call_longest_us": 1e6 * max(inside),
        "step_median_ms": 1e3 * statistics.median(whole),
        "loop_seconds": total,
    }


def _work(size: int) -> Callable[[], object]:
    """A matrix product, which leaves the interpreter free as a training step does."""
    matrix = torch.randn(size, size)
    return lambda: matrix @ matrix


def _size_for(seconds: float) -> int:
    """Rows of a square matrix whose product takes about so long here."""
    size = 128
    while size < 8192:
        compute, taken = _work(size), []
        for _ in range(5):
            start = time.perf_counter()
            compute()
            taken.append(time.perf_counter() - start)
        if min(taken) >= seconds:
            break
        size = size * 5 // 4
    return size


def _show(name: str, results: dict[str, Any]) -> None:
    row = results[name]
    slower = 100 * (row["loop_seconds"] / results["none"]["loop_seconds"] - 1)
    print(
        f"{name:46} call {row['call_median_us']:10.1f} us  p99 {row['call_p99_us']:10.1f}  longest "
        f"{row['call_longest_us']:10.1f}  step {row['step_median_ms']:7.2f} ms  loop {slower:+6.1f} %",
        flush=True,
    )


@contextmanager
def _server(folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A tracking server on loopback, without the seven processes that would run its jobs."""
    backend = store.tracking_uri(str(folder))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", backend, "--port", str(port)]
    command += ["--workers", "1", "--artifacts-destination", str(folder / "served")]
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    uri = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{uri}/health", timeout=1).close()
                break
            except OSError:
                if time.monotonic() > until:
                    raise RuntimeError(f"mlflow server does not start on port {port}") from None
                time.sleep(0.2)
        yield uri, process
    finally:
        _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Ends the server and what it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    tyro.cli(main)
