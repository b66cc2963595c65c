"""Ray, started quietly where it is not running and stopped by whoever started it."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent.parent)


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
        dict.fromkeys([ROOT, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))])
    )
    ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()
