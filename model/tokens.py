"""The tokens of a batch at one level, and the masks that say which of them are there."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor


class Tokens(NamedTuple):
    """The tokens of a batch at one level."""

    tokens: Float[Tensor, "batch n dim"]
    """Features, of any length."""
    logits: Float[Tensor, "batch n"]
    """Weight logits, before the softmax over present tokens."""
    mask: Bool[Tensor, "batch n"]
    """True where a token is present."""

    def weights(self) -> Float[Tensor, "batch n"]:
        """Softmax of the logits over the present tokens; 0 at padding, and everywhere in a row without a token."""
        logits = at_least_float32(self.logits)
        return logits.masked_fill(~self.mask, torch.finfo(logits.dtype).min).softmax(-1) * self.mask


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision widened, since three digits are too few for a softmax; other types as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def require_tokens(mask: Shaped[Tensor, "batch n"], what: str) -> Bool[Tensor, "batch n"]:
    """The mask as bool, or an error naming the first row of it in which nothing is present.

    On a GPU the error is the device's own (no row is named), so that no step waits for the answer.
    """
    mask = mask.bool()
    filled = mask.any(-1)
    if mask.device.type == "cpu":
        if not filled.all():
            row = int((~filled).nonzero()[0, 0])
            raise ValueError(
                f"{what}_mask: row {row} has no valid {what}; leave that sample out of the batch"
            )
    elif filled.numel():
        torch._assert_async(filled.all(), f"{what}_mask: a row has no valid {what}")
    return mask


def longest(mask: Bool[Tensor, "batch n"]) -> int:
    """Columns up to the last one in which a row has a token, at least one; on a GPU all of them, so that no step waits
    for the answer, and where torch compiles, which wants one size."""
    if mask.device.type != "cpu" or torch.compiler.is_compiling():
        return mask.shape[1]
    return int((mask.any(0) * torch.arange(1, mask.shape[1] + 1)).amax().clamp(min=1)) if mask.shape[1] else 0


def last_present(
    words: Float[Tensor, "batch words dim"], mask: Bool[Tensor, "batch words"]
) -> Float[Tensor, "batch dim"]:
    """The last present word of each row: the end token, where CLIP reads the sentence."""
    position = torch.arange(mask.shape[1], device=mask.device)
    last = (position * mask).amax(1)
    return words.gather(1, last[:, None, None].expand(-1, 1, words.shape[2]))[:, 0]
