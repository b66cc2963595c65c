"""Retrieval over a split of shards: every clip against every caption, in one process or on all ranks.

Each rank encodes its part of the clips and their captions; the tokens are gathered, each rank scores its part of the
texts against all videos, and the first rank counts. No pair is encoded twice, and what is published as `rate` decides
which levels count: the entity level alone, by default.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from hbi.model.hbi import HBI
from hbi.model.levels import LEVELS
from hbi.model.metrics import retrieval_metrics
from hbi.model.tokenizer import tokenize
from hbi.model.tokens import Tokens
from hbi.pipelines.sample import ShardIndex, check_shards
from hbi.training.contrast import gather_rows
from hbi.training.evaluate.heldout import grouped, readable
from hbi.training.init import load_named
from hbi.training.parallel import Place

T = TypeVar("T")
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class EvalProtocol:
    """How retrieval is measured."""

    paragraph: bool = False
    """All captions of a clip as one text (ActivityNet, DiDeMo), instead of each caption as a query of its own."""
    rates: tuple[float, float, float] = (1.0, 0.0, 0.0)
    """Weights of the entity, action and event similarities in the score; published: the entity level alone."""
    dsl: bool = False
    """Add the metrics with dual softmax (`t2v+dsl/...`), which sees all queries at once."""
    qbnorm: int = 0
    """Add the metrics with QB-Norm (`t2v+qbnorm/...`), its bank made of so many clips of the train split."""
    batch: int = 64
    """Clips encoded at once."""
    chunk: int = 256
    """Texts and videos compared at once: memory is chunk^2 * words * frames floats."""

    def __post_init__(self) -> None:
        if len(self.rates) != 3 or min(self.rates) < 0 or not any(self.rates):
            raise ValueError(f"rates is {self.rates}: give three numbers of at least 0, one of them above")
        for name in ("batch", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 1")
        if self.qbnorm < 0:
            raise ValueError(f"qbnorm is {self.qbnorm}: give a number of training clips, or 0 for none")

    @property
    def levels(self) -> dict[str, float]:
        """The levels that count, with their weight."""
        return {level: rate for level, rate in zip(LEVELS, self.rates, strict=True) if rate}


@dataclass(frozen=True)
class EncodedSplit:
    """All texts and videos of a split, on every rank alike, on the model's device."""

    text: dict[str, Tokens]
    """Tokens of the texts at each level that counts."""
    video: dict[str, Tokens]
    """Tokens of the videos at each level that counts."""
    video_of_text: Int[Tensor, "texts"]
    """Which video each text describes."""
    ids: list[str] = field(repr=False)
    """The videos' ids."""
    uncaptioned: int
    """Clips that were passed over because they have no caption."""
    unread: int
    """Clips that could not be read."""
    reasons: list[str] = field(repr=False)
    """Why (some of) those could not."""


@dataclass(frozen=True)
class EvalResult:
    """What an evaluation found."""

    metrics: dict[str, float]
    """By name: `val/t2v/R@1`, ..., and how many texts and videos there were. The same on all ranks."""
    similarity: Float[Tensor, "texts videos"] | None = field(repr=False)
    """The scores, on the CPU of the first rank; None on others."""
    video_of_text: Int[Tensor, "texts"] = field(repr=False)
    """Which video (column) each text (row) describes."""
    ids: list[str] = field(repr=False)
    """The videos' ids."""


@torch.no_grad()
def evaluate(
    model: HBI,
    tokenizer: Any,
    shards: str | ShardIndex,
    split: str,
    protocol: EvalProtocol | None = None,
    place: Place | None = None,
    strict: bool = False,
    progress: Progress = lambda done, total: None,
) -> EvalResult:
    """Retrieval metrics of a model on a split, both ways. All ranks call it, with the same arguments.

    Clips without captions are passed over and counted (`<split>/uncaptioned`), and so are clips that cannot be read
    (`<split>/unread`), unless `strict`: then ValueError says which shard is at fault. ValueError too if the split is
    not there, holds no captioned clip, or has other frames than the model takes.
    """
    protocol = protocol or EvalProtocol()
    place = place or Place.here(next(model.parameters()).device)
    index = shards if isinstance(shards, ShardIndex) else ShardIndex.read(shards)
    check_shards(index, model.config)
    was_training = model.training
    model.eval()
    try:
        clips = encode_split(model, tokenizer, index, split, protocol, place, progress=progress)
        if strict and clips.unread:
            raise ValueError(
                f"{index.folder}: {clips.unread} clips of {split} cannot be read ({clips.reasons[0]})"
            )
        if not len(clips.video_of_text):
            raise ValueError(f"{index.folder}: no clip of split {split!r} has a caption: nothing to retrieve")
        scores = similarity(model, clips.text, clips.video, protocol, place)
        options: dict[str, Any] = {"dsl_temperature": 0.01} if protocol.dsl else {}
        if protocol.qbnorm:
            bank = encode_split(model, tokenizer, index, "train", protocol, place, limit=protocol.qbnorm)
            options["text_bank"] = similarity(model, bank.text, clips.video, protocol, place)
            options["video_bank"] = similarity(model, clips.text, bank.video, protocol, place)
    finally:
        model.train(was_training)
    metrics: dict[str, float] = {}
    if scores is not None:
        found = retrieval_metrics(scores, clips.video_of_text.cpu(), **options)
        counts = {"texts": len(clips.video_of_text), "videos": len(clips.ids)}
        counts |= {"uncaptioned": clips.uncaptioned, "unread": clips.unread}
        metrics = {f"{split}/{name}": float(value) for name, value in (found | counts).items()}
    return EvalResult(_from_first(metrics, place), scores, clips.video_of_text.cpu(), clips.ids)


