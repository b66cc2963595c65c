"""The token index: every video's frame tokens, kept so that a sentence finds its video, and can say why.

On disk an index is a folder (local or s3://): parts of tokens (`part-*.safetensors`) with the videos they belong to
(`part-*.jsonl`, same order), and `index.json`, written last, which lists the parts and names the model. Tokens are
unit vectors in float16: a video of 12 frames and 512 channels takes 12.3 KB.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Num
from safetensors.torch import load, save
from torch import Tensor

from hbi.infra import storage
from hbi.model.banzhaf import exact_interaction
from hbi.model.hbi import HBI
from hbi.model.similarity import weighted_similarity
from hbi.model.tokenizer import tokenize
from hbi.model.tokens import Tokens

INDEX_NAME = "index.json"
POOLED_ABOVE = 2000
"""Up to so many videos every one is scored exactly; above, pooled tokens choose the candidates first."""


@dataclass(frozen=True)
class Video:
    """What an index knows of a video besides its tokens."""

    id: str
    """The manifest's id."""
    video: str
    """Path or URI of the source."""
    start: float
    """Where the clip begins in the source, in seconds."""
    end: float
    """Where it ends, in seconds."""
    timestamps: list[float]
    """Presentation time of each frame token, in seconds."""


@dataclass(frozen=True)
class Maker:
    """What made the tokens: a query must be encoded by the same model, a new video cut by the same settings."""

    model: str
    """A model folder, or a pinned registry version (`models:/hbi/3`)."""
    tracking: str
    """The MLflow store in which a `models:/` name is looked up."""
    shards: dict[str, Any]
    """The settings of the shards (frames, size, choice, …)."""


@torch.inference_mode()
def encode_video(model: HBI, images: Num[np.ndarray, "batch frames h w 3"]) -> Tokens:
    """Entity-level frame tokens of clips of equal length, float16 unit vectors; uint8 images of the model's size."""
    device = next(model.parameters()).device
    video = torch.from_numpy(images).to(device)
    mask = torch.ones(video.shape[:2], dtype=torch.bool, device=device)
    tokens, logits, mask = model.video_levels(model.encode_video(video, mask), mask)["entity"]
    return Tokens(
        torch.nn.functional.normalize(tokens, dim=-1).half().cpu(), logits.float().cpu(), mask.cpu()
    )


@torch.inference_mode()
def encode_query(model: HBI, tokenizer: Any, text: str) -> tuple[Tokens, list[str]]:
    """Entity-level word tokens of one sentence ([1, words, dim]) and the words as written, one a token."""
    device = next(model.parameters()).device
    ids, mask = tokenize(tokenizer, [text], model.config.words)
    ids, mask = ids[:, : int(mask.sum())].to(device), mask[:, : int(mask.sum())].to(device)
    words, _ = model.encode_text(ids, mask)
    tokens = model.text_levels(words, mask)["entity"]
    written = [
        tokenizer.convert_tokens_to_string([t]).strip()
        for t in tokenizer.convert_ids_to_tokens(ids[0].tolist())
    ]
    return Tokens(*(part.cpu() for part in tokens)), written


class PartWriter:
    """Writes an index part by part; `finish` makes it an index. Parts may come from many processes."""

    def __init__(self, folder: str) -> None:
        self.folder = storage.absolute(folder)

    def write(self, name: str, tokens: Tokens, videos: Sequence[Video]) -> dict[str, Any]:
        """One part, `name` unique in the index; returns its row for `finish`."""
        lines = "".join(json.dumps(asdict(video)) + "\n" for video in videos)
        storage.write_bytes(
            storage.join(self.folder, f"{name}.jsonl"), lines.encode("utf-8", "surrogateescape")
        )
        arrays = {key: value.contiguous() for key, value in tokens._asdict().items()}
        storage.write_bytes(storage.join(self.folder, f"{name}.safetensors"), save(arrays))
        return {"name": name, "videos": len(videos)}

    def finish(self, maker: Maker, parts: list[dict[str, Any]]) -> None:
        """Writes `index.json`: from now on the folder is an index of just these parts."""
        about = {"version": 1, **asdict(maker), "parts": parts}
        storage.write_bytes(storage.join(self.folder, INDEX_NAME), json.dumps(about, indent=1).encode())


