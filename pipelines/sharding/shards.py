"""Shards: the rows that are planned for it become one tar, whole or not at all, with a commit record that says so.

The tar is written to a staging file, put in its place in one step, and recorded at last: counts, bytes, digest, and
a failure for every row that has no sample.
"""

import hashlib
import os
import tarfile
import tempfile
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import IO, TypeVar

from hbi.infra import storage
from hbi.pipelines.decoding.clip import DecodeError
from hbi.pipelines.decoding.decoder import Decoder
from hbi.pipelines.manifest import Row
from hbi.pipelines.sample import Sample, ShardInfo, members_of
from hbi.pipelines.sharding.fetch import OUT_IS_FULL, Video, fetched
from hbi.pipelines.sharding.filters import Candidate, FilterSettings, Fingerprint, digest, frame_stats, reject
from hbi.pipelines.sharding.plan import ShardPlan, read_rows
from hbi.pipelines.sharding.records import ClipStats, Failure, ShardManifest, record_path, staging_folder
from hbi.pipelines.sharding.settings import ShardSettings

Item = TypeVar("Item")


class ShardError(Exception):
    """Something that stops the run, in one line: the output cannot be written, the storage is down."""


def decoder(settings: ShardSettings) -> Decoder:
    """A decoder with the limits of the settings; close it."""
    return Decoder(
        settings.frame_settings,
        clip_timeout=settings.clip_timeout,
        clip_memory=settings.clip_memory << 20,
        quality=settings.jpeg_quality,
        decoder=settings.decoder,
    )


# --- One shard ------------------------------------------------------------------------------------------------------


def make_shard(
    out: str,
    shard_plan: ShardPlan,
    settings: ShardSettings,
    decoder: Decoder,
    folder: str | None = None,
    row_done: Callable[[], object] = lambda: None,
) -> ShardManifest:
    """Decodes a shard's clips into its tar, puts it in place and records it. ShardError where nothing can be done.

    out: where the plan lies, and the shard will, unless `folder` says otherwise. row_done: called after each row.
    """

    def fill(stream: IO[bytes], staging: str) -> ShardManifest:
        failures: list[Failure] = []
        clips: list[ClipStats] = []
        fingerprints: list[tuple[int, Fingerprint]] = []
        rows = read_rows(out, shard_plan)
        made = _ahead(_made(rows, staging, settings, decoder))
        with ShardWriter(stream) as writer, closing(made):
            for key, result, found in made:
                row_done()
                if isinstance(result, Failure):
                    failures.append(result)
                    continue
                writer.add(result)
                clips.append(stats_of(result))
                if found is not None:
                    fingerprints.append((int(key), found))
        if len(rows) > 2 and len(failures) == len(rows) and all(failure.passing for failure in failures):
            raise storage.StorageError(failures[0].reason)
        return ShardManifest(
            ShardInfo(shard_plan.name, shard_plan.split, len(clips), 0, ""),
            len(rows),
            failures,
            clips,
            fingerprints,
        )

    return commit(out if folder is None else folder, shard_plan.name, fill)


def commit(folder: str, name: str, fill: Callable[[IO[bytes], str], ShardManifest]) -> ShardManifest:
    """`fill(stream, staging folder)` writes a tar, which is then put in place, and recorded at last."""
    with tempfile.TemporaryDirectory(prefix=name, dir=staging_folder(folder)) as staging:
        tar = Path(staging) / "shard.tar"
        with stopping(folder, name):
            with tar.open("wb") as stream:
                record = fill(stream, staging)
            record = replace(record, shard=_describe(tar, record.shard))
            if record.shard.samples:
                storage.put_file(str(tar), storage.join(folder, name), move=True)
            storage.write_bytes(record_path(folder, name), record.json())
    return record


@contextmanager
def stopping(folder: str, name: str) -> Iterator[None]:
    """Inside, what disk or storage refuse of a shard is a ShardError that says what to do."""
    try:
        yield
    except storage.StorageError as error:
        raise ShardError(f"{error}. Run again to go on from here") from error
    except OSError as error:
        if error.errno in OUT_IS_FULL:
            raise ShardError(
                f"no space left for {name} ({error.strerror}): free some and run again; finished shards stay"
            ) from error
        raise ShardError(f"{name} cannot be written to {folder}: {error}") from error


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
    rows: list[tuple[str, Row]], staging: str, settings: ShardSettings, decoder: Decoder
) -> Iterator[tuple[str, Sample | Failure, Fingerprint | None]]:
    """What becomes of each row, and the print of a sample where clips are compared with each other."""
    # The bytes of a video are compared, or decord reads them: all of them are wanted.
    whole = settings.filters.same or settings.decoder == "decord"
    for key, row, video in fetched(rows, staging, whole):
        result = _sample(key, row, video, settings.filters, decoder)
        found = None
        if settings.filters.compares and isinstance(result, Sample) and isinstance(video, Video):
            found = fingerprint_of(result.frames, str(video.data), row, settings.filters)
        yield key, result, found


def _sample(
    key: str, row: Row, video: Video | Failure, filters: FilterSettings, decoder: Decoder
) -> Sample | Failure:
    """The sample of a row with its video, or why there is none."""
    if isinstance(video, Failure):
        return replace(video, key=key, id=row.id)
    try:
        clip = video.clip(decoder, row)
        if isinstance(clip, Failure):
            return replace(clip, key=key, id=row.id)
    except DecodeError as error:
        return Failure(key, row.id, row.video, "decode", " ".join(str(error).split()))
    reason = reject(Candidate(row, clip), filters)
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
        truncated=clip.truncated,
        picture=clip.picture,
        timing=clip.timing,
        extra=row.extra,
        frames=clip.jpegs,
    )


def fingerprint_of(jpegs: list[bytes], video: str, row: Row, filters: FilterSettings) -> Fingerprint:
    """By what a sample is recognised, as far as the filters ask."""
    return Fingerprint(
        digest(video, row.start, row.end) if filters.same else "",
        frame_stats(jpegs).hash if filters.near is not None else "",
    )


def stats_of(sample: Sample) -> ClipStats:
    """What the summary and the report say of a sample."""
    words = len(sample.captions[0].split()) if sample.captions else 0
    return ClipStats(
        seconds=round(sample.end - sample.start, 6),
        fps=sample.fps,
        width=sample.width,
        height=sample.height,
        words=words,
        decoder=sample.decoder,
        truncated=sample.truncated,
        captions=len(sample.captions),
    )


def _describe(tar: Path, shard: ShardInfo) -> ShardInfo:
    """Size and digest of a finished tar; it is flushed to disk, so that a record never outlives its tar."""
    if not shard.samples:
        return shard
    with tar.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        os.fsync(stream.fileno())
    return replace(shard, bytes=tar.stat().st_size, sha256=digest)
