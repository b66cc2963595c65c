"""How true an explanation is: what happens to the score as players go, or come, in the order that it gives.

An explanation orders the players of a match, the most important first. With v the score of a set of players,

    deletion  = mean over k = 1 .. n - 1 of  v(all) - v(all but the first k)        how fast the score falls
    insertion = mean over k = 1 .. n - 1 of  v(the first k) - v(none)               how fast it is there again

are the areas between the two curves and their level ends (Petsiuk, Das, Saenko 2018, "RISE"). How large they can be
depends on the match, so an area is read beside that of the best order, which the scores of all sets tell.
Scores come as a vector over sets: bit i of a row's number says that player i is in it.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Areas(NamedTuple):
    """The two areas, in units of the score."""

    deletion: float
    """Area above the curve as players go."""
    insertion: float
    """Area under the curve as players come."""


def areas(scores: Float[Tensor, " sets"], order: Int[Tensor, " players"]) -> Areas:
    """The areas of one order, the most important player first. Two players or more."""
    come = (1 << order[:-1]).cumsum(0)
    everyone = len(scores) - 1
    fallen = scores[everyone] - scores[everyone - come]
    return Areas(float(fallen.mean()), float((scores[come] - scores[0]).mean()))


def best_areas(scores: Float[Tensor, " sets"]) -> Areas:
    """The largest deletion and the largest insertion that any order has (seldom the same one has both).

    An order is a path through the sets, one player more at each step, and an area a sum along it: the best path to each
    set is known from those to the sets with one player less, 2^n n steps in place of n! orders.
    """
    players = len(scores).bit_length() - 1
    everyone = len(scores) - 1
    come = scores - scores[0]
    gone = scores[everyone] - scores.flip(0)  # by the set that is gone
    return Areas(*(float(_best_path(gain, players)) / (players - 1) for gain in (gone, come)))


def _best_path(gain: Float[Tensor, " sets"], players: int) -> Float[Tensor, ""]:
    """The largest sum of gains over a path from none to all, without its two ends."""
    best = torch.full_like(gain, -torch.inf)
    best[0] = 0.0
    sets = torch.arange(len(gain))
    size = sum((sets >> i) & 1 for i in range(players))
    for step in range(1, players + 1):
        now = sets[size == step]
        for i in range(players):
            holds = now[(now >> i) & 1 == 1]
            best[holds] = torch.maximum(best[holds], best[holds - (1 << i)])
        if step < players:
            best[now] += gain[now]
    return best[-1]


def random_areas(scores: Float[Tensor, " sets"]) -> Areas:
    """The areas' means over all orders: what a random explanation has."""
    players = len(scores).bit_length() - 1
    sets = torch.arange(len(scores))
    size = sum((sets >> i) & 1 for i in range(players))
    of_size = torch.stack([scores[size == k].mean() for k in range(1, players)])
    return Areas(float(scores[-1] - of_size.mean()), float(of_size.mean() - scores[0]))
