"""What every benchmark shares: time and peak memory of a piece of work, and the line that is printed at the end."""

import ctypes
import json
import os
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from hbi.infra.project import ROOT

MEBIBYTE = 2**20


@dataclass(frozen=True)
class Measured:
    """One piece of work."""

    seconds: float | None
    """Median time of a run; none: it failed."""
    peak_mib: float | None
    """Most memory that a run held beyond what it started with (CPU: resident; GPU: allocated)."""
    result: Any = None
    """What the last run returned."""
    error: str = ""
    """Why it failed."""

    def __str__(self) -> str:
        if self.seconds is None:
            return f"failed: {self.error}"
        return f"{1000 * self.seconds:9.1f} ms  {self.peak_mib:8.0f} MiB"

    def plain(self) -> dict[str, Any]:
        """For the JSON line: without the result."""
        values = {name: value for name, value in asdict(self).items() if name != "result" and value != ""}
        return {
            name: round(value, 6) if isinstance(value, float) else value for name, value in values.items()
        }


def best_device() -> str:
    """A GPU where there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def measure(
    prepare: Callable[..., Callable[[], Any]], *, device: str = "cpu", repeats: int = 3, **arguments: Any
) -> Measured:
    """Time and peak memory of `prepare(device=device, **arguments)()`, in a process of its own.

    prepare: a function of a module; it makes the inputs and returns the work. The first run is measured for memory,
    `repeats` more for time (none more: the first is measured for both). Memory that the machine does not have is an
    error of this piece of work alone.
    """
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(_measure, prepare, device, repeats, arguments).result()
        except BrokenProcessPool:
            return Measured(None, None, error="its process was ended, most likely for memory")


def _measure(
    prepare: Callable[..., Callable[[], Any]], device: str, repeats: int, arguments: dict
) -> Measured:
    import torch

    work = prepare(device=device, **arguments)
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        _limit_memory()
        before = forget_peak()
    seconds, result, peak = [], None, before
    try:
        for _ in range(1 + repeats):
            start = time.perf_counter()
            result = work()
            if on_gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
            if len(seconds) == 1:
                peak = torch.cuda.max_memory_allocated() if on_gpu else resident("VmHWM")
    except (MemoryError, RuntimeError) as error:  # torch raises RuntimeError for memory
        reason = str(error).splitlines()[0]
        return Measured(None, None, error="not enough memory" if "memory" in reason.lower() else reason)
    return Measured(statistics.median(seconds[1:] or seconds), (peak - before) / MEBIBYTE, result)


def resident(field: str) -> int:
    """Bytes, from this process's status: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def forget_peak() -> int:
    """Give freed memory back to the system and let the record of the peak begin anew; what is resident now."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def _limit_memory() -> None:
    """Let an allocation fail that the machine has no memory for, instead of the machine."""
    available = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable")
    )
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = used + int(available * 0.9)
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def commit() -> str:
    """The commit that is measured, with a + where files differ from it."""
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine() -> dict[str, Any]:
    """What it was measured on."""
    import torch

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line
        ]
        model = names[0] if names else model
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }


def report(bench: str, results: dict[str, Any], **settings: Any) -> None:
    """Print the one JSON line: the benchmark, its settings, its results, the commit and the machine."""
    line = {
        "bench": bench,
        "settings": settings,
        "results": results,
        "commit": commit(),
        "machine": machine(),
    }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    report("machine", {})
