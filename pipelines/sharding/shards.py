"""Shards: the rows of one planned unit become one tar, whole or not at all, with a commit record that says so.

The tar is written to a spool file, put in its place in one step, and recorded at last: counts, bytes, digest, and
a failure for every row that has no sample.
"""

import errno
import hashlib
import itertools
import os
import stat
import tarfile
import tempfile
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import IO, Any, TypeVar

from hbi.infra import storage
from hbi.model.frames import FrameSettings
from hbi.pipelines.decoding.clip import DecodeError
from hbi.pipelines.decoding.decoder import Decoder
from hbi.pipelines.manifest import Row
from hbi.pipelines.sample import Sample, ShardInfo, members_of
from hbi.pipelines.sharding.filters import FilterSettings, Print, digest, look, reject
from hbi.pipelines.sharding.plan import Unit, read_unit
from hbi.pipelines.sharding.records import ClipFacts, Failure, Record, record_path, spool_of

Item = TypeVar("Item")
OUT_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class ShardError(Exception):
    """Something that stops the run, in one line: the output cannot be written, the storage is down."""


@dataclass(frozen=True)
class ShardSettings:
    """How a manifest becomes shards."""

    frames: FrameSettings = field(default_factory=FrameSettings)
    """Which frames of a clip, and their size."""
    samples_per_shard: int = 100
    """Manifest rows per tar; those that fail leave it smaller."""
    jpeg_quality: int = 95
    """Of the frames, 1 to 100."""
    clip_timeout: float = 60.0
    """Seconds after which the decoding of a clip is ended and recorded as a failure."""
    clip_memory: int = 2048
    """MiB that the decoding of a clip may take."""

    filters: FilterSettings = field(default_factory=FilterSettings)
    """Which clips are not wanted."""

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1:
            raise ValueError(f"samples_per_shard is {self.samples_per_shard}, must be at least 1")
        if not 1 <= self.jpeg_quality <= 100:
            raise ValueError(f"jpeg_quality is {self.jpeg_quality}, must lie between 1 and 100")
        if self.clip_memory < 64:
            raise ValueError(f"clip_memory is {self.clip_memory}, must be at least 64 MiB")
        if self.clip_timeout <= 0:
            raise ValueError(f"clip_timeout is {self.clip_timeout}, must be above 0 seconds")

    def identity(self) -> dict[str, Any]:
        """What decides the bytes of the shards: all but the patience with a clip."""
        frames = asdict(self.frames)
        return {
            "frames": frames.pop("count"),
            **frames,
            "jpeg_quality": self.jpeg_quality,
            "samples_per_shard": self.samples_per_shard,
            "filters": {
                name: value for name, value in asdict(self.filters).items() if value not in (None, False)
            },
        }

    @property
    def compares(self) -> bool:
        """Whether clips are compared with earlier ones."""
        return self.filters.same or self.filters.near is not None


def decoder(settings: ShardSettings) -> Decoder:
    """A decoder with the limits of the settings; close it."""
    return Decoder(
        settings.frames,
        clip_timeout=settings.clip_timeout,
        clip_memory=settings.clip_memory << 20,
        quality=settings.jpeg_quality,
    )


# --- One shard ------------------------------------------------------------------------------------------------------


def make_shard(
    out: str, unit: Unit, settings: ShardSettings, decoder: Decoder, folder: str | None = None
) -> Record:
    """Decodes a unit's clips into its tar, puts it in place and records it. ShardError where nothing can be done.

    out: where the plan lies, and the shard will, unless `folder` says otherwise.
    """

    def fill(stream: IO[bytes], spool: str) -> Record:
        failures: list[Failure] = []
        clips: list[ClipFacts] = []
        prints: list[tuple[int, Print]] = []
        rows = read_unit(out, unit)
        made = _ahead(_made(rows, spool, settings, decoder))
        with ShardWriter(stream) as writer, closing(made):
            for key, result, found in made:
                if isinstance(result, Failure):
                    failures.append(result)
                    continue
                writer.add(result)
                clips.append(facts_of(result))
                if found is not None:
                    prints.append((int(key), found))
        if len(rows) > 2 and len(failures) == len(rows) and all(failure.passing for failure in failures):
            raise storage.StorageError(failures[0].reason)
        return Record(ShardInfo(unit.name, unit.split, len(clips), 0, ""), len(rows), failures, clips, prints)

    return commit(out if folder is None else folder, unit.name, fill)


def commit(folder: str, name: str, fill: Callable[[IO[bytes], str], Record]) -> Record:
    """`fill(stream, spool folder)` writes a tar, which is then put in place, and recorded at last."""
    with tempfile.TemporaryDirectory(prefix=name, dir=spool_of(folder)) as spool:
        tar = Path(spool) / "shard.tar"
        try:
            with tar.open("wb") as stream:
                record = fill(stream, spool)
            record = replace(record, shard=_describe(tar, record.shard))
            if record.shard.samples:
                storage.put_file(str(tar), storage.join(folder, name), move=True)
            storage.write_bytes(record_path(folder, name), record.json())
        except storage.StorageError as error:
            raise ShardError(f"{error}. Run again to go on from here") from error
        except OSError as error:
            if error.errno in OUT_IS_FULL:
                raise ShardError(
                    f"no space left for {name} ({error.strerror}): free some and run again; finished shards stay"
                ) from error
            raise ShardError(f"{name} cannot be written to {folder}: {error}") from error
    return record


