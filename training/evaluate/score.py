"""Every text against every video without gradients: the weighted similarity in blocks that fit into the cache.

`weighted_similarity` of the model keeps what a backward pass needs, and its blocks are written to memory and read
several times. Here texts are sorted by length and cut to it, padding is replaced by what leaves every maximum as it
is, so that nothing is masked, and the videos are laid out frame by frame, so that both maxima run along whole rows.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from hbi.model.hbi import HBI
from hbi.model.tokens import Tokens

BLOCK_BYTES = {"cpu": 2**20, "cuda": 2**28}
"""Cosines of a block: a core's second-level cache, or what keeps a GPU busy."""
BLOCK_VIDEOS = 64
"""Videos of a block on a CPU."""


class _Side(NamedTuple):
    """Texts or videos with nothing left to mask."""

    directions: Float[Tensor, "batch n dim"]
    weights: Float[Tensor, "batch n"]
    lengths: Int[Tensor, " batch"]


def score(
    text: Tokens, video: Tokens, padding_is_zero: bool = False, products: torch.dtype = torch.float32
) -> Float[Tensor, "texts videos"]:
    """`weighted_similarity(text, video)`, equal to rounding, on the tokens' device.

    padding_is_zero: padding enters the maxima as a cosine of 0, as the published code has it. products: what cosines
    are computed in; in bfloat16 each is off by up to 2^-7, their maxima and sums are taken in float32.
    """
    texts, videos = (_side(side, padding_is_zero, products) for side in (text, video))
    scores = texts.weights.new_empty(len(text.mask), len(video.mask))
    device = scores.device.type
    limit = BLOCK_BYTES.get(device, BLOCK_BYTES["cuda"]) // 4
    at_once = BLOCK_VIDEOS if device == "cpu" else len(video.mask)
    for first in range(0, len(video.mask), max(1, at_once)):
        part = slice(first, first + at_once)
        columns, frames = len(videos.weights[part]), videos.weights.shape[1]
        # [frames, videos, dim]: a frame of all of the block's videos lies together.
        laid = videos.directions[part].transpose(0, 1).reshape(frames * columns, -1).T.contiguous()
        of_frames = videos.weights[part].T
        for rows, words in _rows(texts.lengths, limit // (frames * columns)):
            cosines = (texts.directions[rows, :words].flatten(0, 1) @ laid).float()
            cosines = cosines.view(len(rows), words, frames, columns)
            best_of_words = cosines.amax(2) * texts.weights[rows, :words, None]
            best_of_frames = cosines.amax(1) * of_frames
            scores[rows, part] = (best_of_words.sum(1) + best_of_frames.sum(1)) / 2
    return scores


def reranked(
    model: HBI,
    text: dict[str, Tokens],
    video: dict[str, Tokens],
    scores: Float[Tensor, "texts videos"],
    best: int,
) -> Float[Tensor, "texts videos"]:
    """`scores` whose `best` highest of each text are those of `HBI.rerank`, lifted above all others.

    text, video: entity tokens among them. ValueError where the model reconstructs nothing.
    """
    found = scores.clone()
    words, frames = text["entity"], video["entity"]
    for row in range(len(scores)):
        columns = scores[row].topk(min(best, scores.shape[1])).indices
        chosen = columns.to(frames.tokens.device)
        again = model.rerank(
            Tokens(*(part[row].expand(len(columns), *part.shape[1:]) for part in words)),
            Tokens(*(part[chosen] for part in frames)),
        ).cpu()
        found[row, columns] = again + (scores[row].max() - again.min() + 1)
    return found


def _side(tokens: Tokens, padding_is_zero: bool, products: torch.dtype) -> _Side:
    directions = normalize(tokens.tokens.float(), dim=-1).to(products)
    present = tokens.mask[:, :, None]
    if padding_is_zero:
        lengths = torch.full_like(tokens.mask.sum(1), tokens.mask.shape[1])
        return _Side(directions * present, tokens.weights(), lengths)
    # A padded token that repeats a present one changes no maximum, and its weight is 0.
    first = tokens.mask.int().argmax(1)
    repeated = directions.gather(1, first[:, None, None].expand(-1, 1, directions.shape[2]))
    position = torch.arange(1, tokens.mask.shape[1] + 1, device=tokens.mask.device)
    lengths = (position * tokens.mask).amax(1).clamp(min=1)
    return _Side(torch.where(present, directions, repeated), tokens.weights(), lengths)


def _rows(lengths: Int[Tensor, " texts"], tokens: int) -> list[tuple[Int[Tensor, " rows"], int]]:
    """Texts in the order of their lengths, as many at once as have about so many tokens, and the longest's length."""
    order = lengths.argsort(stable=True)
    ordered = lengths[order].tolist()
    blocks, first = [], 0
    while first < len(ordered):
        last = first + 1
        while last < len(ordered) and (last + 1 - first) * ordered[last] <= tokens:
            last += 1
        blocks.append((order[first:last], ordered[last - 1]))
        first = last
    return blocks
