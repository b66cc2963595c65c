"""When the frames of a video are shown, by what its packets say; put right where a few of them lie, and said so.

    ties           packets that share a time are spread over the gap that follows
    liars          a time far from its neighbours' in the file, or none at all, becomes one between them
    clock jumps    pieces of a transport stream follow each other without a leap
    AVI            knows no presentation times: reordered frames take the times in the order in which they are decoded

Each packet is given the number of its frame in the order of presentation as its time stamp before it is decoded, so
that a frame is told from all others whatever the file says.
"""

from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from hbi.pipelines.decoding.container import RATES, DecodeError, demuxed
from hbi.pipelines.decoding.filetype import is_truncated

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.stream import VideoStream

LONGEST_SECONDS = 10 * 24 * 3600
"""A file that claims to be longer has times that mean nothing."""
KEPT_PACKETS_BYTES = 64 << 20
"""Up to so many compressed bytes are kept between the passes over a file; beyond, they are read again."""
CLOCKS = ("mpegts", "mpeg")
"""Formats whose clock starts anywhere, and may jump."""
ELEMENTARY = ("h264", "hevc", "vvc", "mjpeg", "m4v", "mpegvideo", "h263", "h261", "vc1", "cavsvideo", "dirac")
"""Formats without times of their own: FFmpeg counts their frames."""
JUMP_SECONDS = 10.0
"""A clock that goes on by more has jumped (the ffmpeg command's own threshold)."""
BACK_SECONDS = 0.1
"""A clock that goes back by more has jumped (likewise)."""
REORDERED = 32
"""Places by which a packet of the file may be shown earlier or later than its neighbours; codecs allow 16 frames."""
FEW = 0.01
"""Part of the packets that may lie before none is believed."""
NOT_SHOWN = -1


@dataclass(frozen=True)
class Timeline:
    """What the packets of a video stream say before anything is decoded."""

    times: np.ndarray
    """When each frame is shown, in seconds from the start of the file's timeline, increasing, float64 [frames]."""
    ranks: np.ndarray
    """Which frame each packet of the file becomes, NOT_SHOWN for those that are not shown, int64 [packets]."""
    keys: np.ndarray
    """Whether each packet is a keyframe, bool [packets]."""
    stamps: np.ndarray
    """The packets' presentation time stamps as the file has them, in units of its time base, nan for none [packets]."""
    decoded: np.ndarray
    """Their decoding time stamps, likewise [packets]."""
    tail: float
    """How long the last frame is shown, in seconds; 0 if nobody says."""
    length: float
    """Length of the file as its header states it, in seconds; 0 if it does not."""
    truncated: bool
    """The file breaks off before its end."""
    ordered: bool = True
    """Packets say which frame they become; otherwise only the order of decoding does, and `ranks` means nothing."""
    exact: bool = True
    """Each packet that is shown becomes one frame, as far as can be seen without decoding."""
    cut: bool = False
    """Some packets are not shown: those that an edit list leaves out, and VP8's reference frames."""
    leaps: bool = False
    """Decoding may begin anew at each keyframe: nothing that is shown after it refers to what came before it."""
    rate: float = 0.0
    """Frames per second within the pieces of a clock that jumped; 0 for any other."""
    notes: tuple[str, ...] = ()
    """What was put right, in words."""
    listed: bool = False
    """What is a keyframe is by the file's index, not seen in the packets themselves."""
    span: tuple[float, float] | None = None
    """When the film's first and last frame are shown, where `times` are those of a part of it."""
    packets: "list[Packet] | None" = None
    """The packets themselves, their time stamps the ranks, if they are few enough bytes."""


@dataclass
class Packets:
    """What one pass over a stream's packets finds, in the order of the file."""

    pts: list[float] = field(default_factory=list)
    """In units of the time base; nan where a packet has none."""
    dts: list[float] = field(default_factory=list)
    durations: list[int] = field(default_factory=list)
    keys: list[bool] = field(default_factory=list)
    shown: list[bool] = field(default_factory=list)
    kept: "list[Packet] | None" = field(default_factory=list)
    size: int = 0
    leaps: bool = True

    def add(self, packet: "Packet", codec: str, extradata: bytes | None) -> None:
        """Takes one packet."""
        stamp, decoded = packet.pts, packet.dts
        self.pts.append(np.nan if stamp is None else stamp)
        self.dts.append(np.nan if decoded is None else decoded)
        self.durations.append(packet.duration or 0)
        self.keys.append(packet.is_keyframe)
        # VP8 says in its first byte whether a frame is shown, or only referred to.
        hidden = packet.is_discard or (codec == "vp8" and not memoryview(packet)[0] >> 4 & 1)
        self.shown.append(not hidden)
        if packet.is_keyframe and codec == "h264":
            self.leaps = self.leaps and is_idr(packet, extradata)
        self.size += packet.size
        if self.kept is not None:
            self.kept.append(packet)
            if self.size > KEPT_PACKETS_BYTES:
                self.kept = None


