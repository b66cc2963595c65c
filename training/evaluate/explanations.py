"""How true explanations of a split's matches are: areas under deletion and insertion curves, beside the best order's.

For a caption and its clip, a way to explain orders the frames, and the words, by importance. The score of every set
of input frames (with all words) and of every set of words (with all frames) is known by scoring it, and so are the
areas of the order, of the best order, and of a random one (`hbi.model.curves`). Areas are summed over matches, and
reported as shares of the best order's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from hbi.model.banzhaf import exact_interaction
from hbi.model.coalitions import coalition_scores, importance, tokens_of, words_of_tokens
from hbi.model.curves import Areas, areas, best_areas, random_areas
from hbi.model.hbi import HBI
from hbi.model.similarity import pair_similarity
from hbi.model.tokenizer import tokenize
from hbi.model.tokens import Tokens
from hbi.model.values import exact_values
from hbi.pipelines.sample import ShardIndex
from hbi.training.evaluate.encode import readable

MOST_PLAYERS = 12
"""Of a side: all its sets are scored. Captions of more words and clips of more frames are passed over."""


@dataclass(frozen=True)
class Match:
    """A caption and its clip, ready to be explained."""

    model: HBI
    """In evaluation mode."""
    input_ids: Int[Tensor, " tokens"]
    """The caption."""
    word_of_token: Int[Tensor, " tokens"]
    """Which word each token is a piece of; -1 for marks."""
    frames: Float[Tensor, "frames dim"]
    """Of `encode_frames`."""

    @property
    def words(self) -> int:
        return int(self.word_of_token.max()) + 1

    def frame_scores(self) -> Float[Tensor, " sets"]:
        """Of every set of frames, with all words."""
        everything = torch.ones(1, len(self.input_ids), dtype=torch.bool)
        return coalition_scores(
            self.model, self.input_ids, everything, self.frames, every_set(len(self.frames))
        )[0]

    def word_scores(self) -> Float[Tensor, " sets"]:
        """Of every set of words, with all frames."""
        sets = tokens_of(every_set(self.words), self.word_of_token)
        everything = torch.ones(1, len(self.frames), dtype=torch.bool)
        return coalition_scores(self.model, self.input_ids, sets, self.frames, everything)[:, 0]

    def tokens(self) -> tuple[Tokens, Tokens]:
        """Of the entity level, after words saw words and frames saw frames."""
        text_mask = torch.ones(1, len(self.input_ids), dtype=torch.bool)
        video_mask = torch.ones(1, len(self.frames), dtype=torch.bool)
        words, _ = self.model.encode_text(self.input_ids[None], text_mask)
        frames = self.model.over_time(self.frames[None], video_mask)
        return (
            self.model.text_levels(words, text_mask)["entity"],
            self.model.video_levels(frames, video_mask)["entity"],
        )

    def by_word(self, of_tokens: Float[Tensor, " tokens"]) -> Float[Tensor, " words"]:
        """Sums of the pieces of each word; marks fall away."""
        piece = self.word_of_token >= 0
        return torch.zeros(self.words).index_add(0, self.word_of_token[piece], of_tokens[piece].float())


def every_set(players: int) -> Tensor:
    """All sets, bit i of a row's number saying that player i is in it."""
    return (torch.arange(2**players)[:, None] >> torch.arange(players)) & 1 == 1


def by_input(match: Match) -> tuple[Tensor, Tensor]:
    """Values in the game on what goes in: what the page shows."""
    found = importance(match.model, match.input_ids, match.word_of_token, match.frames)
    return found.words, found.frames


def by_values(match: Match) -> tuple[Tensor, Tensor]:
    """Exact Banzhaf values of the tokens."""
    text, video = match.tokens()
    words, frames = exact_values(pair_similarity(text, video), text.logits, video.logits)
    return match.by_word(words[0]), frames[0]


def by_interaction(match: Match) -> tuple[Tensor, Tensor]:
    """Sums of the exact Banzhaf interaction of the tokens."""
    text, video = match.tokens()
    found = exact_interaction(pair_similarity(text, video), text.logits, video.logits)[0]
    return match.by_word(found.sum(1)), found.sum(0)


