"""The Banzhaf interaction of a word and a frame: exact, by its definition, and by sampling.

The game of one matched pair. Players are the words t, with weight logits a_t, and the frames v, with weight logits b_v;
s[t, v] are their similarities. A coalition of words T and frames V has the value

    phi(T, V) = 1/2 ( sum_{t in T} p_t(T) max_{v in V} s[t, v]  +  sum_{v in V} q_v(V) max_{t in T} s[t, v] )

with p(T), q(V) the softmax of the logits over those present, and 0 where T or V is empty. The interaction of word i
and frame j is, over coalitions C of the others, each present with probability 1/2 (Grabisch and Roubens 1999),

    I(i, j) = E_C [ phi(C + i + j) + phi(C) - phi(C + i) - phi(C + j) ].

Padding is no player. The three functions take the same arguments: similarity [batch, words, frames], logits before the
softmax [batch, words] and [batch, frames], masks (bool or 0/1, true where present), and give [batch, words, frames],
0 at padding, in units of the similarity.
"""

from math import ceil, log

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

LEFT_END = -22.0
"""Where the integral over u = log x begins: e^-22 of a weight is left out."""
RIGHT_END = log(40.0)
"""Where it ends, for a weight of 1: the factor e^(-40) is left out."""
NODE_STEP = 0.4
"""Spacing of the nodes in u: the trapezoid rule's error falls as e^(-pi^2 / step), here 2e-11."""
LARGEST_GAP = 40.0
"""Neighbouring logits further apart than this are as good as this far apart: e^-40."""
FLOAT32_SPREAD = 25.0
"""Logits of a game further apart than this are computed with in float64: nodes that far out have few digits left."""
ENUMERATED_PLAYERS = 20
"""Most players of a game whose coalitions are listed."""


def players_of(
    mask: Shaped[Tensor, "batch n"] | None, logits: Float[Tensor, "batch n"]
) -> Bool[Tensor, "batch n"]:
    """Who plays: those present, as bool."""
    return torch.ones_like(logits, dtype=torch.bool) if mask is None else mask.to(logits.device).bool()


def _log_weights(logits: Float[Tensor, "batch n"], mask: Bool[Tensor, "batch n"]) -> Float[Tensor, "batch n"]:
    """Logs of weights that sum to 1 over the present, -inf at padding; gaps that no longer matter are shortened."""
    lowest = torch.finfo(logits.dtype).min
    ordered, order = logits.masked_fill(~mask, lowest).sort(dim=-1, descending=True)
    gaps = (ordered[:, :-1] - ordered[:, 1:]).clamp(max=LARGEST_GAP)
    below = torch.cat([torch.zeros_like(ordered[:, :1]), gaps.cumsum(-1)], dim=-1)
    shortened = torch.zeros_like(logits).scatter(1, order, -below).masked_fill(~mask, -torch.inf)
    total = shortened.masked_fill(~mask.any(-1, keepdim=True), 0.0).logsumexp(-1, keepdim=True)
    return shortened - total


def _spread(logits: Float[Tensor, "batch n"], mask: Bool[Tensor, "batch n"]) -> float:
    """How far apart the logits of a game are, at most; it waits for the device."""
    if not logits.numel():
        return 0.0
    highest = logits.masked_fill(~mask, -torch.inf).amax(-1)
    return float((highest - logits.masked_fill(~mask, torch.inf).amin(-1)).amax())


