"""What ranks tell each other of their clips: the frames of all gathered on every rank, or passed on in a ring.

Each rank compares its texts with the videos of all, and tells every other rank what came of that rank's videos: words
do not travel, and no pair is compared twice. Gathered, a rank holds the frames of the global batch. In the ring they go
from rank to rank, and none ever holds more than its own and one other's (as Inf-CL does for single vectors, Cheng et
al. 2024); the backward pass goes round once more, and takes along what every rank says about the frames that pass. The
similarities that a rank keeps are 4 bytes a pair.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from hbi.model.config import LossSettings
from hbi.model.hbi import Encoded
from hbi.model.losses import Similarities, compared_levels, text_similarities
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


class Sizes:
    """How many clips each rank has in this step. Ranks tell each other on the host, while their encoders run: no step
    waits for its device to learn it."""

    def __init__(self, clips: int, device: torch.device, group: dist.ProcessGroup | None = None) -> None:
        """Asks; `read` has the answer. Where ranks can only talk through their devices, it is asked there."""
        where = "cpu" if "cpu" in dist.get_backend_config(group) else device
        self.counts = torch.empty(dist.get_world_size(group), dtype=torch.int64, device=where)
        ours = torch.tensor([clips], device=where)
        self.asked = dist.all_gather_single(self.counts, ours, group=group, async_op=True)

    def read(self) -> list[int]:
        """Clips of each rank."""
        assert self.asked is not None  # asynchronous
        self.asked.wait()
        return self.counts.tolist()


def gather_rows(
    rows: Float[Tensor, "batch width"],
    group: dist.ProcessGroup | None = None,
    wire: torch.dtype = torch.float32,
    sizes: list[int] | None = None,
) -> tuple[Float[Tensor, "global width"], int]:
    """The rows of all ranks, with gradients, and where ours begin. Ranks may hold different numbers of rows.

    sizes: of each rank; none: they are asked, and waited for.
    """
    if sizes is None:
        sizes = Sizes(len(rows), rows.device, group).read()
    if max(sizes) == 0:
        return rows, 0
    gathered = _Gather.apply(rows, sizes, group, wire)
    assert isinstance(gathered, Tensor)
    return gathered, sum(sizes[: dist.get_rank(group)])


def gather(local: Encoded, sizes: list[int], group: dist.ProcessGroup | None, wire: torch.dtype) -> Encoded:
    """The tokens and predictions of the global batch: one collective for all."""
    local = local._replace(players={})  # what each pair plays with concerns no other pair
    return unpacked(gather_rows(packed(local), group, wire, sizes)[0], local)


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

    texts: Encoded
    """Of this rank, for their shapes."""
    videos: Encoded
    sizes: list[int]
    """Clips of each rank."""
    settings: LossSettings
    group: dist.ProcessGroup | None
    wire: torch.dtype
    """In which frames travel; what is said about them travels, and is summed, in float32."""

    def blocks(self, ours: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Every rank's videos, ours first, and which columns of the similarities are theirs."""
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

    def compare(self, texts: Tensor, videos: Tensor) -> Float[Tensor, "levels texts videos"]:
        """Our texts with their videos, at each level."""
        text, video = unpacked(texts, self.texts).text, unpacked(videos, self.videos).video
        return torch.stack([*text_similarities(text, video, self.settings).values()])


class _RingSimilarities(torch.autograd.Function):
    """`_Ring.compare` with the videos of all ranks: [levels, our texts, all videos]."""

    @staticmethod
    def forward(ctx: Any, texts: Tensor, videos: Tensor, ring: _Ring) -> Tensor:
        ctx.save_for_backward(texts, videos)
        ctx.ring = ring
        levels = compared_levels(ring.texts.text, ring.settings)
        found = texts.new_empty(len(levels), len(texts), sum(ring.sizes))
        for columns, block in ring.blocks(videos):
            found[:, :, columns] = ring.compare(texts, block)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (texts, videos), ring = ctx.saved_tensors, ctx.ring
        total = torch.zeros_like(texts)
        said = videos.new_zeros(max(ring.sizes), videos.shape[1])
        for columns, block in ring.blocks(videos):
            with torch.enable_grad():
                ours, theirs = texts.detach().requires_grad_(), block.detach().requires_grad_()
                found = ring.compare(ours, theirs)
            to_ours, to_theirs = torch.autograd.grad(found, (ours, theirs), gradients[0][:, :, columns])
            total += to_ours
            said[: len(block)] += to_theirs
            said = ring.pass_on(said)  # in the end it is with whom it is about
        return total, said[: len(videos)], None


class _Turn(torch.autograd.Function):
    """What all texts have with our videos, [levels, all texts, our videos], from what our texts have with all videos,
    [levels, our texts, all videos]: each rank gives every other its block. Backward: the same the other way."""

    @staticmethod
    def forward(ctx: Any, of_texts: Tensor, sizes: list[int], group: dist.ProcessGroup | None) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        return _turned(of_texts, sizes, group, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _turned(gradients[0], ctx.sizes, ctx.group, 1), None, None


def _turned(whole: Tensor, sizes: list[int], group: dist.ProcessGroup | None, of: int) -> Tensor:
    """Cut along dimension `of` into a block for each rank; what comes is joined along the other (1 or 2)."""
    ours = sizes[dist.get_rank(group)]
    lengths = [len(whole) * ours * size for size in sizes]
    sent = torch.cat([block.flatten() for block in whole.split(sizes, of)])
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, lengths, lengths, group=group)
    shapes = [(len(whole), size, ours) if of == 2 else (len(whole), ours, size) for size in sizes]
    blocks = zip(received.split(lengths), shapes, strict=True)
    return torch.cat([block.view(shape) for block, shape in blocks], 3 - of)


def similarities_over_ranks(
    local: Encoded,
    sizes: list[int],
    settings: LossSettings,
    group: dist.ProcessGroup | None,
    exchange: ExchangeSettings,
    numbers: Int[Tensor, "global"] | None = None,
) -> Similarities:
    """The similarities of our clips with those of all ranks, each of which has so many; numbers: `videos` of
    `hbi_loss`."""
    texts = local._replace(video={}, predicted={}, estimated={}, players={})
    videos = local._replace(text={}, predicted={}, estimated={}, players={})
    if exchange.form == "ring":
        ring = _Ring(texts, videos, sizes, settings, group, wire_type(exchange))
        found: Any = _RingSimilarities.apply(packed(texts), packed(videos), ring)
    else:
        pool = gather(videos, sizes, group, wire_type(exchange)).video
        found = torch.stack([*text_similarities(local.text, pool, settings, numbers).values()])
    turned: Any = _Turn.apply(found, sizes, group)
    levels = compared_levels(local.text, settings)
    return dict(zip(levels, zip(found, turned.transpose(1, 2), strict=True), strict=True))


def wire_type(settings: ExchangeSettings) -> torch.dtype:
    """The type in which tokens travel."""
    return getattr(torch, settings.wire)
