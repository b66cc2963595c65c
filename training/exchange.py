"""What ranks tell each other of their clips: the tokens of all gathered on every rank, or passed on in a ring.

Gathered, a rank holds the tokens of the global batch. In the ring each rank's tokens go from rank to rank, each of
which compares its own with them; none ever holds more than its own and one other's (as Inf-CL does for single vectors,
Cheng et al. 2024). The similarities that it keeps are 4 bytes a pair. The backward pass goes round once more, and takes
along what every rank says about the tokens that pass.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from hbi.model.config import LossSettings
from hbi.model.hbi import Encoded
from hbi.model.losses import Similarities, compared_levels, cross_similarities
from hbi.model.tokens import Tokens
from hbi.training.settings import ExchangeSettings


class _Gather(torch.autograd.Function):
    """Rows of all ranks, in the order of ranks. Backward: the sum over ranks of what each says about our rows."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sizes: list[int], group: dist.ProcessGroup | None, wire: torch.dtype
    ) -> Tensor:
        ctx.sizes, ctx.group, ctx.wire = sizes, group, wire
        most = max(sizes)
        sent = padded(rows, most).to(wire)
        buffer = sent.new_empty(len(sizes) * most, *rows.shape[1:])
        dist.all_gather_single(buffer, sent, group=group)
        if len(set(sizes)) > 1:
            buffer = torch.cat([part[:size] for part, size in zip(buffer.split(most), sizes, strict=True)])
        return buffer.to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        sizes, gradient = ctx.sizes, gradients[0].contiguous()
        most = max(sizes)
        if len(set(sizes)) > 1:
            gradient = torch.cat([padded(part, most) for part in gradient.split(sizes)])
        ours = gradient.new_empty(most, *gradient.shape[1:])
        if ctx.wire == torch.float32:
            dist.reduce_scatter_single(ours, gradient, group=ctx.group)
        else:  # bfloat16 for both halves, since gradients are small; sums in float32
            received = torch.empty_like(gradient, dtype=torch.bfloat16)
            dist.all_to_all_single(received, gradient.bfloat16(), group=ctx.group)
            ours = received.float().view(len(sizes), *ours.shape).sum(0)
        return ours[: sizes[dist.get_rank(ctx.group)]], None, None, None


def padded(rows: Tensor, size: int) -> Tensor:
    """Collectives want the same shape from every rank."""
    if len(rows) == size:
        return rows.contiguous()
    return torch.cat([rows, rows.new_zeros(size - len(rows), *rows.shape[1:])])


def row_counts(rows: Tensor, group: dist.ProcessGroup | None) -> list[int]:
    """How many rows each rank has; one synchronisation with the host."""
    counts = torch.empty(dist.get_world_size(group), dtype=torch.int64, device=rows.device)
    dist.all_gather_single(counts, torch.tensor([len(rows)], device=rows.device), group=group)
    return counts.tolist()


def gather_rows(
    rows: Float[Tensor, "batch width"],
    group: dist.ProcessGroup | None = None,
    wire: torch.dtype = torch.float32,
) -> tuple[Float[Tensor, "global width"], int]:
    """The rows of all ranks, with gradients, and where ours begin. Ranks may hold different numbers of rows."""
    sizes = row_counts(rows, group)
    if max(sizes) == 0:
        return rows, 0
    gathered = _Gather.apply(rows, sizes, group, wire)
    assert isinstance(gathered, Tensor)
    return gathered, sum(sizes[: dist.get_rank(group)])


def gather(
    local: Encoded, group: dist.ProcessGroup | None = None, wire: torch.dtype = torch.float32
) -> tuple[Encoded, int]:
    """The tokens and predictions of the global batch, and where the local rows begin: one collective for all."""
    local = local._replace(players={})  # what each pair plays with concerns no other pair
    rows, first = gather_rows(packed(local), group, wire)
    return unpacked(rows, local), first


def parts_of(encoded: Encoded) -> list[Tensor]:
    """All per-clip tensors of `encoded`, in a fixed order."""
    sides = [part for side in (encoded.text, encoded.video) for tokens in side.values() for part in tokens]
    return [*sides, *encoded.predicted.values(), *encoded.estimated.values(), *encoded.players.values()]


def assemble(like: Encoded, parts: Sequence[Tensor]) -> Encoded:
    """The inverse of `parts_of`."""
    rest = iter(parts)
    return like._replace(
        text={level: Tokens(next(rest), next(rest), next(rest)) for level in like.text},
        video={level: Tokens(next(rest), next(rest), next(rest)) for level in like.video},
        predicted={level: next(rest) for level in like.predicted},
        estimated={level: next(rest) for level in like.estimated},
        players={level: next(rest) for level in like.players},
    )


