"""The game on what goes in: a match scored again with only some of its words and some of its frames.

The game of `hbi.model.banzhaf` has the tokens as players, after every word has seen the words before it and every
frame the other frames: leave out a token, and the others still carry it. Here a player that is absent was never there:
the text tower and the transformer over time see the coalition alone. Frames are encoded once (`HBI.encode_frames`), so
a coalition costs a short pass over time or over words, and scores of sets of words T with sets of frames V are one
matrix v[T, V].

Players are frames, and the words as written: all pieces of a word come and go together, and the marks of start and end
always stay. A set without frames scores 0.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hbi.model.hbi import HBI
from hbi.model.levels import LEVELS

COALITIONS = 1024
"""Of a side so many are scored at most: all of few players, a random sample of more."""
WORD_PRESENCE = 0.5
"""How likely each other word is in a coalition: Banzhaf's own."""
FRAME_PRESENCE = 0.25
"""How likely each other frame is. Frames stand in for one another: among half of them, one that shows what is asked
adds little, since another still does. Among few it shows what it is good for."""


class Importance(NamedTuple):
    """What each player of a match is good for, in units of the similarity."""

    words: Float[Tensor, " words"]
    """Value of each word with all the frames there: the mean, over sets of the other words, of what it adds."""
    frames: Float[Tensor, " frames"]
    """Value of each frame with all the words there."""
    interaction: Float[Tensor, "words frames"]
    """Interaction of each word with each frame: what both add beyond what each adds."""
    score: float
    """The similarity of the whole match."""


class Coalitions(NamedTuple):
    """Sets of the players of a side, weighted as they come when each player is there by chance alone."""

    sets: Bool[Tensor, "sets players"]
    """The last is the set of all."""
    weights: Float[Tensor, " sets"]
    """How likely each is; of a sample, equal. The set of all weighs nothing in a sample unless it was drawn."""
    presence: float
    """How likely each player is there."""

    def contrasts(self) -> Float[Tensor, "sets players"]:
        """c with c.T v the value of each player: its coefficient in the linear function nearest to v, as sets weigh.

        Over all sets that is E[v with the player] - E[v without it] (Hammer and Holzman 1992; with any presence,
        Marichal and Mathonet 2011). Of a sample it is much nearer to that than the difference of the sample's means,
        in which the others' values are noise (Liu et al. 2024, "Kernel Banzhaf").
        """
        presence = self.sets.double() - self.presence
        root = self.weights.double().sqrt()[:, None]
        linear = torch.cat([root, root * presence], 1)
        return root * torch.linalg.pinv(linear)[1:].T


def coalitions(players: int, presence: float, most: int = COALITIONS, seed: int = 0) -> Coalitions:
    """All 2^players sets, or, if more, a sample of `most`."""
    if 2**players <= most:
        sets = every_set(players)
        size = sets.sum(1)
        return Coalitions(sets, presence ** size.double() * (1 - presence) ** (players - size), presence)
    return sampled_coalitions(players, presence, most, seed)


def every_set(players: int) -> Bool[Tensor, "sets players"]:
    """All sets, bit i of a row's number saying that player i is in it."""
    return (torch.arange(2**players)[:, None] >> torch.arange(players)) & 1 == 1


def sampled_coalitions(players: int, presence: float, most: int, seed: int = 0) -> Coalitions:
    """`most` sets (an even number), each player in it by chance; they come in pairs that have opposite luck."""
    luck = torch.rand(most // 2, players, generator=torch.Generator().manual_seed(seed))
    drawn = torch.cat([luck < presence, luck > 1 - presence])
    weights = torch.full((len(drawn) + 1,), 1 / len(drawn), dtype=torch.float64)
    weights[-1] = 0.0
    return Coalitions(torch.cat([drawn, torch.ones(1, players, dtype=torch.bool)]), weights, presence)


@torch.inference_mode()
def coalition_scores(
    model: HBI,
    input_ids: Int[Tensor, " tokens"],
    token_sets: Bool[Tensor, "word_sets tokens"],
    frames: Float[Tensor, "frames dim"],
    frame_sets: Bool[Tensor, "frame_sets frames"],
) -> Float[Tensor, "word_sets frame_sets"]:
    """v[T, V]: the entity level's similarity of the text with only the tokens T and the clip with only the frames V.

    frames: of `encode_frames`, each by itself. Absent tokens leave the positions of the others as they are.
    """
    words, _ = model.encode_text(input_ids.expand(len(token_sets), -1), token_sets)
    text = model.text_levels(words, token_sets, LEVELS[:1])["entity"]
    someone = frame_sets.any(-1)
    seen = frame_sets[someone]
    tokens = model.over_time(frames.expand(len(seen), -1, -1), seen)
    video = model.video_levels(tokens, seen, LEVELS[:1])["entity"]
    scores = torch.zeros(len(token_sets), len(frame_sets), device=frames.device)
    scores[:, someone] = model.similarity(text, video, chunk=256)
    return scores


def importance(
    model: HBI,
    input_ids: Int[Tensor, " tokens"],
    word_of_token: Int[Tensor, " tokens"],
    frames: Float[Tensor, "frames dim"],
    most: int = COALITIONS,
) -> Importance:
    """Values of words and frames and their interactions in the game on what goes in.

    word_of_token: which word each token is a piece of, counted from 0; -1 for the marks. most: coalitions of a side.
    Each value is a mean over coalitions that all come from one matrix of scores: exact with few players, since all
    coalitions are there; with many an estimate, in which one sample serves all players.
    """
    count = int(word_of_token.max()) + 1
    words, seen = coalitions(count, WORD_PRESENCE, most), coalitions(len(frames), FRAME_PRESENCE, most)
    token_sets = tokens_of(words.sets.to(frames.device), word_of_token)
    scores = (
        coalition_scores(model, input_ids, token_sets, frames, seen.sets.to(frames.device)).double().cpu()
    )
    of_words, of_frames = words.contrasts(), seen.contrasts()
    return Importance(
        (of_words.T @ scores[:, -1]).float(),
        (of_frames.T @ scores[-1]).float(),
        (of_words.T @ scores @ of_frames).float(),
        float(scores[-1, -1]),
    )


def tokens_of(
    word_sets: Bool[Tensor, "sets words"], word_of_token: Int[Tensor, " tokens"]
) -> Bool[Tensor, "sets tokens"]:
    """The tokens of sets of words, with the marks in each."""
    return word_sets[:, word_of_token.clamp(min=0)] | (word_of_token < 0)


def words_of_tokens(tokenizer: Any, text: str, tokens: int) -> tuple[list[str], Int[Tensor, " tokens"]]:
    """The words of a text as written, and which of them each of its first `tokens` tokens is a piece of (-1: a mark).

    Tokens as `tokenize` gives them: a text that was cut ends with its end mark.
    """
    encoded = tokenizer(text, truncation=True, max_length=tokens, split_special_tokens=True)
    numbers = [-1 if word is None else word for word in encoded.word_ids()]
    words = ["" for _ in range(max(numbers, default=-1) + 1)]
    for token, word in enumerate(numbers):
        if word >= 0:
            words[word] += tokenizer.convert_tokens_to_string([encoded.tokens()[token]])
    return [word.strip() for word in words], torch.tensor(numbers)
