"""A frame's numbers as the colours that a player shows: matrix, range, gamut, and high dynamic range brought down.

limited or full range    by the frame's tag, or its pixel format
BT.601 or BT.709         by the frame's tag; untagged, by its size, as mpv and others do
BT.2020, Display P3      gamut brought to BT.709 in linear light
HLG, PQ                  tone-mapped to BT.709: reference white (ITU-R BT.2408: 75 % of HLG, 203 cd/m² of PQ) becomes
                         white, and what is brighter is rolled off above three quarters of it
"""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

BT709, BT601, BT2020 = 1, 5, 9
"""Matrices, as swscale numbers them."""
MATRICES = {1: BT709, 4: 4, 5: BT601, 6: BT601, 7: 7, 9: BT2020, 10: BT2020}
"""By the numbers of ITU-T H.273, which are FFmpeg's."""
LIMITED, FULL = 1, 2
PQ, HLG = 16, 18
TRANSFERS = {PQ: "PQ", HLG: "HLG"}
"""Transfers of high dynamic range, by H.273's numbers."""
GAMUTS = {9: "BT.2020", 12: "Display P3"}
TO_BT709 = {
    9: np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]]),
    12: np.array([[1.2249, -0.2247, 0.0], [-0.0420, 1.0419, 0.0], [-0.0197, -0.0786, 1.0979]]),
}
"""Linear RGB of a gamut to that of BT.709, by H.273's numbers of the primaries."""
HLG_WHITE = 0.26496
"""Scene light of HLG's reference white, a signal of 0.75."""
HLG_GAMMA = 1.2
"""What HLG's display of 1000 cd/m² adds to the contrast of the scene."""
PQ_WHITE = 203.0
"""PQ's reference white, in cd/m²."""
KNEE = 0.75
"""Above so much of white, light is rolled off."""


def to_rgb(frame: "VideoFrame", side: int) -> tuple[np.ndarray, list[str]]:
    """A frame as uint8 RGB [height, width, 3], and what had to be done beside the plain conversion.

    side: pixels that the short side of the result needs at least; where colours are mapped, the frame is first brought
    near it.
    """
    matrix, span = matrix_of(frame), range_of(frame)
    transfer, gamut = int(frame.color_trc), int(frame.color_primaries)
    if transfer not in TRANSFERS and gamut not in GAMUTS:
        image = frame.reformat(
            format="rgb24", src_colorspace=matrix, src_color_range=span, dst_color_range=FULL, threads=1
        )
        return image.to_ndarray(), ["full range"] if span == FULL and not frame.format.is_rgb else []
    scale = min(1.0, 2 * side / min(frame.width, frame.height))
    image = frame.reformat(
        width=max(1, round(frame.width * scale)),
        height=max(1, round(frame.height * scale)),
        format="rgb48le",
        interpolation="AREA",
        src_colorspace=matrix,
        src_color_range=span,
        dst_color_range=FULL,
        threads=1,
    )
    signal = image.to_ndarray().astype(np.float32) / 65535
    if transfer in TRANSFERS:
        return tone_map(signal, transfer, gamut), [f"tone-mapped from {TRANSFERS[transfer]}"]
    light = np.clip(signal, 0, 1) ** 2.4 @ TO_BT709[gamut].T.astype(np.float32)
    return _bytes(np.clip(light, 0, 1) ** (1 / 2.4)), [f"gamut of {GAMUTS[gamut]}"]


def matrix_of(frame: "VideoFrame") -> int:
    """By which matrix a frame's luma and chroma are RGB, in swscale's numbers."""
    high = frame.width >= 1280 or frame.height > 576
    return MATRICES.get(int(frame.colorspace), BT709 if high else BT601)


def range_of(frame: "VideoFrame") -> int:
    """LIMITED or FULL."""
    return FULL if int(frame.color_range) == FULL or frame.format.name.startswith("yuvj") else LIMITED


def tone_map(signal: np.ndarray, transfer: int, gamut: int) -> np.ndarray:
    """HLG or PQ, float [height, width, 3] from 0 to 1, as uint8 RGB of BT.709.

    PQ is the light of a display; HLG is that of the scene, of which a display makes its own by a gamma of 1.2
    (BT.2100), here of each colour by itself, as FFmpeg's zscale has it. The inverse of BT.1886 makes of either what a
    display of BT.709 is to be sent.
    """
    light = (hlg_light(signal) / HLG_WHITE) ** HLG_GAMMA if transfer == HLG else pq_light(signal) / PQ_WHITE
    if gamut in TO_BT709:
        light = light @ TO_BT709[gamut].T.astype(np.float32)
    light = np.maximum(light, 0)
    peak = np.maximum(light.max(axis=-1, keepdims=True), 1e-6)
    over, room = np.maximum(peak - KNEE, 0), 1 - KNEE
    light = light * ((np.minimum(peak, KNEE) + room * over / (over + room)) / peak)
    return _bytes(light ** (1 / 2.4))


def hlg_light(signal: np.ndarray) -> np.ndarray:
    """Scene light, 0 to 1, of an HLG signal, 0 to 1 (ITU-R BT.2100, inverse OETF)."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    signal = np.clip(signal, 0, 1)
    return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)


def pq_light(signal: np.ndarray) -> np.ndarray:
    """Light in cd/m² of a PQ signal, 0 to 1 (SMPTE ST 2084)."""
    m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
    power = np.clip(signal, 0, 1) ** (1 / m2)
    return 10000 * (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1)


def _bytes(image: np.ndarray) -> np.ndarray:
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)
