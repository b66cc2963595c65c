"""The shard contract: what one sample is, how it lies in a tar, and the index that lists the tars.

A sample is one captioned clip: `<key>.json` (text and times) followed by `<key>.00.jpg`, `<key>.01.jpg`, … in
time order. The key is the number of the clip's manifest row, so any `id`, whatever characters it holds, is safe.
"""

import hashlib
import json
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from typing import IO, Any

import numpy as np

from hbi.infra import storage
from hbi.model.config import ModelConfig
from hbi.model.frames import from_jpegs

INDEX_NAME = "index.json"
PARTS_FOLDER = "index"
"""Of an index that is too long for one file."""
FAILURES_NAME = "failures.jsonl"
READERS = 16
"""Parts of an index that are read at a time."""


@dataclass(frozen=True)
class Sample:
    """One clip with its text. Times are presentation times in seconds of the source video."""

    key: str
    """Manifest row number, zero-padded: unique in the corpus, free of dots and slashes."""
    id: str
    """The manifest's id, as it was."""
    captions: list[str]
    """Zero or more sentences that describe the clip."""
    qa: list[dict[str, str]]
    """`{"question", "answer"}` pairs."""
    source: str
    """Path or URI of the video."""
    start: float
    """Where the clip begins, in seconds."""
    end: float
    """Where the clip ends, in seconds."""
    fps: float
    """Frames per second of the source."""
    duration: float
    """Length of the source video in seconds."""
    timestamps: list[float]
    """Presentation time of each frame, in seconds."""
    width: int
    """Width of the source in pixels, as shown (rotation applied)."""
    height: int
    """Height of the source in pixels, as shown."""
    decoder: str
    """The decoder that made the frames."""
    truncated: bool = False
    """The source breaks off before its end: `duration` is that of what is there."""
    picture: list[str] = field(default_factory=list)
    """What was done to show the pictures as a player does: turned, made square, tone-mapped, deinterlaced."""
    timing: list[str] = field(default_factory=list)
    """What was done about times that are not as the source has them."""
    extra: dict[str, Any] = field(default_factory=dict)
    """The manifest's other columns, carried along."""
    frames: list[bytes] = field(default_factory=list, repr=False)
    """JPEG bytes, in time order."""

    def images(self) -> np.ndarray:
        """The frames as uint8 [frames, height, width, 3]; raises OSError on a broken JPEG."""
        return from_jpegs(self.frames)


def members_of(sample: Sample) -> list[tuple[str, bytes]]:
    """The tar members of a sample, name and content, in the order in which they are written."""
    meta = {key: value for key, value in asdict(sample).items() if key not in ("key", "frames")}
    text = json.dumps(meta, ensure_ascii=False, sort_keys=True)
    try:
        content = text.encode()
    except (
        UnicodeEncodeError
    ):  # half a character, or a file name that is not UTF-8: JSON's own escapes hold both
        content = json.dumps(meta, sort_keys=True).encode()
    frames = [(f"{sample.key}.{i:02d}.jpg", jpeg) for i, jpeg in enumerate(sample.frames)]
    return [(f"{sample.key}.json", content), *frames]


def sample_of(key: str, members: dict[str, bytes]) -> Sample:
    """The inverse of `members_of`; `members` maps what follows the key's dot to content. KeyError without json."""
    meta = json.loads(members["json"])
    known = {f.name for f in fields(Sample)} - {"key", "frames"}
    names = sorted((name for name in members if name.endswith(".jpg")), key=lambda name: int(name[:-4]))
    return Sample(
        key=key, frames=[members[n] for n in names], **{k: v for k, v in meta.items() if k in known}
    )


def read_shard(stream: IO[bytes]) -> Iterator[Sample]:
    """The samples of a tar, read as a stream. A truncated tar raises tarfile.ReadError after its last whole sample."""
    key, members = None, {}
    with tarfile.open(fileobj=stream, mode="r|") as tar:
        for member in tar:
            name, _, extension = member.name.partition(".")
            if name != key and key is not None:
                yield sample_of(key, members)
                members = {}
            key = name
            content = tar.extractfile(member)
            if content is not None:
                members[extension] = content.read()
    if key is not None:
        yield sample_of(key, members)


@dataclass(frozen=True)
class ShardInfo:
    """One tar of the index."""

    name: str
    """File name inside the shard folder, `<split>-<000000>.tar`."""
    split: str
    """`train`, `val`, `test`, or whatever the manifest said."""
    samples: int
    """How many samples it holds."""
    bytes: int
    """Its size."""
    sha256: str
    """Its digest, in hexadecimal."""


@dataclass(frozen=True)
class ShardIndex:
    """`index.json`, and the parts that it names: every shard of a folder, and the settings that made them."""

    folder: str
    """Local folder or s3:// URI."""
    settings: dict[str, Any]
    """How the clips were cut: frames, size, choice, …"""
    shards: list[ShardInfo]
    """All shards, by name."""

    @staticmethod
    def read(folder: str) -> "ShardIndex":
        """The index of a shard folder; ValueError names the folder if it is none."""
        try:
            index = json.loads(storage.read_bytes(storage.join(folder, INDEX_NAME)))
            if "parts" in index:
                with ThreadPoolExecutor(READERS) as readers:
                    lists = readers.map(lambda part: _part(folder, **part), index["parts"])
                    shards = [shard for some in lists for shard in some]
            else:
                shards = [ShardInfo(**shard) for shard in index["shards"]]
            return ShardIndex(folder, index["settings"], shards)
        except FileNotFoundError:
            raise ValueError(
                f"{folder}: not a shard folder (no {INDEX_NAME}): make one with `hbi shard`"
            ) from None
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{folder}/{INDEX_NAME}: not a shard index ({error}): run `hbi shard` again"
            ) from error

    def of_split(self, split: str) -> list[ShardInfo]:
        """The shards of one split; ValueError if there are none."""
        found = [shard for shard in self.shards if shard.split == split and shard.samples]
        if not found:
            have = ", ".join(sorted({shard.split for shard in self.shards})) or "no split at all"
            raise ValueError(f"{self.folder}: no samples in split {split!r} (it has {have})")
        return found

    def path(self, shard: ShardInfo) -> str:
        """Where a shard lies."""
        return storage.join(self.folder, shard.name)


def _part(folder: str, name: str, sha256: str, **_: int) -> list[ShardInfo]:
    try:
        content = storage.read_bytes(storage.join(folder, name))
    except FileNotFoundError:
        raise ValueError(f"{name} is missing") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(f"{name} is not the part of this index")
    return [ShardInfo(**shard) for shard in json.loads(content)["shards"]]


def check_shards(index: ShardIndex, model: ModelConfig, flags: str = "") -> None:
    """Refuses shards whose frames are not those that the model takes. flags: where the caller can set the model's."""
    expected = {"frames": model.frames, "size": model.towers.image_size}
    for name, ours in expected.items():
        theirs = index.settings.get(name)
        if theirs is not None and theirs != ours:
            field = "frames" if name == "frames" else "towers.image-size"
            raise ValueError(
                f"{index.folder}: shards made with {name} {theirs}, but the model takes {ours}: make them with "
                f"`hbi shard --frames {expected['frames']} --size {expected['size']}`"
                + (f", or set {flags}{field} {theirs}" if flags else "")
            )
