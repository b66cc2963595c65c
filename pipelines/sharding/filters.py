"""Which clips are not wanted: pure functions that return a reason or nothing.

    reject(candidate, settings)     by itself: length, size, aspect, caption, black, still, and a user's own

A reason depends on nothing but its arguments, so the same manifest and settings reject the same rows, however many
workers there are; whether a clip repeats an earlier one is asked of its `Fingerprint`, in `dedup`. A filter of one's
own is a function of a candidate: from Python `FilterSettings(own=(function,))`, for the command line a field of
`FilterSettings`, a function beside the others, and its place in `FILTERS`.
"""

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from hbi.pipelines.manifest import Row

if TYPE_CHECKING:
    from PIL.Image import Image

    from hbi.pipelines.decoding.clip import Clip

HASH_FRAMES = 3
"""Frames of a clip that its perceptual hash covers: first, middle, last."""
HASH_BITS = 64
"""Bits of the hash of one frame."""


@dataclass(frozen=True)
class FilterSettings:
    """What a clip must be to become a sample. None: not asked."""

    min_seconds: float | None = None
    """Shortest clip, in seconds."""
    max_seconds: float | None = None
    """Longest clip, in seconds."""
    min_side: int | None = None
    """Smallest short side of the source, in pixels."""
    max_aspect: float | None = None
    """Largest ratio of the long side to the short side."""
    min_words: int | None = None
    """Fewest words of a caption; a clip needs one caption that fits."""
    max_words: int | None = None
    """Most words of a caption; a clip needs one caption that fits."""
    black: float | None = None
    """Mean brightness (0 to 255) that at least one frame must exceed. 8 finds black clips."""
    still: float | None = None
    """Mean change of brightness (0 to 255) that two neighbouring frames must exceed. 0.5 finds still pictures."""
    same: bool = False
    """Reject a clip whose file has the same bytes and the same times as that of an earlier row."""
    near: int | None = None
    """Reject a clip whose perceptual hash differs in at most so many of 64 bits a frame from an earlier one's. 4 finds
    re-encoded and resized copies."""
    own: Annotated[tuple[Callable[["Candidate"], str | None], ...], tyro.conf.Suppress] = ()
    """Filters of one's own: each takes a `Candidate` and returns why it is not wanted, or None."""

    def __post_init__(self) -> None:
        for name in (
            "min_seconds",
            "max_seconds",
            "min_side",
            "max_aspect",
            "min_words",
            "max_words",
            "black",
            "still",
        ):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{_flag(name)} {value}: must be 0 or more")
        for low, high in (("min_seconds", "max_seconds"), ("min_words", "max_words")):
            least, most = getattr(self, low), getattr(self, high)
            if least is not None and most is not None and least > most:
                raise ValueError(f"{_flag(low)} {least}: must be at most {_flag(high)} ({most})")
        if self.max_aspect is not None and self.max_aspect < 1:
            raise ValueError(
                f"{_flag('max_aspect')} {self.max_aspect}: must be at least 1 (long side over short side)"
            )
        if self.near is not None and not 0 <= self.near <= 16:
            raise ValueError(f"{_flag('near')} {self.near}: must be between 0 and 16 bits")

    @property
    def compares(self) -> bool:
        """Whether clips are compared with earlier ones."""
        return self.same or self.near is not None

    def identity(self) -> dict[str, Any]:
        """What is asked, in plain values; one's own filters by their names."""
        asked = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        asked["own"] = [f"{own.__module__}.{own.__qualname__}" for own in self.own]
        return {
            name: value
            for name, value in asked.items()
            if value is not None and value is not False and value != []
        }


def _flag(name: str) -> str:
    """What a field is called where it is given."""
    return f"--filters.{name.replace('_', '-')}"


# --- A clip by itself -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FrameStats:
    """What the filters need to know of a clip's pictures."""

    brightness: float
    """Mean brightness of the brightest frame, 0 to 255."""
    change: float
    """Largest mean change of brightness between neighbouring frames, 0 to 255; 0 if there is one frame only."""
    hash: str
    """Perceptual hash of the first, middle and last frame, in hexadecimal."""


