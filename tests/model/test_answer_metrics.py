"""Accuracy of answers, counted by hand."""

import pytest

from hbi.model.answer_metrics import answer_metrics, question_type

TRUTHS = ["red", "red", "man", "two", "blue", "man"]
ANSWERS = ["red", "blue", "man", "two", "blue", "dog"]
TYPES = ["what", "what", "who", "how", "what", "who"]


def test_accuracy_of_all_and_by_type() -> None:
    metrics = answer_metrics(TRUTHS, ANSWERS, TYPES)
    assert metrics["accuracy"] == pytest.approx(100 * 4 / 6)
    assert metrics["accuracy/what"] == pytest.approx(100 * 2 / 3)
    assert metrics["accuracy/who"] == 50
    assert metrics["accuracy/how"] == 100


def test_answers_outside_the_vocabulary_count_as_wrong_in_one_protocol_and_not_at_all_in_the_other() -> None:
    answers = ["red", "blue", "man", "red", "blue", "dog"]  # "two" cannot be given
    metrics = answer_metrics(TRUTHS, answers, TYPES, vocabulary={"red", "man", "blue", "dog"})
    assert metrics["accuracy"] == pytest.approx(100 * 3 / 6)
    assert metrics["accuracy_in_vocabulary"] == pytest.approx(100 * 3 / 5)
    assert metrics["in_vocabulary"] == pytest.approx(100 * 5 / 6)
    assert "accuracy_in_vocabulary" not in answer_metrics(TRUTHS, answers, TYPES, vocabulary=["cat"])


def test_the_baselines_are_the_most_common_answers_of_the_training_questions() -> None:
    training = [
        ("what", "blue"),
        ("what", "blue"),
        ("what", "red"),
        ("who", "man"),
        ("who", "boy"),
        ("where", "sea"),
    ]
    metrics = answer_metrics(TRUTHS, ANSWERS, TYPES, training=training)
    assert metrics["baseline"] == pytest.approx(100 * 1 / 6)  # always "blue"
    # what: blue; who: boy, the first of two; how: not seen in training, so blue again
    assert metrics["baseline_by_type"] == pytest.approx(100 * 1 / 6)
    assert (metrics["baseline/what"], metrics["baseline/who"], metrics["baseline/how"]) == pytest.approx(
        (100 / 3, 0, 0)
    )


def test_without_training_questions_the_baselines_are_as_high_as_they_can_be() -> None:
    metrics = answer_metrics(TRUTHS, ANSWERS, TYPES)
    assert metrics["baseline"] == pytest.approx(100 * 2 / 6)  # "man", before "red" in the alphabet
    assert metrics["baseline_by_type"] == pytest.approx(100 * 5 / 6)


def test_a_question_is_of_the_type_of_its_first_word() -> None:
    questions = [
        "What moves?",
        "who's there",
        "HOW many",
        "when",
        "where is it",
        "is it red?",
        "",
        "whatever",
    ]
    types = ["what", "who", "how", "when", "where", "other", "other", "other"]
    assert [question_type(question) for question in questions] == types


def test_wrong_input_is_named() -> None:
    with pytest.raises(ValueError, match="no question"):
        answer_metrics([], [], [])
    with pytest.raises(ValueError, match="2 truths, 1 answers, 2 types"):
        answer_metrics(["a", "b"], ["a"], ["what", "what"])
    with pytest.raises(ValueError, match="vocabulary: no answer"):
        answer_metrics(["a"], ["a"], ["what"], vocabulary=[])
