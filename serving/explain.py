"""Why a clip was found: the interaction of each word with each frame."""

import torch
from jaxtyping import Float
from torch import Tensor

from hbi.model.banzhaf import exact_interaction
from hbi.model.tokens import Tokens


@torch.inference_mode()
def interactions(query: Tokens, clips: Tokens) -> Float[Tensor, "clips words frames"]:
    """The exact Banzhaf interaction of each word of one query with each frame of each clip; 0 at padding."""
    words = torch.nn.functional.normalize(query.tokens.float(), dim=-1)
    frames = torch.nn.functional.normalize(clips.tokens.float(), dim=-1)
    similarity = words @ frames.transpose(1, 2)
    count = len(clips.tokens)
    return exact_interaction(
        similarity,
        query.logits.float().expand(count, -1),
        clips.logits.float(),
        query.mask.expand(count, -1),
        clips.mask,
    )
