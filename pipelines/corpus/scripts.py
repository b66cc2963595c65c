"""Scripts: which entity does what, in families whose members differ in one word or in the order of two clauses."""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np

Kind = Literal["stories", "moments"]
"""`stories`: one to three clauses about one or two things, which mostly stay in view. `moments`: three or four clauses,
each about a thing of its own that is in view while its clause plays and at no other time."""

FAMILY = 4
"""Scripts of a family: the first, and three that are nearly like it."""

COLOURS = {
    "red": (214, 40, 40),
    "green": (56, 158, 60),
    "blue": (40, 84, 210),
    "yellow": (244, 208, 38),
    "purple": (136, 46, 170),
    "orange": (244, 128, 22),
    "white": (246, 246, 246),
    "black": (16, 16, 16),
}
SHAPES = {  # corners as (angle in turns, radius)
    "circle": [(i / 24, 1.0) for i in range(24)],
    "square": [(1 / 8 + i / 4, 1.15) for i in range(4)],
    "triangle": [(-1 / 4 + i / 3, 1.2) for i in range(3)],
    "star": [(-1 / 4 + i / 10, 1.25 if i % 2 == 0 else 0.5) for i in range(10)],
    "cross": [(i / 4 + a, r) for i in range(4) for a, r in ((-0.05, 1.15), (0.05, 1.15), (1 / 8, 0.5))],
    "bar": [(0.06, 1.3), (0.44, 1.3), (0.56, 1.3), (0.94, 1.3)],
}
ACTIONS = {  # the verb of the first caption, and how others say it
    "moves left": "goes to the left",
    "moves right": "goes to the right",
    "moves up": "rises",
    "moves down": "sinks",
    "grows": "gets bigger",
    "shrinks": "gets smaller",
    "turns": "spins",
    "appears": "shows up",
    "vanishes": "goes away",
}


@dataclass(frozen=True)
class Entity:
    """A coloured shape."""

    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Clause:
    """One entity does one action."""

    entity: Entity
    action: str


Script = tuple[Clause, ...]


def make_scripts(clips: int, seed: int, kind: Kind = "stories") -> list[Script]:
    """One script a clip, all different, in families of four.

    Of a family of stories, three differ from the first in one word or in the order of two clauses; of moments, in the
    order of two clauses or in a word that two clauses have exchanged, so that all four are told with the same words.
    """
    rng = np.random.default_rng([seed, 1])
    new, near = (_script, _sibling) if kind == "stories" else (_moments, _exchanged)
    seen: set[Script] = set()
    scripts: list[Script] = []
    while len(scripts) < clips:
        first = new(rng)
        family = [first]
        for _ in range(64):
            if len(family) == FAMILY:
                break
            sibling = near(rng, first)
            if can_be_seen(sibling) and sibling not in family and sibling not in seen:
                family.append(sibling)
        if first not in seen and len(family) == FAMILY:
            seen.update(family)
            scripts.extend(family)
    return scripts[:clips]


def _script(rng: np.random.Generator) -> Script:
    """A script of one to three clauses about one or two entities."""
    while True:
        entities = [_entity(rng) for _ in range(2)]
        length = int(rng.choice([1, 2, 3], p=[0.2, 0.45, 0.35]))
        script = tuple(
            Clause(entities[int(rng.integers(2))], str(rng.choice(list(ACTIONS)))) for _ in range(length)
        )
        if can_be_seen(script):
            return script


def _entity(rng: np.random.Generator) -> Entity:
    return Entity(str(rng.choice(list(COLOURS))), str(rng.choice(list(SHAPES))))


def _sibling(rng: np.random.Generator, script: Script) -> Script:
    """The same script with one word changed throughout, or with two clauses exchanged."""
    which = int(rng.integers(len(script)))
    clause = script[which]
    match int(rng.integers(4)):
        case 0:
            entity = replace(clause.entity, colour=str(rng.choice(list(COLOURS))))
        case 1:
            entity = replace(clause.entity, shape=str(rng.choice(list(SHAPES))))
        case 2:
            changed = replace(clause, action=str(rng.choice(list(ACTIONS))))
            return (*script[:which], changed, *script[which + 1 :])
        case _:
            other = int(rng.integers(len(script)))
            swapped = list(script)
            swapped[which], swapped[other] = swapped[other], swapped[which]
            return tuple(swapped)
    return tuple(replace(c, entity=entity) if c.entity == clause.entity else c for c in script)


def _moments(rng: np.random.Generator) -> Script:
    """Three or four clauses, each of another thing."""
    while True:
        clauses = [
            Clause(_entity(rng), str(rng.choice(list(ACTIONS)))) for _ in range(int(rng.integers(3, 5)))
        ]
        if can_be_seen(tuple(clauses)) and len({clause.entity for clause in clauses}) == len(clauses):
            return tuple(clauses)


def _exchanged(rng: np.random.Generator, script: Script) -> Script:
    """The same words: two clauses, or the colours, the shapes or the actions of two, exchanged.

    Where that would make two things alike, the script as it is.
    """
    one, other = rng.choice(len(script), 2, replace=False).tolist()
    first, second = script[one], script[other]
    mine, theirs = first.entity, second.entity
    match int(rng.integers(4)):
        case 0:
            pair = (
                Clause(replace(mine, colour=theirs.colour), first.action),
                Clause(replace(theirs, colour=mine.colour), second.action),
            )
        case 1:
            pair = (
                Clause(replace(mine, shape=theirs.shape), first.action),
                Clause(replace(theirs, shape=mine.shape), second.action),
            )
        case 2:
            pair = Clause(mine, second.action), Clause(theirs, first.action)
        case _:
            pair = second, first
    clauses = list(script)
    clauses[one], clauses[other] = pair
    alike = len({clause.entity for clause in clauses}) < len(clauses)
    return script if alike else tuple(clauses)


def can_be_seen(script: Script) -> bool:
    """Whether the script can be seen: an action shows, and nothing acts before it appears or after it vanished."""
    for entity in {c.entity for c in script}:
        actions = [c.action for c in script if c.entity == entity]
        if "appears" in actions[1:] or "vanishes" in actions[:-1]:
            return False
    unseen = any(c.entity.shape == "circle" and c.action == "turns" for c in script)
    return not unseen and all(one != two for one, two in pairwise(script))
