"""Files, local or in object storage: the only door to s3fs.

Paths are strings: local ones (any bytes that the file system allows, as `os.fsdecode` gives them), `file://` and
`s3://`. Credentials and endpoint are s3fs's own: the AWS_* variables and files, and fsspec's configuration
(`FSSPEC_S3='{"config_kwargs": {"read_timeout": 30}}'`).

Whatever object storage does for a moment (503, time-out, a connection cut half-way, fewer bytes than asked for) is
tried again with growing pauses. What lasts is an error: FileNotFoundError, PermissionError, or StorageError after
the last try. Writing is whole or not at all.
"""

import functools
import io
import os
import posixpath
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

TRIES = 6
"""How often a request is made before it counts as failed."""
PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.3, 10.0
"""Before the second try, and at most; a pause is a random part of three times the one before it."""
RANGE_BYTES = 8 * 2**20
"""Objects are read in requests of this size, each tried again by itself."""
PACKAGES = {
    "s3": "s3fs", "gs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "hf": "huggingface_hub", "http": "aiohttp",
    "https": "aiohttp",
}  # fmt: skip
"""Schemes that are read, with the package that fsspec reads them by."""
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")

Result = TypeVar("Result")


class StorageError(OSError):
    """Object storage kept failing until the last try: an outage rather than a missing or forbidden object."""


def is_remote(path: str) -> bool:
    """True for `s3://` and the others of PACKAGES, False for a local path; ValueError for what we do not speak."""
    scheme = re.match(SCHEME, path)
    if scheme is None or scheme[1].lower() == "file":
        return False
    if scheme[1].lower() in PACKAGES:
        return True
    spoken = ", ".join(f"{name}://" for name in PACKAGES)
    raise ValueError(f"{path}: {scheme[1]}:// is not read here: use a local path or one of {spoken}")


def filesystem(path: str) -> Any:
    """The fsspec filesystem of a path (made once per process), for what this module does not offer itself."""
    if not is_remote(path):
        return _filesystem("file://")
    scheme = path.split("://")[0].lower()
    return _s3(os.getpid()) if scheme == "s3" else _other(scheme, os.getpid())


@functools.lru_cache(maxsize=8)
def _other(scheme: str, pid: int) -> "AbstractFileSystem":
    """The filesystem of a scheme beside s3; ValueError with the package that it wants."""
    import fsspec

    try:
        return fsspec.filesystem(scheme, skip_instance_cache=True)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{scheme}:// needs a package: pip install {PACKAGES[scheme]} ({error})") from None


@functools.lru_cache(maxsize=1)
def _s3(pid: int) -> "AbstractFileSystem":
    """s3fs with one layer of retries, ours: its own and botocore's beneath would multiply the waiting."""
    from fsspec.config import conf

    configured = conf.get("s3", {}).get("config_kwargs", {})
    # Checksums only where S3 demands them: other servers give a range the checksum of the whole object.
    ours = {
        "retries": {"total_max_attempts": 1, "mode": "standard"},
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
    }
    remote: Any = _filesystem(
        "s3://", config_kwargs=ours | configured, use_listings_cache=False, skip_instance_cache=True
    )
    remote.retries = 1
    return remote


def _filesystem(uri: str, **options: Any) -> "AbstractFileSystem":
    from fsspec.core import url_to_fs

    return url_to_fs(uri, **options)[0]


def _persist(what: str, request: Callable[[], Result]) -> Result:
    """`request()`, again after growing pauses while it fails for a reason that may pass."""
    import tenacity
    from aiohttp import ClientError as HttpError
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, ParamValidationError

    errors = {"httpx": "HTTPError", "httpx2": "HTTPError", "gcsfs.retry": "HttpError"}  # of hf://, gs://
    others = [getattr(sys.modules[name], error) for name, error in errors.items() if name in sys.modules]
    passing = (OSError, BotoCoreError, ClientError, HttpError, *others)
    lasting = (FileNotFoundError, PermissionError, IsADirectoryError, FileExistsError)
    refused = (NoCredentialsError, ParamValidationError)
    tries = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(passing)
        & tenacity.retry_if_not_exception_type((*lasting, *refused)),
        stop=tenacity.stop_after_attempt(TRIES),
        wait=tenacity.wait_random_exponential(PAUSE_SECONDS, LONGEST_PAUSE_SECONDS, exp_base=3),
        reraise=True,
    )
    try:
        return tries(request)
    except lasting:
        raise
    except refused as error:
        raise PermissionError(f"{what}: {error}") from error
    except passing as error:
        raise StorageError(f"{what}: storage kept failing, {TRIES} tries ({error})") from error


