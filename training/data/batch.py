"""From tars to the frames and captions of a rank's part of a step."""

import io
import json
import logging
import os
import threading
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from hbi.pipelines.sample import ShardIndex
from hbi.training.data.order import caption_number
from hbi.training.data.shards import Entry, ShardCache, scan
from hbi.training.settings import Task, TrainConfig

Text = tuple[str, int | None]
"""A caption, or a question with the number of its answer."""
logger = logging.getLogger(__name__)


@dataclass
class Batch:
    """The samples of one rank in one step."""

    video: UInt8[Tensor, "batch frames height width 3"]
    """Frames as they were shot; the model normalises them on its device."""
    video_mask: Bool[Tensor, "batch frames"]
    """True where a frame is present."""
    captions: list[str]
    """The texts: captions, or questions. One for each clip in a step of retrieval, else up to some of each."""
    shards: list[str]
    """The shards that were read, each once."""
    bad: list[tuple[str, str]]
    """(shard, reason) of each sample that could not be read."""
    uncaptioned: int
    """Clips left out because they have no caption, or no question that can be answered."""
    task: Task = "retrieval"
    """What the step trains."""
    video_of_text: list[int] = field(default_factory=list)
    """Which clip each text belongs to."""
    answers: list[int] = field(default_factory=list)
    """Number of each question's answer in the vocabulary."""
    ids: list[str] = field(default_factory=list)
    """The clips' own ids."""

    def pin_memory(self) -> "Batch":
        """Called by DataLoader: page-locked frames travel to the device while it computes."""
        return replace(self, video=self.video.pin_memory(), video_mask=self.video_mask.pin_memory())


