"""What the ablation compares: models, losses and scores, one row each."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hbi.model.banzhaf import exact_interaction
from hbi.model.config import LossSettings, ReconstructionConfig
from hbi.model.hbi import HBI, Encoded
from hbi.model.losses import QUADRATURE_NODES, hbi_loss
from hbi.model.similarity import pair_similarity, weighted_similarity
from hbi.model.tokens import Tokens, last_present

FRAMES = 6
"""Of the published strength of the alignment, which is 1 over the frames of a clip."""
ENTITY = {"entity": 1.0}
ALL = {"entity": 1 / 3, "action": 1 / 3, "event": 1 / 3}
Score = Callable[[dict[str, Tokens], dict[str, Tokens]], Tensor]
"""Texts and videos, at each level, to similarities [texts, videos]."""
Extra = Callable[[Encoded], Tensor]
"""The batch as the model encodes it to a loss that is added."""


class MeanPooling(HBI):
    """One token a side: the sentence, and the mean of the frames."""

    def text_levels(self, words: Tensor, text_mask: Tensor, levels: Any = ()) -> dict[str, Tokens]:
        return {"entity": _single(last_present(words, text_mask.bool()))}

    def video_levels(self, frames: Tensor, video_mask: Tensor, levels: Any = ()) -> dict[str, Tokens]:
        present = video_mask.bool()[:, :, None]
        return {"entity": _single((frames * present).sum(1) / present.sum(1))}


def _single(vectors: Tensor) -> Tokens:
    one = torch.ones(len(vectors), 1, dtype=torch.bool, device=vectors.device)
    return Tokens(vectors[:, None], torch.zeros_like(one, dtype=vectors.dtype), one)


def by_levels(weights: dict[str, float]) -> Score:
    """The weighted sum of the levels' similarities."""

    def score(text: dict[str, Tokens], video: dict[str, Tokens]) -> Tensor:
        return torch.stack(
            [w * weighted_similarity(text[level], video[level], 256) for level, w in weights.items()]
        ).sum(0)

    return score


def by_interaction(text: dict[str, Tokens], video: dict[str, Tokens]) -> Tensor:
    """The sum of the exact interaction of all words with all frames, at the entity level."""
    words, frames = text["entity"], video["entity"]
    rows = []
    for i in range(len(words.mask)):
        one = Tokens(*(part[i : i + 1].expand(len(frames.mask), *part.shape[1:]) for part in words))
        rows.append(total_interaction(one, frames))
    return torch.stack(rows)


def total_interaction(text: Tokens, video: Tokens) -> Tensor:
    """The sum of a pair's exact interactions, [pairs]; it has gradients."""
    return exact_interaction(
        pair_similarity(text, video), text.logits, video.logits, text.mask, video.mask, nodes=QUADRATURE_NODES
    ).sum((1, 2))


def interaction_contrast(encoded: Encoded) -> Tensor:
    """A text's whole interaction with its own video is larger than with the hardest other one of the batch."""
    text, video = encoded.text["entity"], encoded.video["entity"]
    with torch.no_grad():
        similarity = weighted_similarity(text, video).fill_diagonal_(-torch.inf)
    other_videos = Tokens(*(part[similarity.argmax(1)] for part in video))
    other_texts = Tokens(*(part[similarity.argmax(0)] for part in text))
    own = total_interaction(text, video)
    margins = torch.stack(
        [own - total_interaction(text, other_videos), own - total_interaction(other_texts, video)]
    )
    return torch.nn.functional.softplus(-LossSettings.target_scale * margins).mean()


@dataclass(frozen=True)
class Row:
    """One way to train a model, and the ways to score with it."""

    names: dict[str, Score]
    """Name of the row -> its score: what is trained alike is trained once."""
    loss: LossSettings
    model: dict[str, Any] = field(default_factory=dict)
    """What differs in the model's configuration."""
    kind: type[HBI] = HBI
    extra: Extra | None = None
    """A loss that is added."""
    explained: bool = True
    """Whether its explanations are measured: of mean pooling there is one token to explain."""

    def losses(self, encoded: Encoded) -> Tensor:
        """The loss of a batch."""
        loss = hbi_loss(encoded, encoded, 0, self.loss, len(encoded.text["entity"].mask))["loss"]
        return loss if self.extra is None else loss + self.extra(encoded)


def _loss(levels: float, interaction: float = 0.0, distillation: float = 0.0, **more: Any) -> LossSettings:
    return LossSettings((1.0, levels, levels), interaction, distillation, **more)


ALIGNED, DISTILLED = 1 / FRAMES, 2 / (64 * 100**2)
ROWS = [
    Row({"1 mean pooling": by_levels(ENTITY)}, _loss(0), kind=MeanPooling, explained=False),
    Row({"2 weighted token-wise similarity": by_levels(ENTITY)}, _loss(0)),
    Row(
        {"3 + action and event levels": by_levels(ENTITY), "4 + score by all levels": by_levels(ALL)},
        _loss(1),
    ),
    Row({"5 + alignment to the exact interaction": by_levels(ALL)}, _loss(1, ALIGNED)),
    Row(
        {
            "6 + self-distillation": by_levels(ALL),
            "6, scored by the sum of interactions": by_interaction,
        },
        _loss(1, ALIGNED, DISTILLED),
    ),
    Row(
        {"7 + reconstruction": by_levels(ALL)},
        _loss(1, ALIGNED, DISTILLED),
        {"reconstruction": ReconstructionConfig("attention")},
    ),
    Row(
        {"8 the published objective": by_levels(ALL)},
        _loss(1, 1.0, 2.0, objective="published"),
        {"estimator": True},
    ),
    Row({"9 the defaults": by_levels(ENTITY)}, LossSettings()),
    Row({"a: 2, frames see one neighbour": by_levels(ENTITY)}, _loss(0), {"temporal_window": 1}),
    Row({"b: 5, frames see one neighbour": by_levels(ALL)}, _loss(1, ALIGNED), {"temporal_window": 1}),
    Row({"c: 2, taught by averaged weights": by_levels(ENTITY)}, _loss(0, teacher=1.0)),
    Row({"d: 2, contrast of interactions": by_levels(ENTITY)}, _loss(0), extra=interaction_contrast),
]
