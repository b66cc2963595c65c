"""How true explanations of a split's matches are: areas under deletion and insertion curves, and what is pointed at.

For a caption and its clip, a way to explain orders the frames, and the words, by importance. The score of every set
of input frames (with all words) and of every set of words (with all frames) is known by scoring it, and so are the
areas of the order, of the best order, and of a random one (`hbi.model.curves`). Areas are summed over matches, and
reported as shares of the best order's.

Where samples say when what they tell of happens (a column `moments` of `{"text", "start", "end"}`), two more things are
measured. Pointing: the whole caption is explained, and the frame that the words of one moment meet most lies inside it
(the pointing game of Zhang et al. 2016, in time); chance is the moment's share of the frames. Moment: its text alone is
explained, and the run of frames that this names (`hbi.model.moments`) overlaps it: mean temporal IoU, and the share of
IoU 0.5 and more (R1@0.5 of moment retrieval).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hbi.model.banzhaf import exact_interaction
from hbi.model.coalitions import coalition_scores, every_set, importance, tokens_of, words_of_tokens
from hbi.model.curves import Areas, areas, best_areas, random_areas
from hbi.model.hbi import HBI
from hbi.model.moments import moment, temporal_iou
from hbi.model.similarity import pair_similarity
from hbi.model.tokenizer import tokenize
from hbi.model.tokens import Tokens
from hbi.model.values import exact_values
from hbi.pipelines.sample import Sample, ShardIndex
from hbi.training.evaluate.encode import readable

MOST_PLAYERS = 12
"""Of a side: all its sets are scored. Captions of more words and clips of more frames are passed over."""


@dataclass(frozen=True)
class Match:
    """A caption and its clip, ready to be explained."""

    model: HBI
    """In evaluation mode."""
    written: list[str]
    """The words of the caption."""
    input_ids: Int[Tensor, " tokens"]
    """The caption."""
    word_of_token: Int[Tensor, " tokens"]
    """Which word each token is a piece of; -1 for marks."""
    frames: Float[Tensor, "frames dim"]
    """Of `encode_frames`."""

    @property
    def words(self) -> int:
        return len(self.written)

    @property
    def is_short(self) -> bool:
        """Whether all sets of its words and of its frames can be scored."""
        return max(self.words, len(self.frames)) <= MOST_PLAYERS

    def places(self, text: str) -> list[int]:
        """Where a text's words stand in the caption, one after another; empty where they do not."""
        sought = text.split()
        for first in range(self.words - len(sought) + 1):
            if self.written[first : first + len(sought)] == sought:
                return list(range(first, first + len(sought)))
        return []

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

    def by_word(self, of_tokens: Float[Tensor, " tokens *rest"]) -> Float[Tensor, " words *rest"]:
        """Sums of the pieces of each word; marks fall away."""
        piece = self.word_of_token >= 0
        nothing = torch.zeros(self.words, *of_tokens.shape[1:])
        return nothing.index_add(0, self.word_of_token[piece], of_tokens[piece].float())


class Explanation(NamedTuple):
    """What one way says of a match."""

    words: Float[Tensor, " words"]
    """How much each word counts."""
    frames: Float[Tensor, " frames"]
    """How much each frame counts."""
    pairs: Float[Tensor, "words frames"]
    """How much each word has to do with each frame."""


def by_input(match: Match) -> Explanation:
    """Values and interactions in the game on what goes in: what the page shows."""
    found = importance(match.model, match.input_ids, match.word_of_token, match.frames)
    return Explanation(found.words, found.frames, found.interaction)


def by_values(match: Match) -> Explanation:
    """Exact Banzhaf values of the tokens, and their interactions."""
    text, video = match.tokens()
    similarity = pair_similarity(text, video)
    words, frames = exact_values(similarity, text.logits, video.logits)
    pairs = exact_interaction(similarity, text.logits, video.logits)[0]
    return Explanation(match.by_word(words[0]), frames[0], match.by_word(pairs))


