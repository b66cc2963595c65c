"""An open video: its container, its stream, and when its frames are shown, kept for all clips that are cut of it."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hbi.pipelines.decoding.container import DecodeError, demuxed, opened, video_file
from hbi.pipelines.decoding.timeline import Timeline, read_timeline

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.stream import VideoStream

SEEKABLE = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
"""Formats in which FFmpeg finds a keyframe by an index of the file's."""


class Film:
    """A video that stays open; close it. DecodeError where it is none."""

    def __init__(self, data: bytes | Path | str) -> None:
        self.data = data
        self._open = ExitStack()
        try:
            self.source = self._open.enter_context(video_file(data))
            self.container, self.stream = self._open.enter_context(opened(self.source))
        except BaseException:
            self._open.close()
            raise

    def close(self) -> None:
        """Closes the file; further calls do nothing."""
        self._open.close()

    @cached_property
    def timeline(self) -> Timeline | None:
        """When its frames are shown: one pass over its packets, once."""
        return read_timeline(self.container, self.stream, self.source)

    def packets(self, begin: int) -> "Iterator[Packet]":
        """The packets from number `begin` of the timeline on, their time stamps the ranks of their frames.

        From memory where they are few; else from the file, found by its index where it has one.
        """
        timeline = self.timeline
        assert timeline is not None
        if timeline.packets is not None:
            yield from timeline.packets[begin:]
            return
        position, packets = self._sought(timeline, begin)
        for packet in packets:
            if position >= len(timeline.ranks):
                return
            if position >= begin:
                packet.pts = int(timeline.ranks[position])
                yield packet
            position += 1

    def _sought(self, timeline: Timeline, begin: int) -> "tuple[int, Iterator[Packet]]":
        """Packets that begin at number `begin` or before, and the number of the first."""
        import av

        if self.container.format.name in SEEKABLE and begin:
            for stamp in (timeline.stamps[begin], timeline.decoded[begin]):
                try:
                    self.container.seek(int(stamp), stream=self.stream)
                except (av.FFmpegError, OSError):
                    break
                packets = demuxed(self.container, self.stream)
                first = next(packets, None)
                if first is None or first.pts is None or first.dts is None:
                    continue
                found = np.flatnonzero((timeline.stamps == first.pts) & (timeline.decoded == first.dts))
                if len(found) == 1 and found[0] <= begin:
                    return int(found[0]), _then(first, packets)
        return 0, self._from_the_start()

    def _from_the_start(self) -> "Iterator[Packet]":
        with self.again() as (container, stream):
            yield from demuxed(container, stream)

    @contextmanager
    def again(self) -> "Iterator[tuple[InputContainer, VideoStream]]":
        """The container and stream once more, with a place in the file of their own."""
        with video_file(self.data) as source, opened(source) as both:
            yield both


def _then(first: "Packet", packets: "Iterator[Packet]") -> "Iterator[Packet]":
    yield first
    yield from packets


class LastFilm:
    """Keeps the film that was used last open: clips of one video follow each other in a manifest."""

    def __init__(self) -> None:
        self.key: tuple[object, ...] = ()
        self.film: Film | None = None

    @contextmanager
    def of(self, data: bytes | Path | str) -> Iterator[Film]:
        """The film of a path, open from the clip before where the file is the same; of bytes, a film of its own."""
        key = () if isinstance(data, bytes) else _identity(data)
        if self.film is None or not key or key != self.key:
            self.close()
            self.film, self.key = Film(data), key
        try:
            yield self.film
        except DecodeError:
            raise
        except BaseException:
            self.close()
            raise
        if not key:
            self.close()

    def close(self) -> None:
        """Closes the film."""
        if self.film is not None:
            self.film.close()
        self.film, self.key = None, ()


def _identity(path: Path | str) -> tuple[object, ...]:
    """What changes when a file does; nothing for what cannot be asked."""
    try:
        found = os.stat(path)  # noqa: PTH116 (a name with a null byte)
    except (OSError, ValueError):
        return ()
    return os.fspath(path), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
