"""Pictures of an evaluation, as matplotlib figures of their own (no pyplot, no state): safe to draw in a thread."""

import numpy as np
import torch
from matplotlib.figure import Figure

from hbi.model.metrics import query_ranks, recall_curve
from hbi.training.evaluate.retrieval import EvalResult

LARGEST = 512
"""Rows and columns of the largest picture of a matrix; larger ones are averaged down."""


def similarity_figure(result: EvalResult, title: str = "") -> Figure:
    """The similarity matrix with its texts in the order of their videos, so that matches lie on the diagonal."""
    assert result.similarity is not None, "only the first rank has the scores"
    ordered = result.similarity[result.video_of_text.argsort(stable=True)].float()
    size = (min(LARGEST, ordered.shape[0]), min(LARGEST, ordered.shape[1]))
    small = torch.nn.functional.adaptive_avg_pool2d(ordered[None, None], size)[0, 0].numpy()
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.add_subplot()
    extent = (0, ordered.shape[1], ordered.shape[0], 0)
    image = axes.imshow(small, extent=extent, aspect="auto", interpolation="nearest")
    figure.colorbar(image, label="similarity")
    axes.set(xlabel="video", ylabel="text, by its video", title=title)
    return figure


def recall_figure(result: EvalResult, title: str = "", longest: int = 100) -> Figure:
    """R@K over K, both ways, beside chance."""
    assert result.similarity is not None, "only the first rank has the scores"
    scores, of_text = result.similarity, result.video_of_text
    videos = torch.arange(scores.shape[1])
    longest = min(longest, *scores.shape)
    at = np.arange(1, longest + 1)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    ways = {
        "text to video": (scores, of_text, videos),
        "video to text": (scores.T, videos, of_text),
    }
    for name, (rows, query, gallery) in ways.items():
        ranks, _ = query_ranks(rows, query, gallery)
        axes.plot(at, recall_curve(ranks, longest).numpy(), label=name)
    axes.plot(at, 100 * at / len(videos), "--", color="gray", label="text to video by chance")
    axes.set(xlabel="K", ylabel="R@K (%)", ylim=(0, 100), title=title)
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    return figure
