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


def by_word(
    interaction: Float[Tensor, "tokens frames"], word_of_token: list[int]
) -> Float[Tensor, "words frames"]:
    """The rows of a word's pieces added up."""
    words = torch.zeros(max(word_of_token) + 1, interaction.shape[1], dtype=interaction.dtype)
    return words.index_add(0, torch.tensor(word_of_token), interaction)
