"""Chosen frames of a video by PyAV (FFmpeg): only what they need is decoded, and all of it where packets do not say."""

from collections.abc import Callable, Iterator
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from hbi.pipelines.decoding.container import DecodeError, demuxed, failed, stated_rate
from hbi.pipelines.decoding.film import Film
from hbi.pipelines.decoding.index import IndexDistrusted
from hbi.pipelines.decoding.picture import Picture

if TYPE_CHECKING:
    from av.video.codeccontext import VideoCodecContext
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

Choose = Callable[[np.ndarray], np.ndarray]
"""Times of all frames, seconds, to the indices of those that are wanted, increasing."""


def chosen_frames(film: Film, choose: Choose, picture: Picture) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Puts the chosen frames into `picture`; the times of all frames, the chosen ones, and what was done about time.

    DecodeError where nothing decodes, and whatever `choose` raises.
    """
    timeline = film.timeline
    if timeline is not None and timeline.exact:
        chosen = choose(timeline.times)
        if pick(film, chosen.tolist(), picture.add):
            return timeline.times, chosen, list(timeline.notes)
        picture.frames.clear()
    if timeline is not None and (timeline.span or timeline.listed):
        raise IndexDistrusted("a packet of it gives no frame")
    # Not every packet became a frame (hidden ones, damage), or the packets say nothing of time: decode all of it
    # to learn which frames there are, then once more to keep the chosen ones.
    times, notes = decoded_times(film)
    chosen = choose(times)
    left = set(chosen.tolist())
    for index, (_, frame) in enumerate(decoded(film)):
        if index in left:
            picture.add(frame)
            left.discard(index)
            if not left:
                break
    return times, chosen, notes


def pick(film: Film, wanted: list[int], take: "Callable[[VideoFrame], None]") -> bool:
    """Hands the wanted frames (increasing) to `take`; False if one of them does not appear.

    Decodes forward from the last keyframe shown at or before each wanted frame, leaping over what nobody needs.
    """
    import av

    timeline = film.timeline
    assert timeline is not None
    keys = np.flatnonzero(timeline.keys & (timeline.ranks >= 0))
    if not len(keys):
        return False
    # Packet at which decoding has to begin for each wanted frame. A frame shown before "its" keyframe (open group
    # of pictures) thereby begins at the one before. GIFs and the like flag what they must: their first picture.
    begins = []
    for rank in wanted:
        before = keys[timeline.ranks[keys] <= rank]
        begins.append(int(before[-1]) if len(before) else int(keys[0]))
    context = one_thread(film.stream)
    left, needed = list(wanted), set(wanted)
    position, packets = -1, iter(())
    while True:
        begin = begins[len(wanted) - len(left)]
        if begin > position or position < 0:
            context.flush_buffers()
            position, packets = begin, film.packets(begin)
        packet = next(packets, None)
        if packet is not None:
            position += 1
            # Frames that no other refers to are decoded only if they are wanted.
            context.skip_frame = "DEFAULT" if packet.pts in needed else "NONREF"
        try:
            frames = context.decode(packet)
        except av.FFmpegError as error:
            failed(error)
            return False
        for frame in frames:
            if frame.pts is None or frame.pts < left[0]:
                continue
            if frame.pts > left[0] or frame.is_corrupt:
                return False  # frames come in order: this one will not
            take(frame)
            left.pop(0)
            if not left:
                return True
        if packet is None:
            return False


def one_thread(stream: "VideoStream") -> "VideoCodecContext":
    """The stream's decoder, told to use one thread: there is a process for every core."""
    context = stream.codec_context
    if not context.is_open:
        context.thread_type = "NONE"
        context.thread_count = 1
    return context


def decoded(film: Film) -> "Iterator[tuple[int | None, VideoFrame]]":
    """Every frame that decodes, in order of presentation, with its rank in the timeline where packets say it."""
    import av

    timeline = film.timeline if film.timeline is not None and film.timeline.ordered else None
    with film.again() as (container, stream):
        context = one_thread(stream)
        packets = (
            film.packets(0)
            if timeline is not None and timeline.packets is not None
            else demuxed(container, stream)
        )
        for position, packet in enumerate(chain(packets, [None])):
            if timeline is not None and packet is not None and position < len(timeline.ranks):
                packet.pts = int(timeline.ranks[position])
            try:
                frames = context.decode(packet)
            except av.EOFError:
                return
            except av.FFmpegError as error:
                failed(error)
                continue
            for frame in frames:
                if timeline is not None and frame.pts is not None and frame.pts < 0:
                    continue  # decoded, but not to be shown
                if not frame.is_corrupt:
                    yield frame.pts if timeline is not None else None, frame


def decoded_times(film: Film) -> tuple[np.ndarray, list[str]]:
    """Presentation times in seconds of every frame that decodes, increasing, and where they are from."""
    timeline = film.timeline
    ranks = [rank for rank, _ in decoded(film)]
    if not ranks:
        raise DecodeError(
            "no frame of it can be decoded: the video data are damaged, encrypted or incomplete"
        )
    if timeline is not None and not timeline.ordered and len(ranks) <= len(timeline.times):
        return timeline.times[: len(ranks)], list(timeline.notes)
    if timeline is not None and None not in ranks:
        shown = np.array(ranks)
        if (np.diff(shown) > 0).all():
            return timeline.times[shown], list(timeline.notes)
    rate = stated_rate(film.stream) or 25.0
    return np.arange(len(ranks)) / rate, [
        f"counted at {rate:g} frames per second: no times in the file are true"
    ]
