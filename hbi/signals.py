"""How a command ends early: Ctrl-C and SIGTERM tidy up, and leave nothing behind."""

import os
import signal
import sys
import threading
from typing import Any

END_SECONDS = 2.5
"""How long an interrupted command may tidy up before what it started is ended for it.

Less than the 3 s after which Ray ends a job that was told to stop."""


def end_on_signal() -> None:
    """Ctrl-C and SIGTERM raise KeyboardInterrupt once; a moment later whatever is left of the command is ended."""

    def end(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        started = _descendants()
        timer = threading.Timer(END_SECONDS, lambda: (_kill(started | _descendants()), os._exit(130)))
        timer.daemon = True
        timer.start()
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, end)
    signal.signal(signal.SIGTERM, end)


def stop_ray() -> None:
    """Stops a Ray that this command started (a cluster that it joined stays up)."""
    if (ray := sys.modules.get("ray")) is not None and ray.is_initialized():
        ray.shutdown()


def _descendants() -> set[Any]:
    import psutil

    return set(psutil.Process().children(recursive=True))


def _kill(processes: set[Any]) -> None:
    import psutil

    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
