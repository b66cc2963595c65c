"""Answers to questions about a video: the published classifier, and a head that scores answers by their text."""

from math import log

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, normalize

from hbi.model.levels import LEVELS
from hbi.model.tokens import Tokens

LEVEL_SHARES = {"entity": 0.4, "action": 0.4, "event": 0.2}
"""How much each level's logits count in an answer; published."""


class PublishedAnswerHead(nn.Module):
    """The head of the published code: at each level one pooled text and one pooled video, and a classifier of its own.

        pooled = sum_n softmax_n( Linear(relu(Linear(x_n))) ) x_n            of the words, and of the frames
        logits = Linear(relu(Linear(dropout([ V pooled video ; T pooled text ]))))

    At dim 512 and 1,500 answers that is 138 M weights in the classifiers alone.
    """

    def __init__(self, dim: int, answers: int, dropout: float) -> None:
        super().__init__()

        def weights() -> nn.ModuleDict:
            return nn.ModuleDict(
                {level: nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 1)) for level in LEVELS}
            )

        self.text_weights, self.video_weights = weights(), weights()
        self.text_maps = nn.ModuleDict({level: nn.Linear(dim, 4 * dim) for level in LEVELS})
        self.video_maps = nn.ModuleDict({level: nn.Linear(dim, 4 * dim) for level in LEVELS})
        self.classifiers = nn.ModuleDict(
            {
                level: nn.Sequential(nn.Linear(8 * dim, 16 * dim), nn.ReLU(), nn.Linear(16 * dim, answers))
                for level in LEVELS
            }
        )
        self.dropout = nn.Dropout(dropout)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(
        self, text: dict[str, Tokens], video: dict[str, Tokens], published: bool = False
    ) -> dict[str, Float[Tensor, "questions answers"]]:
        """Logits of each level. published: padding takes part in the weights' softmax, as in the published code."""
        logits = {}
        for level in LEVELS:
            pair = [
                maps[level](_pooled(tokens[level], weights[level](tokens[level].tokens)[:, :, 0], published))
                for maps, weights, tokens in (
                    (self.video_maps, self.video_weights, video),
                    (self.text_maps, self.text_weights, text),
                )
            ]
            logits[level] = self.classifiers[level](self.dropout(torch.cat(pair, dim=1))).float()
        return logits


class OpenAnswerHead(nn.Module):
    """Answers of any list: each token of the video beside the question, one hidden layer, the likeness to an answer.

        h_n    = gelu( Linear([ n(x_n) ; n(question) ]) )        the same layers at all levels
        fused  = Linear( dropout( sum_n softmax_n( Linear(h_n) ) h_n ) )
        logit  = scale * cos( fused, Linear(answer) )

    with x the video's tokens (rebuilt with the question, where the model reconstructs), the question the last word's
    token, and an answer the sentence token that the text tower gives it (as in Just Ask, Yang et al., ICCV 2021).
    """

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.question_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.hidden = nn.Linear(2 * dim, 2 * dim)
        self.weight = nn.Linear(2 * dim, 1)
        self.out = nn.Linear(2 * dim, dim)
        self.answer = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.scale = nn.Parameter(torch.tensor(log(1 / 0.07)))
        """Its logarithm."""

    def forward(
        self,
        question: Float[Tensor, "questions dim"],
        video: dict[str, Tokens],
        answers: Float[Tensor, "answers dim"],
    ) -> dict[str, Float[Tensor, "questions answers"]]:
        """Logits of each level."""
        directions = normalize(self.answer(answers).float(), dim=-1)
        asked = self.question_norm(question)[:, None]
        logits = {}
        for level in LEVELS:
            tokens = self.norm(video[level].tokens)
            both = torch.cat([tokens, asked.expand_as(tokens)], dim=-1)
            hidden = torch.nn.functional.gelu(self.hidden(both))
            fused = _pooled(video[level]._replace(tokens=hidden), self.weight(hidden)[:, :, 0])
            found = normalize(self.out(self.dropout(fused)).float(), dim=-1)
            logits[level] = self.scale.exp().clamp(max=100.0) * (found @ directions.T)
        return logits


def _pooled(
    tokens: Tokens, logits: Float[Tensor, "batch n"], padded: bool = False
) -> Float[Tensor, "batch dim"]:
    """The weighted mean of the present tokens; `padded`: padding takes its share of the weights, and adds nothing."""
    shares = logits.float().softmax(-1) * tokens.mask
    weights = shares if padded else tokens._replace(logits=logits).weights()
    return torch.einsum("bn,bnd->bd", weights.to(tokens.tokens.dtype), tokens.tokens)


def combined(logits: dict[str, Float[Tensor, "questions answers"]]) -> Float[Tensor, "questions answers"]:
    """The levels' logits, weighted as published."""
    return torch.stack([LEVEL_SHARES[level] * logits[level] for level in LEVELS]).sum(0)


def answer_loss(
    logits: dict[str, Float[Tensor, "questions answers"]], labels: Int[Tensor, " questions"]
) -> Float[Tensor, ""]:
    """Sum over the questions of the levels' mean cross entropy."""
    each = [cross_entropy(logits[level], labels, reduction="sum") for level in LEVELS]
    return torch.stack(each).mean()


def answer_distillation(
    logits: dict[str, Float[Tensor, "questions answers"]], into_teacher: bool = False
) -> Float[Tensor, ""]:
    """Sum over the questions of the mean over answers of KL(entity || action) + KL(entity || event).

    into_teacher: the gradient goes into the entity level too, as in the published code.
    """
    teacher = logits["entity"] if into_teacher else logits["entity"].detach()
    expected = teacher.log_softmax(-1)
    each = [
        kl_div(logits[level].log_softmax(-1), expected, reduction="sum", log_target=True)
        for level in LEVELS
        if level != "entity"
    ]
    return torch.stack(each).sum() / teacher.shape[-1]
