"""Writing word by word, against every sentence there is and against a search written with lists."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hbi.model.config import DecodeSettings
from hbi.model.heads.beam import Marks, beam_search, greedy, write

WORDS, LONGEST = 5, 4
MARKS = Marks(start=0, end=1)


class Table:
    """A language of five tokens: the shares of the next word depend on everything written so far, and on the video."""

    def __init__(self, videos: int, rows: int, seed: int = 0, sharpness: float = 2.0) -> None:
        self.seed, self.sharpness = seed, sharpness
        self.written: list[tuple[int, ...]] = [()] * (videos * rows)
        self.video = [row // rows for row in range(videos * rows)]

    def shares(self, video: int, before: tuple[int, ...]) -> Tensor:
        code = self.seed
        for token in (video, *before):
            code = (code * 31 + token + 7) % (2**31)
        generator = torch.Generator().manual_seed(code)
        return (self.sharpness * torch.randn(WORDS, generator=generator)).log_softmax(0)

    def next(self, tokens: Tensor) -> Tensor:
        self.written = [(*w, t) for w, t in zip(self.written, tokens.tolist(), strict=True)]
        return torch.stack([self.shares(v, w) for v, w in zip(self.video, self.written, strict=True)])

    def keep(self, rows: Tensor) -> None:
        self.written = [self.written[row] for row in rows.tolist()]
        self.video = [self.video[row] for row in rows.tolist()]


def score(table: Table, video: int, sentence: tuple[int, ...], power: float) -> float:
    total, before = 0.0, (MARKS.start,)
    for word in sentence:
        total += float(table.shares(video, before)[word])
        before = (*before, word)
    return total / len(sentence) ** power


def every_sentence() -> list[tuple[int, ...]]:
    """All that may be written: words 2, 3, 4, ended after one at least, or as long as can be."""
    sentences = []
    for n in range(1, LONGEST + 1):
        for words in itertools.product((2, 3, 4), repeat=n):
            if n < LONGEST:
                sentences.append((*words, MARKS.end))
            else:
                sentences.append(words)
    return [s for s in sentences if len(s) <= LONGEST]


def slow_search(table: Table, video: int, beam: int, power: float) -> tuple[tuple[int, ...], float]:
    """The rules of the search, with lists: ended captions hold their places."""
    still: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    ended: list[tuple[float, tuple[int, ...]]] = []
    for step in range(1, LONGEST + 1):
        longer = []
        for total, words in still:
            shares = table.shares(video, (MARKS.start, *words))
            longer += [
                (total + float(shares[word]), (*words, word))
                for word in range(WORDS)
                if word != MARKS.start and not (word == MARKS.end and step == 1)
            ]
        longer.sort(reverse=True)
        chosen = longer[: beam - len(ended)]
        ended += [(t / step**power, w) for t, w in chosen if w[-1] == MARKS.end or step == LONGEST]
        still = [(t, w) for t, w in chosen if w[-1] != MARKS.end]
        if not still:
            break
    best = max(ended)
    return best[1], best[0]


def without_end(sentence: tuple[int, ...]) -> list[int]:
    return [word for word in sentence if word != MARKS.end]


@pytest.mark.parametrize("power", [0.0, 0.7, 1.0])
def test_a_beam_that_holds_everything_is_full_enumeration(power: float) -> None:
    settings = DecodeSettings(beam=150, length_power=power, words=LONGEST)
    for seed in range(5):
        found = beam_search(Table(3, 150, seed), 3, MARKS, settings)
        for video in range(3):
            table = Table(3, 1, seed)
            best = max(every_sentence(), key=lambda s, v=video, t=table: score(t, v, s, power))
            assert found.ids[video] == without_end(best)
            assert found.scores[video] == pytest.approx(score(table, video, best, power), abs=1e-5)


@pytest.mark.parametrize("run", [1, 2])
def test_no_run_is_written_twice(run: int) -> None:
    def repeats(words: tuple[int, ...] | list[int]) -> bool:
        runs = [tuple(words[i : i + run]) for i in range(len(words) - run + 1)]
        return len(set(runs)) < len(runs)

    settings = DecodeSettings(beam=150, length_power=0.7, words=LONGEST, no_repeat=run)
    unlike = 0
    for seed in range(12):
        found = beam_search(Table(2, 150, seed), 2, MARKS, settings)
        free = beam_search(Table(2, 150, seed), 2, MARKS, replace(settings, no_repeat=0))
        unlike += found.ids != free.ids
        for video in range(2):
            table = Table(2, 1, seed)
            allowed = [sentence for sentence in every_sentence() if not repeats(sentence)]
            best = max(allowed, key=lambda s, v=video, t=table: score(t, v, s, 0.7))
            assert found.ids[video] == without_end(best)
        one = greedy(Table(2, 1, seed), 2, MARKS, settings)
        assert not any(map(repeats, one.ids))
        assert one.ids == beam_search(Table(2, 1, seed), 2, MARKS, replace(settings, beam=1)).ids
    assert unlike


@pytest.mark.parametrize("beam", [1, 2, 3, 4])
def test_a_narrow_beam_is_the_slow_search(beam: int) -> None:
    settings = DecodeSettings(beam=beam, length_power=0.7, words=LONGEST)
    for seed in range(20):
        found = beam_search(Table(2, beam, seed), 2, MARKS, settings)
        for video in range(2):
            words, total = slow_search(Table(2, 1, seed), video, beam, 0.7)
            assert found.scores[video] == pytest.approx(total, abs=1e-5)
            assert found.ids[video] == without_end(words)


def test_a_beam_of_one_is_greedy() -> None:
    settings = DecodeSettings(beam=1, words=LONGEST)
    for seed in range(20):
        chosen = greedy(Table(3, 1, seed), 3, MARKS, settings)
        searched = beam_search(Table(3, 1, seed), 3, MARKS, settings)
        assert chosen.ids == searched.ids
        assert chosen.scores == pytest.approx(searched.scores, abs=1e-5)
        assert write(Table(3, 1, seed), 3, MARKS, settings).ids == chosen.ids


def test_a_wider_beam_is_not_worse_on_the_whole_and_neighbours_have_no_say() -> None:
    totals = []
    for beam in (1, 4):
        settings = DecodeSettings(beam=beam, words=LONGEST)
        together = beam_search(Table(30, beam), 30, MARKS, settings)
        totals.append(sum(together.scores))
        alone = beam_search(Table(1, beam), 1, MARKS, settings)
        assert alone.ids[0] == together.ids[0] and math.isclose(
            alone.scores[0], together.scores[0], abs_tol=1e-6
        )
    assert totals[1] > totals[0]


def test_marks_are_never_written_and_a_caption_has_a_word() -> None:
    settings = DecodeSettings(beam=3, words=LONGEST)
    for seed in range(20):
        marks = Marks(0, 1, never=(4,))
        for found in (
            beam_search(Table(2, 3, seed), 2, marks, settings),
            greedy(Table(2, 1, seed), 2, marks, settings),
        ):
            assert all(1 <= len(ids) <= LONGEST and set(ids) <= {2, 3} for ids in found.ids)


def test_no_video_gives_no_caption() -> None:
    assert write(Table(0, 4), 0, MARKS, DecodeSettings()).ids == []


@pytest.mark.parametrize("values", [{"beam": 0}, {"words": 0}, {"length_power": -0.1}])
def test_settings_that_make_no_sense(values: dict) -> None:
    with pytest.raises(ValueError, match="DecodeSettings"):
        DecodeSettings(**values)
