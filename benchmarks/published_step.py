"""What a training step of the published code does, in our own writing: the opponent of `benchmarks.step`.

float32; attention that makes its whole matrix; all patches of a frame normalised and projected, of which the first is
kept; the whole [texts, videos, words, frames] tensor, masked twice; a frozen estimator whose interaction the three
levels learn; divergences averaged as published; gradients clipped over all and then one by one; BertAdam, a parameter
at a time.
"""

from collections.abc import Iterable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, normalize
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from hbi.model.backbones.block import Block
from hbi.model.backbones.clip import VisionTower, run_layers
from hbi.model.hbi import HBI, Encoded
from hbi.model.levels import LEVELS
from hbi.model.tokens import Tokens


def with_whole_frames(model: HBI) -> HBI:
    """The model with blocks as the library runs them, whose vision tower carries every patch to the end."""

    def forward(self: VisionTower, images: Tensor) -> Tensor:
        hidden = self.norm_before(self.embeddings(images))
        return self.projection(self.norm(run_layers(self.layers, hidden, None, self.checkpointing)))[:, 0]

    for module in model.modules():
        if isinstance(module, Block):
            module.__class__ = CLIPEncoderLayer  # type: ignore[assignment]
    tower: VisionTower = model.video  # type: ignore[assignment]
    tower.forward = MethodType(forward, tower)  # type: ignore[method-assign]
    return model


def similarities(text: Tokens, video: Tokens) -> tuple[Tensor, Tensor]:
    """[texts, videos], and the word-by-frame similarities of the matched pairs, cut out of the whole."""
    words, frames = normalize(text.tokens, dim=-1), normalize(video.tokens, dim=-1)
    pairwise = torch.einsum("atd,bvd->abtv", words, frames)
    pairwise = torch.einsum("abtv,at->abtv", pairwise, text.mask.float())
    pairwise = torch.einsum("abtv,bv->abtv", pairwise, video.mask.float())
    of_words = torch.einsum("abt,at->ab", pairwise.max(3).values, text.weights())
    of_frames = torch.einsum("abv,bv->ab", pairwise.max(2).values, video.weights())
    return (of_words + of_frames) / 2, torch.diagonal(pairwise, dim1=0, dim2=1).permute(2, 0, 1)


def loss_of(model: HBI, encoded: Encoded) -> Tensor:
    """The loss with the published weights: alignment 1, self-distillation 2.

    The predictors of the levels have run inside the model; the published code runs them here, once as well.
    """

    def divergence(student: Tensor, teacher: Tensor) -> Tensor:
        return kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="none").mean()

    total, entity = encoded.logit_scale.new_zeros(()), None
    for level in LEVELS:
        text, video = encoded.text[level], encoded.video[level]
        similarity, pairs = similarities(text, video)
        logits = encoded.logit_scale * similarity
        rows = [way.log_softmax(-1).diagonal().mean() for way in (logits, logits.T)]
        estimator: Any = model.estimator
        with torch.no_grad():
            teacher = estimator(pairs)
        student = encoded.predicted[level]
        turned = (2, 1, 0)
        aligned = divergence(student, teacher) + divergence(student.permute(turned), teacher.permute(turned))
        total = total - sum(rows) / 2 + aligned
        if entity is None:
            entity = similarity
        else:
            total = total + 2 * (divergence(similarity.T, entity.T) + divergence(similarity, entity))
    return total


class BertAdam:
    """Adam without bias correction, with decoupled decay; each gradient is clipped by itself."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float = 1e-4) -> None:
        self.parameters, self.lr = [p for p in parameters if p.requires_grad], lr
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.parameters]

    @torch.no_grad()
    def step(self) -> None:
        for parameter, (first, second) in zip(self.parameters, self.moments, strict=True):
            if parameter.grad is None:
                continue
            nn.utils.clip_grad_norm_([parameter], 1.0)
            first.mul_(0.9).add_(parameter.grad, alpha=0.1)
            second.mul_(0.98).addcmul_(parameter.grad, parameter.grad, value=0.02)
            change = first / (second.sqrt() + 1e-6)
            if parameter.ndim > 1:
                change += 0.2 * parameter
            parameter.add_(-self.lr * change)

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None