def similarity(
    model: HBI, text: dict[str, Tokens], video: dict[str, Tokens], protocol: EvalProtocol, place: Place
) -> Float[Tensor, "texts videos"] | None:
    """The weighted sum of the levels' similarities, a part of the texts on each rank; whole on the first one's CPU."""
    texts = len(next(iter(text.values())).mask)
    ours = _share(texts, place)
    blocks = []
    for first in range(ours.start, ours.stop, protocol.chunk):
        rows = slice(first, min(first + protocol.chunk, ours.stop))
        parts = [
            rate
            * model.similarity(Tokens(*(part[rows] for part in text[level])), video[level], protocol.chunk)
            for level, rate in protocol.levels.items()
        ]
        blocks.append(torch.stack(parts).sum(0).cpu())
    videos = len(next(iter(video.values())).mask)
    scores = torch.cat(blocks) if blocks else torch.empty(0, videos)
    return _to_first(scores, [len(_share(texts, place, rank)) for rank in range(place.world)], place)


# ---------------------------------------------------------------------------------------------- encoding


@torch.no_grad()
def encode_split(
    model: HBI,
    tokenizer: Any,
    index: ShardIndex,
    split: str,
    protocol: EvalProtocol,
    place: Place,
    limit: int | None = None,
    progress: Progress = lambda done, total: None,
) -> EncodedSplit:
    """Tokens of the first `limit` (default: all) clips of a split and of all their captions, on all ranks."""
    config, device = model.config, place.device
    total = sum(shard.samples for shard in index.of_split(split))
    ours = _share(min(total, limit or total), place)
    texts: list[dict[str, Tokens]] = []
    videos: list[dict[str, Tokens]] = []
    owners: list[int] = []
    ids: list[str] = []
    reasons: list[str] = []
    uncaptioned = done = 0

    def encode(images: list[UInt8[np.ndarray, "frames h w 3"]], captions: list[str]) -> None:
        size = config.towers.image_size
        video = np.zeros((len(images), config.frames, size, size, 3), dtype=np.uint8)
        mask = torch.zeros(len(images), config.frames, dtype=torch.bool)
        for i, frames in enumerate(images):
            video[i, : len(frames)] = frames
            mask[i, : len(frames)] = True
        mask = mask.to(device)
        frames = model.encode_video(torch.from_numpy(video).to(device), mask)
        videos.append(_kept(model.video_levels(frames, mask), protocol))
        for part in range(0, max(1, len(captions)), 4 * protocol.batch):
            written = captions[part : part + 4 * protocol.batch]
            tokens, present = (tensor.to(device) for tensor in tokenize(tokenizer, written, config.words))
            words, _ = model.encode_text(tokens, present)
            texts.append(_kept(model.text_levels(words, present), protocol))

    for group in grouped(readable(index, split, ours, config.frames, reasons), protocol.batch):
        images, captions = [], []
        for sample, frames in group:
            written = [caption for caption in sample.captions if caption.strip()]
            if not written:
                uncaptioned += 1
                continue
            written = [" ".join(written)] if protocol.paragraph else written
            owners.extend([len(ids)] * len(written))
            captions.extend(written)
            images.append(frames)
            ids.append(sample.id)
        if images:
            encode(images, captions)
        done += len(group)
        progress(done, len(ours))
    if not videos:
        encode([], [])  # a rank without clips still knows the shapes
    video, first = _gathered(videos, place)
    text, _ = _gathered(texts, place)
    owner, _ = _gather(torch.tensor(owners, device=device, dtype=torch.float32)[:, None] + first, place)
    unread = len(ours) - len(ids) - uncaptioned
    uncaptioned, unread = place.total(torch.tensor([uncaptioned, unread], device=device)).tolist()
    everyone = _all_objects((ids, reasons), place)
    return EncodedSplit(
        text,
        video,
        video_of_text=owner[:, 0].round().long(),
        ids=[id for part, _ in everyone for id in part],
        uncaptioned=uncaptioned,
        unread=unread,
        reasons=[reason for _, part in everyone for reason in part],
    )