class ClipDataset(Dataset):
    """Reads batches: `clips[epoch, ids, soon, task]`. Runs in the loader workers; holds nothing until first used."""

    def __init__(self, index: ShardIndex, config: TrainConfig, cache: str):
        self.shards = index.of_split(config.data.split)
        self.paths = [index.path(shard) for shard in self.shards]
        self.settings, self.seed = config.data, config.seed
        self.frames, self.size = config.model.frames, config.model.towers.image_size
        self.cache = ShardCache(cache, keep=3 * config.data.shuffle_window)
        self.texts_per_clip = config.heads.texts_per_clip
        self.labels = {answer: number for number, answer in enumerate(config.heads.vocabulary)}
        self.kept: dict[tuple[int, int], tuple[str, dict[str, Any], UInt8[np.ndarray, "f h w 3"]]] = {}
        self.room = config.data.keep_mb * 10**6
        self.opened: OrderedDict[int, tuple[io.FileIO, list[Entry]]] = OrderedDict()

    def __getitem__(self, request: tuple[int, Int[np.ndarray, "_ 2"], list[int], Task]) -> Batch:
        epoch, ids, soon, task = request
        if soon:
            threading.Thread(target=self._fetch, args=(soon,), daemon=True).start()
        videos, captions, answers, owners, clips, bad = [], [], [], [], [], []
        for shard, number in ids.tolist():
            try:
                frames, texts, clip = self.read(shard, number, epoch, task)
            except Exception as error:  # whatever a damaged file makes a parser raise
                bad.append((self.shards[shard].name, f"{type(error).__name__}: {error}"))
                continue
            if texts:
                owners += [len(videos)] * len(texts)
                clips.append(clip)
                videos.append(frames)
                captions += [text for text, _ in texts]
                answers += [answer for _, answer in texts if answer is not None]
        video = torch.zeros(len(videos), self.frames, self.size, self.size, 3, dtype=torch.uint8)
        mask = torch.zeros(len(videos), self.frames, dtype=torch.bool)
        for i, frames in enumerate(videos):
            video[i, : len(frames)] = torch.from_numpy(frames)
            mask[i, : len(frames)] = True
        names = [self.shards[s].name for s in dict.fromkeys(ids[:, 0].tolist())]
        left_out = len(ids) - len(videos) - len(bad)
        return Batch(video, mask, captions, names, bad, left_out, task, owners, answers, clips)

    def read(
        self, shard: int, number: int, epoch: int, task: Task = "retrieval"
    ) -> tuple[UInt8[np.ndarray, "f h w 3"], list[Text], str]:
        """Frames, the epoch's texts for a task (without any, no frames are decoded) and the clip's id."""
        kept = self.kept.get((shard, number))
        key, about, frames = kept or self._sample(shard, number)
        texts = self._texts(about, task, epoch, key)
        clip = str(about.get("id", key))
        if not texts:
            return np.empty((0, self.size, self.size, 3), np.uint8), [], clip
        if isinstance(frames, np.ndarray):
            return frames, texts, clip
        video = self._decoded(frames)
        if self.room >= video.nbytes:
            self.room -= video.nbytes
            self.kept[shard, number] = key, about, video
        return video, texts, clip

    def _sample(self, shard: int, number: int) -> tuple[str, dict[str, Any], list[bytes]]:
        """Key, description and JPEGs of a sample, in time order."""
        file, samples = self._open(shard)
        if number >= len(samples):
            raise ValueError(
                f"sample {number} of {self.shards[shard].samples} is not there: the tar is cut short"
            )
        key, members = samples[number]

        def content(name: str) -> bytes:
            offset, length = members[name]
            return os.pread(file.fileno(), length, offset)

        about = json.loads(content("json").decode("utf-8", "surrogateescape"))
        names = sorted(
            (n for n in members if n.endswith((".jpg", ".jpeg"))), key=lambda n: int(n.split(".")[0])
        )
        if not 1 <= len(names) <= self.frames:
            raise ValueError(f"{len(names)} frames, expected 1 to {self.frames}")
        # A tar that is cut between two members reads as a shorter clip.
        if len(names) != len(about.get("timestamps", names)):
            raise ValueError(
                f"{len(names)} of {len(about['timestamps'])} frames are there: the tar is cut short"
            )
        return key, about, [content(name) for name in names]

    def _decoded(self, jpegs: list[bytes]) -> UInt8[np.ndarray, "f h w 3"]:
        video = np.empty((len(jpegs), self.size, self.size, 3), np.uint8)
        for i, jpeg in enumerate(jpegs):
            image = np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))
            if image.shape != video.shape[1:]:
                raise ValueError(
                    f"a frame of {image.shape[1]}x{image.shape[0]}, expected {self.size}x{self.size}"
                )
            video[i] = image
        return video

    def _texts(self, clip: dict[str, Any], task: Task, epoch: int, key: str) -> list[Text]:
        """What a clip shows in an epoch: one caption, or up to some captions to write or questions to answer."""
        most = 1 if task == "retrieval" else self.texts_per_clip
        if task == "qa":
            asked = [(entry["question"], self.labels.get(entry["answer"])) for entry in clip.get("qa", [])]
            asked = [(question, label) for question, label in asked if label is not None and question.strip()]
        else:
            captions = [caption for caption in clip["captions"] if caption.strip()]
            captions = [" ".join(captions)] if captions and self.settings.paragraph else captions
            asked = [(caption, None) for caption in captions]
        turns = range(most * epoch, most * epoch + min(most, len(asked)))
        return [asked[caption_number(len(asked), self.seed, turn, key)] for turn in turns]

    def _open(self, shard: int) -> tuple[io.FileIO, list[Entry]]:
        """The shard's file and members: scanned once, the least recently used closed."""
        if shard not in self.opened:
            path = self.cache.path(self.paths[shard])
            self.opened[shard] = (io.FileIO(path), scan(path))
            if len(self.opened) > 2 * self.settings.shuffle_window:
                self.opened.popitem(last=False)[1][0].close()
        self.opened.move_to_end(shard)
        return self.opened[shard]

    def _fetch(self, shards: list[int]) -> None:
        for shard in shards:
            try:
                self.cache.path(self.paths[shard])
            except OSError as error:  # whoever needs the shard will fail on it, and be counted
                logger.debug("%s: %s", self.paths[shard], error)

    def close(self) -> None:
        """Closes the shards that this process has open."""
        while self.opened:
            self.opened.popitem()[1][0].close()
