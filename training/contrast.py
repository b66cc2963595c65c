"""The only place where ranks meet the loss: every rank contrasts its clips with those of all ranks.

Tokens are gathered with gradients. Each rank computes its own part of the loss, so no rank holds the whole pairwise
tensor, and the parts sum to the loss of the global batch. In the backward pass each rank's tokens collect what all
the parts say about them. DDP and FSDP average gradients over ranks, so each part counts `world_size` times: what the
optimiser sees is exactly the gradient of one process that holds the global batch. (The published gather returned
only the local slice of the gradient, so that its encoders learned at 1 / world size of the rate.)
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from hbi.model.config import LossSettings
from hbi.model.hbi import Encoded
from hbi.model.losses import hbi_loss
from hbi.model.tokens import Tokens

MicroBatch = TypeVar("MicroBatch")


class _Gather(torch.autograd.Function):
    """Rows of all ranks, in the order of ranks. Backward: the sum over ranks of what each says about our rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int], group: dist.ProcessGroup | None) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        padded = _padded(rows, max(sizes))
        gathered = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(gathered, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        parts = [_padded(part, max(ctx.sizes)) for part in gradients[0].split(ctx.sizes)]
        ours = torch.empty_like(parts[0])
        dist.reduce_scatter(ours, parts, group=ctx.group)
        return ours[: ctx.sizes[dist.get_rank(ctx.group)]], None, None


def _padded(rows: Tensor, size: int) -> Tensor:
    """Collectives want the same shape from every rank."""
    return torch.cat([rows, rows.new_zeros(size - len(rows), *rows.shape[1:])])


def gather_rows(
    rows: Float[Tensor, "batch width"], group: dist.ProcessGroup | None = None
) -> tuple[Float[Tensor, "global width"], int]:
    """The rows of all ranks, with gradients, and where ours begin. Ranks may hold different numbers of rows."""
    world_size, rank = dist.get_world_size(group), dist.get_rank(group)
    ours = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.zeros_like(ours) for _ in range(world_size)]
    dist.all_gather(counts, ours, group=group)
    sizes = [int(count) for count in counts]
    if max(sizes) == 0:
        return rows, 0
    gathered = _Gather.apply(rows, sizes, group)
    assert isinstance(gathered, Tensor)
    return gathered, sum(sizes[:rank])


def gather(local: Encoded, group: dist.ProcessGroup | None = None) -> tuple[Encoded, int]:
    """The tokens and predictions of the global batch, and where the local rows begin: one collective for all."""
    local = local._replace(players={})  # what each pair plays with concerns no other pair
    parts = _parts(local)
    wide = torch.cat([part.flatten(1).to(torch.float32) for part in parts], 1)
    rows, first = gather_rows(wide, group)
    columns = rows.split([part.flatten(1).shape[1] for part in parts], 1)
    whole = [
        column.reshape(len(rows), *part.shape[1:]).to(part.dtype)
        for column, part in zip(columns, parts, strict=True)
    ]
    return _assemble(local, whole), first


def _parts(encoded: Encoded) -> list[Tensor]:
    """All per-clip tensors of `encoded`, in a fixed order."""
    sides = [part for side in (encoded.text, encoded.video) for tokens in side.values() for part in tokens]
    return [*sides, *encoded.predicted.values(), *encoded.estimated.values(), *encoded.players.values()]


def _assemble(like: Encoded, parts: list[Tensor]) -> Encoded:
    """The inverse of `_parts`."""
    rest = iter(parts)
    return like._replace(
        text={level: Tokens(next(rest), next(rest), next(rest)) for level in like.text},
        video={level: Tokens(next(rest), next(rest), next(rest)) for level in like.video},
        predicted={level: next(rest) for level in like.predicted},
        estimated={level: next(rest) for level in like.estimated},
        players={level: next(rest) for level in like.players},
    )


def join(parts: list[Encoded]) -> Encoded:
    """Micro-batches as one batch."""
    return _assemble(parts[0], [torch.cat(same) for same in zip(*map(_parts, parts), strict=True)])


def contrast(
    local: Encoded, settings: LossSettings, group: dist.ProcessGroup | None = None
) -> dict[str, Float[Tensor, ""]]:
    """This rank's part of each loss, scaled so that the mean over ranks is the loss of the global batch.

    A global batch without a single clip has loss 0.
    """
    pool, first, world_size = local, 0, 1
    if dist.is_initialized() and dist.get_world_size(group) > 1:
        (pool, first), world_size = gather(local, group), dist.get_world_size(group)
    clips = len(_parts(pool)[0])
    if clips == 0:
        return {"loss": local.logit_scale * 0}
    return {name: part * world_size for name, part in hbi_loss(local, pool, first, settings, clips).items()}


def detach_tokens(encoded: Encoded) -> tuple[Encoded, list[Tensor]]:
    """`encoded` in float32 and cut from its graph, with its differentiable tensors in the order of `tensors_of`.

    The loss's gradient stops at these tensors, and goes on into the encoders from there, whole or one micro-batch
    after the other.
    """
    differentiable = {id(tensor) for tensor in tensors_of(encoded)}
    parts = [
        part.detach().float().requires_grad_() if id(part) in differentiable else part
        for part in _parts(encoded)
    ]
    scale, *bias = [scalar.detach().float().requires_grad_() for scalar in _scalars(encoded)]
    detached = _assemble(encoded, parts)._replace(logit_scale=scale, logit_bias=bias[0] if bias else None)
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


def backward(
    encode: Callable[[MicroBatch], Encoded],
    micro_batches: Sequence[MicroBatch],
    settings: LossSettings,
    averaging: Callable[[bool], AbstractContextManager[None]] = lambda on: nullcontext(),
    group: dist.ProcessGroup | None = None,
) -> dict[str, Float[Tensor, ""]]:
    """The losses of the global batch, and its gradient added to that of the weights behind `encode`.

    The rank's part of the batch comes in micro-batches. With one, the encoders keep their graph while the loss is
    computed on their tokens. With more, tokens are made without a graph first, and each is encoded once more when the
    loss's gradient at its tokens is known (GradCache, Gao et al. 2021): the same loss, the same gradient.
    averaging(on): a context in which backward passes average gradients over the ranks, or do not.
    """
    with torch.set_grad_enabled(len(micro_batches) == 1):
        encoded = [encode(micro_batch) for micro_batch in micro_batches]
    detached, leaves = detach_tokens(join(encoded))
    losses = contrast(detached, settings, group)
    losses["loss"].backward()
    gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    of_clips, of_scalars = gradients[: -len(_scalars(detached))], gradients[-len(_scalars(detached)) :]
    shares = zip(*(gradient.tensor_split(len(micro_batches)) for gradient in of_clips), strict=True)
    for number, (micro_batch, share) in enumerate(zip(micro_batches, shares, strict=True), 1):
        last = number == len(micro_batches)  # ranks average once, and the scalars count once
        with averaging(last):
            tensors = tensors_of(encoded[0] if len(micro_batches) == 1 else encode(micro_batch))
            into = zip(tensors, [*share, *(each * last for each in of_scalars)], strict=True)
            wanted = [
                (tensor, gradient.to(tensor.dtype)) for tensor, gradient in into if tensor.requires_grad
            ]
            torch.autograd.backward([t for t, _ in wanted], [g for _, g in wanted])
    return {name: loss.detach() for name, loss in losses.items()}
