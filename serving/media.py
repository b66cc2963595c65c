"""Videos that clients may name and play: inside the roots that were allowed, by pieces, with ranges and an ETag."""

import hashlib
import mimetypes
import os
import posixpath
import re
import stat
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import anyio
from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from hbi.infra import storage
from hbi.pipelines.decoding.filetype import refusal
from hbi.serving.index.table import ClipTable
from hbi.serving.refusal import Refused

PIECE_BYTES = 256 * 1024
"""Read and sent at once; the next piece is read when the client has taken this one."""
REMOTE_PIECE_BYTES = 2 * 1024 * 1024
"""The same of an object in s3://, where every piece is a request."""
STORAGE_SECONDS = 15.0
"""How long storage may take to say what it knows of a file."""
HEAD_BYTES = 4096
"""What a file is told by."""
STRAY_SECONDS = 24 * 3600.0
"""Age at which an upload that no clip has is deleted: longer than any request, and than clocks are apart."""
KINDS = {
    ".mp4": "video/mp4", ".m4v": "video/mp4", ".mov": "video/quicktime", ".webm": "video/webm",
    ".mkv": "video/x-matroska", ".avi": "video/x-msvideo", ".ogv": "video/ogg", ".mpg": "video/mpeg",
    ".mpeg": "video/mpeg", ".ts": "video/mp2t", ".flv": "video/x-flv", ".wmv": "video/x-ms-wmv",
    ".3gp": "video/3gpp", ".gif": "image/gif",
}  # fmt: skip
Found = TypeVar("Found")


@dataclass(frozen=True)
class MediaRoots:
    """Where videos may lie."""

    roots: tuple[str, ...]
    """Folders and s3:// prefixes that were allowed."""
    uploads: str
    """The folder of the videos that came with a request."""
    max_bytes: int
    """Largest video that is taken in."""

    @staticmethod
    def of(roots: list[str], uploads: str, max_bytes: int) -> "MediaRoots":
        """ValueError for a root that is no folder."""
        known = []
        for root in roots:
            absolute = storage.absolute(root)
            if not storage.is_remote(absolute):
                if not Path(absolute).is_dir():
                    raise ValueError(f"--media-root {root}: not a folder")
                absolute = os.path.realpath(absolute)
            known.append(absolute.rstrip("/") or "/")
        return MediaRoots(tuple(known), uploads, max_bytes)

    def inside(self, video: str) -> str:
        """The place that a path or URI leads to, links and `..` resolved; 403 for what is no upload and in no root."""
        for place in self._places(video):
            if self.is_upload(place) or any(_below(place, root) for root in self.roots):
                return place
        where = "no --media-root is set" if not self.roots else "it lies in no --media-root"
        raise Refused(403, f"{_shown(video)}: not allowed ({where})")

    def to_add(self, video: str) -> str:
        """The same for a video to be taken in: 422 for what is no regular file there, 413 for one that is too large."""
        place = self.inside(video)
        if self.is_upload(place):  # it goes with the clip that it came with
            raise Refused(403, f"{_shown(video)}: not allowed (it is the upload of another clip)")
        try:
            if not storage.is_remote(place):
                mode = Path(place).stat().st_mode
                if not stat.S_ISREG(mode):
                    what = "a folder" if stat.S_ISDIR(mode) else "no regular file"
                    raise Refused(422, f"{_shown(video)}: {what}, not a video")
            size = storage.size(place)
        except FileNotFoundError:
            raise Refused(422, f"{_shown(video)}: there is no such file") from None
        except PermissionError:
            raise Refused(422, f"{_shown(video)}: the server may not read it") from None
        if size > self.max_bytes:
            raise Refused(413, f"{_shown(video)}: {size} bytes, the server takes {self.max_bytes}")
        return place

    def is_upload(self, source: str) -> bool:
        """Whether a source came with a request."""
        return _below(source, self.uploads.rstrip("/")) or _below(source, self._real_uploads())

    def _real_uploads(self) -> str:
        return self.uploads if storage.is_remote(self.uploads) else os.path.realpath(self.uploads)

    def _places(self, video: str) -> Iterator[str]:
        """What a path or URI may mean: a relative path is looked for in every root."""
        if "\0" in video:
            return
        try:
            remote = storage.is_remote(video)
        except ValueError:  # a scheme that is not read here
            return
        if remote:
            yield _tidy(video)
        elif video.lower().startswith("file://") or video.startswith("/"):
            yield os.path.realpath(storage.absolute(video))
        else:
            for root in self.roots:
                joined = storage.join(root, video)
                yield _tidy(joined) if storage.is_remote(root) else os.path.realpath(joined)


def _tidy(uri: str) -> str:
    return "s3://" + posixpath.normpath("/" + uri[len("s3://") :]).lstrip("/")


def _below(place: str, root: str) -> bool:
    return place.startswith(root if root.endswith("/") else root + "/")


def _shown(video: str) -> str:
    return video.encode("utf-8", "backslashreplace").decode()[:300]


@contextmanager
def local_file(place: str) -> Iterator[str]:
    """A local path of a video while it is looked at; what is remote is fetched into a scratch folder."""
    if not storage.is_remote(place):
        yield place
        return
    with tempfile.TemporaryDirectory(prefix="hbi-") as scratch:
        yield storage.local_copy(place, scratch)


async def in_time(seconds: float, what: str, question: Callable[..., Found], *args: Any) -> Found:
    """What a function answers that asks storage, in a thread; StorageError says that `what` takes longer than that."""
    try:
        with anyio.fail_after(seconds):
            return await anyio.to_thread.run_sync(question, *args, abandon_on_cancel=True)
    except TimeoutError:
        raise storage.StorageError(f"{what}: no answer within {seconds:g} s") from None


