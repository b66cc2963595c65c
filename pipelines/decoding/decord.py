"""Chosen frames of a video by decord, where its answer is PyAV's.

decord 0.6.0 carries an FFmpeg of 2019. Measured against a sequential decode of real and made clips: it opens no AV1,
GIF or raw stream, misses frames when it seeks in HEVC, in AVI and FLV with reordered frames, and wherever a frame
after a keyframe refers to one before it, and hangs for good on MPEG-TS with B-frames. It takes the first of several
streams, turns mirrored pictures upside down, and knows no pixels that are not square together with a rotation, no
high dynamic range, no interlacing and no matrix by size. So it is used only for a file in which there is nothing to be
done: one stream, in a codec and container whose seeks are right, each packet a frame, and a first picture that is
8-bit, progressive, upright, square and plain BT.601.
"""

import io
import os
from typing import BinaryIO

import numpy as np

from hbi.pipelines.decoding.colour import BT601, GAMUTS, LIMITED, TRANSFERS, matrix_of, range_of
from hbi.pipelines.decoding.container import DecodeError, failed, video_file
from hbi.pipelines.decoding.film import Film
from hbi.pipelines.decoding.picture import Picture, display_turn
from hbi.pipelines.decoding.pyav import Choose, decoded
from hbi.pipelines.decoding.timeline import KEPT_PACKETS_BYTES

FORMATS = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}
CODECS = {"h264", "vp8", "vp9", "mpeg4", "h263", "mjpeg"}
UPRIGHT = (1, 0, 0, 1)


def is_right(film: Film) -> bool:
    """Whether decord's frames are those of PyAV for this file."""
    container, stream, timeline = film.container, film.stream, film.timeline
    if (
        timeline is None
        or not timeline.exact
        or timeline.cut
        or timeline.truncated
        or timeline.notes
        or not timeline.leaps
        or len(container.streams.video) > 1
        or container.format.name not in FORMATS
        or stream.codec_context.codec.canonical_name not in CODECS
        or (stream.sample_aspect_ratio or 1) != 1
    ):
        return False
    _, first = next(decoded(film), (None, None))
    return (
        first is not None
        and first.format.name == "yuv420p"
        and not first.interlaced_frame
        and display_turn(first) == UPRIGHT
        and matrix_of(first) == BT601
        and range_of(first) == LIMITED
        and int(first.color_trc) not in TRANSFERS
        and int(first.color_primaries) not in GAMUTS
    )


def chosen_frames(film: Film, choose: Choose, picture: Picture) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """As `hbi.pipelines.decoding.pyav.chosen_frames`; DecodeError also where decord is seen to be wrong."""
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    stream, timeline = film.stream, film.timeline
    assert timeline is not None
    times = timeline.times
    chosen = choose(times)
    last = None
    shape = (stream.codec_context.height, stream.codec_context.width, 3)
    try:
        with video_file(film.data) as source:
            # VP9 fails after a few frames with other numbers of threads; one process per core needs no more than one.
            reader = decord.VideoReader(_to_open(source), ctx=decord.cpu(0), num_threads=1)
            if len(reader) != len(times):
                raise DecodeError(f"decord counts {len(reader)} frames, the file has {len(times)}")
            for index in chosen.tolist():
                image = reader[index].asnumpy()
                if last is not None and np.array_equal(image, last):
                    # Where decord runs out of frames it repeats the last one in silence. Or the picture stands still:
                    # the second decoder knows.
                    raise DecodeError("decord gave the same frame twice")
                if image.shape != shape:  # as it does for 1, 2, 16, 48, 72 wide
                    raise DecodeError(f"decord gave a frame of shape {image.shape}")
                last = image
                picture.add_image(image, UPRIGHT, 1.0, [])
            reader.seek(0)  # else its threads decode ahead into memory
    except (decord.DECORDError, RuntimeError, ValueError, OSError, IndexError) as error:
        raise failed(error) from error
    return times, chosen, []


def _to_open(source: BinaryIO) -> BinaryIO | str:
    """What decord is to open: the bytes, or for a large file a path, so that it is not copied into memory.

    By path decord would follow a playlist; that `source` is none was seen before. The path by descriptor has no
    extension that could mislead, and exists for names that are not UTF-8, which decord cannot open.
    """
    if isinstance(source, io.BytesIO) or os.fstat(source.fileno()).st_size <= KEPT_PACKETS_BYTES:
        return source
    return f"/dev/fd/{source.fileno()}"
