"""The only place where ranks meet the loss: every rank contrasts its clips with those of all ranks.

Frames are gathered, or go round, with gradients (`hbi.training.exchange`). Each rank computes its own part of the
loss, so no rank holds the whole pairwise tensor, and the parts sum to the loss of the global batch. In the backward
pass each rank's tokens collect what all the parts say about them. DDP and FSDP average gradients over ranks, so each
part counts `world_size` times: what the optimiser sees is exactly the gradient of one process that holds the global
batch. (The published gather returned only the local slice of the gradient, so that its encoders learned at 1 / world
size of the rate.)
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from hbi.model.config import LossSettings
from hbi.model.hbi import Encoded
from hbi.model.losses import hbi_loss, loss_of_similarities
from hbi.training.exchange import (
    Sizes,
    assemble,
    gather,
    gather_rows,
    parts_of,
    similarities_over_ranks,
    wire_type,
)
from hbi.training.settings import GATHERED, ExchangeSettings

MicroBatch = TypeVar("MicroBatch")


def join(parts: Sequence[Encoded]) -> Encoded:
    """Micro-batches as one batch."""
    return assemble(parts[0], [torch.cat(same) for same in zip(*map(parts_of, parts), strict=True)])


def contrast(
    local: Encoded,
    settings: LossSettings,
    group: dist.ProcessGroup | None = None,
    exchange: ExchangeSettings = GATHERED,
    videos: Int[Tensor, " batch"] | None = None,
    asked: Sizes | None = None,
) -> dict[str, Float[Tensor, ""]]:
    """This rank's part of each loss, scaled so that the mean over ranks is the loss of the global batch.

    A global batch without a single clip has loss 0. videos: which of the rank's videos each pair has, where several
    have one, next to each other: these are not told from each other. asked: how many clips each rank has; none: it is
    asked here, and waited for.
    """
    ours = len(parts_of(local)[0])
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return hbi_loss(local, local, 0, settings, ours, videos) if ours else {"loss": local.logit_scale * 0}
    sizes = (asked or Sizes(ours, local.logit_scale.device, group)).read()
    first, clips = sum(sizes[: dist.get_rank(group)]), sum(sizes)
    if not clips:
        return {"loss": local.logit_scale * 0}
    numbers = None if videos is None else global_numbers(videos, sizes, group)
    if settings.objective == "published":
        pool = gather(local, sizes, group, wire_type(exchange))
        losses = hbi_loss(local, pool, first, settings, clips, numbers)
    else:
        with torch.autocast(local.logit_scale.device.type, enabled=False):
            similarities = similarities_over_ranks(local, sizes, settings, group, exchange, numbers)
            losses = loss_of_similarities(local, similarities, first, settings, clips, numbers)
    return {name: part * len(sizes) for name, part in losses.items()}


def global_numbers(
    videos: Int[Tensor, " batch"], sizes: list[int], group: dist.ProcessGroup | None = None
) -> Int[Tensor, "global"]:
    """A number for the video of each pair of the global batch, from the ranks' own numbers."""
    ours = torch.stack([torch.full_like(videos, dist.get_rank(group)), videos], 1).float()
    everyone, _ = gather_rows(ours, group, sizes=sizes)
    return everyone.unique_consecutive(dim=0, return_inverse=True)[1]


def detach_tokens(encoded: Encoded) -> tuple[Encoded, list[Tensor]]:
    """`encoded` in float32 and cut from its graph, with its differentiable tensors in the order of `tensors_of`.

    The loss's gradient stops at these tensors, and goes on into the encoders from there, whole or one micro-batch
    after the other.
    """
    differentiable = {id(tensor) for tensor in tensors_of(encoded)}
    parts = [
        part.detach().float().requires_grad_() if id(part) in differentiable else part
        for part in parts_of(encoded)
    ]
    scale, *bias = [scalar.detach().float().requires_grad_() for scalar in _scalars(encoded)]
    detached = assemble(encoded, parts)._replace(logit_scale=scale, logit_bias=bias[0] if bias else None)
    return detached, tensors_of(detached)


def _scalars(encoded: Encoded) -> list[Tensor]:
    """The logit scale, and the bias where there is one."""
    return [scalar for scalar in (encoded.logit_scale, encoded.logit_bias) if scalar is not None]


def tensors_of(encoded: Encoded) -> list[Tensor]:
    """The tensors of `encoded` that a gradient goes into: those of each clip, then the scalars."""
    sides = [
        part for side in (encoded.text, encoded.video) for tokens in side.values() for part in tokens[:2]
    ]
    return [*sides, *encoded.predicted.values(), *_scalars(encoded)]


def backward(  # noqa: PLR0913 (what is computed, and how ranks meet)
    encode: Callable[[MicroBatch], Encoded],
    micro_batches: Sequence[MicroBatch],
    settings: LossSettings,
    averaging: Callable[[bool], AbstractContextManager[None]] = lambda on: nullcontext(),
    group: dist.ProcessGroup | None = None,
    exchange: ExchangeSettings = GATHERED,
    asked: Sizes | None = None,
) -> dict[str, Float[Tensor, ""]]:
    """The losses of the global batch, and its gradient added to that of the weights behind `encode`.

    The rank's part of the batch comes in micro-batches. With one, the encoders keep their graph while the loss is
    computed on their tokens. With more, tokens are made without a graph first, and each is encoded once more when the
    loss's gradient at its tokens is known (GradCache, Gao et al. 2021): the same loss, the same gradient.
    averaging(on): a context in which backward passes average gradients over the ranks, or do not. asked: how many clips
    each rank has; none: it is asked when the encoders have run.
    """
    with torch.set_grad_enabled(len(micro_batches) == 1):
        encoded = [encode(micro_batch) for micro_batch in micro_batches]
    losses, gradients = token_gradients(
        encoded, lambda tokens: contrast(tokens, settings, group, exchange, asked=asked)
    )
    for number, (micro_batch, gradient) in enumerate(zip(micro_batches, gradients, strict=True), 1):
        with averaging(number == len(micro_batches)):  # ranks average once
            backward_into(encoded[0] if len(micro_batches) == 1 else encode(micro_batch), gradient)
    return losses


def token_gradients(
    encoded: Sequence[Encoded], loss_of: Callable[[Encoded], dict[str, Tensor]]
) -> tuple[dict[str, Float[Tensor, ""]], list[list[Tensor]]]:
    """The losses of micro-batches as one, and the gradient of "loss" at `tensors_of` each of them.

    The scalars count once: their gradient is in the last.
    """
    detached, leaves = detach_tokens(join(encoded))
    losses = loss_of(detached)
    losses["loss"].backward()
    gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    count = len(_scalars(detached))
    of_clips, of_scalars = gradients[:-count], gradients[-count:]
    sizes = [len(parts_of(part)[0]) for part in encoded]
    shares = zip(*(gradient.split(sizes) for gradient in of_clips), strict=True)
    found = [
        [*share, *(each * (number == len(sizes)) for each in of_scalars)]
        for number, share in enumerate(shares, 1)
    ]
    return {name: loss.detach() for name, loss in losses.items()}, found


def backward_into(encoded: Encoded, gradients: Sequence[Tensor], *losses: Tensor) -> None:
    """Goes on into the encoders with what `token_gradients` found at their tokens, and with losses of their own."""
    into = zip(tensors_of(encoded), gradients, strict=True)
    wanted = [(tensor, gradient.to(tensor.dtype)) for tensor, gradient in into if tensor.requires_grad]
    torch.autograd.backward(
        [*(t for t, _ in wanted), *losses], [*(g for _, g in wanted), *(None for _ in losses)]
    )