def by_interaction(match: Match) -> Explanation:
    """Sums of the exact Banzhaf interaction of the tokens."""
    text, video = match.tokens()
    found = exact_interaction(pair_similarity(text, video), text.logits, video.logits)[0]
    return Explanation(match.by_word(found.sum(1)), found.sum(0), match.by_word(found))


def by_similarity(match: Match) -> Explanation:
    """Weighted similarity of the tokens: the mean over the others, under the weights of the score."""
    text, video = match.tokens()
    cosines = pair_similarity(text, video)[0]
    p, q = text.weights()[0], video.weights()[0]
    of_frames = (p[:, None] * cosines).sum(0) + q * cosines.mean(0)
    of_words = (q[None] * cosines).sum(1) + p * cosines.mean(1)
    pairs = (p[:, None] + q[None]) * cosines
    return Explanation(match.by_word(of_words), of_frames, match.by_word(pairs))


METHODS: dict[str, Callable[[Match], Explanation]] = {
    "input values": by_input,
    "token values": by_values,
    "token interaction": by_interaction,
    "similarity": by_similarity,
}


@torch.inference_mode()
def explanation_metrics(
    model: HBI, tokenizer: Any, index: ShardIndex, split: str, matches: int
) -> dict[str, float]:
    """What there is to measure of the first `matches` clips of a split that have it, in percent.

    By name: `<split>/explain/<frames or words>/<way>/<deletion or insertion>`, shares of the best order's areas over
    matches that are short enough, with the way `random` beside the others; `<split>/explain/matches`, how many there
    were; `<split>/explain/pointing/<way>`, `.../moment/<way>/IoU` and `.../moment/<way>/R1@0.5`, with `chance` of the
    pointing; `<split>/explain/moments`, how many. ValueError where there is none of either.
    """
    curves, moments, reasons = Curves(), Moments(), []
    everything = range(sum(shard.samples for shard in index.of_split(split)))
    for sample, images in readable(index, split, everything, model.config.frames, reasons):
        frames = model.encode_frames(torch.from_numpy(images)[None])[0]
        told = sample.extra.get("moments", [])
        matched = [match_of(model, tokenizer, caption, frames) for caption in sample.captions]
        alone = [match_of(model, tokenizer, moment["text"], frames) for moment in told]
        short = [match for match in (*matched, *alone) if match is not None and match.is_short]
        if short and curves.matches < matches:
            curves.add(short[0])
        if told and moments.clips < matches:
            moments.add(sample, told, matched, alone)
        if curves.matches >= matches and (moments.clips >= matches or not told):
            break
    if not curves.matches and not moments.clips:
        raise ValueError(
            f"{index.folder}: no match of {split} has 2 to {MOST_PLAYERS} words and frames to explain, "
            "and none says when what it tells of happens"
        )
    found = {**curves.metrics(), **moments.metrics()}
    return {f"{split}/explain/{name}": value for name, value in found.items()}


class Curves:
    """Sums of areas over matches."""

    def __init__(self) -> None:
        self.matches = 0
        self.sums: dict[tuple[str, str], np.ndarray] = {}

    def add(self, match: Match) -> None:
        """One more match, all of whose sets of words and of frames are scored."""
        self.matches += 1
        found = {name: explain(match) for name, explain in METHODS.items()}
        for side, scores in (("words", match.word_scores()), ("frames", match.frame_scores())):
            scores = scores.double()
            each = {
                way: areas(scores, getattr(explained, side).argsort(descending=True))
                for way, explained in found.items()
            }
            each |= {"best": best_areas(scores), "random": random_areas(scores)}
            for way, area in each.items():
                self.sums[side, way] = self.sums.get((side, way), np.zeros(2)) + np.array(area)

    def metrics(self) -> dict[str, float]:
        """Shares of the best order's, in percent."""
        shares = {
            f"{side}/{way}/{kind}": float(100 * area / best)
            for (side, way), both in self.sums.items()
            if way != "best"
            for kind, area, best in zip(Areas._fields, both, self.sums[side, "best"], strict=True)
        }
        return {**shares, "matches": float(self.matches)} if self.matches else {}


