"""The clips of a held-out split and their captions as tokens on all ranks; each rank reads and encodes a part, once."""

import tarfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from hbi.infra import storage
from hbi.model.hbi import HBI
from hbi.model.levels import LEVELS
from hbi.model.tokenizer import tokenize
from hbi.model.tokens import Tokens
from hbi.pipelines.sample import Sample, ShardIndex, check_shards, read_shard
from hbi.training.exchange import gather_rows
from hbi.training.parallel import Process
from hbi.training.settings import EvalProtocol

T = TypeVar("T")
TEXTS_PER_CLIP = 4
"""Texts are encoded this many times as many at once as clips: they are that much shorter, at least."""


class NothingToMeasure(ValueError):
    """A split that has nothing of the kind that is measured."""


@dataclass(frozen=True)
class EncodedSplit:
    """All texts and videos of a split, on every rank alike, on the model's device."""

    text: dict[str, Tokens]
    """Tokens of the texts at each level that counts."""
    video: dict[str, Tokens]
    """Tokens of the videos at each level that counts."""
    video_of_text: Int[Tensor, " texts"]
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
class SplitEncoder:
    """A model and the shards that it is measured on."""

    model: HBI
    """In whatever mode; it is put into that of evaluation for the time of it."""
    tokenizer: Any
    """The model's own."""
    index: ShardIndex
    """The shards."""
    process: Process
    """This rank: all ranks do the same with the same arguments."""
    protocol: EvalProtocol = field(default_factory=EvalProtocol)
    """How retrieval is measured."""
    progress: Callable[[int, int], None] = lambda done, total: None
    """Gets this rank's clips that are encoded, and how many there are."""

    def __post_init__(self) -> None:
        check_shards(self.index, self.model.config)

    @torch.no_grad()
    def encode(self, split: str, limit: int | None = None) -> EncodedSplit:
        """Tokens of the first `limit` (default: all) clips of a split and of all their captions, on all ranks.

        ValueError if the split is not there.
        """
        total = sum(shard.samples for shard in self.index.of_split(split))
        ours = share(min(total, limit or total), self.process)
        texts: list[dict[str, Tokens]] = []
        videos: list[dict[str, Tokens]] = []
        owners: list[int] = []
        ids: list[str] = []
        reasons: list[str] = []
        uncaptioned = done = 0
        clips = readable(self.index, split, ours, self.model.config.frames, reasons)
        for group in grouped(clips, self.protocol.batch):
            captioned = [(sample, frames, self._texts(sample)) for sample, frames in group]
            captioned = [entry for entry in captioned if entry[2]]
            uncaptioned += len(group) - len(captioned)
            if captioned:
                for sample, _, captions in captioned:
                    owners.extend([len(ids)] * len(captions))
                    ids.append(sample.id)
                videos.append(self._videos([frames for _, frames, _ in captioned]))
                texts += self._captions([caption for _, _, captions in captioned for caption in captions])
            done += len(group)
            self.progress(done, len(ours))
        if not videos:  # a rank without clips still knows the shapes
            videos, texts = [self._videos([])], self._captions([])
        counts = [uncaptioned, len(ours) - len(ids) - uncaptioned]
        return self._gathered(texts, videos, owners, (ids, reasons), counts)

    def _texts(self, sample: Sample) -> list[str]:
        """What is asked for a clip: its captions, or all of them as one."""
        captions = [caption for caption in sample.captions if caption.strip()]
        return [" ".join(captions)] if captions and self.protocol.paragraph else captions

    def padded(
        self, images: list[UInt8[np.ndarray, "frames h w 3"]]
    ) -> tuple[UInt8[Tensor, "clips frames h w 3"], Bool[Tensor, "clips frames"]]:
        """Clips as one batch with its mask, on the model's device."""
        config, device = self.model.config, self.process.device
        size = config.towers.image_size
        video = np.zeros((len(images), config.frames, size, size, 3), dtype=np.uint8)
        mask = torch.zeros(len(images), config.frames, dtype=torch.bool)
        for i, frames in enumerate(images):
            video[i, : len(frames)] = frames
            mask[i, : len(frames)] = True
        return torch.from_numpy(video).to(device), mask.to(device)

    def collected(self, rows: list[T], reasons: list[str], split: str, strict: bool) -> list[T]:
        """The rows of all ranks, in the order of ranks. reasons: why clips of this rank could not be read; with
        `strict` ValueError where there are any."""
        everyone = self.process.gather_objects((rows, reasons))
        unread = [reason for _, part in everyone for reason in part]
        if strict and unread:
            raise ValueError(
                f"{self.index.folder}: {len(unread)} clips of {split} cannot be read ({unread[0]})"
            )
        return [row for part, _ in everyone for row in part]

    def _videos(self, images: list[UInt8[np.ndarray, "frames h w 3"]]) -> dict[str, Tokens]:
        video, mask = self.padded(images)
        frames = self.model.encode_video(video, mask)
        return self._counting(self.model.video_levels(frames, mask))

    def _captions(self, captions: list[str]) -> list[dict[str, Tokens]]:
        at_once, parts = TEXTS_PER_CLIP * self.protocol.batch, []
        for part in range(0, max(1, len(captions)), at_once):
            encoded = tokenize(self.tokenizer, captions[part : part + at_once], self.model.config.words)
            ids, mask = (tensor.to(self.process.device) for tensor in encoded)
            words, _ = self.model.encode_text(ids, mask)
            parts.append(self._counting(self.model.text_levels(words, mask)))
        return parts

    def _counting(self, levels: dict[str, Tokens]) -> dict[str, Tokens]:
        """The levels that the score is made of."""
        return {level: levels[level] for level in level_weights(self.protocol)}

    def _gathered(
        self,
        texts: list[dict[str, Tokens]],
        videos: list[dict[str, Tokens]],
        owners: list[int],
        said: tuple[list[str], list[str]],
        counts: list[int],
    ) -> EncodedSplit:
        """What all ranks encoded, in the order of ranks. said: ids and reasons; counts: uncaptioned and unread."""
        process = self.process
        video, first = _gather_tokens(videos, process)
        text, _ = _gather_tokens(texts, process)
        owner = torch.tensor(owners, device=process.device, dtype=torch.float64)[:, None] + first
        owner, _ = _gather(owner, process)
        uncaptioned, unread = process.all_reduce(torch.tensor(counts, device=process.device)).tolist()
        everyone = process.gather_objects(said)
        return EncodedSplit(
            text,
            video,
            video_of_text=owner[:, 0].round().long(),
            ids=[id for part, _ in everyone for id in part],
            uncaptioned=uncaptioned,
            unread=unread,
            reasons=[reason for _, part in everyone for reason in part],
        )


