"""Ray, started quietly where it is not running and stopped by whoever started it."""

import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hbi.infra.project import ROOT

if TYPE_CHECKING:
    from ray.data import Dataset


@contextmanager
def ray_running() -> Iterator[None]:
    """Inside, Ray runs: the one that is there, the cluster that RAY_ADDRESS names, or a local one of its own.

    A local Ray has no dashboard, keeps its workers' chatter in its log files, and ends with the context. Its workers
    import the project from where this file lies.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    # Workers inherit it; their working directory is not the project's.
    os.environ["PYTHONPATH"] = os.pathsep.join(
        dict.fromkeys([str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))])
    )
    # Its C++ side prints advice on the arguments of Ray Data's own actors as errors.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    with _without_line("RAY_BACKEND_LOG_LEVEL"):
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


def dataset_of(rows: list[dict[str, Any]]) -> "Dataset":
    """Ray Data over `rows`, each a task of its own; what there is to say is said by us, and not by Ray."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # its errors are exceptions too
    data = ray.data.from_items(rows, override_num_blocks=len(rows))
    data.context.enable_progress_bars = False
    data.context.print_on_execution_start = False
    # A row may take its time.
    data.context.execution_no_progress_timeout_s = -1
    return data


@contextmanager
def _without_line(text: str) -> Iterator[None]:
    """Inside, whatever is written to standard error waits for the end, and lines with `text` are dropped.

    By descriptor, for what C++ writes: that its log level was set, on the very terminal that was to be spared.
    """
    sys.stderr.flush()
    real = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(real, 2)
            os.close(real)
            held.seek(0)
            for line in held:
                if text.encode() not in line:
                    os.write(2, line)
