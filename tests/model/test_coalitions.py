"""The game on what goes in, against its definition with one coalition at a time."""

from itertools import combinations

import pytest
import torch
from torch import Tensor

from hbi.model import coalitions as module
from hbi.model.coalitions import (
    FRAME_PRESENCE,
    WORD_PRESENCE,
    coalition_scores,
    coalitions,
    importance,
    tokens_of,
    words_of_tokens,
)
from hbi.model.hbi import HBI
from hbi.model.tokenizer import tokenize, train_tokenizer
from tests.support.training_shards import tiny_model

IDS = torch.tensor([1, 40, 41, 42, 2])
WORDS = torch.tensor([-1, 0, 0, 1, -1])
"""Two words, the first of two pieces, between the marks."""


@pytest.fixture(scope="module")
def model() -> HBI:
    torch.manual_seed(1)
    return HBI(tiny_model()).eval()


@pytest.fixture(scope="module")
def frames(model: HBI) -> Tensor:
    size = model.config.towers.image_size
    video = torch.rand(1, 3, 3, size, size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return model.encode_frames(video)[0]


@torch.no_grad()
def score(model: HBI, frames: Tensor, words: tuple[int, ...], seen: tuple[int, ...]) -> float:
    """One coalition: the text without its other words, the clip without its other frames."""
    if not seen:
        return 0.0
    text_mask = torch.tensor([[word < 0 or word in words for word in WORDS.tolist()]])
    video_mask = torch.tensor([[j in seen for j in range(len(frames))]])
    text = model.text_levels(model.encode_text(IDS[None], text_mask)[0], text_mask)["entity"]
    video = model.video_levels(model.over_time(frames[None], video_mask), video_mask)["entity"]
    return float(model.similarity(text, video))


def subsets(players: range, without: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
    left = [i for i in players if i not in without]
    return [chosen for size in range(len(left) + 1) for chosen in combinations(left, size)]


def chance(size: int, others: int, presence: float) -> float:
    return presence**size * (1 - presence) ** (others - size)


def test_values_and_interactions_are_those_of_the_definition(model: HBI, frames: Tensor) -> None:
    found = importance(model, IDS, WORDS, frames)
    words, seen = range(2), range(3)
    every_word, every_frame = tuple(words), tuple(seen)
    for i in words:
        value = sum(
            chance(len(t), 1, WORD_PRESENCE)
            * (score(model, frames, (*t, i), every_frame) - score(model, frames, t, every_frame))
            for t in subsets(words, (i,))
        )
        assert float(found.words[i]) == pytest.approx(value, abs=1e-5)
    for j in seen:
        value = sum(
            chance(len(v), 2, FRAME_PRESENCE)
            * (score(model, frames, every_word, (*v, j)) - score(model, frames, every_word, v))
            for v in subsets(seen, (j,))
        )
        assert float(found.frames[j]) == pytest.approx(value, abs=1e-5)
        for i in words:
            both = sum(
                chance(len(t), 1, WORD_PRESENCE)
                * chance(len(v), 2, FRAME_PRESENCE)
                * (
                    score(model, frames, (*t, i), (*v, j))
                    + score(model, frames, t, v)
                    - score(model, frames, (*t, i), v)
                    - score(model, frames, t, (*v, j))
                )
                for t in subsets(words, (i,))
                for v in subsets(seen, (j,))
            )
            assert float(found.interaction[i, j]) == pytest.approx(both, abs=1e-5)
    assert found.score == pytest.approx(score(model, frames, every_word, every_frame), abs=1e-6)


def test_a_sample_gives_the_values_of_the_model(
    model: HBI, frames: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = importance(model, IDS, WORDS, frames)
    monkeypatch.setattr(module, "coalitions", module.sampled_coalitions)
    estimate = importance(model, IDS, WORDS, frames, most=1_500)
    for mine, truth in zip(estimate[:3], exact[:3], strict=True):
        torch.testing.assert_close(mine, truth, rtol=0, atol=0.02)


@pytest.mark.parametrize("presence", [WORD_PRESENCE, FRAME_PRESENCE])
def test_of_many_players_a_sample_estimates(presence: float) -> None:
    """A game of 20 players: what each brings alone, exactly; with pairs, within a twentieth of the mean value."""
    generator = torch.Generator().manual_seed(3)
    alone = torch.rand(20, generator=generator, dtype=torch.float64)
    pairs = 0.05 * torch.randn(20, 20, generator=generator, dtype=torch.float64).triu(1)
    sample = coalitions(20, presence)
    there = sample.sets.double()
    straight = 5 + there @ alone
    torch.testing.assert_close(sample.contrasts().T @ straight, alone)
    bent = straight + torch.einsum("si,ij,sj->s", there, pairs, there)
    values = alone + presence * (pairs + pairs.T).sum(1)
    error = (sample.contrasts().T @ bent - values).abs()
    assert float(error.max()) < 0.05 * float(values.abs().mean())


def test_coalitions_come_with_their_chances() -> None:
    every = coalitions(3, 0.25)
    assert float(every.weights.sum()) == pytest.approx(1) and bool(every.sets[-1].all())
    assert float(every.weights @ every.sets.double()[:, 0]) == pytest.approx(0.25)
    sampled = coalitions(20, 0.25)
    assert bool(sampled.sets[-1].all()) and float(sampled.weights.sum()) == pytest.approx(1)
    assert torch.equal(sampled.sets, coalitions(20, 0.25).sets)


def test_marks_stay_and_pieces_go_together() -> None:
    tokens = tokens_of(torch.tensor([[True, False], [False, True]]), WORDS)
    assert tokens.tolist() == [[True, True, True, False, True], [True, False, False, True, True]]


def test_words_are_those_that_were_written() -> None:
    tokenizer = train_tokenizer(["red square"], 270)
    words, numbers = words_of_tokens(tokenizer, "a red quark", 32)
    assert words == ["a", "red", "quark"]
    _, mask = tokenize(tokenizer, ["a red quark"], 32)
    assert len(numbers) == int(mask.sum()) and numbers[0] == -1 == numbers[-1]
    cut, numbers = words_of_tokens(tokenizer, "a red quark", 4)
    assert len(numbers) == 4 and numbers[-1] == -1 and cut[0] == "a"


def test_a_clip_of_no_frame_scores_nothing(model: HBI, frames: Tensor) -> None:
    nobody = torch.zeros(1, 3, dtype=torch.bool)
    assert not coalition_scores(model, IDS, torch.ones(1, 5, dtype=torch.bool), frames, nobody).any()
