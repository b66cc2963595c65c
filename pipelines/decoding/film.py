"""An open video: its container, its stream, and when its frames are shown, kept for all clips that are cut of it."""

import io
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hbi.pipelines.decoding.container import DecodeError, demuxed, opened, video_file
from hbi.pipelines.decoding.index import (
    MATROSKA,
    MP4,
    Ends,
    IndexDistrusted,
    cued_ends,
    cued_timeline,
    listed_timeline,
)
from hbi.pipelines.decoding.pieces import Pieces, WholeWanted
from hbi.pipelines.decoding.timeline import KEPT_PACKETS_BYTES, Timeline, read_timeline

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.stream import VideoStream

SEEKABLE = (MP4, MATROSKA)
"""Formats in which FFmpeg finds a keyframe by an index of the file's."""
PART = 0.5
"""A clip that takes more than this of its film is cut of the whole of it."""


class Film:
    """A video that stays open; close it. DecodeError where it is none.

    data: its bytes, its path, or pieces of it that are fetched as they are read; those raise WholeWanted where that
    is not enough.
    """

    def __init__(self, data: "bytes | Path | str | Pieces") -> None:
        self.data = data
        self.whole = ""
        """Why every packet of it was read, in words, where that was not meant to be."""
        self._open = ExitStack()
        try:
            self.source = self._open.enter_context(video_file(data))
            self.large = self.source.seek(0, io.SEEK_END) > KEPT_PACKETS_BYTES
            self.by_index = self.large or isinstance(data, Pieces)
            self.container, self.stream = self._open.enter_context(opened(self.source))
        except BaseException:
            self._open.close()
            raise

    def close(self) -> None:
        """Closes the file; further calls do nothing."""
        self._open.close()

    @cached_property
    def timeline(self) -> Timeline | None:
        """When its frames are shown: by its index, or one pass over its packets, once."""
        if self.by_index:
            try:
                with video_file(self.data) as source:
                    return listed_timeline(self.container, self.stream, source)
            except IndexDistrusted as reason:
                self.note_whole(reason)
        if not self.large:
            return read_timeline(self.container, self.stream, self.source)
        with self.again() as (container, stream):
            return read_timeline(container, stream, self.source)

    def note_whole(self, reason: IndexDistrusted) -> None:
        """Every packet will be read; WholeWanted of a video in pieces."""
        if isinstance(self.data, Pieces):
            raise WholeWanted(str(reason))
        self.whole = self.whole or str(reason)

    @property
    def lists_packets(self) -> bool:
        """Whether the timeline is by the index."""
        timeline: Timeline | None = self.__dict__.get("timeline")
        return timeline is not None and timeline.listed

    def distrust(self, reason: IndexDistrusted) -> None:
        """The index is believed no more."""
        self.note_whole(reason)
        self.by_index = False
        if "timeline" in self.__dict__:
            del self.timeline

    def part(self, start: float | None, end: float | None) -> "Film":
        """Of which to cut a clip: this, or where its index lists keyframes only, the part of it around the clip.

        IndexDistrusted where there is none.
        """
        length = (self.container.duration or 0) / 1e6
        begin, until = max(0.0, start or 0.0), length if end is None else min(end, length)
        large = until - begin > PART * length
        if isinstance(self.data, Pieces) and large:
            raise WholeWanted("the clip is most of it")
        if not self.by_index or large or self.container.format.name != MATROSKA:
            return self
        if isinstance(self._ends, IndexDistrusted):
            raise self._ends
        around = copy(self)
        around.timeline = cued_timeline(self.container, self.stream, self._ends, begin, until)
        return around

    @cached_property
    def _ends(self) -> Ends | IndexDistrusted:
        try:
            return cued_ends(self.container, self.stream, self.source)
        except IndexDistrusted as reason:
            return reason

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
            if position == begin and timeline.listed and not packet.is_keyframe:
                raise IndexDistrusted("it calls a packet a keyframe that is none")
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
    def of(self, data: bytes | Path | str | Pieces) -> Iterator[Film]:
        """The film of a path, open from the clip before where the file is the same; of bytes, a film of its own."""
        key = () if isinstance(data, bytes) else data.key if isinstance(data, Pieces) else _identity(data)
        if self.film is None or not key or key != self.key:
            self.close()
            self.film, self.key = Film(data), key
        try:
            yield self.film
        except (DecodeError, WholeWanted):
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
