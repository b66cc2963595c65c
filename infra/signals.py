"""How a command ends early: Ctrl-C and SIGTERM tidy up, and leave nothing behind."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
END_SECONDS = 2.5
"""How long an interrupted command may tidy up before what it started is ended for it.

Less than the 3 s after which Ray ends a job that was told to stop."""
SAME_SECONDS = 0.5
"""A signal that comes again within this is the same one: a terminal and whoever started us may both pass it on."""


class Interrupted(KeyboardInterrupt):
    """A signal asked for an early end; its text is the line to say of it."""

    def __init__(self, number: int, text: str = "interrupted") -> None:
        super().__init__(text)
        self.number = number
        """Which signal. A shell calls such an end 128 and this: 130 for Ctrl-C, 143 for SIGTERM."""


def end_on_signal() -> None:
    """Ctrl-C and SIGTERM raise Interrupted. A moment later, or at a second signal, whatever is left is ended."""
    first: list[float] = []

    def end(number: int, frame: Any) -> None:
        if not first:
            first.append(time.monotonic())
            timer = threading.Timer(END_SECONDS, _end_all, (number, _descendants()))
            timer.daemon = True
            timer.start()
            raise Interrupted(number)
        if time.monotonic() - first[0] > SAME_SECONDS:
            _end_all(number, set())

    for number in SIGNALS:
        signal.signal(number, end)


@contextmanager
def stop_requests() -> Iterator[Callable[[], int]]:
    """Inside, the first signal only asks: the function yielded here says which came, 0 for none.

    A second one does what it would do without us. Outside the main thread, which alone gets signals, none comes.
    """
    asked: list[tuple[int, float]] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def ask(number: int, frame: Any) -> None:
        if not asked:
            asked.append((number, time.monotonic()))
        elif time.monotonic() - asked[0][1] > SAME_SECONDS:
            restore()
            signal.raise_signal(number)

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in SIGNALS:
        signal.signal(number, ask)
    try:
        yield lambda: asked[0][0] if asked else 0
    finally:
        restore()


def stop_ray() -> None:
    """Stops a Ray that this command started (a cluster that it joined stays up)."""
    if (ray := sys.modules.get("ray")) is not None and ray.is_initialized():
        ray.shutdown()


def _descendants() -> set[Any]:
    import psutil

    return set(psutil.Process().children(recursive=True))


def _end_all(number: int, known: set[Any]) -> None:
    """Ends what this process has started (known: what it had started earlier, and may have lost since), and itself."""
    import psutil

    for process in known | _descendants():
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    os._exit(128 + number)
