"""Retrieval metrics: recall, median and mean rank, both ways, ties without favour.

A text's positive is its one video. A video is ranked against videos too (`v2t/`): each counts by the best of its
captions, as the published evaluations have it, whatever their number. `v2t-single/` ranks it against single captions,
of which its own best-ranked counts; with one caption a video the two are the same.

The rank of a query is 1 + the number of negatives placed before its best positive. Where scores tie, the order is
taken as uniformly random and *expectations* are reported: with g negatives above the best positive, e negatives and
p positives that tie with it, the tied block of e + p is shuffled, so

    P(rank <= K) = 1 - C(e, K - g) / C(e + p, K - g),        E[rank] = g + (e + p + 1) / (p + 1).

R@K is the mean of the first over queries (percent), MnR the mean and MdR the median of the second. A constant matrix
scores chance exactly: R@K = 100 K / N, MdR = MnR = (N + 1) / 2. (The published code counts every tied position as a
hit of its own.)

Two corrections of hubness are offered, each a row transform of its own and named in the metric (`t2v+dsl/R@1`):
`dual_softmax` (Cheng et al., "Improving Video-Text Retrieval by Multi-Stream Corpus Alignment and Dual Softmax Loss",
arXiv 2109.04290) sees all test queries at once, `querybank_norm` (Bogolin et al., "Cross Modal Retrieval with
Querybank Normalisation", CVPR 2022) sees a bank of training queries. Neither compares with a plain score.

All of it works on blocks of rows, so the extra memory is some times `BLOCK` elements, whatever the matrix.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

RECALL_AT = (1, 5, 10, 50)
BLOCK = 1 << 20
"""Elements of the similarity matrix held in float64 at one time."""

Matrix = Float[Tensor, "texts videos"] | Float[np.ndarray, "texts videos"]
Correction = Callable[[Float[Tensor, "rows gallery"]], Float[Tensor, "rows gallery"]]


def retrieval_metrics(
    similarity: Matrix,
    video_of_text: Int[Tensor, " _"] | Int[np.ndarray, " _"] | list[int] | None = None,
    *,
    dsl_temperature: float | None = None,
    text_bank: Float[Tensor, "bank_texts videos"] | None = None,
    video_bank: Float[Tensor, "texts bank_videos"] | None = None,
) -> dict[str, float]:
    """Text-to-video (`t2v/`), video-to-text (`v2t/`, the published way) and video to single captions (`v2t-single/`):
    R@1, R@5, R@10, R@50 in percent, MdR, MnR from rank 1.

    `video_of_text[i]` is the column of the video that text i describes; without it the matrix must be square and
    text i describes video i. Videos without a text are no v2t queries, but stay in the gallery of t2v.

    `dsl_temperature` (of cosines; 0.01 is CLIP's scale) adds `t2v+dsl/` and `v2t+dsl/`. `text_bank`, similarities
    of training texts with the test videos, adds `t2v+qbnorm/`; `video_bank`, of the test texts with training
    videos, adds `v2t+qbnorm/`.

    Raises ValueError for an empty matrix, NaN, or a `video_of_text` that does not fit. -inf is a score like others.
    """
    scores = torch.as_tensor(similarity)
    texts, videos = scores.shape
    if not texts or not videos:
        raise ValueError(f"similarity: shape {texts} x {videos} has no text or no video to rank")
    text_label = _text_labels(video_of_text, texts, videos).to(scores.device)
    video_label = torch.arange(videos, device=scores.device)

    captioned = text_label.unique()
    by_video = best_of_captions(scores, text_label)  # [captioned, videos]
    ways = {"t2v": (scores, text_label, video_label), "v2t": (by_video.T, video_label, captioned)}
    metrics: dict[str, float] = {}
    for name, (matrix, query_label, gallery_label) in ways.items():
        metrics |= _summary(name, matrix, query_label, gallery_label, None)
    metrics |= _summary("v2t-single", scores.T, video_label, text_label, None)
    if dsl_temperature is not None:
        for name, (matrix, query_label, gallery_label) in ways.items():
            sums = column_log_sums(matrix, dsl_temperature)
            correct = partial(dual_softmax, log_sums=sums, temperature=dsl_temperature)
            metrics |= _summary(f"{name}+dsl", matrix, query_label, gallery_label, correct)
    banks = {
        "t2v": text_bank,
        "v2t": None if video_bank is None else best_of_captions(video_bank, text_label).T,
    }
    for name, bank in banks.items():
        if bank is not None:
            matrix, query_label, gallery_label = ways[name]
            sums, hubs = column_log_sums(bank, QUERYBANK_TEMPERATURE), querybank_hubs(bank)
            correct = partial(querybank_norm, log_sums=sums, hubs=hubs)
            metrics |= _summary(f"{name}+qbnorm", matrix, query_label, gallery_label, correct)
    return metrics


def best_of_captions(
    scores: Float[Tensor, "texts columns"], video_of_text: Int[Tensor, " texts"]
) -> Float[Tensor, "captioned columns"]:
    """For each video that has texts, in the order of their numbers, the best score of its texts in each column."""
    videos, own = video_of_text.unique(return_inverse=True)
    best = scores.new_full((len(videos), scores.shape[1]), -torch.inf)
    return best.scatter_reduce_(0, own[:, None].expand_as(scores), scores, "amax")


def recall_curve(ranks: Float[Tensor, " queries"], longest: int) -> Float[Tensor, " longest"]:
    """R@K in percent for K = 1 … `longest`, of expected ranks (a picture's precision: ties count by their mean)."""
    at = torch.arange(1, longest + 1, device=ranks.device, dtype=ranks.dtype)
    return 100 * torch.searchsorted(ranks.sort().values, at, right=True).to(ranks.dtype) / len(ranks)


# --------------------------------------------------------------------------------------------------- ranks


def query_ranks(
    scores: Float[Tensor, "queries gallery"],
    query_label: Int[Tensor, " queries"],
    gallery_label: Int[Tensor, " gallery"],
    correction: Correction | None = None,
) -> tuple[Float[Tensor, " answered"], Float[Tensor, "answered at"]]:
    """Expected rank, and probability of a rank of at most each K of `RECALL_AT`, of every query that has a positive.

    A gallery entry is positive where its label equals the query's. `correction` maps a block of rows (float64) to
    the scores to rank by. ValueError on NaN.
    """
    queries, gallery = scores.shape
    # Written in place: results kept one by one pin the freed blocks between them, and the heap grows by gigabytes.
    above, tied, hits = scores.new_zeros(3, queries, dtype=torch.float64)
    step = max(1, BLOCK // gallery)
    for first in range(0, queries, step):
        block = slice(first, first + step)
        rows = scores[block].double()
        if correction is not None:
            rows = correction(rows)
        if torch.isnan(rows).any():
            row, column = torch.isnan(rows).nonzero()[0].tolist()
            raise ValueError(
                f"similarity: query {first + row}, gallery entry {column} is NaN: nothing to rank by"
            )
        positive = query_label[block, None] == gallery_label[None, :]
        best = rows.masked_fill(~positive, -torch.inf).amax(1, keepdim=True)
        equal = rows == best
        above[block] = (rows > best).sum(1)
        tied[block] = (equal & ~positive).sum(1)
        hits[block] = (equal & positive).sum(1)
    answered = hits > 0  # a positive always ties with the best positive
    g, e, p = above[answered], tied[answered], hits[answered]
    within = torch.stack([_probability_within(k - g, e, p) for k in RECALL_AT], dim=1)
    return g + (e + p + 1) / (p + 1), within


def _probability_within(
    m: Float[Tensor, " queries"], e: Float[Tensor, " queries"], p: Float[Tensor, " queries"]
) -> Float[Tensor, " queries"]:
    """P(one of p positives is among the first m of e + p shuffled) = 1 - prod_{i<m} (e - i) / (e + p - i)."""
    missed = torch.ones_like(m)
    for i in range(max(RECALL_AT)):
        factor = (e - i).clamp(min=0) / (e + p - i).clamp(min=1)
        missed = torch.where(i < m, missed * factor, missed)
    return 1 - missed


def _summary(
    name: str,
    scores: Float[Tensor, "queries gallery"],
    query_label: Int[Tensor, " queries"],
    gallery_label: Int[Tensor, " gallery"],
    correction: Correction | None,
) -> dict[str, float]:
    ranks, within = query_ranks(scores, query_label, gallery_label, correction)
    recalls = 100 * within.mean(0)
    metrics = {f"{name}/R@{k}": recall for k, recall in zip(RECALL_AT, recalls.tolist(), strict=True)}
    # numpy's median takes the mean of the two middle ranks, as the published numbers do; torch's takes the lower.
    return metrics | {
        f"{name}/MdR": float(np.median(ranks.cpu().numpy())),
        f"{name}/MnR": ranks.mean().item(),
    }


def _text_labels(
    video_of_text: Int[Tensor, " _"] | Int[np.ndarray, " _"] | list[int] | None, texts: int, videos: int
) -> Int[Tensor, " texts"]:
    if video_of_text is None:
        if texts != videos:
            raise ValueError(
                f"similarity: {texts} texts and {videos} videos: give video_of_text, which is whose"
            )
        return torch.arange(texts)
    labels = torch.as_tensor(video_of_text, dtype=torch.int64)
    if labels.shape != (texts,):
        raise ValueError(f"video_of_text: shape {tuple(labels.shape)} for {texts} texts: one entry per text")
    if labels.min() < 0 or labels.max() >= videos:
        raise ValueError(
            f"video_of_text: {labels.min()}..{labels.max()} for {videos} videos: use 0..{videos - 1}"
        )
    return labels


# --------------------------------------------------------------------------------------------- corrections

QUERYBANK_TEMPERATURE = 0.05
"""1 / beta with the published beta = 20, for cosines."""


def column_log_sums(scores: Float[Tensor, "rows columns"], temperature: float) -> Float[Tensor, " columns"]:
    """log sum_r exp(scores[r, c] / temperature) for every column c, float64, in blocks of columns."""
    step = max(1, BLOCK // scores.shape[0])
    blocks = scores.split(step, dim=1)
    return torch.cat([torch.logsumexp(block.double() / temperature, dim=0) for block in blocks])


def dual_softmax(
    similarity: Float[Tensor, "queries gallery"],
    log_sums: Float[Tensor, " gallery"],
    temperature: float = 0.01,
) -> Float[Tensor, "queries gallery"]:
    """DSL: s[q, g] * softmax over queries of s[:, g] / temperature, for some rows q of the matrix.

    `log_sums` are `column_log_sums` of the whole matrix at the same temperature. A gallery entry that many queries
    claim counts less for each. float64, since the softmax of far-off queries falls below float32.
    """
    return similarity * torch.exp(similarity.double() / temperature - log_sums)


def querybank_hubs(bank: Float[Tensor, "bank gallery"]) -> torch.Tensor:
    """Gallery entries that are the nearest of any bank query (the activation set with k = 1): bool [gallery]."""
    hubs = torch.zeros(bank.shape[1], dtype=torch.bool, device=bank.device)
    hubs[bank.argmax(1)] = True
    return hubs


def querybank_norm(
    similarity: Float[Tensor, "queries gallery"],
    log_sums: Float[Tensor, " gallery"],
    hubs: torch.Tensor,
    temperature: float = QUERYBANK_TEMPERATURE,
) -> Float[Tensor, "queries gallery"]:
    """QB-Norm (dynamic inverted softmax): rows whose nearest entry is a hub are divided by what the bank gives.

    The published score exp(beta s[q, g]) / sum_b exp(beta s[b, g]) is kept as its logarithm, which ranks alike.
    `log_sums` are `column_log_sums` and `hubs` the `querybank_hubs` of the bank's similarities [bank, gallery].
    """
    corrected = similarity.double() / temperature - log_sums
    return torch.where(hubs[similarity.argmax(1)][:, None], corrected, similarity.double())