class ShardWriter:
    """Samples into a tar; the same samples give the same bytes."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._tar = tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._tar.close()

    def add(self, sample: Sample) -> None:
        """Appends a sample. Headers hold nothing but name and size: no time, no owner."""
        for name, content in members_of(sample):
            header = tarfile.TarInfo(name)
            header.size, header.mode = len(content), 0o644
            self._tar.addfile(header, BytesIO(content))


def _ahead(items: Iterator[Item]) -> Generator[Item]:
    """The items; a thread makes the next one while one is used: a decoder never waits for the tar."""
    with ThreadPoolExecutor(1) as maker:
        coming = maker.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = maker.submit(next, items, None)
            yield item


def _made(
    rows: list[tuple[str, Row]], spool: str, settings: ShardSettings, decoder: Decoder
) -> Iterator[tuple[str, Sample | Failure, Print | None]]:
    """What becomes of each row, and the print of a sample where clips are compared with each other."""
    for key, row, video in _fetched(rows, spool):
        result = _sample(key, row, video, settings.filters, decoder)
        found = None
        if settings.compares and isinstance(result, Sample) and isinstance(video, str):
            found = print_of(result.frames, video, row, settings.filters)
        yield key, result, found


def _fetched(rows: list[tuple[str, Row]], spool: str) -> Iterator[tuple[str, Row, str | Failure]]:
    """Each row with a local path of its video, or why there is none.

    Of remote videos the next is fetched while one is decoded; neighbours that cut the same video share its copy.
    """
    groups = [list(group) for _, group in itertools.groupby(rows, key=lambda row: row[1].video)]
    with ThreadPoolExecutor(1) as reader:

        def fetch(group: list[tuple[str, Row]]) -> Callable[[], str | Failure]:
            row = group[0][1]
            return (
                reader.submit(_fetch, row, spool).result
                if _remote(row.video)
                else partial(_fetch, row, spool)
            )

        coming = fetch(groups[0])
        for group, following in zip(groups, [*groups[1:], None], strict=True):
            video = coming()
            if following is not None:
                coming = fetch(following)
            for key, row in group:
                yield key, row, video
            if isinstance(video, str) and _remote(group[0][1].video):
                Path(video).unlink()


def _remote(video: str) -> bool:
    """Whether a video is in object storage; one that is nowhere is not."""
    try:
        return storage.is_remote(video)
    except ValueError:
        return False


def _fetch(row: Row, spool: str) -> str | Failure:
    """A local path from which the row's video can be read; remote ones are copied into `spool`."""

    def failure(reason: str, passing: bool = False) -> Failure:
        return Failure("", "", row.video, "read", " ".join(reason.split()), passing)

    try:
        if storage.is_remote(row.video):
            return storage.local_copy(row.video, spool)
        path = storage.absolute(row.video)
        mode = os.stat(path).st_mode  # noqa: PTH116 (a name with a null byte must raise here, not in pathlib)
        if stat.S_ISDIR(mode):
            return failure("is a folder, not a video")
        if not stat.S_ISREG(mode):
            return failure("is not a regular file")
        with open(path, "rb"):  # noqa: PTH123
            return path
    except FileNotFoundError:
        return failure("no such file" if not storage.is_remote(row.video) else "no such object")
    except storage.StorageError as error:
        return failure(str(error), passing=True)
    except OSError as error:
        if error.errno in OUT_IS_FULL:
            raise
        return failure(f"cannot be read: {error.strerror or error}")
    except ValueError as error:
        return failure(f"cannot be read: {error}")


def _sample(
    key: str, row: Row, video: str | Failure, filters: FilterSettings, decoder: Decoder
) -> Sample | Failure:
    """The sample of a row whose video lies at a local path, or why there is none."""
    if isinstance(video, Failure):
        return replace(video, key=key, id=row.id)
    try:
        clip = decoder.decode(video, row.start, row.end)
    except DecodeError as error:
        return Failure(key, row.id, row.video, "decode", " ".join(str(error).split()))
    reason = reject(row, clip, look(clip.jpegs) if filters.looks else None, filters)
    if reason is not None:
        return Failure(key, row.id, row.video, "filter", reason)
    return Sample(
        key=key,
        id=row.id,
        captions=row.captions,
        qa=row.qa,
        source=row.video,
        start=clip.start,
        end=clip.end,
        fps=clip.fps,
        duration=clip.duration,
        timestamps=clip.timestamps,
        width=clip.width,
        height=clip.height,
        decoder=clip.decoder,
        extra=row.extra,
        frames=clip.jpegs,
    )


def print_of(jpegs: list[bytes], video: str, row: Row, filters: FilterSettings) -> Print:
    """By what a sample is recognised, as far as the filters ask."""
    return Print(
        digest(video, row.start, row.end) if filters.same else "",
        look(jpegs).hash if filters.near is not None else "",
    )


def facts_of(sample: Sample) -> ClipFacts:
    """What the summary and the report say of a sample."""
    words = len(sample.captions[0].split()) if sample.captions else 0
    return ClipFacts(
        round(sample.end - sample.start, 6), sample.fps, sample.width, sample.height, words, sample.decoder
    )


def _describe(tar: Path, shard: ShardInfo) -> ShardInfo:
    """Size and digest of a finished tar; it is flushed to disk, so that a record never outlives its tar."""
    if not shard.samples:
        return shard
    with tar.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        os.fsync(stream.fileno())
    return replace(shard, bytes=tar.stat().st_size, sha256=digest)