def packed(encoded: Encoded) -> Float[Tensor, "batch width"]:
    """Everything that is said of a clip, as one row."""
    return torch.cat([part.flatten(1).to(torch.float32) for part in parts_of(encoded)], 1)


def unpacked(rows: Float[Tensor, "batch width"], like: Encoded) -> Encoded:
    """The inverse of `packed`, for any number of clips."""
    parts = parts_of(like)
    columns = rows.split([part.flatten(1).shape[1] for part in parts], 1)
    return assemble(
        like,
        [
            column.reshape(len(rows), *part.shape[1:]).to(part.dtype)
            for column, part in zip(columns, parts, strict=True)
        ],
    )


@dataclass(frozen=True)
class _Ring:
    """Who passes what to whom."""

    like: Encoded
    """The tokens of this rank, for their shapes."""
    sizes: list[int]
    """Clips of each rank."""
    settings: LossSettings
    group: dist.ProcessGroup | None
    wire: torch.dtype
    """In which tokens travel; what is said about them travels, and is summed, in float32."""

    def blocks(self, ours: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Every rank's rows, ours first, and which columns of the similarities are theirs."""
        rank, world_size = dist.get_rank(self.group), len(self.sizes)
        block = padded(ours, max(self.sizes)).to(self.wire)
        for hop in range(world_size):
            owner = (rank - hop) % world_size
            first = sum(self.sizes[:owner])
            rows = block[: self.sizes[owner]].to(ours.dtype) if hop else ours
            yield slice(first, first + self.sizes[owner]), rows
            if hop < world_size - 1:
                block = self.pass_on(block)

    def pass_on(self, block: Tensor) -> Tensor:
        """Gives a block to the next rank; what the one before gives us."""
        rank, world_size = dist.get_rank(self.group), len(self.sizes)
        after, before = ((rank + turn) % world_size for turn in (1, -1))
        if self.group is not None:
            after, before = (dist.get_global_rank(self.group, peer) for peer in (after, before))
        received = torch.empty_like(block)
        both = [
            dist.P2POp(dist.isend, block, after, self.group),
            dist.P2POp(dist.irecv, received, before, self.group),
        ]
        for work in dist.batch_isend_irecv(both):
            work.wait()
        return received

    def compare(self, ours: Tensor, theirs: Tensor) -> list[Tensor]:
        """Our texts with their videos, and our videos with their texts, at each level."""
        local, pool = unpacked(ours, self.like), unpacked(theirs, self.like)
        found = cross_similarities(local, pool, self.settings)
        return [
            side
            for of_texts, of_videos in found.values()
            for side in (of_texts, of_videos)
            if side is not None
        ]


class _RingSimilarities(torch.autograd.Function):
    """`_Ring.compare` with the rows of all ranks: [our clips, all clips] each."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, ring: _Ring) -> tuple[Tensor, ...]:
        ctx.save_for_backward(rows)
        ctx.ring = ring
        found: list[Tensor] = []
        for columns, block in ring.blocks(rows):
            parts = ring.compare(rows, block)
            found = found or [part.new_empty(len(rows), sum(ring.sizes)) for part in parts]
            for whole, part in zip(found, parts, strict=True):
                whole[:, columns] = part
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (rows,), ring = ctx.saved_tensors, ctx.ring
        total = torch.zeros_like(rows)
        said = rows.new_zeros(max(ring.sizes), rows.shape[1])
        for columns, block in ring.blocks(rows):
            with torch.enable_grad():
                ours, theirs = rows.detach().requires_grad_(), block.detach().requires_grad_()
                parts = ring.compare(ours, theirs)
            to_ours, to_theirs = torch.autograd.grad(
                parts, (ours, theirs), [gradient[:, columns] for gradient in gradients]
            )
            total += to_ours
            said[: len(block)] += to_theirs
            said = ring.pass_on(said)  # in the end it is with whom it is about
        return total + said[: len(rows)], None


def ring_similarities(
    local: Encoded, settings: LossSettings, group: dist.ProcessGroup | None, wire: torch.dtype
) -> tuple[Similarities, int, int]:
    """The similarities of our clips with those of all ranks, where ours begin, and how many there are in all."""
    local = local._replace(predicted={}, estimated={}, players={})
    rows = packed(local)
    sizes = row_counts(rows, group)
    ring = _Ring(local, sizes, settings, group, wire)
    found: Any = _RingSimilarities.apply(rows, ring)
    pairs = zip(compared_levels(local, settings), zip(found[::2], found[1::2], strict=True), strict=True)
    return dict(pairs), sum(sizes[: dist.get_rank(group)]), sum(sizes)


def wire_type(settings: ExchangeSettings) -> torch.dtype:
    """The type in which tokens travel."""
    return getattr(torch, settings.wire)