def _local(path: str) -> str:
    """A local path without its `file://`."""
    return path[len("file://") :] if path[:7].lower() == "file://" else path


def _key(path: str) -> str:
    """`s3://bucket/key` as fsspec wants it: `bucket/key`; of the web, the whole address."""
    scheme, _, key = path.partition("://")
    return path if scheme.lower() in ("http", "https") else key


def absolute(path: str) -> str:
    """The path from the root; `~` is the home folder. Remote paths are absolute already."""
    return path if is_remote(path) else os.path.abspath(os.path.expanduser(_local(path)))  # noqa: PTH100, PTH111


def join(base: str, *parts: str) -> str:
    """Like os.path.join, for both kinds: an absolute part or a part with a scheme starts anew, `..` is resolved."""
    for part in parts:
        if re.match(SCHEME, part):
            base = part
        elif is_remote(base) and not part.startswith("/"):
            base = base.rstrip("/") + "/" + part
            if ".." in part.split("/"):
                scheme, _, key = base.partition("://")
                base = f"{scheme}://{posixpath.normpath(key)}"
        else:
            base = os.path.join(base, part)  # noqa: PTH118 (pathlib loses a trailing slash and `s3://`)
    return base


def parent(path: str) -> str:
    """The folder that holds a path."""
    if is_remote(path):
        scheme, _, key = path.partition("://")
        return f"{scheme}://{posixpath.dirname(key.rstrip('/'))}"
    return os.path.dirname(absolute(path))  # noqa: PTH120


def remote_info(path: str) -> dict[str, Any]:
    """What storage says of an object now: `size`, and in s3:// `ETag`; FileNotFoundError if there is none."""
    fresh = {"refresh": True} if path[:5].lower() == "s3://" else {}
    info = _persist(path, lambda: filesystem(path).info(_key(path), **fresh))
    if info["type"] != "file":
        raise FileNotFoundError(f"{path}: is a folder, not an object")
    return info


def size(path: str) -> int:
    """Bytes of a file; FileNotFoundError if there is none."""
    if is_remote(path):
        size = remote_info(path)["size"]
        if size is None:  # a web server that does not say
            return len(_persist(path, lambda: filesystem(path).cat_file(_key(path))))
        return int(size)
    return Path(_local(path)).stat().st_size


def exists(path: str) -> bool:
    """Whether a file (or a local folder) is there."""
    if not is_remote(path):
        return Path(_local(path)).exists()
    try:
        size(path)
    except FileNotFoundError:
        return False
    return True


def require_bucket(path: str) -> None:
    """FileNotFoundError or PermissionError where a remote path's bucket is not there or not open to us."""
    bucket = _key(path).split("/")[0]
    _persist(f"s3://{bucket}", lambda: filesystem(path).info(bucket, refresh=True))


class _Ranges(io.RawIOBase):
    """An object as a seekable raw stream of ranged requests, each checked for its length."""

    def __init__(self, path: str):
        self.path, self.position, self.bytes = path, 0, size(path)
        self.start, self.block = 0, b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.bytes}[whence]
        self.position = max(0, base + offset)
        return self.position

    def readinto(self, buffer: Any, /) -> int:
        """Small reads share one request: whoever decodes text or gzip asks for some kilobytes at a time."""
        wanted = min(len(buffer), self.bytes - self.position)
        if wanted <= 0:
            return 0
        offset = self.position - self.start
        if not 0 <= offset < len(self.block):
            length = min(RANGE_BYTES, self.bytes - self.position)
            self.start, self.block, offset = self.position, read_range(self.path, self.position, length), 0
        content = memoryview(self.block)[offset : offset + wanted]
        buffer[: len(content)] = content
        self.position += len(content)
        return len(content)

    def readall(self) -> bytes:
        """The rest, in ranges (the stream's own readall would ask for 8 KiB at a time)."""
        rest = bytearray(max(0, self.bytes - self.position))
        view, filled = memoryview(rest), 0
        while filled < len(rest):
            filled += self.readinto(view[filled:])
        return bytes(rest)


def open_file(path: str) -> IO[bytes]:
    """A file for reading, seekable; remote ones are fetched in ranges as they are read."""
    return io.BufferedReader(_Ranges(path)) if is_remote(path) else Path(_local(path)).open("rb")


def read_range(path: str, start: int, length: int) -> bytes:
    """`length` bytes from byte `start` on, in one request. FileNotFoundError; OSError if there are fewer."""
    if not is_remote(path):
        with open_file(path) as stream:
            stream.seek(start)
            return _of_length(stream.read(length), start, length)
    remote = filesystem(path)

    def request() -> bytes:
        content = remote.cat_file(_key(path), start=start, end=start + length)
        if len(content) > length:  # a web server that gives the whole for any part
            content = content[start : start + length]
        return _of_length(content, start, length)

    return _persist(path, request) if length else b""


