"""The Banzhaf value of each word and each frame of a matched pair: exact, and by its definition.

The game is that of `hbi.model.banzhaf`. The value of a player i is what it adds to a random coalition C of all the
others, each present with probability 1/2 (Banzhaf 1965; Dubey and Shapley 1979):

    B(i) = E_C[ phi(C + i) - phi(C) ].

An interaction says what a word and a frame add together beyond what each adds alone. A value says what one of them
adds, whatever the others do. Arguments and masks are those of `exact_interaction`; the result is 0 at padding, in units
of the similarity.
"""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from hbi.model.banzhaf import coalition_values, maximum_change, players_of, weight_change


def exact_values(
    similarity: Float[Tensor, "batch words frames"],
    word_logits: Float[Tensor, "batch words"],
    frame_logits: Float[Tensor, "batch frames"],
    word_mask: Shaped[Tensor, "batch words"] | None = None,
    frame_mask: Shaped[Tensor, "batch frames"] | None = None,
    nodes: int | None = None,
) -> tuple[Float[Tensor, "batch words"], Float[Tensor, "batch frames"]]:
    """Values of the words and of the frames, in closed form.

    Words join apart from frames, and each half of phi is a sum of products of what depends on the one and what depends
    on the other: a word changes one factor, and the other takes its mean. With dP, dM, dQ, dN of `exact_interaction`,

        B(word i)  = 1/2 ( sum_t dP[t, i] EM[t]  +  sum_v EQ[v] dN[v, i] )
        B(frame j) = 1/2 ( sum_v dQ[v, j] EN[v]  +  sum_t EP[t] dM[t, j] )

    where EM[t] = sum_r 2^-r s[t, rank r] is the mean of the maximum over a random set of frames (0 over none), EN the
    same over words, and EP[t] = dP[t, t] / 2, EQ[v] = dQ[v, v] / 2 are the mean weights. Computed in float64.
    nodes: see `exact_interaction`.
    """
    words, frames = players_of(word_mask, word_logits), players_of(frame_mask, frame_logits)
    pairs = words[:, :, None] & frames[:, None, :]
    grid = similarity.double().masked_fill(~pairs, 0.0)
    of_words = weight_change(word_logits.double(), words, nodes)
    of_frames = weight_change(frame_logits.double(), frames, nodes)

    def values(changes: Tensor, maxima: Tensor, other: Tensor, maximum_changes: Tensor) -> Tensor:
        weights = other.diagonal(dim1=1, dim2=2) / 2
        first = torch.einsum("bti,bt->bi", changes, maxima)
        second = torch.einsum("bv,bvi->bi", weights, maximum_changes)
        return (first + second) / 2

    turned = grid.transpose(1, 2)
    of_each_word = values(of_words, mean_maximum(grid, frames), of_frames, maximum_change(turned, words))
    of_each_frame = values(of_frames, mean_maximum(turned, words), of_words, maximum_change(grid, frames))
    return (
        of_each_word.masked_fill(~words, 0.0).to(similarity.dtype),
        of_each_frame.masked_fill(~frames, 0.0).to(similarity.dtype),
    )


def mean_maximum(
    rows: Float[Tensor, "batch n m"], mask: Shaped[Tensor, "batch m"]
) -> Float[Tensor, "batch n"]:
    """E_V[ max_{v in V} row[v] ], each present v in V with probability 1/2, the maximum over nothing being 0.

    The entry of rank r is the maximum where it is present and the r - 1 above it are not: with probability 2^-r.
    """
    ordered = rows.masked_fill(~mask.bool()[:, None, :], -torch.inf).sort(dim=-1, descending=True).values
    rank = torch.arange(1, rows.shape[-1] + 1, device=rows.device)
    return ordered.masked_fill(ordered.isinf(), 0.0) @ (0.5**rank).to(rows.dtype)


def enumerated_values(
    similarity: Float[Tensor, "words frames"],
    word_logits: Float[Tensor, " words"],
    frame_logits: Float[Tensor, " frames"],
) -> tuple[Float[Tensor, " words"], Float[Tensor, " frames"]]:
    """The values of one game without padding by their definition, in float64: a mean over all its coalitions."""
    phi = coalition_values(similarity.double(), word_logits.double(), frame_logits.double())

    def values(rows: Tensor) -> Tensor:  # [coalitions of one side, coalitions of the other]
        sets = torch.arange(len(rows))
        each = [
            (rows[sets & 1 << i != 0] - rows[sets & 1 << i == 0]).mean()
            for i in range(len(sets).bit_length() - 1)
        ]
        return torch.stack(each)

    return values(phi), values(phi.T)