def level_weights(protocol: EvalProtocol) -> dict[str, float]:
    """The levels that count, with their weight."""
    return {level: weight for level, weight in zip(LEVELS, protocol.level_weights, strict=True) if weight}


# ------------------------------------------------------------------------------------------------- ranks


def share(count: int, process: Process, rank: int | None = None) -> range:
    """A rank's part of so many things, contiguous and even."""
    rank = process.rank if rank is None else rank
    return range(count * rank // process.world_size, count * (rank + 1) // process.world_size)


def _gather(rows: Float[Tensor, "rows width"], process: Process) -> tuple[Float[Tensor, "all width"], int]:
    """The rows of all ranks, and where ours begin."""
    return gather_rows(rows) if process.world_size > 1 else (rows, 0)


def _gather_tokens(parts: list[dict[str, Tokens]], process: Process) -> tuple[dict[str, Tokens], int]:
    """The tokens of all ranks at each level, and where ours begin."""
    gathered: dict[str, Tokens] = {}
    first = 0
    for level in parts[0]:
        tokens, logits, mask = (
            torch.cat(same) for same in zip(*(part[level] for part in parts), strict=True)
        )
        count, n, dim = tokens.shape
        rows = torch.cat([tokens.reshape(count, n * dim), logits, mask.float()], 1)
        rows, first = _gather(rows, process)
        tokens, logits, mask = rows.split([n * dim, n, n], 1)
        gathered[level] = Tokens(tokens.reshape(-1, n, dim), logits, mask > 0.5)
    return gathered, first


# ----------------------------------------------------------------------------------------------- reading


def readable(
    index: ShardIndex, split: str, ours: range, frames: int, reasons: list[str]
) -> Iterator[tuple[Sample, UInt8[np.ndarray, "frames h w 3"]]]:
    """Our samples of a split with their frames, in order; why one is missing goes to `reasons`."""
    with ThreadPoolExecutor(4) as pool:  # decoding a JPEG frees the interpreter
        first = 0
        for shard in index.of_split(split):
            numbers = range(max(first, ours.start) - first, min(first + shard.samples, ours.stop) - first)
            first += shard.samples
            if not numbers:
                continue
            wanted = _samples(index.path(shard), shard.name, numbers, reasons)
            for sample, images in _ahead(pool, wanted, _images):
                count, expected = len(sample.frames), len(sample.timestamps)
                if count != expected or not 1 <= count <= frames:
                    reasons.append(
                        f"{shard.name}, clip {sample.id}: {count} of {expected} frames, limit {frames}"
                    )
                elif isinstance(images, Exception):
                    reasons.append(f"{shard.name}, clip {sample.id}: {images}")
                else:
                    yield sample, images


def _samples(path: str, name: str, numbers: range, reasons: list[str]) -> Iterator[Sample]:
    """The samples of these numbers in a shard, as far as it can be read."""
    number = -1
    try:
        with storage.open_file(path) as stream:
            for number, sample in enumerate(read_shard(stream)):
                if number in numbers:
                    yield sample
                if number + 1 >= numbers.stop:
                    return
        reasons.append(f"{name}: {number + 1} clips, the index says {numbers.stop} or more")
    except (OSError, EOFError, tarfile.TarError, ValueError, KeyError) as error:
        reasons.append(f"{name}: {type(error).__name__}: {error}")


def _images(sample: Sample) -> UInt8[np.ndarray, "frames h w 3"] | Exception:
    try:
        return sample.images()
    except Exception as error:  # whatever a broken picture makes a decoder raise
        return error


def _ahead(
    pool: ThreadPoolExecutor, items: Iterable[T], work: Callable[[T], Any], depth: int = 16
) -> Iterator[Any]:
    """(item, work(item)) in order, the work done up to `depth` items ahead."""
    waiting: list[tuple[T, Any]] = []
    for item in items:
        waiting.append((item, pool.submit(work, item)))
        if len(waiting) > depth:
            item, future = waiting.pop(0)
            yield item, future.result()
    for item, future in waiting:
        yield item, future.result()


def grouped(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items; the last may be shorter."""
    group: list[T] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
