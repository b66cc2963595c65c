"""The videos of a shard's rows: local files, copies of remote ones, or remote ones of which only parts are read."""

import errno
import itertools
import os
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hbi.infra import storage
from hbi.pipelines.decoding.clip import Clip
from hbi.pipelines.decoding.decoder import Decoder
from hbi.pipelines.decoding.pieces import RemoteVideo, WholeWanted
from hbi.pipelines.manifest import Row
from hbi.pipelines.sharding.records import Failure

OUT_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
IN_PARTS_BYTES = 16 << 20
"""Remote files of fewer bytes are copied whole: that is two requests."""


@dataclass
class Video:
    """The video of neighbouring rows; of a remote one, parts as long as parts are enough."""

    data: str | RemoteVideo
    """A local path, or what is read in parts."""
    row: Row
    """The first of its rows."""
    staging: str
    """The folder for copies."""

    def clip(self, decoder: Decoder, row: Row) -> Clip | Failure:
        """The clip of one of its rows, or why its bytes cannot be had; DecodeError as the decoder raises it."""
        if isinstance(self.data, RemoteVideo):
            try:
                return decoder.decode(self.data, row.start, row.end)
            except WholeWanted:
                copy = _read(self.row, lambda: storage.local_copy(self.row.video, self.staging))
            except (OSError, ValueError) as error:
                return _failed(row, error)
            if isinstance(copy, Failure):
                return copy
            self.data = copy
        return decoder.decode(self.data, row.start, row.end)

    def close(self) -> None:
        """Deletes a copy."""
        if _remote(self.row.video) and isinstance(self.data, str):
            Path(self.data).unlink()


def fetched(
    rows: list[tuple[str, Row]], staging: str, whole: bool = False
) -> Iterator[tuple[str, Row, Video | Failure]]:
    """Each row with its video, or why there is none. whole: nothing is read in parts.

    Of remote videos the next is fetched while one is decoded; neighbours that cut the same video share it.
    """
    groups = [
        list(group) for _, group in itertools.groupby(rows, key=lambda row: (row[1].video, row[1].fault))
    ]
    with ThreadPoolExecutor(1) as reader:

        def fetch(group: list[tuple[str, Row]]) -> Callable[[], Video | Failure]:
            given = [row for _, row in group]
            if _remote(given[0].video):
                return reader.submit(_fetch, given, staging, whole).result
            return partial(_fetch, given, staging, whole)

        coming = fetch(groups[0])
        for group, following in zip(groups, [*groups[1:], None], strict=True):
            video = coming()
            if following is not None:
                coming = fetch(following)
            for key, row in group:
                yield key, row, video
            if isinstance(video, Video):
                video.close()


def _remote(video: str) -> bool:
    """Whether a video is in object storage; one that is nowhere is not."""
    try:
        return storage.is_remote(video)
    except ValueError:
        return False


def _fetch(rows: list[Row], staging: str, whole: bool) -> Video | Failure:
    """The video of neighbouring rows; remote ones are copied into `staging` unless parts may be enough."""
    row = rows[0]
    if row.fault:
        return Failure("", "", row.video, "manifest", " ".join(row.fault.split()))

    def locate() -> str | RemoteVideo:
        if storage.is_remote(row.video):
            parts = not whole and all(row.end is not None for row in rows) and storage.has_ranges(row.video)
            size = storage.size(row.video) if parts else 0
            if size > IN_PARTS_BYTES:
                return RemoteVideo(row.video, size, partial(storage.read_range, row.video))
            return storage.local_copy(row.video, staging)
        path = storage.absolute(row.video)
        mode = os.stat(path).st_mode  # noqa: PTH116 (a name with a null byte must raise here, not in pathlib)
        if stat.S_ISDIR(mode):
            raise ValueError("is a folder, not a video")
        if not stat.S_ISREG(mode):
            raise ValueError("is not a regular file")
        with open(path, "rb"):  # noqa: PTH123
            return path

    found = _read(row, locate)
    return found if isinstance(found, Failure) else Video(found, row, staging)


def _read(row: Row, read: Callable[[], str | RemoteVideo]) -> str | RemoteVideo | Failure:
    try:
        return read()
    except (OSError, ValueError) as error:
        return _failed(row, error)


def _failed(row: Row, error: OSError | ValueError) -> Failure:
    """Why a video cannot be read; raises what is no fault of the video's."""

    def failure(reason: str, passing: bool = False) -> Failure:
        return Failure("", "", row.video, "read", " ".join(reason.split()), passing)

    if isinstance(error, FileNotFoundError):
        return failure("no such object" if _remote(row.video) else "no such file")
    if isinstance(error, storage.StorageError):
        return failure(str(error), passing=True)
    if isinstance(error, OSError):
        if error.errno in OUT_IS_FULL:
            raise error
        return failure(f"cannot be read: {error.strerror or error}")
    return failure(str(error) if str(error).startswith("is ") else f"cannot be read: {error}")
