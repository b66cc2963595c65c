"""What is asked of a replica, as it travels there: plain values, known without the model."""

from dataclasses import dataclass

FRESH_SECONDS = 1.0
"""How old a version of the index may be that is searched."""


@dataclass(frozen=True)
class Page:
    """Which part of a ranking is asked for, and among which clips."""

    k: int
    """How many."""
    offset: int = 0
    """How many before them are left out."""
    filters: tuple[tuple[str, str], ...] = ()
    """Labels that a clip must have: (key, value)."""
    rerank: bool = False
    """Score the best again, with tokens that are rebuilt with each other's help."""


@dataclass(frozen=True)
class Span:
    """A clip of a video."""

    place: str
    """Where the video lies, as the server reads it."""
    start: float | None = None
    """Where the clip begins, in seconds."""
    end: float | None = None
    """Where it ends, in seconds."""


@dataclass(frozen=True)
class NewClip:
    """A clip to take in."""

    clip: Span
    """Its video, and which part of it."""
    video: str
    """What it is called in answers."""
    id: str
    """Unique in the index."""
    part: str
    """Names the request that brought it."""
    captions: tuple[str, ...] = ()
    """Sentences that came with it."""
