"""The moment of a clip that a sentence speaks of, and how near it is to the right one."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor


def moment(gains: Float[Tensor, " frames"], timestamps: Sequence[float], end: float) -> tuple[float, float]:
    """The run of frames whose gains above their mean add up to the most; start and end in seconds.

    gains: what each frame is good for; timestamps: when each is shown; end: of the clip. It ends where the next frame
    is shown, or where the clip ends.
    """
    gains = gains[: len(timestamps)]
    above = (gains - gains.mean()).tolist()
    best, first, last = -float("inf"), 0, 0
    for i in range(len(above)):
        total = 0.0
        for j in range(i, len(above)):
            total += above[j]
            if total > best + 1e-12:
                best, first, last = total, i, j
    until = timestamps[last + 1] if last + 1 < len(timestamps) else max(end, timestamps[last])
    return timestamps[first], until


def temporal_iou(one: tuple[float, float], other: tuple[float, float]) -> float:
    """Seconds that both hold over seconds that either holds, 0 to 1 (Gao et al. 2017, "TALL"); 0 where neither has
    any."""
    both = max(0.0, min(one[1], other[1]) - max(one[0], other[0]))
    either = (one[1] - one[0]) + (other[1] - other[0]) - both
    return both / either if either > 0 else 0.0
