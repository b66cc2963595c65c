"""The value of each word and frame against its definition."""

from itertools import chain, combinations

import pytest
import torch
from torch import Tensor

from hbi.model.values import enumerated_values, exact_values


def a_game(seed: int, words: int, frames: int, spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    similarity = torch.rand(words, frames, generator=generator, dtype=torch.float64) * 1.2 - 0.2
    logits = [spread * torch.randn(n, generator=generator, dtype=torch.float64) for n in (words, frames)]
    return similarity, logits[0], logits[1]


def subsets(players: list[int]) -> list[tuple[int, ...]]:
    return list(chain.from_iterable(combinations(players, n) for n in range(len(players) + 1)))


def reference(similarity: Tensor, word_logits: Tensor, frame_logits: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of phi(C + i) - phi(C) over all coalitions, with phi as it is written."""
    n, m = similarity.shape

    def phi(words: tuple[int, ...], frames: tuple[int, ...]) -> float:
        if not words or not frames:
            return 0.0
        p, q = word_logits[list(words)].softmax(0), frame_logits[list(frames)].softmax(0)
        of_words = sum(p[k] * max(similarity[t, v] for v in frames) for k, t in enumerate(words))
        of_frames = sum(q[k] * max(similarity[t, v] for t in words) for k, v in enumerate(frames))
        return float((of_words + of_frames) / 2)

    def mean(gains: list[float]) -> float:
        return sum(gains) / len(gains)

    every_word, every_frame = list(range(n)), list(range(m))
    of_words = [
        mean(
            [
                phi((*t, i), v) - phi(t, v)
                for t in subsets([k for k in every_word if k != i])
                for v in subsets(every_frame)
            ]
        )
        for i in every_word
    ]
    of_frames = [
        mean(
            [
                phi(t, (*v, j)) - phi(t, v)
                for v in subsets([k for k in every_frame if k != j])
                for t in subsets(every_word)
            ]
        )
        for j in every_frame
    ]
    return torch.tensor(of_words, dtype=torch.float64), torch.tensor(of_frames, dtype=torch.float64)


@pytest.mark.parametrize("words, frames", [(1, 1), (1, 4), (3, 2), (4, 3)])
def test_both_ways_agree_with_the_definition(words: int, frames: int) -> None:
    game = a_game(words + frames, words, frames)
    truth = reference(*game)
    enumerated = enumerated_values(*game)
    exact = exact_values(*(part[None] for part in game))
    for side in (0, 1):
        torch.testing.assert_close(enumerated[side], truth[side], rtol=0, atol=1e-12)
        torch.testing.assert_close(exact[side][0], truth[side], rtol=0, atol=1e-9)


@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0, 20.0])
def test_it_holds_for_logits_near_and_far(spread: float) -> None:
    for seed in range(5):
        game = a_game(seed, 5, 4, spread)
        exact = exact_values(*(part[None] for part in game))
        for mine, truth in zip(exact, enumerated_values(*game), strict=True):
            torch.testing.assert_close(mine[0], truth, rtol=0, atol=1e-8)


def test_padding_is_no_player() -> None:
    similarity, word_logits, frame_logits = a_game(3, 4, 5)
    alone = exact_values(similarity[None, :3, :4], word_logits[None, :3], frame_logits[None, :4])
    word_mask, frame_mask = torch.arange(4)[None] < 3, torch.arange(5)[None] < 4
    padded = exact_values(similarity[None], word_logits[None], frame_logits[None], word_mask, frame_mask)
    torch.testing.assert_close(padded[0], torch.cat([alone[0], torch.zeros(1, 1)], 1).double())
    torch.testing.assert_close(padded[1], torch.cat([alone[1], torch.zeros(1, 1)], 1).double())
    nobody = exact_values(
        similarity[None], word_logits[None], frame_logits[None], word_mask & False, frame_mask
    )
    assert not nobody[0].any() and not nobody[1].any()


def test_words_and_frames_exchange_with_the_sides() -> None:
    similarity, word_logits, frame_logits = a_game(5, 4, 3)
    one = exact_values(similarity[None], word_logits[None], frame_logits[None])
    other = exact_values(similarity.T[None], frame_logits[None], word_logits[None])
    torch.testing.assert_close(one[0], other[1])
    torch.testing.assert_close(one[1], other[0])
