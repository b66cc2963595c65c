"""Decoding behind a wall: a child process decodes, so that a bad video ends the child and nothing else.

    with Decoder(FrameSettings(num_frames=12)) as decoder:
        clip = decoder.decode(Path("video.mp4"), start=3.0, end=9.5)

The child is ended when a clip runs past its time or memory, it dies with its parent, it is renewed before leaks
matter, and it loads no torch: it starts in a third of a second. Requests and replies cross two pipes as JSON and
bytes, never pickle: what decoded a hostile file is not trusted.
"""

import contextlib
import fcntl
import io
import json
import os
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from hbi.infra.project import ROOT
from hbi.model.frames import FrameSettings
from hbi.pipelines.decoding.clip import (
    DECODERS,
    Clip,
    DecodeError,
    VideoInfo,
    decode_clip,
    probe,
    small_frames,
)

START_SECONDS = 60.0
"""How long a child may take to start (a busy machine, a cold disk)."""
HEADER = struct.Struct("<IQ")
"""Lengths of the JSON and of the bytes that follow it."""
MIB = 1 << 20
WATCH_SECONDS = 0.025
"""How often the memory of a busy child is looked at."""
LEAK = 256 * MIB
"""A child that keeps more than this between clips is replaced."""
CUT_SIDE = 256
"""Long side in pixels of the frames in which cuts are looked for."""


class _Ended(DecodeError):
    """The child is gone: it crashed or was ended at a limit."""


class Decoder:
    """Decodes clips in a child process; not for use by several threads at once.

    settings: which frames, how large. clip_timeout: seconds that one clip may take, all attempts together.
    clip_memory: bytes that one clip may take. renew_after: clips after which the child is replaced.
    quality: if given, frames come back as JPEGs of this quality, `Clip.jpegs`.
    """

    def __init__(
        self,
        settings: FrameSettings,
        clip_timeout: float = 60.0,
        clip_memory: int = 2048 * MIB,
        renew_after: int = 2000,
        quality: int | None = None,
    ) -> None:
        self.settings = settings
        self.clip_timeout = clip_timeout
        self.clip_memory = clip_memory
        self.renew_after = renew_after
        self.quality = quality
        self._child: _Child | None = None

    @classmethod
    def of_settings(cls, settings: dict[str, Any], **limits: Any) -> "Decoder":
        """A decoder that cuts clips as those of a shard folder were cut. settings: those of its `index.json`."""
        frames = FrameSettings(settings["frames"], settings["size"], settings["choice"], settings["fps"])
        return cls(frames, quality=settings["jpeg_quality"], **limits)

    def decode(self, data: bytes | Path | str, start: float | None = None, end: float | None = None) -> Clip:
        """The chosen frames of start <= time < end; DecodeError with a reason for people.

        data: the file's bytes, or its path (cheaper: only the child reads it).
        """
        reply, blobs = self._ask("decode", data, start=start, end=end)
        clip = Clip(**reply)
        if self.quality is not None:
            return replace(clip, jpegs=blobs)
        size = self.settings.size
        return replace(clip, frames=[np.frombuffer(b, np.uint8).reshape(size, size, 3) for b in blobs])

    def probe(self, data: bytes | Path | str) -> VideoInfo:
        """What a video is, without its frames; DecodeError with a reason for people."""
        return VideoInfo(**self._ask("probe", data)[0])

    def cuts(self, data: bytes | Path | str, threshold: float, min_seconds: float) -> list[float]:
        """When new shots begin, in seconds, the first (0) left out; see `find_cuts`. DecodeError likewise."""
        return self._ask("cuts", data, threshold=threshold, min_seconds=min_seconds)[0]["cuts"]

    def close(self) -> None:
        """Ends the child."""
        if self._child is not None:
            self._child.end()
            self._child = None

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()

    def _ask(self, task: str, data: bytes | Path | str, **asked: Any) -> tuple[dict[str, Any], list[bytes]]:
        """Sends a task to the child. If decord ends the child, PyAV gets what is left of the time."""
        deadline = time.monotonic() + self.clip_timeout
        request = {"task": task, "path": None, "decoders": DECODERS, "quality": self.quality} | asked
        request["settings"] = asdict(self.settings)
        payload = b""
        if isinstance(data, bytes):
            payload = data
        else:
            request["path"] = os.fspath(data)
        try:
            return self._exchange(request, payload, deadline)
        except _Ended:
            if self._child is None or self._child.trying != "decord":
                raise
            return self._exchange(request | {"decoders": ("pyav",)}, payload, deadline)
        finally:
            child = self._child
            if child is not None and (not child.alive or child.done >= self.renew_after or child.leaking()):
                self.close()

    def _exchange(
        self, request: dict[str, Any], payload: bytes, deadline: float
    ) -> tuple[dict[str, Any], list[bytes]]:
        if self._child is None or not self._child.alive:
            self._child = _Child(self.clip_memory)
            deadline += self._child.start_seconds
        return self._child.exchange(request, payload, deadline, self.clip_timeout)


