"""Where new shots begin, by the content detector of PySceneDetect, in small frames of the whole video."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from hbi.pipelines.decoding.clip import film_of
from hbi.pipelines.decoding.container import check_size, stated_rate
from hbi.pipelines.decoding.pyav import decoded


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


def small_frames(data: bytes | Path | str, side: int) -> Iterator[tuple[float, np.ndarray]]:
    """Every frame of a video with its time in seconds, uint8 BGR, the long side at most `side`: to find shots in."""
    with film_of(data) as film:
        timeline, rate = film.timeline, stated_rate(film.stream) or 25.0
        for index, (rank, frame) in enumerate(decoded(film)):
            place = index if rank is None else rank
            known = timeline is not None and place < len(timeline.times)
            time = float(timeline.times[place]) if timeline is not None and known else index / rate
            check_size(frame.width, frame.height)
            scale = min(1.0, side / max(frame.width, frame.height))
            width, height = (max(1, round(length * scale)) for length in (frame.width, frame.height))
            yield time, frame.to_ndarray(format="bgr24", width=width, height=height)
