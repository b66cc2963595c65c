"""Decoding behind a wall: a process of its own decodes, so that a bad video ends it and nothing else.

    with Decoder(FrameSettings(num_frames=12)) as decoder:
        clip = decoder.decode(Path("video.mp4"), start=3.0, end=9.5)

The worker is ended when a clip runs past its time or memory, it dies with its parent, it is renewed before leaks
matter, and it loads no torch: it starts in a third of a second. Requests and replies cross two pipes as JSON and
bytes, never pickle: what decoded a hostile file is not trusted.
"""

import contextlib
import fcntl
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from hbi.infra.project import ROOT
from hbi.model.frames import FrameSettings
from hbi.pipelines.decoding.clip import DECODERS, Clip, DecodeError, VideoInfo
from hbi.pipelines.decoding.pieces import MOST_BYTES, RemoteVideo, WholeWanted
from hbi.pipelines.decoding.worker import HEADER, MIB, serve

START_SECONDS = 60.0
"""How long a worker may take to start (a busy machine, a cold disk)."""
WATCH_SECONDS = 0.025
"""How often the memory of a busy worker is looked at."""
LEAK = 256 * MIB
"""A worker that keeps more than this between clips is replaced."""


class _Ended(DecodeError):
    """The worker is gone: it crashed or was ended at a limit."""


class Decoder:
    """Decodes clips in a decode worker; not for use by several threads at once.

    settings: which frames, how large. clip_timeout: seconds that one clip may take, all attempts together.
    clip_memory: bytes that one clip may take. renew_after: clips after which the worker is replaced.
    quality: if given, frames come back as JPEGs of this quality, `Clip.jpegs`. decoder: `pyav`, or `decord` where its
    answer is PyAV's. ValueError for a decoder that is not installed.
    """

    def __init__(
        self,
        settings: FrameSettings,
        clip_timeout: float = 60.0,
        clip_memory: int = 2048 * MIB,
        renew_after: int = 2000,
        quality: int | None = None,
        decoder: str = "pyav",
    ) -> None:
        if decoder == "decord" and importlib.util.find_spec("decord") is None:
            raise ValueError("--decoder decord: it is not installed: pip install 'hbi[decord]', or take pyav")
        self.settings = settings
        self.clip_timeout = clip_timeout
        self.clip_memory = clip_memory
        self.renew_after = renew_after
        self.quality = quality
        self.decoders = (decoder,)
        self._worker: DecodeWorker | None = None

    @classmethod
    def of_settings(cls, settings: dict[str, Any], **limits: Any) -> "Decoder":
        """A decoder that cuts clips as those of a shard folder were cut. settings: those of its `index.json`."""
        frames = FrameSettings(settings["frames"], settings["size"], settings["choice"], settings["fps"])
        chosen = settings.get("decoder", DECODERS[0])
        return cls(frames, quality=settings["jpeg_quality"], decoder=chosen, **limits)

    def decode(
        self, data: bytes | Path | str | RemoteVideo, start: float | None = None, end: float | None = None
    ) -> Clip:
        """The chosen frames of start <= time < end; DecodeError with a reason for people.

        data: the file's bytes, its path (cheaper: only the worker reads it), or a video in storage, of which only
        what the clip needs is fetched: WholeWanted with the reason where the file is wanted, and whatever its `read`
        raises.
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
        """Ends the worker."""
        if self._worker is not None:
            self._worker.end()
            self._worker = None

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()

    def _ask(
        self, task: str, data: bytes | Path | str | RemoteVideo, **asked: Any
    ) -> tuple[dict[str, Any], list[bytes]]:
        """Sends a task to the worker. If decord ends the worker, PyAV gets what is left of the time."""
        deadline = time.monotonic() + self.clip_timeout
        request = {
            "task": task,
            "path": None,
            "remote": None,
            "decoders": self.decoders,
            "quality": self.quality,
        } | asked
        request["settings"] = asdict(self.settings)
        payload: bytes | RemoteVideo = b""
        if isinstance(data, bytes):
            payload = data
        elif isinstance(data, RemoteVideo):
            payload = data
            request["remote"] = [data.uri, data.size]
        else:
            request["path"] = os.fspath(data)
        try:
            return self._exchange(request, payload, deadline)
        except _Ended:
            if self._worker is None or self._worker.trying != "decord":
                raise
            return self._exchange(request | {"decoders": ("pyav",)}, payload, deadline)
        finally:
            worker = self._worker
            if worker is not None and (
                not worker.alive or worker.done >= self.renew_after or worker.leaking()
            ):
                self.close()

    def _exchange(
        self, request: dict[str, Any], payload: bytes | RemoteVideo, deadline: float
    ) -> tuple[dict[str, Any], list[bytes]]:
        if self._worker is None or not self._worker.alive:
            self._worker = DecodeWorker(self.clip_memory)
            deadline += self._worker.start_seconds
        return self._worker.exchange(request, payload, deadline, self.clip_timeout)


class DecodeWorker:
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
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from {serve.__module__} import serve; serve()"
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
        self, request: dict[str, Any], payload: bytes | RemoteVideo, deadline: float, timeout: float
    ) -> tuple[dict[str, Any], list[bytes]]:
        """One task and its answer; DecodeError if the worker says so, _Ended if it is no more."""
        text = json.dumps(request).encode()
        self.trying = ""
        remote = payload if isinstance(payload, RemoteVideo) else None
        content = payload if isinstance(payload, bytes) else b""
        reply, body = self._talk(HEADER.pack(len(text), len(content)) + text, content, deadline, timeout)
        while "piece" in reply:
            content, waited = self._piece(remote, reply["piece"])
            deadline += waited
            reply, body = self._talk(HEADER.pack(0, len(content)), content, deadline, timeout)
        self.done += 1
        if "whole" in reply:
            raise WholeWanted(reply["whole"])
        if "error" in reply:
            if reply.get("fatal"):
                self.end()
            raise DecodeError(reply["error"])
        blobs, offset = [], 0
        for length in reply.pop("lengths"):
            blobs.append(body[offset : offset + length])
            offset += length
        return reply, blobs

    def _piece(self, remote: RemoteVideo | None, asked: Any) -> tuple[bytes, float]:
        """The bytes that the worker asks for, and the seconds that storage took; the worker ends if it gives none."""
        begin = time.monotonic()
        try:
            start, length = (int(number) for number in asked)
            if remote is None or not (0 <= start < start + length <= remote.size and length <= MOST_BYTES):
                raise self._over("the decoder answered with nonsense")
            return remote.read(start, length), time.monotonic() - begin
        except BaseException:
            self.end()
            raise

    def _talk(
        self, head: bytes, payload: bytes, deadline: float, timeout: float = START_SECONDS
    ) -> tuple[dict[str, Any], bytes]:
        """Writes and reads until a reply is whole; ends the worker where it breaks a limit."""
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
        """Bytes of memory that the worker holds now; 0 where the system does not say."""
        try:
            statm = Path(f"/proc/{self._process.pid}/statm").read_text()
            return int(statm.split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except (OSError, IndexError, ValueError):
            return 0

    def _over(self, reason: str | None) -> _Ended:
        """Ends the worker; the error to raise. reason: None if it ended by itself."""
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
        """Kills the worker and waits for it."""
        if self.alive:
            self.alive = False
            self._process.kill()
            self._process.wait()
            for closing in (self._to, self._from, self._errors):
                closing.close()
            os.close(self._lifeline)