def read_timeline(
    container: "InputContainer", stream: "VideoStream", source: BinaryIO, keep: bool = True
) -> Timeline | None:
    """One pass over the packets; None if they carry no time stamps (raw elementary streams), or none that is true.

    keep: whether the packets are kept, where they are few bytes. DecodeError where there is no packet at all.
    """
    if container.format.name in ("obu", "av1"):
        return None
    codec, extradata = stream.codec_context.codec.canonical_name, stream.codec_context.extradata
    read = Packets() if keep else Packets(kept=None)
    truncated, cut_through = breaks_off(source), False
    for packet in demuxed(container, stream):
        read.add(packet, codec, extradata)
        cut_through = truncated and (packet.is_corrupt or container.format.name == "gif")
    if cut_through:
        read.shown[-1] = False
    if not any(read.shown):
        raise DecodeError("there is no frame in it")
    # An index that lists more than there is: the rest of the file is missing.
    truncated = truncated or (container.format.name.startswith("mov") and len(read.pts) < stream.frames)
    base = float(stream.time_base or Fraction(1, 1000))
    avi = container.format.name == "avi" and bool(stream.codec_context.has_b_frames)
    found = _of_order(read, base) if avi else of_stamps(read, base, container)
    if found is None:
        return None
    length = 0.0 if truncated else max(0.0, (container.duration or 0) / 1e6)
    return replace(found, length=length, truncated=truncated)


def breaks_off(source: BinaryIO) -> bool:
    """Whether the file says itself that it was longer. The place in `source` stays."""
    place = source.tell()
    size = source.seek(0, 2)
    source.seek(0)
    found = is_truncated(source, source.read(4096), size)
    source.seek(place)
    return found


def _of_order(read: Packets, base: float) -> Timeline | None:
    """The timeline of an AVI with reordered frames: decoding times, which frames take in the order of decoding."""
    stamps = np.array(read.dts)
    if np.isnan(stamps).any():
        return None
    times = np.sort(stamps * base)
    times -= times[0]
    if not believed(times):
        return None
    gap = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
    ranks = np.full(len(times), NOT_SHOWN)
    notes = ("reordered AVI: times in the order of decoding",)
    keys = np.array(read.keys)
    return Timeline(
        times,
        ranks,
        keys,
        np.array(read.pts),
        stamps,
        gap,
        0.0,
        False,
        ordered=False,
        exact=False,
        notes=notes,
        packets=read.kept,
    )


def of_stamps(
    read: Packets, base: float, container: "InputContainer", first: float | None = None
) -> Timeline | None:
    """The timeline by presentation time stamps; None where they cannot be true.

    base: seconds of their unit. first: when the film's first frame is shown, where `read` begins later.
    """
    avi = container.format.name == "avi"  # which has decoding times only
    stamps, decoded = np.array(read.dts if avi else read.pts) * base, np.array(read.dts) * base
    durations, shown = np.array(read.durations) * base, np.array(read.shown)
    notes: list[str] = []
    rate = 0.0
    missing = np.isnan(stamps)
    if missing.all() or missing.sum() > max(1, FEW * len(stamps)):
        return None
    clock = container.format.name in CLOCKS
    if clock and not np.isnan(decoded).any():
        stamps, count = join_pieces(stamps, decoded, durations)
        if count:
            rate = 1 / float(np.median(np.diff(np.sort(stamps))))
            notes.append(f"{count} jumps of the clock joined")
    if container.format.name in ELEMENTARY:
        notes.append("counted at the stated rate: an elementary stream has no times")
    liars = missing | outliers(stamps)
    if 0 < liars.sum() <= max(1, FEW * len(stamps)):
        stamps = between_neighbours(stamps, liars)
        notes.append(f"{liars.sum()} times that cannot be true put between their neighbours'")
    order = np.flatnonzero(shown)
    order = order[np.argsort(stamps[order], kind="stable")]
    times = stamps[order]
    tied = int((np.diff(times) <= 0).sum())
    if tied:
        times = spread_ties(times)
        notes.append(f"{tied} times nudged that stood twice")
    times = times - origin(container, float(times[0]) if first is None else first, joined=bool(rate))
    if container.format.name == "gif":
        times = shown_by_browsers(times)
    if not believed(times):
        return None
    ranks = np.full(len(stamps), NOT_SHOWN)
    ranks[order] = np.arange(len(order))
    for packet, rank in zip(read.kept or (), ranks.tolist(), strict=False):
        packet.pts = rank
    return Timeline(
        times,
        ranks,
        np.array(read.keys),
        np.array(read.pts),
        np.array(read.dts),
        float(durations[order[-1]]),
        0.0,
        False,
        exact=tied <= max(1, FEW * len(times)),
        cut=not shown.all(),
        leaps=read.leaps and _leaps(ranks, np.array(read.keys)),
        rate=rate,
        notes=tuple(notes),
        packets=read.kept,
    )


def origin(container: "InputContainer", first: float, joined: bool = False) -> float:
    """Where a file's clock stands at the start of its timeline, in seconds.

    mp4, Matroska and their like count from zero; the clock of an MPEG stream, or of a piece of a live broadcast, starts
    anywhere. first: when the first frame is shown. joined: the clock jumped.
    """
    clock, begin = container.format.name in CLOCKS, (container.start_time or 0) / 1e6
    return min(begin if (clock or begin >= 1) and not joined else first if clock else 0.0, first)


