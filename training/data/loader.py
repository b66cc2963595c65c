"""Shards to batches: which sample goes to which rank in which step, and how it becomes frames.

The order of an epoch is a pure function of the seed and the epoch: shards are permuted, samples are shuffled
inside windows of a few shards, and the ranks get contiguous parts. Where a run stands is therefore a handful of
numbers (`Position`), and the number of loader workers changes nothing.
"""

import fcntl
import hashlib
import io
import json
import logging
import os
import tarfile
import tempfile
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hbi.infra import storage
from hbi.pipelines.sample import ShardIndex
from hbi.training.parallel import Place
from hbi.training.settings import TrainConfig

log = logging.getLogger(__name__)
AHEAD_BATCHES = 16
"""How many batches before its first use a remote shard is fetched."""
PART_SECONDS = 6 * 3600
"""An unfinished download older than this was left by a killed process."""


# --- which sample when ------------------------------------------------------------------------------------------


def epoch_order(samples: Sequence[int], seed: int, epoch: int, window: int) -> Int[np.ndarray, "n 2"]:
    """Every (shard, index) once: shards permuted, then samples shuffled inside windows of `window` shards."""
    generator = np.random.default_rng([seed, epoch])
    shards = generator.permutation(len(samples))
    parts = [np.empty((0, 2), np.int32)]
    for start in range(0, len(shards), window):
        ids = [
            np.stack([np.full(samples[s], s), np.arange(samples[s])], 1)
            for s in shards[start : start + window]
        ]
        parts.append(generator.permutation(np.concatenate(ids).astype(np.int32)))
    return np.concatenate(parts)


