"""Weighted token-wise similarity of every text with every video, whole or block by block."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

from hbi.model.tokens import Tokens, at_least_float32, longest

Padding = Literal["absent", "zero"]
BLOCK_BYTES = 2**28
"""Of the cosines of a block whose size nobody chose."""
Side = tuple[Tensor, Tensor, Tensor]
"""Directions [batch, n, dim], weights [batch, n] and mask [batch, n] of the tokens of one side."""


def _directions(tokens: Float[Tensor, "batch n dim"]) -> Float[Tensor, "batch n dim"]:
    return normalize(at_least_float32(tokens), dim=-1)


def _full_precision(tokens: Tensor) -> torch.autocast:
    """No autocast: three digits of a cosine are too few for a softmax at a logit scale of 100."""
    return torch.autocast(tokens.device.type, enabled=False)


def pair_similarity(text: Tokens, video: Tokens) -> Float[Tensor, "batch words frames"]:
    """Cosines of each text's words with its own video's frames; 0 at padding."""
    with _full_precision(text.tokens):
        cosines = torch.einsum("btd,bvd->btv", _directions(text.tokens), _directions(video.tokens))
    return cosines * (text.mask[:, :, None] & video.mask[:, None, :])


def matched_similarity(text: Tokens, video: Tokens, padding: Padding = "absent") -> Float[Tensor, " batch"]:
    """The diagonal of `weighted_similarity`: each text with the video of its own row, in linear memory."""
    with _full_precision(text.tokens):
        cosines = pair_similarity(text, video)
        present = text.mask[:, :, None] & video.mask[:, None, :]
        cosines = cosines.masked_fill(~present, 0.0 if padding == "zero" else -2.0)
        of_words = (cosines.amax(2) * text.weights()).sum(1)
        of_frames = (cosines.amax(1) * video.weights()).sum(1)
    return (of_words + of_frames) / 2


def _block(words: Side, frames: Side, padding: Padding) -> Float[Tensor, "texts videos"]:
    """The similarity of some texts with some videos: the whole of [texts, videos, words, frames] in memory."""
    word_directions, word_weights, word_mask = words
    frame_directions, frame_weights, frame_mask = frames
    cosines = torch.einsum("atd,bvd->abtv", word_directions, frame_directions)
    present = word_mask[:, None, :, None] & frame_mask[None, :, None, :]
    # Below every cosine, and finite: a padded word's maximum times its weight 0 must be 0, not NaN.
    cosines = cosines.masked_fill(~present, 0.0 if padding == "zero" else -2.0)
    # max, not amax: it keeps the positions of the maxima for the backward pass, not the whole grid.
    of_words = torch.einsum("abt,at->ab", cosines.max(dim=3).values, word_weights)
    of_frames = torch.einsum("abv,bv->ab", cosines.max(dim=2).values, frame_weights)
    return (of_words + of_frames) / 2


def weighted_similarity(
    text: Tokens, video: Tokens, chunk: int | None = None, padding: Padding = "absent"
) -> Float[Tensor, "texts videos"]:
    """Weighted token-wise similarity, in [-1, 1], of each text a with each video b:

        S[a, b] = 1/2 ( sum_t p_t max_v s[t, v] + sum_v q_v max_t s[t, v] )

    with s the cosines of a's words t and b's frames v, p and q the softmax of the weight logits over the present
    tokens (Wang et al. 2022, "Disentangled Representation Learning for Text-Video Retrieval"; used by HBI). A padded
    token is in no maximum and has no weight. `padding="zero"` lets it enter the maxima as a cosine of 0, as the
    published HBI code does.

    chunk: largest number of texts and of videos compared at once. Memory beyond the inputs and the result is then
    chunk^2 * words * frames, in the backward pass too, which computes each block a second time. None: all at once.
    ValueError below 1.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk}, must be at least 1 (or None for no chunks)")
    if padding == "absent":
        text, video = (Tokens(*(part[:, : longest(side.mask)] for part in side)) for side in (text, video))
    with _full_precision(text.tokens):
        words = (_directions(text.tokens), text.weights(), text.mask)
        frames = (_directions(video.tokens), video.weights(), video.mask)
        return _blocks(words, frames, chunk, padding)


def fitting_chunk(words: int, frames: int) -> int:
    """Texts and videos whose cosines, compared at once, take `BLOCK_BYTES`."""
    return max(1, int((BLOCK_BYTES / (4 * max(1, words * frames))) ** 0.5))


def _blocks(words: Side, frames: Side, chunk: int | None, padding: Padding) -> Float[Tensor, "texts videos"]:
    """The similarity, block by block where it is larger than one."""
    if chunk is None or (len(words[0]) <= chunk and len(frames[0]) <= chunk):
        return _block(words, frames, padding)
    # Split once: the gradient of each part then gathers at the part's own size.
    word_parts = list(zip(*(tensor.split(chunk) for tensor in words), strict=True))
    frame_parts = list(zip(*(tensor.split(chunk) for tensor in frames), strict=True))
    rows = []
    for word_part in word_parts:
        row = [
            checkpoint(_block, word_part, frame_part, padding, use_reentrant=False, preserve_rng_state=False)
            for frame_part in frame_parts
        ]
        rows.append(torch.cat(row, dim=1))
    return torch.cat(rows)