def shown_by_browsers(times: np.ndarray) -> np.ndarray:
    """A GIF's times as browsers and players have them: a delay below 0.02 s is one of 0.1 s."""
    delays = np.diff(times)
    return times[0] + np.r_[0.0, np.cumsum(np.where(delays < 0.0199, 0.1, delays))]


def join_pieces(stamps: np.ndarray, decoded: np.ndarray, durations: np.ndarray) -> tuple[np.ndarray, int]:
    """Presentation times of a clock that jumps as if it had not, seconds [packets], and how often it jumped.

    stamps, decoded: presentation and decoding times in the order of the file. After a jump decoding goes on as if the
    packet before had been followed at once. Pictures of a piece that would thereby be shown after the next has begun
    (its end is missing) are put before it.
    """
    steps = np.diff(decoded)
    edges = (np.flatnonzero((steps < -BACK_SECONDS) | (steps > JUMP_SECONDS)) + 1).tolist()
    joined, shift = stamps.copy(), 0.0
    for begin, end in pairwise([0, *edges, len(stamps)]):
        if begin:
            shift += decoded[begin - 1] + durations[begin - 1] - decoded[begin]
        joined[begin:end] += shift
    for begin, end in reversed(list(pairwise([0, *edges]))):
        following = float(np.nanmin(joined[end:]))
        late = np.flatnonzero(joined[begin:end] >= following) + begin
        early = np.nanmax(np.delete(joined[begin:end], late - begin), initial=following - durations[end - 1])
        places = np.linspace(early, following, len(late) + 2)[1:-1]
        joined[late[np.argsort(joined[late], kind="stable")]] = places
    return joined, len(edges)


def outliers(stamps: np.ndarray) -> np.ndarray:
    """Which presentation times cannot be true, bool [packets]: far from their place in the file, or beyond belief."""
    known = ~np.isnan(stamps)
    wrong = np.zeros(len(stamps), dtype=bool)
    wrong[known] = np.abs(stamps[known]) > LONGEST_SECONDS
    good = np.flatnonzero(known & ~wrong)
    while len(good) > 2 * REORDERED:
        places = np.empty(len(good), dtype=int)
        places[np.argsort(stamps[good], kind="stable")] = np.arange(len(good))
        off = np.abs(places - np.arange(len(good)))
        worst = int(off.argmax())
        if off[worst] <= REORDERED or wrong.sum() > max(1, FEW * len(stamps)):
            break
        wrong[good[worst]] = True
        good = np.delete(good, worst)
    return wrong


def between_neighbours(stamps: np.ndarray, liars: np.ndarray) -> np.ndarray:
    """The times with those of `liars` put between their neighbours in the file."""
    places = np.arange(len(stamps))
    true = places[~liars]
    gap = float(np.median(np.diff(np.sort(stamps[true])))) if len(true) > 1 else 0.0
    filled = np.interp(places, true, stamps[true])
    # np.interp stands still beyond the ends.
    filled[places > true[-1]] += gap * (places[places > true[-1]] - true[-1])
    return np.where(liars, filled, stamps)


def spread_ties(times: np.ndarray) -> np.ndarray:
    """Increasing times: those that are equal share the gap to the next, or the usual gap where that is smaller."""
    edges = np.flatnonzero(np.r_[True, np.diff(times) > 0])
    distinct, counts = times[edges], np.diff(np.r_[edges, len(times)])
    gaps = np.diff(distinct)
    usual = float(np.median(gaps)) if len(gaps) else 0.0
    room = np.minimum(np.r_[gaps, usual], usual or np.inf)
    within = np.arange(len(times)) - np.repeat(edges, counts)
    return np.repeat(distinct, counts) + np.repeat(room / counts, counts) * within


def believed(times: np.ndarray) -> bool:
    """Whether increasing times can be those of a video: not too long, and not too many frames a second."""
    span = float(times[-1] - times[0])
    return times[-1] <= LONGEST_SECONDS and len(times) - 1 <= RATES[1] * span


def _leaps(ranks: np.ndarray, keys: np.ndarray) -> bool:
    """Whether no packet is shown before the keyframe that it follows in the file."""
    last = np.maximum.accumulate(np.where(keys & (ranks >= 0), ranks, -1))
    return bool((ranks[ranks >= 0] >= last[ranks >= 0]).all())


def is_idr(packet: "Packet", extradata: bytes | None) -> bool:
    """Whether an H.264 packet of an mp4 or Matroska file holds an IDR picture: other keyframes are points from which a
    picture is whole after a while."""
    if not extradata or extradata[0] != 1:
        return False  # not in units with their length in front
    prefix, data, place = (extradata[4] & 3) + 1, memoryview(packet), 0
    while place + prefix < len(data):
        if data[place + prefix] & 31 == 5:
            return True
        place += prefix + int.from_bytes(data[place : place + prefix])
    return False