def _kept(levels: dict[str, Tokens], protocol: EvalProtocol) -> dict[str, Tokens]:
    return {level: levels[level] for level in protocol.levels}


# ------------------------------------------------------------------------------------------------- ranks


def _share(count: int, place: Place, rank: int | None = None) -> range:
    """A rank's part of so many things, contiguous and even."""
    rank = place.rank if rank is None else rank
    return range(count * rank // place.world, count * (rank + 1) // place.world)


def _gather(rows: Float[Tensor, "rows width"], place: Place) -> tuple[Float[Tensor, "all width"], int]:
    """The rows of all ranks, and where ours begin."""
    return gather_rows(rows) if place.world > 1 else (rows, 0)


def _gathered(parts: list[dict[str, Tokens]], place: Place) -> tuple[dict[str, Tokens], int]:
    """The tokens of all ranks at each level, and where ours begin."""
    whole: dict[str, Tokens] = {}
    first = 0
    for level in parts[0]:
        tokens, logits, mask = (
            torch.cat(same) for same in zip(*(part[level] for part in parts), strict=True)
        )
        count, n, dim = tokens.shape
        rows = torch.cat([tokens.reshape(count, n * dim), logits, mask.float()], 1)
        rows, first = _gather(rows, place)
        tokens, logits, mask = rows.split([n * dim, n, n], 1)
        whole[level] = Tokens(tokens.reshape(-1, n, dim), logits, mask > 0.5)
    return whole, first


def _to_first(
    rows: Float[Tensor, "rows width"], counts: list[int], place: Place
) -> Float[Tensor, "all width"] | None:
    """The rows of all ranks (`counts` of them each) on the first rank's CPU."""
    if place.world == 1:
        return rows
    padded = torch.zeros(max(counts), rows.shape[1], device=place.device)
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts] if place.first else None
    dist.gather(padded, parts)
    return (
        None if parts is None else torch.cat([part[:n].cpu() for part, n in zip(parts, counts, strict=True)])
    )


def _all_objects(ours: T, place: Place) -> list[T]:
    if place.world == 1:
        return [ours]
    everyone: list[Any] = [None] * place.world
    dist.all_gather_object(everyone, ours)
    return everyone


def _from_first(metrics: dict[str, float], place: Place) -> dict[str, float]:
    if place.world == 1:
        return metrics
    said: list[Any] = [metrics]
    dist.broadcast_object_list(said, device=place.device)
    return said[0]


# ----------------------------------------------------------------------------------------------- command


def evaluate_command(
    model: str,
    shards: str,
    split: str = "test",
    protocol: EvalProtocol | None = None,
    tracking: str | None = None,
    tokenizer: str | None = None,
    words: int | None = None,
    device: str | None = None,
) -> dict[str, float]:
    """`hbi evaluate`: metrics of a model on a split, every clip of which must be readable.

    `model` is a folder, models:/name@alias, or the file of a published checkpoint. The last has no tokenizer: it is
    CLIP's own, by name, or from the folder `tokenizer`; nor does it know how many `words` it takes (24 if not given).
    """
    from tqdm import tqdm

    index = ShardIndex.read(shards)
    index.of_split(split)
    loaded, words_of = load_named(
        model, tracking, tokenizer, words=words, frames=index.settings.get("frames")
    )
    loaded = loaded.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with tqdm(unit="clip", desc=f"encode {split}") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return evaluate(loaded, words_of, index, split, protocol, strict=True, progress=progress).metrics


def table(metrics: dict[str, float], split: str) -> str:
    """The metrics of a split as a small table, beside chance."""
    texts, videos = (round(metrics[f"{split}/{name}"]) for name in ("texts", "videos"))
    columns = ("R@1", "R@5", "R@10", "R@50", "MdR", "MnR")
    ways = dict.fromkeys(name.split("/")[1] for name in metrics if name.endswith("/R@1"))
    head = f"{split}: {videos} clips, {texts} texts"
    rows = {way: [metrics[f"{split}/{way}/{column}"] for column in columns] for way in ways}
    rows["t2v by chance"] = [min(100.0, 100 * k / videos) for k in (1, 5, 10, 50)] + [(videos + 1) / 2] * 2
    lines = [f"{head:34}" + "".join(f"{column:>9}" for column in columns)]
    lines += [f"  {name:32}" + "".join(f"{value:9.2f}" for value in row) for name, row in rows.items()]
    out = {name: round(metrics[f"{split}/{name}"]) for name in ("uncaptioned", "unread")}
    return "\n".join(
        [*lines, *(f"  {count} clips were left out: {name}" for name, count in out.items() if count)]
    )