def weight_change(
    logits: Float[Tensor, "batch n"], mask: Bool[Tensor, "batch n"], nodes: int | None
) -> Float[Tensor, "batch n n"]:
    """dP[t, i] = E_T[ p_t(T + i) - p_t(T) ], p_t = 0 where t is absent; T: random subset of the others than i.

    With w the weights, f_u(x) = (1 + e^(-x w_u)) / 2 and 1 / y = int_0^inf e^(-x y) dx,

        dP[i, i] =     int w_i e^(-x w_i)                      prod_{u != i}    f_u(x) dx
        dP[t, i] = 1/2 int w_t e^(-x w_t) (e^(-x w_i) - 1)     prod_{u != t, i} f_u(x) dx

    by the trapezoid rule in u = log x. Every f lies in [1/2, 1]: a product without t and i may be formed by division.
    """
    log_weights = _log_weights(logits, mask)
    with torch.no_grad():
        lightest = log_weights.masked_fill(~mask, 0.0).amin(-1)
        length = RIGHT_END - LEFT_END - lightest
        if nodes is None:
            nodes = ceil(length.max().item() / NODE_STEP) + 1 if len(length) else 2
        step = length / (nodes - 1)
        u = LEFT_END + step[:, None] * torch.arange(nodes, device=logits.device, dtype=logits.dtype)
    scaled = (u[:, None, :] + log_weights[:, :, None]).exp()  # x w_t: [batch, n, nodes]
    decay = (-scaled).exp()
    factor = (1 + decay) / 2
    product = factor.log().sum(1).exp() * step[:, None]  # dx = x du; the x is in `scaled`
    present = scaled * decay / factor * product[:, None, :]
    change = torch.expm1(-scaled) / (2 * factor)
    result = present @ change.transpose(1, 2)
    return result.diagonal_scatter(present.sum(-1), dim1=1, dim2=2)


