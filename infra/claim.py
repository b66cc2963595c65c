"""One job at a time on an output in object storage: whoever writes there says so, again and again.

Object storage has no locks that every server keeps. An object that changes says that its writer lives, whatever the
clocks; one that has stopped changing was left by a job that was killed.
"""

import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from hbi.infra import storage

BEAT_SECONDS = 4.0
"""Between two signs of life."""
PATIENCE_BEATS = 2.5
"""How long a sign must stay the same before it counts as left behind."""


@contextmanager
def claimed(place: str, what: str) -> Iterator[None]:
    """Inside, the object `place` says that this process writes to `what`; it is gone afterwards.

    Raises ValueError where another process does; what storage raises where it may not be written.
    """
    _wait_for_its_end(place, what)
    token = uuid.uuid4().hex
    storage.write_bytes(place, f"{token} 0".encode())
    time.sleep(BEAT_SECONDS / 4)  # who saw nothing there in the same moment has written by now
    if not _read(place).startswith(token):
        raise ValueError(_busy(what))
    over = threading.Event()

    def beat() -> None:
        number = 0
        while not over.wait(BEAT_SECONDS):
            number += 1
            with suppress(OSError):
                storage.write_bytes(place, f"{token} {number}".encode())

    thread = threading.Thread(target=beat, name="claim", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        with suppress(OSError):
            storage.delete(place)


def _wait_for_its_end(place: str, what: str) -> None:
    """Returns where nobody writes, or where who did is gone; ValueError at the first sign of life."""
    before = _read(place)
    until = time.monotonic() + BEAT_SECONDS * PATIENCE_BEATS
    while before and time.monotonic() < until:
        time.sleep(BEAT_SECONDS / 4)
        now = _read(place)
        if not now:
            return
        if now != before:
            raise ValueError(_busy(what))


def _read(place: str) -> str:
    try:
        return storage.read_bytes(place).decode()
    except FileNotFoundError:
        return ""


def _busy(what: str) -> str:
    return f"{what}: another run is writing there: wait, or choose another folder"