def deal(order: Int[np.ndarray, "n 2"], world: int, batch: int) -> list[list[Int[np.ndarray, "_ 2"]]]:
    """[rank][step]: contiguous parts, every rank the same number of steps, batches that differ by one at most.

    `batch` is the global batch. A batch is empty for a rank that has fewer samples than there are steps.
    """
    steps = -(-len(order) // batch)
    return [np.array_split(part, steps) if steps else [] for part in np.array_split(order, world)]


@dataclass(frozen=True)
class Position:
    """Where a run stands in its data."""

    epoch: int = 0
    """Epochs that are over."""
    done: tuple[tuple[int, int, int], ...] = ()
    """(world, global batch, steps taken), one for each number of workers that worked at this epoch, in turn."""

    def advanced(self, world: int, batch: int) -> "Position":
        """One step later."""
        *before, last = self.done or ((world, batch, 0),)
        if last[:2] == (world, batch):
            return replace(self, done=(*before, (world, batch, last[2] + 1)))
        return replace(self, done=(*self.done, (world, batch, 1)))

    def next_epoch(self) -> "Position":
        """The start of the following epoch."""
        return Position(self.epoch + 1)

    def left(
        self, order: Int[np.ndarray, "n 2"], world: int, batch: int
    ) -> list[list[Int[np.ndarray, "_ 2"]]]:
        """[rank][step] of what the epoch still holds: the same deal going on, or the remainder dealt anew."""
        for done_world, done_batch, steps in self.done:
            dealt = deal(order, done_world, done_batch)
            left = [part[steps:] for part in dealt]
            if (done_world, done_batch, steps) == self.done[-1] and (done_world, done_batch) == (
                world,
                batch,
            ):
                return left
            order = np.concatenate([order[:0], *(ids for part in left for ids in part)])
        return deal(order, world, batch)


def caption_number(captions: int, seed: int, epoch: int, key: str) -> int:
    """Which caption a clip shows in an epoch: each of them once, in an order of the clip's own, then anew."""
    if captions == 1:
        return 0
    turn, place = divmod(epoch, captions)
    return int(np.random.default_rng([seed, turn, zlib.crc32(key.encode())]).permutation(captions)[place])


# --- from tars to frames ----------------------------------------------------------------------------------------


@dataclass
class Batch:
    """The samples of one rank in one step."""

    video: UInt8[Tensor, "batch frames height width 3"]
    """Frames as they were shot; the model normalises them on its device."""
    video_mask: Bool[Tensor, "batch frames"]
    """True where a frame is present."""
    captions: list[str]
    """One for each clip."""
    shards: list[str]
    """The shards that were read, each once."""
    bad: list[tuple[str, str]]
    """(shard, reason) of each sample that could not be read."""
    uncaptioned: int
    """Clips left out because they have no caption."""

    def pin_memory(self) -> "Batch":
        """Called by DataLoader: page-locked frames travel to the device while it computes."""
        return replace(self, video=self.video.pin_memory(), video_mask=self.video_mask.pin_memory())


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
        log.debug("%s: %s", path, error)
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
        with self._locked(target):
            if not target.exists():
                parts = self.folder / "parts"
                parts.mkdir(exist_ok=True)
                Path(storage.local_copy(uri, str(parts))).rename(target)
                self._drop_old(parts)
            os.utime(target)
        return str(target)

    @contextmanager
    def _locked(self, target: Path) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with target.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

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


class Clips(Dataset):
    """Reads batches: `clips[epoch, ids, soon]`. Runs in the loader workers; holds nothing until first used."""

    def __init__(self, index: ShardIndex, config: TrainConfig, cache: str):
        self.shards = index.of_split(config.data.split)
        self.paths = [index.path(shard) for shard in self.shards]
        self.settings, self.seed = config.data, config.seed
        self.frames, self.size = config.model.frames, config.model.towers.image_size
        self.cache = ShardCache(cache, keep=3 * config.data.window)
        self.opened: OrderedDict[int, tuple[io.FileIO, list[Entry]]] = OrderedDict()

    def __getitem__(self, request: tuple[int, Int[np.ndarray, "_ 2"], list[int]]) -> Batch:
        epoch, ids, soon = request
        if soon:
            threading.Thread(target=self._fetch, args=(soon,), daemon=True).start()
        videos, captions, bad = [], [], []
        for shard, number in ids.tolist():
            try:
                frames, caption = self.read(shard, number, epoch)
            except Exception as error:  # whatever a damaged file makes a parser raise
                bad.append((self.shards[shard].name, f"{type(error).__name__}: {error}"))
                continue
            if caption is not None:
                videos.append(frames)
                captions.append(caption)
        video = torch.zeros(len(videos), self.frames, self.size, self.size, 3, dtype=torch.uint8)
        mask = torch.zeros(len(videos), self.frames, dtype=torch.bool)
        for i, frames in enumerate(videos):
            video[i, : len(frames)] = torch.from_numpy(frames)
            mask[i, : len(frames)] = True
        names = [self.shards[s].name for s in dict.fromkeys(ids[:, 0].tolist())]
        return Batch(video, mask, captions, names, bad, len(ids) - len(videos) - len(bad))

    def read(self, shard: int, number: int, epoch: int) -> tuple[UInt8[np.ndarray, "f h w 3"], str | None]:
        """Frames and the epoch's caption (None without captions, and then no frames are decoded)."""
        file, samples = self._open(shard)
        if number >= len(samples):
            raise ValueError(
                f"sample {number} of {self.shards[shard].samples} is not there: the tar is cut short"
            )
        key, members = samples[number]

        def content(name: str) -> bytes:
            offset, length = members[name]
            return os.pread(file.fileno(), length, offset)

        text = json.loads(content("json").decode("utf-8", "surrogateescape"))
        captions = [caption for caption in text["captions"] if caption.strip()]
        names = sorted(
            (n for n in members if n.endswith((".jpg", ".jpeg"))), key=lambda n: int(n.split(".")[0])
        )
        if not 1 <= len(names) <= self.frames:
            raise ValueError(f"{len(names)} frames, expected 1 to {self.frames}")
        if len(names) != len(
            text.get("timestamps", names)
        ):  # a tar cut between two members reads as a shorter clip
            raise ValueError(
                f"{len(names)} of {len(text['timestamps'])} frames are there: the tar is cut short"
            )
        if not captions:
            return np.empty((0, self.size, self.size, 3), np.uint8), None
        video = np.empty((len(names), self.size, self.size, 3), np.uint8)
        for i, name in enumerate(names):
            image = np.asarray(Image.open(io.BytesIO(content(name))).convert("RGB"))
            if image.shape != video.shape[1:]:
                raise ValueError(
                    f"a frame of {image.shape[1]}x{image.shape[0]}, expected {self.size}x{self.size}"
                )
            video[i] = image
        if self.settings.paragraph:
            return video, " ".join(captions)
        return video, captions[caption_number(len(captions), self.seed, epoch, key)]

    def _open(self, shard: int) -> tuple[io.FileIO, list[Entry]]:
        """The shard's file and members: scanned once, the least recently used closed."""
        if shard not in self.opened:
            path = self.cache.path(self.paths[shard])
            self.opened[shard] = (io.FileIO(path), scan(path))
            if len(self.opened) > 2 * self.settings.window:
                self.opened.popitem(last=False)[1][0].close()
        self.opened.move_to_end(shard)
        return self.opened[shard]

    def _fetch(self, shards: list[int]) -> None:
        for shard in shards:
            try:
                self.cache.path(self.paths[shard])
            except OSError as error:  # whoever needs the shard will fail on it, and be counted
                log.debug("%s: %s", self.paths[shard], error)

    def close(self) -> None:
        """Closes the shards that this process has open."""
        while self.opened:
            self.opened.popitem()[1][0].close()


class Loader:
    """The batches of one rank, from any position on."""

    def __init__(self, index: ShardIndex, config: TrainConfig, place: Place):
        settings = config.data
        cache = settings.cache or str(Path(tempfile.gettempdir()) / f"hbi-shards-{os.getuid()}")
        cache = str(
            Path(cache) / hashlib.sha256(index.folder.encode()).hexdigest()[:12] / f"rank-{place.rank}"
        )
        self.clips = Clips(index, config, cache)
        self.settings, self.seed, self.place = settings, config.seed, place
        self.remote = storage.is_remote(index.folder)
        self.samples = [shard.samples for shard in self.clips.shards]
        self.plan: list[tuple[int, Any, list[int]]] = []
        workers = settings.workers
        # Spawned, not forked: Ray's and s3fs's threads do not survive a fork.
        spawned = {"multiprocessing_context": "spawn", "persistent_workers": True, "prefetch_factor": 4}
        # The sampler is our own plan, looked at anew in each epoch; one item of the plan is one batch.
        self.loader = DataLoader(
            self.clips,
            sampler=self.plan,  # type: ignore[arg-type]
            batch_size=None,
            num_workers=workers,
            pin_memory=place.device.type == "cuda",
            **(spawned if workers else {}),
        )

    @property
    def steps_per_epoch(self) -> int:
        """Steps of a whole epoch, the same for every rank and every number of ranks."""
        return -(-sum(self.samples) // self.settings.batch)

    def batches(self, position: Position) -> Iterator[Batch]:
        """What is left of the epoch for this rank, every rank the same number of batches."""
        order = epoch_order(self.samples, self.seed, position.epoch, self.settings.window)
        mine = position.left(order, self.place.world, self.settings.batch)[self.place.rank]
        soon = self._soon(mine) if self.remote else [[]] * len(mine)
        self.plan[:] = [(position.epoch, ids, first) for ids, first in zip(mine, soon, strict=True)]
        yield from self.loader

    def _soon(self, batches: list[Int[np.ndarray, "_ 2"]]) -> list[list[int]]:
        """For each batch the shards that are first needed `AHEAD_BATCHES` later."""
        soon: list[list[int]] = [[] for _ in batches]
        seen: set[int] = set()
        for step, ids in enumerate(batches):
            new = set(ids[:, 0].tolist()) - seen
            seen |= new
            soon[max(0, step - AHEAD_BATCHES)].extend(sorted(new))
        return soon

    def close(self) -> None:
        """Ends the loader workers."""
        self.clips.close()
        iterator = getattr(self.loader, "_iterator", None)
        if iterator is not None:
            iterator._shutdown_workers()
            self.loader._iterator = None


def index_digest(index: ShardIndex) -> str:
    """One digest of all shards and of their order: the data that a run saw."""
    lines = "".join(f"{shard.name} {shard.samples} {shard.sha256}\n" for shard in index.shards)
    return hashlib.sha256(lines.encode()).hexdigest()


def captions_of(index: ShardIndex, split: str, limit: int = 500_000) -> Iterator[str]:
    """The captions of a split, shard by shard, up to a limit; what cannot be read is passed over here."""
    left = limit
    for shard in index.of_split(split):
        try:
            with (
                storage.open_file(index.path(shard)) as stream,
                tarfile.open(fileobj=stream, mode="r:") as tar,
            ):
                for member in tar:
                    if member.name.endswith(".json") and (content := tar.extractfile(member)) is not None:
                        captions = json.loads(content.read().decode("utf-8", "surrogateescape"))["captions"]
                        yield from captions
                        left -= len(captions)
        except (tarfile.TarError, OSError, ValueError, KeyError) as error:
            log.debug("%s: %s", shard.name, error)
        if left <= 0:
            return
