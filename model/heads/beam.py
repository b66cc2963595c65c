"""Writing word by word: greedy, and by beam search with length normalisation.

A caption of words w_1 ... w_n, the end token included, scores sum_i log p(w_i | before) / n^length_power. The search
keeps `beam` captions a video, open or ended: in each step the best continuations of the open ones fill the places that
no ended one holds, and one that ends keeps its place. So a beam of 1 is the greedy choice, and a beam that holds
everything is full enumeration. A video's search is over when no open caption can still beat its best ended one.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hbi.model.config import DecodeSettings


class Marks(NamedTuple):
    """Tokens that are no words."""

    start: int
    """What every caption begins with."""
    end: int
    """What ends it; never the first word."""
    never: tuple[int, ...] = ()
    """What is never written, beside the start."""


@runtime_checkable
class NextWord(Protocol):
    """What a search writes with; `CachedDecoder` is one."""

    def next(self, tokens: Int[Tensor, " rows"]) -> Float[Tensor, "rows vocabulary"]:
        """Log probabilities of the word after the latest of each row."""
        ...

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Goes on with these rows."""
        ...


class Written(NamedTuple):
    """Captions as they were written."""

    ids: list[list[int]]
    """Without start and end."""
    scores: list[float]
    """Length-normalised log probabilities."""


def write(
    decoder: NextWord, videos: int, marks: Marks, settings: DecodeSettings, device: torch.device | None = None
) -> Written:
    """A caption for each video: greedily with a beam of 1, else by beam search."""
    if not videos:
        return Written([], [])
    search = greedy if settings.beam == 1 else beam_search
    return search(decoder, videos, marks, settings, device)


def _allowed(log_shares: Tensor, marks: Marks, first: bool) -> Tensor:
    forbidden = [marks.start, *marks.never, *([marks.end] if first else [])]
    return log_shares.index_fill(-1, torch.tensor(forbidden, device=log_shares.device), -torch.inf)


def _unrepeated(
    log_shares: Float[Tensor, "rows vocabulary"], written: Int[Tensor, "rows step"], run: int
) -> Float[Tensor, "rows vocabulary"]:
    """Without the words that would end a run of so many tokens which the row has already."""
    if not run or written.shape[1] < run:
        return log_shares
    runs = written.unfold(1, run, 1)
    again = (runs[:, :, :-1] == written[:, None, written.shape[1] - run + 1 :]).all(-1)
    rows, places = again.nonzero(as_tuple=True)
    log_shares = log_shares.clone()
    log_shares[rows, runs[rows, places, -1]] = -torch.inf
    return log_shares


def greedy(
    decoder: NextWord, videos: int, marks: Marks, settings: DecodeSettings, device: torch.device | None = None
) -> Written:
    """The likeliest word, again and again, until the end token or the most words."""
    tokens = torch.full((videos,), marks.start, device=device)
    ended = torch.zeros(videos, dtype=torch.bool, device=device)
    total = torch.zeros(videos, device=device)
    length = torch.zeros(videos, device=device)
    columns: list[Tensor] = []
    for step in range(settings.words):
        log_shares = _allowed(decoder.next(tokens), marks, step == 0)
        if columns:
            log_shares = _unrepeated(log_shares, torch.stack(columns, 1), settings.no_repeat)
        best = log_shares.max(-1)
        tokens = best.indices.masked_fill(ended, marks.end)
        total = total + best.values.masked_fill(ended, 0.0)
        length = length + ~ended
        columns.append(tokens)
        ended = ended | (tokens == marks.end)
        if ended.all():
            break
    scores = total / length.pow(settings.length_power)
    return Written(_words(torch.stack(columns, 1).tolist(), marks.end), scores.tolist())


def beam_search(
    decoder: NextWord, videos: int, marks: Marks, settings: DecodeSettings, device: torch.device | None = None
) -> Written:
    """The best of the captions that the search ends with, for each video; its neighbours have no say in it."""
    beam, power, most = settings.beam, settings.length_power, settings.words
    tokens = torch.full((videos * beam,), marks.start, device=device)
    written = torch.zeros(videos, beam, 0, dtype=torch.int64, device=device)
    # One caption a video to begin with: the other places are empty until there is something to fill them.
    open_scores = torch.full((videos, beam), -torch.inf, device=device)
    open_scores[:, 0] = 0.0
    best = torch.full((videos,), -torch.inf, device=device)
    best_words: list[list[int]] = [[] for _ in range(videos)]
    places = torch.full((videos, 1), beam, device=device)
    first_row = torch.arange(videos, device=device)[:, None] * beam
    for step in range(1, most + 1):
        log_shares = _allowed(decoder.next(tokens), marks, step == 1)
        log_shares = _unrepeated(log_shares, written.flatten(0, 1), settings.no_repeat)
        log_shares = log_shares.unflatten(0, (videos, beam))
        scores, words, parents = _best(open_scores[:, :, None] + log_shares, beam, places)
        written = torch.cat(
            [written.gather(1, parents[:, :, None].expand(-1, -1, step - 1)), words[:, :, None]], 2
        )
        ends = ((words == marks.end) | (step == most)) & scores.isfinite()
        final = (scores / step**power).masked_fill(~ends, -torch.inf)
        top = final.max(-1)
        for video in (top.values > best).nonzero()[:, 0].tolist():
            best_words[video] = written[video, int(top.indices[video])].tolist()
        best = torch.maximum(best, top.values)
        places = places - ends.sum(-1, keepdim=True)
        # Log probabilities only fall: the best that an open caption can still become is its sum at full length.
        hopeless = scores / most**power <= best[:, None]
        open_scores = scores.masked_fill(ends | hopeless, -torch.inf)
        if not open_scores.isfinite().any():
            break
        decoder.keep((first_row + parents).flatten())
        tokens = words.flatten()
    return Written(_words(best_words, marks.end), best.tolist())


def _best(
    scores: Float[Tensor, "videos beam vocabulary"], beam: int, places: Int[Tensor, "videos 1"]
) -> tuple[Float[Tensor, "videos beam"], Int[Tensor, "videos beam"], Int[Tensor, "videos beam"]]:
    """The best continuations, as many as there are places, with their word and the caption that they continue."""
    vocabulary = scores.shape[2]
    flat = scores.flatten(1)
    top = flat.topk(min(beam, flat.shape[1]), dim=-1)
    values, indices = top.values, top.indices
    if (missing := beam - values.shape[1]) > 0:  # a beam wider than all the words there are
        values = torch.nn.functional.pad(values, (0, missing), value=-torch.inf)
        indices = torch.nn.functional.pad(indices, (0, missing))
    held: Bool[Tensor, "videos beam"] = torch.arange(beam, device=flat.device) >= places
    return values.masked_fill(held, -torch.inf), indices % vocabulary, indices // vocabulary


def _words(rows: Sequence[list[int]], end: int) -> list[list[int]]:
    return [row[: row.index(end)] if end in row else row for row in rows]