def by_similarity(match: Match) -> tuple[Tensor, Tensor]:
    """Weighted similarity of the tokens: the mean over the others, under the weights of the score."""
    text, video = match.tokens()
    cosines = pair_similarity(text, video)[0]
    p, q = text.weights()[0], video.weights()[0]
    of_frames = (p[:, None] * cosines).sum(0) + q * cosines.mean(0)
    of_words = (q[None] * cosines).sum(1) + p * cosines.mean(1)
    return match.by_word(of_words), of_frames


METHODS: dict[str, Callable[[Match], tuple[Tensor, Tensor]]] = {
    "input values": by_input,
    "token values": by_values,
    "token interaction": by_interaction,
    "similarity": by_similarity,
}


@torch.inference_mode()
def explanation_metrics(
    model: HBI, tokenizer: Any, index: ShardIndex, split: str, matches: int
) -> dict[str, float]:
    """Shares of the best order's areas in percent, over the first `matches` matches of a split that are short enough.

    By name: `<split>/explain/<frames or words>/<way>/<deletion or insertion>`, with the way `random` beside the others,
    and `<split>/explain/matches`, how many there were. ValueError where there was none.
    """
    sums: dict[tuple[str, str], np.ndarray] = {}
    done, reasons = 0, []
    everything = range(sum(shard.samples for shard in index.of_split(split)))
    for sample, images in readable(index, split, everything, model.config.frames, reasons):
        match = match_of(model, tokenizer, sample.captions, images)
        if match is None or done == matches:
            continue
        done += 1
        found = {name: explain(match) for name, explain in METHODS.items()}
        for side, scores in enumerate((match.word_scores().double(), match.frame_scores().double())):
            name = ("words", "frames")[side]
            each = {
                way: areas(scores, values[side].argsort(descending=True)) for way, values in found.items()
            }
            each |= {"best": best_areas(scores), "random": random_areas(scores)}
            for way, area in each.items():
                sums[name, way] = sums.get((name, way), np.zeros(2)) + np.array(area)
    if not done:
        raise ValueError(
            f"{index.folder}: no match of {split} has 2 to {MOST_PLAYERS} words and frames to explain"
        )
    shares = {
        f"{split}/explain/{side}/{way}/{kind}": float(100 * area / best)
        for (side, way), both in sums.items()
        if way != "best"
        for kind, area, best in zip(Areas._fields, both, sums[side, "best"], strict=True)
    }
    return {**shares, f"{split}/explain/matches": float(done)}


def match_of(
    model: HBI, tokenizer: Any, captions: list[str], images: UInt8[np.ndarray, "frames h w 3"]
) -> Match | None:
    """The first caption that is short enough, with its clip; None where there is none or the clip is too long."""
    if not 2 <= len(images) <= MOST_PLAYERS:
        return None
    for caption in captions:
        words, numbers = words_of_tokens(tokenizer, caption, model.config.words)
        if 2 <= len(words) <= MOST_PLAYERS:
            ids, _ = tokenize(tokenizer, [caption], model.config.words)
            frames = model.encode_frames(torch.from_numpy(images)[None])[0]
            return Match(model, ids[0, : len(numbers)], numbers, frames)
    return None


def explanation_table(metrics: dict[str, float], split: str) -> str:
    """The shares as a small table: one row a way."""
    head = f"{split}: {metrics[f'{split}/explain/matches']:.0f} matches explained, areas in % of the best order's"
    columns = [(side, kind) for side in ("frames", "words") for kind in Areas._fields]
    lines = [head, f"  {'':20}" + "".join(f"{f'{side} {kind}':>18}" for side, kind in columns)]
    for way in (*METHODS, "random"):
        shares = [metrics[f"{split}/explain/{side}/{way}/{kind}"] for side, kind in columns]
        lines.append(f"  {way:20}" + "".join(f"{share:18.1f}" for share in shares))
    return "\n".join(lines)
