"""Sentences and videos to the tokens that the index holds and is searched with."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Num
from torch import Tensor

from hbi.model.hbi import HBI
from hbi.model.tokenizer import tokenize
from hbi.model.tokens import Tokens
from hbi.serving.index.rows import Encoded
from hbi.serving.index.stages import segments_of
from hbi.serving.model import words_of


@dataclass(frozen=True)
class Sentence:
    """One sentence, encoded."""

    tokens: Tokens
    """Entity-level word tokens, [1, words, dim]."""
    ids: list[int]
    """What the model read."""
    words: list[str]
    """The words as written, one a row of an explanation."""
    word_of_token: list[int]
    """Which word each token belongs to."""
    cut: bool
    """Whether it was longer than the model's words, and its end was left out."""


@torch.inference_mode()
def encode_video(model: HBI, images: Num[np.ndarray, "batch frames h w 3"]) -> tuple[Tokens, Tensor]:
    """What the index keeps of clips of equal length; uint8 images of the model's size.

    Entity-level frame tokens, float16 unit vectors, by which they are found; and each frame by itself as
    `HBI.encode_frames` has it, float16 [batch, frames, dim], by which a match is explained.
    """
    device = next(model.parameters()).device
    video = torch.from_numpy(images).to(device)
    mask = torch.ones(video.shape[:2], dtype=torch.bool, device=device)
    frames = model.encode_frames(video)
    tokens, logits, mask = model.video_levels(model.over_time(frames, mask), mask)["entity"]
    unit = torch.nn.functional.normalize(tokens, dim=-1).half().cpu()
    return Tokens(unit, logits.float().cpu(), mask.cpu()), frames.half().cpu()


@torch.inference_mode()
def encode_sentences(model: HBI, tokenizer: Any, texts: Sequence[str]) -> list[Sentence]:
    """Entity-level word tokens of each sentence, without padding."""
    device = next(model.parameters()).device
    ids, mask = tokenize(tokenizer, texts, model.config.words)
    longest = int(mask.sum(1).max())
    ids, mask = ids[:, :longest].to(device), mask[:, :longest].to(device)
    levels = model.text_levels(model.encode_text(ids, mask)[0], mask)["entity"]
    tokens = [part.cpu() for part in levels]
    whole = tokenizer(list(texts), split_special_tokens=True)["input_ids"]
    sentences = []
    for i in range(len(texts)):
        length = int(mask[i].sum())
        read = ids[i, :length].tolist()
        words, of_token = words_of(tokenizer, read)
        own = Tokens(*(part[i : i + 1, :length] for part in tokens))
        sentences.append(Sentence(own, read, words, of_token, len(whole[i]) > length))
    return sentences


def encoded_rows(tokens: Tokens, frames: Tensor, thumbnails: Sequence[Sequence[bytes]]) -> list[Encoded]:
    """What the index keeps of each clip. tokens, frames: of `encode_video`; thumbnails: of each clip's frames."""
    rows = []
    for i, small in enumerate(thumbnails):
        present = tokens.mask[i]
        own, logits = tokens.tokens[i][present].numpy(), tokens.logits[i][present].numpy()
        segments = segments_of(own.astype(np.float32), logits)
        rows.append(Encoded(own, logits, *segments, list(small), frames[i][present].numpy()))
    return rows