def _of_length(content: bytes, start: int, length: int) -> bytes:
    if len(content) != length:
        raise OSError(f"short read: {len(content)} bytes of {length} from byte {start}")
    return content


def has_ranges(path: str) -> bool:
    """Whether a part of a file can be read without the rest: of the web, where the server says so."""
    if path[:4].lower() != "http":
        return True
    from fsspec.asyn import sync

    remote: Any = filesystem(path)

    async def says_so() -> bool:
        async with (await remote.set_session()).head(path, allow_redirects=True) as answer:
            return answer.headers.get("Accept-Ranges") == "bytes"

    return bool(_persist(path, lambda: sync(remote.loop, says_so)))


def read_bytes(path: str) -> bytes:
    """The whole of a file; FileNotFoundError if there is none."""
    with open_file(path) as stream:
        return stream.read()


def local_copy(path: str, folder: str) -> str:
    """A local path with the file's content: the path itself, or a copy of a remote object made inside `folder`."""
    if not is_remote(path):
        return absolute(path)
    handle, copy = tempfile.mkstemp(dir=folder, suffix=posixpath.splitext(path)[1][:10])
    try:
        with os.fdopen(handle, "wb") as target:
            if path[:4].lower() == "http":  # in one stream: not every web server knows ranges
                _persist(path, lambda: filesystem(path).get_file(_key(path), copy))
            else:
                with open_file(path) as source:
                    shutil.copyfileobj(source, target, RANGE_BYTES)
    except BaseException:
        Path(copy).unlink()
        raise
    return copy


def put_file(local: str, path: str, move: bool = False) -> None:
    """Copies (or moves) a finished local file to its place, whole or not at all; folders are made on the way."""
    if is_remote(path):
        remote = filesystem(path)
        _persist(path, lambda: remote.put_file(local, _key(path)))
        if move:
            Path(local).unlink()
        return
    target = Path(absolute(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    if move and Path(local).stat().st_dev == target.parent.stat().st_dev:
        Path(local).replace(target)
        return
    with Path(local).open("rb") as source:
        _replace(target, lambda stream: shutil.copyfileobj(source, stream, RANGE_BYTES))
    if move:
        Path(local).unlink()


def put_files(files: Iterable[Path], folder: str, last: str, move: bool = False) -> None:
    """Copies (or moves) finished local files into a folder, last the one named so: it says that all are there."""
    for file in sorted(files, key=lambda file: (file.name == last, file.name)):
        put_file(str(file), join(folder, file.name), move)


def write_bytes(path: str, data: bytes, durable: bool = True) -> None:
    """Writes a file, whole or not at all; folders are made on the way. durable: a local one survives a power cut."""
    if is_remote(path):
        remote = filesystem(path)
        _persist(path, lambda: remote.pipe_file(_key(path), data))
        return
    target = Path(absolute(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    _replace(target, lambda stream: stream.write(data), durable)


def _replace(target: Path, write: Callable[[IO[bytes]], Any], durable: bool = True) -> None:
    """Fills a neighbour of `target`, then renames it: no reader sees half a file, not even after a power cut."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as stream:
            os.fchmod(stream.fileno(), 0o644)
            write(stream)
            stream.flush()
            if durable:
                os.fsync(stream.fileno())
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def list_sizes(folder: str, recursive: bool = False, prefix: str = "") -> dict[str, int]:
    """Paths of the files in a folder with their bytes, sorted by path; empty if there is no such folder.

    prefix: with what their names begin, in object storage, which lists no others then.
    """
    if is_remote(folder):
        remote = filesystem(folder)
        how = {"maxdepth": None if recursive else 1, **({"prefix": prefix} if prefix else {})}
        found = _persist(folder, lambda: remote.find(_key(folder), **how, detail=True))
        return {f"s3://{key}": int(info["size"]) for key, info in sorted(found.items())}
    files = (path for path in Path(_local(folder)).glob("**/*" if recursive else "*") if path.is_file())
    return {str(path): path.stat().st_size for path in sorted(files, key=str)}


def list_files(folder: str, recursive: bool = False) -> list[str]:
    """Paths of the files in a folder, sorted; empty if there is no such folder."""
    return list(list_sizes(folder, recursive))


def delete(path: str) -> None:
    """Removes a file; one that is not there is fine."""
    if not is_remote(path):
        Path(_local(path)).unlink(missing_ok=True)
        return
    remote = filesystem(path)
    try:
        _persist(path, lambda: remote.rm_file(_key(path)))
    except FileNotFoundError:
        return
