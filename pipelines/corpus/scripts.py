"""Scripts: which entity does what, in families whose members differ in one word or in the order of two clauses."""

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

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


def make_scripts(clips: int, seed: int) -> list[Script]:
    """One script a clip, all different, in families of four that differ from their first in one word or in order."""
    rng = np.random.default_rng([seed, 1])
    seen: set[Script] = set()
    scripts: list[Script] = []
    while len(scripts) < clips:
        first = _script(rng)
        family = [first]
        for _ in range(64):
            if len(family) == FAMILY:
                break
            sibling = _sibling(rng, first)
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


def can_be_seen(script: Script) -> bool:
    """Whether the script can be seen: an action shows, and nothing acts before it appears or after it vanished."""
    for entity in {c.entity for c in script}:
        actions = [c.action for c in script if c.entity == entity]
        if "appears" in actions[1:] or "vanishes" in actions[:-1]:
            return False
    unseen = any(c.entity.shape == "circle" and c.action == "turns" for c in script)
    return not unseen and all(one != two for one, two in pairwise(script))
