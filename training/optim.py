"""The optimiser's groups, the learning rate by step, and the moving average of the weights."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hbi.model.hbi import HBI
from hbi.training.settings import OptimSettings


def make_optimizer(model: HBI, settings: OptimSettings) -> torch.optim.AdamW:
    """AdamW over four groups: backbone or new layers, decayed or not.

    Matrices and embeddings decay; gains, biases and scalars do not. `peak` of a group is its own largest learning
    rate, which `set_learning_rate` scales by the schedule.
    """
    groups = []
    for name, parameters, peak in (
        ("backbone", model.backbone_parameters(), settings.backbone_lr),
        ("new", model.new_parameters(), settings.lr),
    ):
        trained = [parameter for _, parameter in parameters if parameter.requires_grad]
        for decay, held in (
            (settings.weight_decay, [p for p in trained if p.ndim >= 2]),
            (0.0, [p for p in trained if p.ndim < 2]),
        ):
            groups.append({"params": held, "name": name, "peak": peak, "weight_decay": decay})
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)


def schedule(step: int, steps: int, warmup: float, floor: float) -> float:
    """Share of the peak learning rate in step 0, 1, … of `steps`: linear warm-up, then half a cosine.

    s(x) = (step + 1) / w for the first w = warmup * steps steps, then floor + (1 - floor) (1 + cos(pi x)) / 2 with
    x from 0 to 1 over the rest. Unlike the published code it is continuous where warm-up ends, and it never rises
    again: `steps` are those of the whole run, whatever the number of epochs.
    """
    warm = math.ceil(warmup * steps)
    if step < warm:
        return (step + 1) / warm
    x = min(1.0, (step - warm) / max(1, steps - warm))
    return floor + (1 - floor) * (1 + math.cos(math.pi * x)) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Sets each group to its share of the peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share


class EMA:
    """Exponential moving average of the trained weights: a <- d a + (1 - d) w, d = min(decay, (1 + n) / (10 + n)).

    The cap lets the average follow quickly in the first n steps.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """After the optimiser's step `step`."""
        decay = min(self.decay, (1 + step) / (10 + step))
        live = [p.detach() for p in model.parameters() if p.requires_grad]
        torch._foreach_lerp_(list(self.weights.values()), live, 1 - decay)

    @contextmanager
    def swapped(self, model: nn.Module) -> Iterator[None]:
        """A context in which the model has the averaged weights."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    @torch.no_grad()
    def _swap(self, model: nn.Module) -> None:
        """Exchanges the model's weights with the average; twice is nothing."""
        for name, parameter in model.named_parameters():
            if name in self.weights:
                kept: Tensor = parameter.detach().clone()
                parameter.copy_(self.weights[name])
                self.weights[name].copy_(kept)
