"""Waiting for what another process or thread does."""

import time
from collections.abc import Callable


def wait_for(condition: Callable[[], bool], seconds: float, what: str = "waited in vain") -> None:
    """Until `condition()` holds (an OSError counts as not yet); AssertionError `what` after so many seconds."""
    until = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return
        except OSError:
            pass
        assert time.monotonic() < until, what
        time.sleep(0.1)
