"""What of one script holds in another clip: word by word, and how far an answer is from the right one."""

from itertools import combinations
from typing import Literal

from hbi.pipelines.corpus.scripts import Clause, Script

Verdict = Literal["right", "but for one word", "wrong"]


def verdict(asked: Script, answer: Script) -> Verdict:
    """Whether the clip that plays `answer` is the one that was asked for, or is but for one word.

    One word: a colour, a shape or an action is another one, wherever the script has it, and nothing else.
    """
    if asked == answer:
        return "right"
    if len(asked) != len(answer):
        return "wrong"
    changed = {
        (one, other)
        for mine, theirs in zip(asked, answer, strict=True)
        for one, other in zip(_words(mine), _words(theirs), strict=True)
        if one != other
    }
    return "but for one word" if len(changed) == 1 else "wrong"


def words_that_hold(asked: Script, answer: Script) -> list[list[bool]]:
    """For each clause that is asked for, whether its colour, its shape and its action hold in the clip.

    The clauses are laid beside those of the clip in order, so that as many words as possible hold; one that finds no
    partner does not hold at all.
    """
    shorter = min(len(asked), len(answer))
    best: list[list[bool]] = []
    for mine in combinations(range(len(asked)), shorter):
        for theirs in combinations(range(len(answer)), shorter):
            partner = dict(zip(mine, theirs, strict=True))
            held = [
                [one == other for one, other in zip(_words(clause), _words(answer[partner[i]]), strict=True)]
                if i in partner
                else [False] * 3
                for i, clause in enumerate(asked)
            ]
            if not best or sum(map(sum, held)) > sum(map(sum, best)):
                best = held
    return best


def told(asked: Script, answer: Script) -> str:
    """The asked script as a sentence, with (brackets) around what does not hold in the clip."""
    clauses = [
        "the "
        + " ".join(word if holds else f"({word})" for word, holds in zip(_words(clause), row, strict=True))
        for clause, row in zip(asked, words_that_hold(asked, answer), strict=True)
    ]
    return " then ".join(clauses)


def _words(clause: Clause) -> tuple[str, str, str]:
    return clause.entity.colour, clause.entity.shape, clause.action
