"""Ray, started quietly where it is not running and stopped by whoever started it."""

import logging
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from hbi.infra.project import ROOT

if TYPE_CHECKING:
    from ray.data import Dataset


SERVE_ENDS = r"Task ServeController\.\w+ failed\..* killed by `ray\.kill`"
"""What Ray prints of calls that Serve's controller leaves unanswered as it is taken down, which is no error."""
MESSAGE_SECONDS = 0.3
"""Between two looks for messages of workers."""


@contextmanager
def ray_running() -> Iterator[None]:
    """Inside, Ray runs: the one that is there, the cluster that RAY_ADDRESS names, or a local one of its own.

    A local Ray has no dashboard, keeps its workers' chatter in its log files, and ends with the context. Its workers
    import the project from where this file lies.
    """
    # Read as Ray is imported.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", SERVE_ENDS)
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
def messages(receive: Callable[[Any], object]) -> Iterator[Callable[[Any], object]]:
    """Inside, what any worker gives to the sender yielded here is received by this process, in the order it came.

    The sender travels to workers, and returns at once. What it sends lies on this process's own node until it is
    received: the loss of another node loses nothing else.
    """
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    box: Any = ray.remote(_mailbox()).options(num_cpus=0, scheduling_strategy=here).remote()
    over = threading.Event()

    def deliver() -> None:
        with suppress(RayError):  # Ray is being stopped
            for message in ray.get(box.take.remote()):
                receive(message)

    def listen() -> None:
        while not over.wait(MESSAGE_SECONDS):
            deliver()

    listener = threading.Thread(target=listen, name="messages", daemon=True)
    listener.start()
    try:
        yield box.put.remote
    finally:
        over.set()
        listener.join()
        deliver()
        ray.kill(box)


def _mailbox() -> type:
    """The class of the actor that holds messages; made here, so that it travels whole to a Python without us."""

    class Mailbox:
        def __init__(self) -> None:
            self.held: list[Any] = []

        def put(self, message: Any) -> None:
            self.held.append(message)

        def take(self) -> list[Any]:
            held, self.held = self.held, []
            return held

    return Mailbox


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
