"""Ray, started quietly where it is not running and stopped by whoever started it."""

import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
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
    if os.environ.get("RAY_ADDRESS"):
        use_token()
    with _without_lines("RAY_BACKEND_LOG_LEVEL", "gcs_client.cc"), _signals_kept():
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


def use_token() -> None:
    """Ray's own rule for its command line: where a token lies here, it is sent. Nothing is said of it.

    `ray start` asks for one wherever a Ray was ever started, and clients send none to an address that they are given.
    A cluster that asks for none takes no notice of it.
    """
    from ray._private.authentication import authentication_token_setup as setup

    for name in (setup.__name__, "ray.dashboard", "ray._private.runtime_env"):
        logging.getLogger(name).setLevel(logging.ERROR)
    setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def dataset_of(rows: list[dict[str, Any]]) -> "Dataset":
    """Ray Data over `rows`, each a task of its own; what there is to say is said by us, and not by Ray.

    Its settings, `context`, are its own.
    """
    import ray.data
    from ray.data import DataContext

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # its errors are exceptions too
    with DataContext.current(DataContext.get_current().copy()):
        data = ray.data.from_items(rows, override_num_blocks=len(rows))
    data.context.enable_progress_bars = False
    data.context.print_on_execution_start = False
    # A row may take its time.
    data.context.execution_no_progress_timeout_s = -1
    return data


@dataclass(frozen=True)
class Line:
    """Between this process and its workers; it travels to them."""

    say: Callable[[Any], object]
    """A worker's message; it returns at once."""
    stop: Callable[[], object]
    """Asks the workers for an early end; it returns at once."""
    stopping: Callable[[], Any]
    """A reference to whether they were asked."""

    @contextmanager
    def watched(self) -> Iterator[Callable[[], bool]]:
        """Inside, on a worker: whether an early end was asked for, as known a moment ago; it costs nothing to ask."""
        import ray
        from ray.exceptions import RayError

        asked, over = threading.Event(), threading.Event()

        def watch() -> None:
            with suppress(RayError):  # Ray is being stopped
                while not over.wait(MESSAGE_SECONDS):
                    if ray.get(self.stopping()):
                        asked.set()
                        return

        watcher = threading.Thread(target=watch, name="stop", daemon=True)
        watcher.start()
        try:
            yield asked.is_set
        finally:
            over.set()
            watcher.join()


@contextmanager
def messages(receive: Callable[[Any], object]) -> Iterator[Line]:
    """Inside, what any worker says on the line yielded here is received by this process, in the order it came.

    What is said lies on this process's own node until it is received: the loss of another node loses nothing else.
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
        yield Line(box.put.remote, box.stop.remote, box.stopping.remote)
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
            self.stopped = False

        def put(self, message: Any) -> None:
            self.held.append(message)

        def take(self) -> list[Any]:
            held, self.held = self.held, []
            return held

        def stop(self) -> None:
            self.stopped = True

        def stopping(self) -> bool:
            return self.stopped

    return Mailbox


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Inside, a Ray that is started stands in a session of its own, and afterwards SIGTERM means what it meant.

    A signal to the group of this process, as a terminal or a scheduler sends it, would end Ray's processes before the
    command could end what it does with them; and Ray gives the driver a handler of its own, which raises SystemExit.
    """
    from ray._private import services

    start = services.ConsolePopen
    handler = signal.getsignal(signal.SIGTERM)
    services.ConsolePopen = partial(start, start_new_session=True)  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        services.ConsolePopen = start
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


@contextmanager
def _without_lines(*texts: str) -> Iterator[None]:
    """Inside, whatever is written to standard error waits for the end, and lines with one of `texts` are dropped.

    By descriptor, for what C++ writes: that its log level was set, on the very terminal that was to be spared, and
    once a second that a cluster does not answer, which is an exception in the end.
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
                if not any(text.encode() in line for text in texts):
                    os.write(2, line)
