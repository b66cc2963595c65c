"""What of a sentence holds in a clip."""

import pytest

from hbi.pipelines.corpus.scripts import Clause, Entity, Script
from hbi.pipelines.corpus.truth import told, verdict, words_that_hold


def script(*clauses: str) -> Script:
    """Of clauses such as "red square grows"."""
    parts = [clause.split(" ", 2) for clause in clauses]
    return tuple(Clause(Entity(colour, shape), action) for colour, shape, action in parts)


ASKED = script("red square moves left", "blue star grows")


@pytest.mark.parametrize(
    "answer, expected",
    [
        (ASKED, "right"),
        (script("red square moves left", "green star grows"), "but for one word"),
        (script("red square moves right", "blue star grows"), "but for one word"),
        (script("blue star grows", "red square moves left"), "wrong"),
        (script("red square moves left"), "wrong"),
        (script("red circle moves left", "green star grows"), "wrong"),
    ],
)
def test_an_answer_is_right_or_nearly_or_wrong(answer: Script, expected: str) -> None:
    assert verdict(ASKED, answer) == expected


def test_a_word_that_changes_throughout_is_one_word() -> None:
    asked = script("red square grows", "red square turns")
    assert verdict(asked, script("red cross grows", "red cross turns")) == "but for one word"
    assert verdict(asked, script("red cross grows", "red square turns")) == "but for one word"
    assert verdict(asked, script("red cross grows", "red star turns")) == "wrong"


def test_words_hold_in_the_order_that_suits_them_best() -> None:
    answer = script("white bar turns", "red square moves right", "blue star grows")
    assert words_that_hold(ASKED, answer) == [[True, True, False], [True, True, True]]
    assert told(ASKED, answer) == "the red square (moves left) then the blue star grows"


def test_a_clause_without_a_partner_does_not_hold() -> None:
    answer = script("blue star grows")
    assert words_that_hold(ASKED, answer) == [[False] * 3, [True] * 3]
    assert told(ASKED, answer) == "the (red) (square) (moves left) then the blue star grows"
