"""How a sentence finds its clips, in three stages of plain functions: candidates, segments, the exact score.

    1  all clips; above a size those with segments near the words, by an ANN index       -> candidates
    2  the two-way weighted similarity of the words with the candidates' three segments  -> the best of them
    3  the two-way weighted similarity of the words with their frame tokens, from disk   -> the answer

A segment is the weighted mean of neighbouring frame tokens. Three of them say enough of a clip for the true best to
be among the candidates; the tokens stay on disk until stage 3.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int

from hbi.model.similarity import weighted_similarity
from hbi.model.tokens import Tokens
from hbi.serving.index.rows import SEGMENTS
from hbi.serving.index.snapshot import SegmentScan, Snapshot

CLIPS_AT_ONCE = 8192
"""Clips whose segments are compared at once: their cosines stay in the processor's cache."""


@dataclass(frozen=True)
class SearchSettings:
    """How much each stage hands on."""

    nearest: int = 300
    """Segments that stage 1 finds for each word and each of the three places."""
    probes: int = 128
    """Partitions of the ANN index that are looked into for each word. 32, and 128 for the mean, took as long at a
    million clips of 64 channels, and found 0.93, 0.87 and 0.72 of the best ten where these find 1.00, 0.97, 0.95."""
    nearest_mean: int = 2000
    """Segments that it finds for the mean of the words: what a sentence far from every clip is found by."""
    probes_mean: int = 512
    """Partitions that are looked into for it."""
    candidates: int = 2000
    """Clips that stage 2 compares, beside those near the mean."""
    exact: int = 100
    """Clips that stage 3 compares, or twice the number asked for."""