class Moments:
    """What is pointed at, over the moments that clips tell of."""

    def __init__(self) -> None:
        self.clips = self.moments = 0
        self.hits: dict[str, float] = dict.fromkeys((*METHODS, "chance"), 0.0)
        self.overlaps: dict[str, list[float]] = {way: [] for way in METHODS}

    def add(
        self,
        sample: Sample,
        told: list[dict[str, Any]],
        captions: list[Match | None],
        alone: list[Match | None],
    ) -> None:
        """One more clip. captions: its captions, of which the first that tells all its moments is explained; alone: the
        moments' texts."""
        texts = [moment["text"] for moment in told]
        whole = next((m for m in captions if m is not None and all(m.places(text) for text in texts)), None)
        if whole is None or not all(alone):
            return
        self.clips += 1
        pairs = {way: explain(whole).pairs for way, explain in METHODS.items()}
        for right, match in zip(told, alone, strict=True):
            inside = [right["start"] <= time < right["end"] for time in sample.timestamps]
            if not any(inside) or match is None:
                continue
            self.moments += 1
            self.hits["chance"] += sum(inside) / len(inside)
            for way, explain in METHODS.items():
                self.hits[way] += inside[int(pairs[way][whole.places(right["text"])].sum(0).argmax())]
                named = moment(explain(match).frames, sample.timestamps, sample.end)
                self.overlaps[way].append(temporal_iou(named, (right["start"], right["end"])))

    def metrics(self) -> dict[str, float]:
        """Means, in percent."""
        if not self.moments:
            return {}
        pointing = {f"pointing/{way}": 100 * self.hits[way] / self.moments for way in (*METHODS, "chance")}
        overlap = {f"moment/{way}/IoU": float(100 * np.mean(ious)) for way, ious in self.overlaps.items()}
        near = {
            f"moment/{way}/R1@0.5": float(100 * np.mean(np.array(ious) >= 0.5))
            for way, ious in self.overlaps.items()
        }
        return {**pointing, **overlap, **near, "moments": float(self.moments)}


def match_of(model: HBI, tokenizer: Any, text: str, frames: Float[Tensor, "frames dim"]) -> Match | None:
    """A text with a clip; None where there are fewer than two words or frames, or the text is cut."""
    words, numbers = words_of_tokens(tokenizer, text, model.config.words)
    if len(words) < 2 or len(frames) < 2 or len(words) < len(text.split()):
        return None
    ids, _ = tokenize(tokenizer, [text], model.config.words)
    return Match(model, words, ids[0, : len(numbers)], numbers, frames)


def explanation_table(metrics: dict[str, float], split: str) -> str:
    """The shares as small tables: one row a way."""
    lines = []
    if matches := metrics.get(f"{split}/explain/matches"):
        columns = [(side, kind) for side in ("frames", "words") for kind in Areas._fields]
        lines.append(f"{split}: {matches:.0f} matches explained, areas in % of the best order's")
        lines.append(f"  {'':20}" + "".join(f"{f'{side} {kind}':>18}" for side, kind in columns))
        for way in (*METHODS, "random"):
            shares = [metrics[f"{split}/explain/{side}/{way}/{kind}"] for side, kind in columns]
            lines.append(f"  {way:20}" + "".join(f"{share:18.1f}" for share in shares))
    if moments := metrics.get(f"{split}/explain/moments"):
        chance = metrics[f"{split}/explain/pointing/chance"]
        lines.append(f"{split}: {moments:.0f} moments, in %; {chance:.1f} are pointed at by chance")
        lines.append(f"  {'':20}" + "".join(f"{name:>18}" for name in ("pointed at", "IoU", "R1@0.5")))
        for way in METHODS:
            names = (f"pointing/{way}", f"moment/{way}/IoU", f"moment/{way}/R1@0.5")
            shares = [metrics[f"{split}/explain/{name}"] for name in names]
            lines.append(f"  {way:20}" + "".join(f"{share:18.1f}" for share in shares))
    return "\n".join(lines)
