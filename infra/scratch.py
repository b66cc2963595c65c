"""Temporary folders of worker processes, which may be killed at any time: whoever comes next removes what they left."""

import contextlib
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from hbi.infra.nodes import on_every_node

if TYPE_CHECKING:
    from filelock import BaseFileLock

END_SECONDS = 1.0
"""How long a job's workers may take to end before what they leave is looked for."""
_ours: "BaseFileLock | None" = None
"""Held for the life of the process: it says that its folder is in use."""


def _root() -> Path:
    """Where the folders of all processes of this user lie, each beside its lock."""
    return Path(os.environ.get("HBI_SCRATCH") or tempfile.gettempdir()) / f"hbi-scratch-{os.getuid()}"


def scratch_folder() -> Path:
    """A temporary folder of this process's own. Removes the folders of processes that were killed."""
    from filelock import FileLock

    global _ours
    if _ours is not None:
        return Path(_ours.lock_file).with_suffix("")
    sweep_scratch()
    root = _root()
    while True:
        folder = root / uuid.uuid4().hex
        folder.mkdir(parents=True)
        lock = FileLock(folder.with_suffix(".lock"))
        lock.acquire()
        if folder.exists() and Path(lock.lock_file).exists():  # nobody swept it in between
            break
    _ours = lock
    return folder


def claim_scratch() -> Path:
    """Makes this process's temporary files, and those of its children, lie in its `scratch_folder` from now on."""
    folder = scratch_folder()
    os.environ["HBI_SCRATCH"] = str(folder.parents[1])
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    return folder


def sweep_scratch(seconds: float = 0.0) -> None:
    """Removes the folders of processes that are gone; waits up to `seconds` for those that are about to be."""
    from filelock import FileLock, Timeout

    deadline = time.monotonic() + seconds
    root = _root()
    while True:
        for path in root.glob("*.lock"):
            with contextlib.suppress(Timeout, OSError), FileLock(path, timeout=0):
                shutil.rmtree(path.with_suffix(""), ignore_errors=True)
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            root.rmdir()  # where it is empty
        if not root.exists() or time.monotonic() >= deadline:
            return
        time.sleep(0.1)


@contextlib.contextmanager
def scratch_swept() -> Iterator[None]:
    """Around work on Ray: what its killed workers left is removed afterwards, on every node.

    Its own errors are passed over, so that what the work raised is what is seen where Ray is lost: who comes next
    sweeps again.
    """
    try:
        yield
    finally:
        with contextlib.suppress(Exception):
            on_every_node(sweep_scratch, END_SECONDS)
