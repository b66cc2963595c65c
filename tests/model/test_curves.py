"""Areas under deletion and insertion curves against every order, one by one."""

from itertools import permutations

import pytest
import torch

from hbi.model.curves import areas, best_areas, random_areas


def of_order(scores: dict[frozenset[int], float], order: tuple[int, ...]) -> tuple[float, float]:
    """The definition: players go one by one, or come one by one."""
    everyone, nobody = frozenset(order), frozenset()
    fallen = [scores[everyone] - scores[everyone - set(order[:k])] for k in range(1, len(order))]
    risen = [scores[frozenset(order[:k])] - scores[nobody] for k in range(1, len(order))]
    return sum(fallen) / len(fallen), sum(risen) / len(risen)


@pytest.mark.parametrize("players", [2, 3, 5])
def test_areas_are_those_of_the_definition(players: int) -> None:
    scores = torch.randn(2**players, generator=torch.Generator().manual_seed(players), dtype=torch.float64)
    by_set = {
        frozenset(i for i in range(players) if number >> i & 1): float(score)
        for number, score in enumerate(scores)
    }
    every = {order: of_order(by_set, order) for order in permutations(range(players))}
    for order, expected in every.items():
        assert areas(scores, torch.tensor(order)) == pytest.approx(expected)
    assert best_areas(scores) == pytest.approx(
        tuple(max(each[side] for each in every.values()) for side in (0, 1))
    )
    means = tuple(sum(each[side] for each in every.values()) / len(every) for side in (0, 1))
    assert random_areas(scores) == pytest.approx(means)


def test_in_a_game_of_independent_players_the_order_of_their_worth_is_the_best() -> None:
    worth = torch.tensor([0.1, 0.7, 0.2, 0.4])
    sets = (torch.arange(16)[:, None] >> torch.arange(4)) & 1
    scores = (sets * worth).sum(1)
    assert areas(scores, worth.argsort(descending=True)) == pytest.approx(best_areas(scores))
    assert areas(scores, worth.argsort()).deletion < random_areas(scores).deletion