def segments_of(
    tokens: Float[np.ndarray, "frames dim"], logits: Float[np.ndarray, " frames"]
) -> tuple[Float[np.ndarray, "segments dim"], Float[np.ndarray, " segments"]]:
    """Means of three runs of frames under their weights, as unit vectors, and what each weighs.

    The runs are of equal length in the frames' order; a clip of fewer frames than segments repeats some.
    Clusters of frames in their place found no more (0.970 of the best ten among ten candidates, beside 0.974: the
    demo's model on 400 clips), the tokens of the event level less (0.62).
    """
    frames = len(tokens)
    weights = np.exp(logits.astype(np.float64) - logits.max())
    weights /= weights.sum()
    vectors, weighs = [], []
    for i in range(SEGMENTS):
        first = min(i * frames // SEGMENTS, frames - 1)
        run = slice(first, max(first + 1, (i + 1) * frames // SEGMENTS))
        part = weights[run]
        mean = (part[:, None] * tokens[run]).sum(0)
        vectors.append(mean / max(float(np.linalg.norm(mean)), 1e-9))
        weighs.append(part.sum())
    total = np.asarray(weighs)
    return np.stack(vectors).astype(np.float16), (total / total.sum()).astype(np.float32)


def search(
    snapshot: Snapshot,
    query: Tokens,
    k: int,
    where: str | None = None,
    settings: SearchSettings = SearchSettings(),
) -> list[tuple[float, int]]:
    """The best `k` clips for one query, best first: weighted token-wise similarity in [-1, 1], and row id.

    query: the words of one sentence [1, words, dim], or the frames of an example. where: a condition on clips.
    """
    words, weights = _directions(query)
    if snapshot.indexed:
        scan = snapshot.segments_of_rows(nearest_candidates(snapshot, words, weights, where, settings, k))
    else:
        scan = snapshot.segments()
        if where is not None:
            scan = scan.only(snapshot.rows_where(where))
    scores = segment_scores(words, weights, scan)
    best = scan.rows[: scan.used][_top(scores, max(settings.exact, 2 * k))]
    return exact_scores(snapshot, query, best)[:k]


def nearest_candidates(
    snapshot: Snapshot,
    words: Float[np.ndarray, "words dim"],
    weights: Float[np.ndarray, " words"],
    where: str | None,
    settings: SearchSettings,
    k: int,
) -> Int[np.ndarray, " candidates"]:
    """Row ids of the clips with a segment near the words' weighted mean, and of those near to heavy words."""
    mean = (weights @ words)[None]
    near_mean = snapshot.nearest(mean, max(settings.nearest_mean, k), settings.probes_mean, where)
    rows_of_mean = np.unique(np.concatenate([row for _, row, _ in near_mean]))
    found = list(snapshot.nearest(words, max(settings.nearest, k), settings.probes, where))
    number, row, inner = (np.concatenate(parts) for parts in zip(*found, strict=True))
    rows, position = np.unique(row, return_inverse=True)
    # A clip that a word did not find is at most as near to it as the farthest that it found.
    farthest = np.full(len(words), np.inf)
    np.minimum.at(farthest, number, inner)
    nearest = np.repeat(np.where(np.isfinite(farthest), farthest, 0.0)[None], len(rows), 0)
    np.maximum.at(nearest, (position, number), inner)
    heavy = rows[_top(nearest @ weights, max(settings.candidates, 4 * k))]
    return np.union1d(rows_of_mean, heavy)


@torch.inference_mode()
def segment_scores(
    words: Float[np.ndarray, "words dim"], weights: Float[np.ndarray, " words"], scan: SegmentScan
) -> Float[np.ndarray, " clips"]:
    """The two-way weighted similarity with segments in the place of frames; -inf for clips that are gone."""
    scores = torch.empty(scan.used)
    query = torch.from_numpy(words).to(scan.vectors.dtype).T
    for first in range(0, scan.used, CLIPS_AT_ONCE):
        part = slice(first, min(first + CLIPS_AT_ONCE, scan.used))
        cosines = (scan.vectors[part].flatten(0, 1) @ query).float().unflatten(0, (-1, SEGMENTS))
        of_words = cosines.amax(1) @ torch.from_numpy(weights)
        scores[part] = (of_words + (cosines.amax(2) * scan.weights[part]).sum(1)) / 2
    return np.where(scan.present, scores.numpy(), -np.inf)


@torch.inference_mode()
def exact_scores(snapshot: Snapshot, query: Tokens, rows: np.ndarray) -> list[tuple[float, int]]:
    """The exact score of each of these rows that is there, best first."""
    if not len(rows):
        return []
    found, tokens, logits = snapshot.tokens(rows)
    scores = weighted_similarity(query, padded(tokens, logits))[0].numpy()
    order = np.argsort(-scores, kind="stable")
    return [(float(scores[i]), int(found[i])) for i in order]


def exhaustive(snapshot: Snapshot, query: Tokens, rows_at_once: int = 4096) -> list[tuple[float, int]]:
    """The exact score of every row, best first: what the stages are measured against."""
    rows = snapshot.all_rows()
    scored = []
    for first in range(0, len(rows), rows_at_once):
        scored += exact_scores(snapshot, query, rows[first : first + rows_at_once])
    return sorted(scored, key=lambda pair: -pair[0])


def padded(tokens: list[np.ndarray], logits: list[np.ndarray]) -> Tokens:
    """Clips of different lengths as one batch."""
    longest = max(map(len, tokens))
    batch = torch.zeros(len(tokens), longest, tokens[0].shape[1])
    weights = torch.zeros(len(tokens), longest)
    mask = torch.zeros(len(tokens), longest, dtype=torch.bool)
    for i, (clip, weight) in enumerate(zip(tokens, logits, strict=True)):
        batch[i, : len(clip)] = torch.from_numpy(clip.astype(np.float32))
        weights[i, : len(clip)] = torch.from_numpy(weight)
        mask[i, : len(clip)] = True
    return Tokens(batch, weights, mask)


def _directions(query: Tokens) -> tuple[np.ndarray, np.ndarray]:
    """The present words of one query as unit vectors, and their weights."""
    present = query.mask[0]
    words = torch.nn.functional.normalize(query.tokens[0][present].float(), dim=-1)
    return words.numpy(), query.weights()[0][present].float().numpy()


def _top(scores: np.ndarray, count: int) -> np.ndarray:
    """Positions of the largest scores, in no order; those of -inf are left out."""
    chosen = np.argpartition(-scores, count)[:count] if len(scores) > count else np.arange(len(scores))
    return chosen[np.isfinite(scores[chosen])]
