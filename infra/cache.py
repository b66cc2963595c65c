"""Remote model folders, kept on this machine: fetched once, whole or absent."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from hbi.infra import storage


def cache_folder() -> Path:
    """HBI_CACHE, else ~/.cache/hbi."""
    return Path(os.environ.get("HBI_CACHE") or Path.home() / ".cache" / "hbi")


def fetch_folder(folder: str) -> Path:
    """A remote model folder in the cache. Its key is what lies there, so that a changed model is fetched anew.

    Raises what storage raises for a folder that may not be read; a folder that is not there is an empty one.
    """
    sizes = storage.list_sizes(folder, recursive=True)
    small = [storage.read_bytes(path) for path in sizes if path.endswith("config.json")]

    def fetch(target: Path) -> None:
        for path in sizes:
            place = target / path.removeprefix(folder.rstrip("/") + "/")
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(storage.local_copy(path, str(target)), place)

    return cached(f"{list(sizes.items())} {small}", fetch)


def cached(key: str, fill: Callable[[Path], object]) -> Path:
    """A folder filled once for each key; whole or absent, and fetched by one process while the others wait."""
    from filelock import FileLock

    cache = cache_folder() / "models"
    folder = cache / hashlib.sha256(key.encode()).hexdigest()[:32]
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f".{folder.name}.lock"):
        if not folder.exists():
            scratch = Path(tempfile.mkdtemp(dir=cache, prefix="."))
            try:
                fill(scratch)
                scratch.rename(folder)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return folder