def look_at(place: str) -> None:
    """422 for what is no video by its first bytes."""
    with storage.open_file(place) as stream:
        head = stream.read(HEAD_BYTES)
    if reason := refusal(head, storage.size(place)):
        raise Refused(422, reason)


def keep_upload(path: str, name: str, folder: str) -> str:
    """Moves an uploaded file beside the table, under a name that says when it came; where it lies then."""
    suffix = Path(name).suffix.lower()
    own = f"{int(time.time())}-{uuid.uuid4().hex}{suffix if suffix in KINDS else ''}"
    target = storage.join(folder, own)
    storage.put_file(path, target, move=True)
    return target


def remove_strays(table: ClipTable) -> None:
    """Deletes the uploads that no clip of the index has: a failed add leaves its file, as it may have come through.

    Only those that came more than STRAY_SECONDS ago: others may be on their way, by this server or another one.
    """
    old = [path for path in storage.list_files(table.uploads) if _seconds_since(path) > STRAY_SECONDS]
    if not old:
        return
    # By their names: an index that was moved or copied has sources that begin with its old place.
    held = {posixpath.basename(source) for source in table.snapshot().request_sources()}
    for path in old:
        if posixpath.basename(path) not in held:
            storage.delete(path)


def _seconds_since(path: str) -> float:
    """How long ago an upload came, by its name; 0 for any other file."""
    came = re.fullmatch(r"(\d{10,})-[0-9a-f]{32}(\.\w+)?", posixpath.basename(path))
    return time.time() - int(came[1]) if came else 0.0


# --- Answers --------------------------------------------------------------------------------------------------------


async def play(request: Request, place: str, headers: dict[str, str]) -> Response:
    """A video file, or the range asked for (206, 416); 304 where the client has it, 404 if it is gone."""
    try:
        size, tag = await in_time(STORAGE_SECONDS, "the source video", _facts, place)
    except (FileNotFoundError, PermissionError, NotADirectoryError):
        raise Refused(404, "the source video is not there any more") from None
    kind = KINDS.get(posixpath.splitext(place)[1].lower(), "application/octet-stream")
    headers = headers | {
        "ETag": tag,
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, no-cache",
        # Whatever a file holds, it is shown as a video or not at all.
        "Content-Security-Policy": "sandbox; default-src 'none'; media-src 'self'",
    }
    if tag in _tags(request.headers.get("if-none-match", "")):
        return Response(status_code=304, headers=headers)
    asked = request.headers.get("range")
    if asked is not None and request.headers.get("if-range", tag) != tag:
        asked = None
    first, last, status = 0, size - 1, 200
    if asked is not None and (found := parse_range(asked, size)) is not None:
        if not found:
            headers["Content-Range"] = f"bytes */{size}"
            return Response(status_code=416, headers=headers)
        first, last, status = found[0], found[1], 206
        headers["Content-Range"] = f"bytes {first}-{last}/{size}"
    headers["Content-Length"] = str(last - first + 1)
    body = _nothing() if request.scope.get("hbi.head") else _pieces(place, first, last)
    return StreamingResponse(body, status, headers, media_type=kind)


def parse_range(header: str, size: int) -> tuple[int, int] | tuple[()] | None:
    """First and last byte of `bytes=a-b`; () for a range outside the file; None for what may be ignored (RFC 9110)."""
    match = re.fullmatch(r"\s*bytes\s*=\s*(\d{0,18})\s*-\s*(\d{0,18})\s*", header)
    if match is None or match[1] == match[2] == "":
        return None
    if match[1] == "":
        length = int(match[2])
        return (max(0, size - length), size - 1) if length and size else ()
    first = int(match[1])
    last = min(int(match[2]) if match[2] else size - 1, size - 1)
    if match[2] and int(match[2]) < first:
        return None
    return (first, last) if first < size else ()


def _facts(place: str) -> tuple[int, str]:
    """Bytes and ETag."""
    if storage.is_remote(place):
        info = storage.remote_info(place)
        known = f"{info.get('ETag')} {info['size']} {info.get('LastModified')}"
        return int(info["size"]), _tag(known)
    about = Path(place).stat()
    if not stat.S_ISREG(about.st_mode):
        raise FileNotFoundError(place)
    return about.st_size, _tag(f"{about.st_size} {about.st_mtime_ns} {about.st_ino}")


def _tag(known: str) -> str:
    return f'"{hashlib.sha256(known.encode()).hexdigest()[:24]}"'


def _tags(header: str) -> list[str]:
    return [tag.strip().removeprefix("W/") for tag in header.split(",")]


async def _nothing() -> AsyncIterator[bytes]:
    for part in ():
        yield part


async def _pieces(place: str, first: int, last: int) -> AsyncIterator[bytes]:
    """The bytes first to last, piece by piece: never more than one in memory."""
    if storage.is_remote(place):
        while first <= last:
            length = min(REMOTE_PIECE_BYTES, last - first + 1)
            yield await anyio.to_thread.run_sync(storage.read_range, place, first, length)
            first += length
        return
    async with await anyio.open_file(place, "rb") as stream:
        await stream.seek(first)
        while first <= last:
            piece = await stream.read(min(PIECE_BYTES, last - first + 1))
            if not piece:
                return  # it became shorter: the connection ends early, and the client sees that
            yield piece
            first += len(piece)


def kind_of_static(name: str) -> str:
    """The content type of a file of the page."""
    return mimetypes.guess_type(name)[0] or "application/octet-stream"
