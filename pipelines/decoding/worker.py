"""The decode worker: the process in which videos are decoded, and the protocol of its pipes.

A request is JSON and the video's bytes, or its path; a reply is JSON and frames. Never pickle: what decoded a hostile
file is not trusted. It loads no torch, so it starts in a third of a second.
"""

import contextlib
import fcntl
import io
import json
import os
import signal
import struct
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from hbi.model.frames import FrameSettings
from hbi.pipelines.decoding.clip import decode_clip, probe
from hbi.pipelines.decoding.container import DecodeError
from hbi.pipelines.decoding.film import LastFilm
from hbi.pipelines.decoding.pieces import Pieces, WholeWanted
from hbi.pipelines.decoding.shots import find_cuts, small_frames

HEADER = struct.Struct("<IQ")
"""Lengths of the JSON and of the bytes that follow it."""
MIB = 1 << 20
CUT_SIDE = 256
"""Long side in pixels of the frames in which cuts are looked for."""


def serve() -> None:
    """The process's main: answers requests from standard input until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    lifeline, memory = int(sys.argv[1]), int(sys.argv[2])
    # A killed parent leaves no worker, whatever it is stuck in: the kernel sends SIGIO, whose default is death,
    # when the last writing end of this pipe closes.
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    # Nothing that a library prints may reach the pipe of replies.
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    requests = os.fdopen(os.dup(0), "rb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    import av

    av.logging.set_level(None)
    films = LastFilm()
    _limit(memory)
    _send(replies, {"ready": True})
    while header := requests.read(HEADER.size):
        text, body = HEADER.unpack(header)
        request = json.loads(requests.read(text))
        payload = requests.read(body)
        try:
            video = _video(request, payload, requests, replies)
            reply, blobs = _answer(request, video, films, lambda name: _send(replies, {"trying": name}))
            _send(replies, reply | {"lengths": [len(blob) for blob in blobs]}, b"".join(blobs))
        except DecodeError as error:
            _send(replies, {"error": str(error)})
        except WholeWanted as error:
            _send(replies, {"whole": str(error)})
        except MemoryError:
            reason = f"decoding took more than the memory limit of {memory // MIB} MiB"
            _send(replies, {"error": reason, "fatal": True})
        except Exception as error:  # whatever a library throws at a hostile file is that file's failure
            reason = f"the decoder failed with {type(error).__name__}: {error}"
            _send(replies, {"error": reason[:500], "fatal": True})
        del payload


def _video(
    request: dict[str, Any], payload: bytes, requests: IO[bytes], replies: IO[bytes]
) -> bytes | str | Pieces:
    """What a request is about: bytes that came with it, a path, or what is asked of the parent piece by piece."""
    if request["remote"] is None:
        return payload if request["path"] is None else request["path"]

    def fetch(begin: int, length: int) -> bytes:
        _send(replies, {"piece": [begin, length]})
        text, body = HEADER.unpack(requests.read(HEADER.size))
        requests.read(text)
        return requests.read(body)

    uri, size = request["remote"]
    return Pieces((uri, size), size, fetch)


def _answer(
    request: dict[str, Any], data: bytes | str | Pieces, films: LastFilm, trying: Callable[[str], None]
) -> tuple[dict[str, Any], list[bytes]]:
    if request["task"] == "probe" and not isinstance(data, Pieces):
        return asdict(probe(data)), []
    if request["task"] == "cuts" and not isinstance(data, Pieces):
        return {
            "cuts": find_cuts(small_frames(data, CUT_SIDE), request["threshold"], request["min_seconds"])
        }, []
    settings = FrameSettings(**request["settings"])
    with films.of(data) as film:
        clip = decode_clip(
            film, settings, request["start"], request["end"], tuple(request["decoders"]), trying
        )
    if request["quality"] is None:
        blobs = [frame.tobytes() for frame in clip.frames]
    else:
        blobs = [encode_jpeg(frame, request["quality"]) for frame in clip.frames]
    return asdict(replace(clip, frames=[], jpegs=[])), blobs


def encode_jpeg(frame: np.ndarray, quality: int) -> bytes:
    """uint8 [height, width, 3] to a JPEG file; the same bytes for the same frame, always."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _send(replies: IO[bytes], reply: dict[str, Any], body: bytes = b"") -> None:
    text = json.dumps(reply).encode()
    message = memoryview(HEADER.pack(len(text), len(body)) + text + body)
    while message:
        message = message[replies.write(message) :]


def _limit(memory: int) -> None:
    """No core files, no large files on disk, and address space for more than twice `memory`.

    The parent watches the memory that is really used, and says so; this is the wall behind it, for what grows faster
    than it looks.
    """
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, MIB))
    with contextlib.suppress(OSError, ValueError):
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        wall = mapped + 2 * memory + 256 * MIB
        resource.setrlimit(resource.RLIMIT_AS, (wall, wall))