def frame_stats(jpegs: Sequence[bytes]) -> FrameStats:
    """Looks at the frames of a clip, in time order and at a quarter of their size (JPEG decodes to that directly)."""
    import imagehash
    import numpy as np

    small = [_small(jpeg) for jpeg in jpegs]
    pixels = [np.asarray(image, dtype=np.float32) for image in small]
    changes = [float(np.abs(b - a).mean()) for a, b in pairwise(pixels)]
    picks = np.linspace(0, len(small) - 1, HASH_FRAMES).round().astype(int)
    return FrameStats(
        brightness=round(max(float(image.mean()) for image in pixels), 3),
        change=round(max(changes, default=0.0), 3),
        hash="".join(str(imagehash.phash(small[pick])) for pick in picks),
    )


def _small(jpeg: bytes) -> "Image":
    from PIL import Image

    image = Image.open(io.BytesIO(jpeg))
    image.draft("L", (image.width // 4, image.height // 4))
    return image.convert("L")


@dataclass(frozen=True)
class Candidate:
    """A clip that would be a sample, as the filters see it."""

    row: Row
    """Its row of the manifest."""
    clip: "Clip"
    """Its frames (`clip.jpegs`), times and size."""

    @cached_property
    def stats(self) -> FrameStats:
        """What its pictures are like; looked at when a filter first asks."""
        return frame_stats(self.clip.jpegs)


def reject(candidate: Candidate, settings: FilterSettings) -> str | None:
    """Why a clip is not wanted, or None: the first reason of `FILTERS`, then of one's own."""
    reasons = chain(
        (asked(candidate, settings) for asked in FILTERS), (own(candidate) for own in settings.own)
    )
    return next(filter(None, reasons), None)


def wrong_length(candidate: Candidate, settings: FilterSettings) -> str | None:
    """A clip that is too short or too long."""
    seconds = candidate.clip.end - candidate.clip.start
    if settings.min_seconds is not None and seconds < settings.min_seconds - 1e-6:
        return f"too short: {seconds:.2f} s, less than {settings.min_seconds:g} s"
    if settings.max_seconds is not None and seconds > settings.max_seconds + 1e-6:
        return f"too long: {seconds:.2f} s, more than {settings.max_seconds:g} s"
    return None


def wrong_size(candidate: Candidate, settings: FilterSettings) -> str | None:
    """A source that is too small or too wide (or tall)."""
    width, height = candidate.clip.width, candidate.clip.height
    if settings.min_side is not None and min(width, height) < settings.min_side:
        return f"too small: {width}x{height}, short side less than {settings.min_side}"
    if settings.max_aspect is not None and max(width, height) > settings.max_aspect * min(width, height):
        return (
            f"wrong aspect: {width}x{height}, sides differ by more than a factor of {settings.max_aspect:g}"
        )
    return None


def wrong_caption(candidate: Candidate, settings: FilterSettings) -> str | None:
    """A clip none of whose captions has the length that is asked for."""
    least, most = settings.min_words, settings.max_words
    if least is None and most is None:
        return None
    lengths = [len(caption.split()) for caption in candidate.row.captions]
    if any((least or 0) <= length <= (length if most is None else most) for length in lengths):
        return None
    asked = f"{least or 0} to {'any number of' if most is None else most} words"
    if not lengths:
        return f"no caption, {asked} are asked for" if least else None
    return f"caption length: {', '.join(map(str, lengths[:5]))} words, {asked} are asked for"


def black(candidate: Candidate, settings: FilterSettings) -> str | None:
    """A clip that shows nothing."""
    if settings.black is not None and candidate.stats.brightness <= settings.black:
        return f"black: no frame is brighter than {candidate.stats.brightness:.1f} of 255"
    return None


def still(candidate: Candidate, settings: FilterSettings) -> str | None:
    """A picture that does not move."""
    if settings.still is not None and candidate.stats.change <= settings.still:
        return f"still picture: frames differ by {candidate.stats.change:.2f} of 255 at most"
    return None


FILTERS: tuple[Callable[[Candidate, FilterSettings], str | None], ...] = (
    wrong_length,
    wrong_size,
    wrong_caption,
    black,
    still,
)
"""In the order in which they are asked."""


# --- A clip against those before it ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fingerprint:
    """By what a clip is recognised."""

    digest: str
    """`digest` of its file and times."""
    hash: str
    """`FrameStats.hash`."""


def digest(path: str | Path, start: float | None, end: float | None) -> str:
    """SHA-256 of a local video file's bytes and the clip's times, in hexadecimal."""
    with Path(path).open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256")
    found.update(f"\0{start}\0{end}".encode())
    return found.hexdigest()