def maximum_change(
    similarity: Float[Tensor, "batch n m"], mask: Bool[Tensor, "batch m"]
) -> Float[Tensor, "batch n m"]:
    """dM[t, j] = E_V[ max_{V + j} s[t, .] - max_V s[t, .] ], the maximum over nothing being 0; V: subset without j.

    With s sorted downwards, L(r) the expected maximum of a random subset of what ranks below r (0 at the end),

        L(r - 1) = s(r) / 2 + L(r) / 2         dM[t, rank r] = 2^-(r-1) ( s(r) - L(r) ).
    """
    m = similarity.shape[-1]
    absent = ~mask[:, None, :].expand_as(similarity)
    order = similarity.masked_fill(absent, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    ordered = similarity.masked_fill(absent, 0.0).gather(-1, order)
    rank = torch.arange(m, device=similarity.device)
    halves = 0.5 ** rank.to(similarity.dtype)  # 2^-(r-1)
    below = torch.where(
        rank[:, None] > rank, halves[(rank[:, None] - rank).clamp(min=0)], 0.0
    )  # [rank below, rank]
    change = halves * (ordered - ordered @ below)
    return torch.zeros_like(change).scatter(-1, order, change).masked_fill(absent, 0.0)


def exact_interaction(
    similarity: Float[Tensor, "batch words frames"],
    word_logits: Float[Tensor, "batch words"],
    frame_logits: Float[Tensor, "batch frames"],
    word_mask: Shaped[Tensor, "batch words"] | None = None,
    frame_mask: Shaped[Tensor, "batch frames"] | None = None,
    nodes: int | None = None,
) -> Float[Tensor, "batch words frames"]:
    """I(i, j) in closed form. Words and frames join apart, and each half of phi is a sum of products of what depends on
    the words and what depends on the frames, so the mixed difference of the product is the product of the differences:

        I = 1/2 ( dP^T dM + (dQ^T dN)^T )

    with dP, dM of `weight_change` and `maximum_change`, and dQ, dN the same with words and frames exchanged.
    Computed and given in the similarity's type, at least float32; gradients flow to all three. The error is below 1e-9
    in float64 and below 1e-5 in float32, for similarities in [-1, 1].

    nodes: points of the quadrature; None: as many as the spread of the logits needs (on a GPU that waits for the
    device), and float64 inside where that is beyond float32. 128 are enough where the logits of a game lie within 25
    of each other.
    """
    words, frames = players_of(word_mask, word_logits), players_of(frame_mask, frame_logits)
    pairs = words[:, :, None] & frames[:, None, :]
    kind = torch.float64 if similarity.dtype == torch.float64 else torch.float32
    if nodes is None and max(_spread(word_logits, words), _spread(frame_logits, frames)) > FLOAT32_SPREAD:
        kind = torch.float64
    grid = similarity.to(kind).masked_fill(~pairs, 0.0)
    of_words = weight_change(word_logits.to(kind), words, nodes)
    of_frames = weight_change(frame_logits.to(kind), frames, nodes)
    first = of_words.transpose(1, 2) @ maximum_change(grid, frames)
    second = maximum_change(grid.transpose(1, 2), words).transpose(1, 2) @ of_frames
    return ((first + second) / 2).masked_fill(~pairs, 0.0).to(similarity.dtype)


def enumerated_interaction(
    similarity: Float[Tensor, "batch words frames"],
    word_logits: Float[Tensor, "batch words"],
    frame_logits: Float[Tensor, "batch frames"],
    word_mask: Shaped[Tensor, "batch words"] | None = None,
    frame_mask: Shaped[Tensor, "batch frames"] | None = None,
) -> Float[Tensor, "batch words frames"]:
    """I(i, j) by its definition, in float64: the value of every coalition, then the mean over all of them.

    The reference for the other two: 2^players values a game. ValueError for a game of more than 20 players.
    """
    words, frames = players_of(word_mask, word_logits), players_of(frame_mask, frame_logits)
    result = torch.zeros(similarity.shape, dtype=torch.float64, device=similarity.device)
    for game in range(len(similarity)):
        t, v = words[game].nonzero()[:, 0], frames[game].nonzero()[:, 0]
        if len(t) + len(v) > ENUMERATED_PLAYERS:
            raise ValueError(
                f"{len(t)} words and {len(v)} frames: at most {ENUMERATED_PLAYERS} players are enumerated"
            )
        if not len(t) or not len(v):
            continue
        s = similarity[game][t][:, v].double()
        values = coalition_values(s, word_logits[game, t].double(), frame_logits[game, v].double())
        word_sets = torch.arange(2 ** len(t), device=s.device)
        frame_sets = torch.arange(2 ** len(v), device=s.device)
        for i in range(len(t)):
            for j in range(len(v)):
                rows = word_sets[(word_sets >> i) & 1 == 0]
                columns = frame_sets[(frame_sets >> j) & 1 == 0]
                both = values[rows | 1 << i][:, columns | 1 << j]
                none = values[rows][:, columns]
                word = values[rows | 1 << i][:, columns]
                frame = values[rows][:, columns | 1 << j]
                result[game, t[i], v[j]] = (both + none - word - frame).mean()
    return result


def coalition_values(
    s: Float[Tensor, "n m"], word_logits: Float[Tensor, " n"], frame_logits: Float[Tensor, " m"]
) -> Float[Tensor, "word_sets frame_sets"]:
    """phi of every coalition; bit t of the row says that word t is in it, bit v of the column that frame v is."""

    def members(n: int) -> Bool[Tensor, "sets n"]:
        return (torch.arange(2**n, device=s.device)[:, None] >> torch.arange(n, device=s.device)) & 1 == 1

    def weights(logits: Tensor, sets: Tensor) -> Tensor:
        chosen = logits.masked_fill(~sets, -torch.inf)
        return torch.cat([torch.zeros_like(chosen[:1]), chosen[1:].softmax(-1)])  # the first set is empty

    def largest(rows: Tensor, sets: Tensor) -> Tensor:
        values = torch.where(sets[:, None, :], rows[None], -torch.inf).amax(-1)
        return values.masked_fill(~sets.any(-1, keepdim=True), 0.0)

    word_sets, frame_sets = members(s.shape[0]), members(s.shape[1])
    of_words = weights(word_logits, word_sets) @ largest(s, frame_sets).T
    of_frames = largest(s.T, word_sets) @ weights(frame_logits, frame_sets).T
    return (of_words + of_frames) / 2


def sampled_interaction(  # noqa: PLR0913 (the three interactions take the same tensors)
    similarity: Float[Tensor, "batch words frames"],
    word_logits: Float[Tensor, "batch words"],
    frame_logits: Float[Tensor, "batch frames"],
    word_mask: Shaped[Tensor, "batch words"] | None = None,
    frame_mask: Shaped[Tensor, "batch frames"] | None = None,
    samples: int = 1000,
    generator: torch.Generator | None = None,
    chunk: int = 64,
) -> Float[Tensor, "batch words frames"]:
    """I(i, j) as the mean over random coalitions: unbiased, its standard error falling as 1 / sqrt(samples).

    One coalition C is drawn a game and sample and serves every pair (i, j) with C less i and j. Its mixed difference
    is taken whole, for all pairs at once, as a product of differences (see `exact_interaction`).

    generator: on the similarity's device; chunk: samples in memory at once. ValueError for less than one sample.
    """
    if samples < 1:
        raise ValueError(f"samples is {samples}, must be at least 1")
    words, frames = players_of(word_mask, word_logits), players_of(frame_mask, frame_logits)
    pairs = words[:, :, None] & frames[:, None, :]
    grid = similarity.masked_fill(~pairs, 0.0)
    total = torch.zeros_like(grid, dtype=torch.float64)

    def draw(players: Tensor, count: int) -> Tensor:
        shape = (count, *players.shape)
        return (torch.rand(shape, generator=generator, device=players.device) < 0.5) & players

    for start in range(0, samples, chunk):
        count = min(chunk, samples - start)
        word_sets, frame_sets = draw(words, count), draw(frames, count)
        first = _sampled_weight_change(word_logits, word_sets, words).transpose(
            -1, -2
        ) @ _sampled_maximum_change(grid, frame_sets, frames)
        second = _sampled_weight_change(frame_logits, frame_sets, frames).transpose(
            -1, -2
        ) @ _sampled_maximum_change(grid.transpose(1, 2), word_sets, words)
        total += (first + second.transpose(-1, -2)).sum(0) / 2
    return (total / samples).masked_fill(~pairs, 0.0).to(similarity.dtype)


def _sampled_weight_change(
    logits: Float[Tensor, "batch n"], sets: Bool[Tensor, "samples batch n"], players: Bool[Tensor, "batch n"]
) -> Float[Tensor, "samples batch n n"]:
    """p_t(T + i) - p_t(T - i) at [t, i], for each drawn T."""
    itself = torch.eye(logits.shape[-1], dtype=torch.bool, device=logits.device)
    weights = (logits - logits.masked_fill(~players, -torch.inf).amax(-1, keepdim=True)).exp()

    def shares(members: Tensor) -> Tensor:  # [samples, batch, t, i]
        chosen = weights[:, :, None] * members
        return chosen / chosen.sum(-2, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)

    drawn = sets[..., :, None]
    joined = (drawn | itself) & players[:, :, None]
    return shares(joined) - shares(drawn & ~itself)


def _sampled_maximum_change(
    rows: Float[Tensor, "batch n m"], sets: Bool[Tensor, "samples batch m"], players: Bool[Tensor, "batch m"]
) -> Float[Tensor, "samples batch n m"]:
    """max_{V + j} s[t, .] - max_{V - j} s[t, .] at [t, j], for each drawn V."""
    members = sets[:, :, None, :]
    values = torch.where(members, rows, -torch.inf)
    best, best_at = values.max(-1, keepdim=True)
    second = values.scatter(-1, best_at, -torch.inf).amax(-1, keepdim=True)
    position = torch.arange(rows.shape[-1], device=rows.device)
    without = torch.where(position == best_at, second, best)
    largest = torch.maximum(without, rows)
    return (largest - without.masked_fill(without.isinf(), 0.0)) * players[:, None, :]
