"""Remote model folders, kept on this machine: fetched once, whole or absent."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from hbi.infra import storage


def fetch_folder(folder: str) -> Path:
    """A remote model folder in the cache. Its key is what lies there, so that a changed model is fetched anew."""
    files = storage.list_files(folder, recursive=True)
    content = [(path, storage.size(path)) for path in files]
    small = [storage.read_bytes(path) for path in files if path.endswith("config.json")]

    def fetch(target: Path) -> None:
        for path in files:
            place = target / path.removeprefix(folder.rstrip("/") + "/")
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(storage.local_copy(path, str(target)), place)

    return cached(f"{content} {small}", fetch)


def cached(key: str, fill: Callable[[Path], object]) -> Path:
    """A folder filled once for each key; whole or absent, whoever else fetches the same at the same time."""
    cache = Path(os.environ.get("HBI_CACHE") or Path.home() / ".cache" / "hbi") / "models"
    folder = cache / hashlib.sha256(key.encode()).hexdigest()[:32]
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=cache, prefix="."))
        try:
            fill(scratch)
            scratch.rename(folder)
        except OSError:
            if not folder.exists():
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder
