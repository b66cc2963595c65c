"""Shards as the loader reads them: where each sample lies in its tar, and remote tars kept nearby."""

import hashlib
import json
import logging
import os
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from hbi.infra import storage
from hbi.pipelines.sample import ShardIndex, ShardInfo

logger = logging.getLogger(__name__)
PART_SECONDS = 6 * 3600
"""An unfinished download older than this was left by a killed process."""


class Entry(NamedTuple):
    """Where a sample lies in its tar."""

    key: str
    """The members' common name, up to the first dot of the base name, as webdataset has it."""
    members: dict[str, tuple[int, int]]
    """What follows that dot -> (offset, bytes)."""


def scan(path: str) -> list[Entry]:
    """The samples of a tar, in order; a damaged tar gives those before the damage."""
    samples: list[Entry] = []
    end = Path(path).stat().st_size
    try:
        with tarfile.open(path, mode="r:") as tar:
            for member in tar:
                folder, _, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")
                if not member.isfile() or member.offset_data + member.size > end:
                    continue
                key = f"{folder}/{stem}" if folder else stem
                if not samples or samples[-1].key != key:
                    samples.append(Entry(key, {}))
                samples[-1].members[extension] = (member.offset_data, member.size)
    except (tarfile.TarError, EOFError, OSError) as error:
        logger.debug("%s: %s", path, error)
    return samples


class ShardCache:
    """Local paths of shards. Remote ones are fetched whole, once for all loader workers, and the oldest dropped."""

    def __init__(self, folder: str, keep: int):
        self.folder, self.keep = Path(folder), keep

    def path(self, uri: str) -> str:
        """A local path with the shard's content. FileNotFoundError, or OSError after the storage's own retries."""
        if not storage.is_remote(uri):
            return storage.absolute(uri)
        target = self.folder / f"{hashlib.sha256(uri.encode()).hexdigest()[:12]}.tar"
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_suffix(".lock")):
            if not target.exists():
                parts = self.folder / "parts"
                parts.mkdir(exist_ok=True)
                Path(storage.local_copy(uri, str(parts))).rename(target)
                self._drop_old(parts)
            os.utime(target)
        return str(target)

    def _drop_old(self, parts: Path) -> None:
        """Readers keep what they have open: an unlinked file lives until the last of them closes it."""
        ages: dict[Path, float] = {}
        for path in [*self.folder.glob("*.tar"), *parts.iterdir()]:
            try:
                ages[path] = path.stat().st_mtime
            except FileNotFoundError:  # another worker was quicker
                continue
        whole = sorted((p for p in ages if p.parent == self.folder), key=lambda p: ages[p])
        left = [p for p in ages if p.parent == parts and ages[p] < time.time() - PART_SECONDS]
        for path in [*whole[: -self.keep], *left]:
            path.unlink(missing_ok=True)


def index_digest(index: ShardIndex) -> str:
    """One digest of all shards and of their order: the data that a run saw."""
    lines = "".join(f"{shard.name} {shard.samples} {shard.sha256}\n" for shard in index.shards)
    return hashlib.sha256(lines.encode()).hexdigest()


def described(index: ShardIndex, split: str) -> Iterator[dict[str, Any]]:
    """What each sample of a split says of itself, shard by shard; what cannot be read is passed over here."""
    for shard in index.of_split(split):
        yield from _described(index, shard)


def _described(index: ShardIndex, shard: ShardInfo) -> Iterator[dict[str, Any]]:
    try:
        with (
            storage.open_file(index.path(shard)) as stream,
            tarfile.open(fileobj=stream, mode="r:") as tar,
        ):
            for member in tar:
                if member.name.endswith(".json") and (content := tar.extractfile(member)) is not None:
                    yield json.loads(content.read().decode("utf-8", "surrogateescape"))
    except (tarfile.TarError, OSError, ValueError) as error:
        logger.debug("%s: %s", shard.name, error)


def captions_of(index: ShardIndex, split: str, limit: int = 500_000) -> Iterator[str]:
    """The captions of a split, shard by shard, up to a limit; what cannot be read is passed over here."""
    left = limit
    for shard in index.of_split(split):
        for clip in _described(index, shard):
            captions = clip.get("captions", [])
            yield from captions
            left -= len(captions)
        if left <= 0:
            return