class _Child:
    """The parent's end of one decode process."""

    def __init__(self, memory: int) -> None:
        begin = time.monotonic()
        self.memory = memory
        self.alive = True
        self.done = 0
        self.trying = ""
        self.idle = 0
        lifeline, self._lifeline = os.pipe()
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed in `end`)
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from {__name__} import serve; serve()"
        self._process = subprocess.Popen(
            # -P: nothing of the folder we happen to stand in is imported.
            [sys.executable, "-P", "-c", code, str(lifeline), str(memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            pass_fds=(lifeline,),
            bufsize=0,
            env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"},
        )
        os.close(lifeline)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._to, self._from = self._process.stdin, self._process.stdout
        for pipe in (self._to, self._from):
            os.set_blocking(pipe.fileno(), False)
            with contextlib.suppress(OSError, AttributeError):
                fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, MIB)
        try:
            self._talk(b"", b"", time.monotonic() + START_SECONDS)
        except DecodeError as error:
            raise RuntimeError(f"the decode process does not start: {error}") from error
        self.start_seconds = time.monotonic() - begin
        self.idle = self.resident()

    def leaking(self) -> bool:
        """Whether it still holds much of what a clip may take, though it has nothing to do: a leak."""
        return self.resident() > self.idle + min(LEAK, self.memory // 2)

    def exchange(
        self, request: dict[str, Any], payload: bytes, deadline: float, timeout: float
    ) -> tuple[dict[str, Any], list[bytes]]:
        """One task and its answer; DecodeError if the child says so, _Ended if it is no more."""
        text = json.dumps(request).encode()
        self.trying = ""
        reply, body = self._talk(HEADER.pack(len(text), len(payload)) + text, payload, deadline, timeout)
        self.done += 1
        if "error" in reply:
            if reply.get("fatal"):
                self.end()
            raise DecodeError(reply["error"])
        blobs, offset = [], 0
        for length in reply.pop("lengths"):
            blobs.append(body[offset : offset + length])
            offset += length
        return reply, blobs

    def _talk(
        self, head: bytes, payload: bytes, deadline: float, timeout: float = START_SECONDS
    ) -> tuple[dict[str, Any], bytes]:
        """Writes and reads until a reply is whole; ends the child where it breaks a limit."""
        poll = select.poll()
        poll.register(self._from.fileno(), select.POLLIN)
        poll.register(self._to.fileno(), select.POLLOUT)
        unsent = [memoryview(part) for part in (head, payload) if part]
        if not unsent:
            poll.unregister(self._to.fileno())
        received = bytearray()
        while True:
            # decord may hang: half of the time is kept for the second decoder.
            limit = deadline - timeout / 2 if self.trying == "decord" else deadline
            left = limit - time.monotonic()
            if left <= 0:
                raise self._over(f"decoding ran past the time limit of {timeout:g} s")
            events = poll.poll(min(left, WATCH_SECONDS) * 1000)
            if not events and self.idle and self.resident() > self.idle + self.memory:
                raise self._over(f"decoding took more than the memory limit of {self.memory // MIB} MiB")
            for descriptor, event in events:
                if descriptor == self._to.fileno():
                    if event & (select.POLLERR | select.POLLHUP):
                        poll.unregister(descriptor)
                        continue
                    with contextlib.suppress(BlockingIOError, BrokenPipeError):
                        sent = os.write(descriptor, unsent[0])
                        unsent[0] = unsent[0][sent:]
                        if not unsent[0]:
                            unsent.pop(0)
                    if not unsent:
                        poll.unregister(descriptor)
                    continue
                part = os.read(descriptor, MIB)
                if not part:
                    raise self._over(None)
                received += part
            while len(received) >= HEADER.size:
                text, body = HEADER.unpack_from(received)
                whole = HEADER.size + text + body
                if text > MIB or body > 4096 * MIB:
                    raise self._over("the decoder answered with nonsense")
                if len(received) < whole:
                    break
                reply = json.loads(received[HEADER.size : HEADER.size + text])
                content = bytes(received[HEADER.size + text : whole])
                del received[:whole]
                if "trying" in reply:
                    self.trying = reply["trying"]
                    continue
                return reply, content

    def resident(self) -> int:
        """Bytes of memory that the child holds now; 0 where the system does not say."""
        try:
            statm = Path(f"/proc/{self._process.pid}/statm").read_text()
            return int(statm.split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except (OSError, IndexError, ValueError):
            return 0

    def _over(self, reason: str | None) -> _Ended:
        """Ends the child; the error to raise. reason: None if it ended by itself."""
        if reason is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5)
            code = self._process.returncode
            name = signal.Signals(-code).name if code is not None and code < 0 else f"exit status {code}"
            self._errors.seek(0)
            said = self._errors.read()[-400:].decode(errors="replace").strip().splitlines()
            reason = f"the decoder crashed ({name})" + (f": {said[-1]}" if said else "")
        self.end()
        return _Ended(reason)

    def end(self) -> None:
        """Kills the child and waits for it."""
        if self.alive:
            self.alive = False
            self._process.kill()
            self._process.wait()
            for closing in (self._to, self._from, self._errors):
                closing.close()
            os.close(self._lifeline)


# --- The child's side -----------------------------------------------------------------------------------------------


def serve() -> None:
    """The child's main: answers requests from standard input until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    lifeline, memory = int(sys.argv[1]), int(sys.argv[2])
    # A killed parent leaves no child, whatever the child is stuck in: the kernel sends SIGIO, whose default is death,
    # when the last writing end of this pipe closes.
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    # Nothing that a library prints may reach the pipe of replies.
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    requests = os.fdopen(os.dup(0), "rb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    import av
    import decord

    av.logging.set_level(None)
    decord.logging.set_level(decord.logging.QUIET)
    _limit(memory)
    _send(replies, {"ready": True})
    while header := requests.read(HEADER.size):
        text, body = HEADER.unpack(header)
        request = json.loads(requests.read(text))
        payload = requests.read(body)
        try:
            reply, blobs = _answer(request, payload, lambda name: _send(replies, {"trying": name}))
            _send(replies, reply | {"lengths": [len(blob) for blob in blobs]}, b"".join(blobs))
        except DecodeError as error:
            _send(replies, {"error": str(error)})
        except MemoryError:
            reason = f"decoding took more than the memory limit of {memory // MIB} MiB"
            _send(replies, {"error": reason, "fatal": True})
        except Exception as error:  # whatever a library throws at a hostile file is that file's failure
            reason = f"the decoder failed with {type(error).__name__}: {error}"
            _send(replies, {"error": reason[:500], "fatal": True})
        del payload


def _answer(request: dict[str, Any], payload: bytes, trying: Any) -> tuple[dict[str, Any], list[bytes]]:
    data = payload if request["path"] is None else request["path"]
    if request["task"] == "probe":
        return asdict(probe(data)), []
    if request["task"] == "cuts":
        return {
            "cuts": find_cuts(small_frames(data, CUT_SIDE), request["threshold"], request["min_seconds"])
        }, []
    settings = FrameSettings(**request["settings"])
    clip = decode_clip(data, settings, request["start"], request["end"], tuple(request["decoders"]), trying)
    if request["quality"] is None:
        blobs = [frame.tobytes() for frame in clip.frames]
    else:
        blobs = [encode_jpeg(frame, request["quality"]) for frame in clip.frames]
    return asdict(replace(clip, frames=[], jpegs=[])), blobs


def find_cuts(
    frames: Iterable[tuple[float, np.ndarray]], threshold: float, min_seconds: float
) -> list[float]:
    """Times at which new shots begin, by the content detector of PySceneDetect. frames: (seconds, uint8 BGR)."""
    from scenedetect import FrameTimecode
    from scenedetect.detectors import ContentDetector

    # Frames are counted, not timed: where the frame rate varies, the detector's clock would be wrong.
    detector = ContentDetector(threshold=threshold, min_scene_len=1)
    times: list[float] = []
    found: list[float] = []
    for seconds, frame in frames:
        for cut in detector.process_frame(FrameTimecode(len(times), 25.0), frame):
            number = min(cut.frame_num, len(times))
            at = seconds if number == len(times) else times[number]
            if at - (found[-1] if found else times[0]) >= min_seconds:
                found.append(round(at, 6))
        times.append(seconds)
    return found


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