@dataclass(frozen=True)
class TokenIndex:
    """An index in memory. Adding and removing give a new index; the arrays are shared where they can be."""

    maker: Maker
    """What made the tokens."""
    tokens: Tokens
    """[videos, frames, dim] in float16, with logits and mask."""
    videos: list[Video]
    """In the order of the tokens."""

    @staticmethod
    def open(folder: str) -> "TokenIndex":
        """Reads an index; ValueError names the folder if it is none."""
        try:
            about = json.loads(storage.read_bytes(storage.join(folder, INDEX_NAME)))
        except FileNotFoundError:
            raise ValueError(f"{folder}: not an index (no {INDEX_NAME}): make one with `hbi index`") from None
        parts, videos = [], []
        for part in about["parts"]:
            stem = storage.join(folder, part["name"])
            parts.append(Tokens(**load(storage.read_bytes(f"{stem}.safetensors"))))
            lines = storage.read_bytes(f"{stem}.jsonl").decode("utf-8", "surrogateescape").splitlines()
            videos += [Video(**json.loads(line)) for line in lines]
        maker = Maker(about["model"], about["tracking"], about["shards"])
        return TokenIndex(maker, _stack(parts), videos)

    def save(self, folder: str) -> None:
        """Writes the index as one part."""
        writer = PartWriter(folder)
        writer.finish(self.maker, [writer.write("part-000000", self.tokens, self.videos)])

    def position(self, id: str) -> int:
        """Where a video stands; KeyError if it is not held."""
        for position, video in enumerate(self.videos):
            if video.id == id:
                return position
        raise KeyError(id)

    def without(self, ids: Sequence[str]) -> "TokenIndex":
        """The index less some ids; KeyError names one that it does not hold."""
        gone = set(ids)
        if missing := gone - {video.id for video in self.videos}:
            raise KeyError(min(missing))
        keep = [i for i, video in enumerate(self.videos) if video.id not in gone]
        return replace(
            self, tokens=Tokens(*(part[keep] for part in self.tokens)), videos=[self.videos[i] for i in keep]
        )

    def plus(self, tokens: Tokens, videos: Sequence[Video]) -> "TokenIndex":
        """The index with more videos; one whose id it held already is replaced."""
        held = {video.id for video in self.videos}
        base = self.without([v.id for v in videos if v.id in held])
        return replace(base, tokens=_stack([base.tokens, tokens]), videos=[*base.videos, *videos])

    @torch.inference_mode()
    def search(self, query: Tokens, k: int, candidates: int = 200) -> list[tuple[float, Video]]:
        """The `k` best videos for one sentence, best first, with their weighted token-wise similarity in [-1, 1]."""
        if not self.videos:
            return []
        chosen = torch.arange(len(self.videos))
        if len(self.videos) > POOLED_ABOVE:
            pooled = self._pooled() @ _pool(query)[0]
            chosen = pooled.topk(min(max(candidates, k), len(self.videos))).indices
        tokens, logits, mask = (part[chosen] for part in self.tokens)
        scores = weighted_similarity(query, Tokens(tokens.to(query.tokens.dtype), logits, mask))[0]
        best = scores.topk(min(k, len(chosen)))
        return [
            (float(s), self.videos[int(chosen[i])]) for s, i in zip(best.values, best.indices, strict=True)
        ]

    @torch.inference_mode()
    def explain(self, query: Tokens, id: str) -> tuple[Float[Tensor, "words frames"], Video]:
        """The exact Banzhaf interaction of each word with each frame of one video; KeyError if it is not held."""
        position = self.position(id)
        tokens, logits, mask = (part[position : position + 1] for part in self.tokens)
        words = torch.nn.functional.normalize(query.tokens.float(), dim=-1)
        similarity = words @ tokens.float().transpose(1, 2)
        return exact_interaction(similarity, query.logits.float(), logits.float(), query.mask, mask)[
            0
        ], self.videos[position]

    def _pooled(self) -> Float[Tensor, "videos dim"]:
        """One vector a video, made at the first search and kept."""
        if "pooled" not in self.__dict__:
            object.__setattr__(self, "pooled", _pool(self.tokens))
        return self.__dict__["pooled"]


def _pool(tokens: Tokens) -> Float[Tensor, "batch dim"]:
    """The tokens' mean under their weights."""
    weights = tokens.logits.float().masked_fill(~tokens.mask, -torch.inf).softmax(-1)
    unit = torch.nn.functional.normalize(tokens.tokens.float(), dim=-1)
    return torch.einsum("bn,bnd->bd", weights, unit)


def _stack(parts: Sequence[Tokens]) -> Tokens:
    """Parts one after another, padded to the longest."""
    parts = [part for part in parts if len(part.tokens)] or list(parts[:1])
    length = max((part.tokens.shape[1] for part in parts), default=0)

    def padded(part: Tensor) -> Tensor:
        if part.shape[1] == length:
            return part
        return torch.cat([part, part.new_zeros(len(part), length - part.shape[1], *part.shape[2:])], 1)

    return Tokens(*(torch.cat([padded(part) for part in same]) for same in zip(*parts, strict=True)))
