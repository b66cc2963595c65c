"""Accuracy of answers: of all questions and of those that could be answered, by type, beside what guessing scores.

An answer is right if it equals the truth as a string. Two protocols are in use and differ by some percent: all
questions, where an answer outside the vocabulary counts as wrong (ALPRO, FrozenBiLM), and in-vocabulary questions alone
(the published HBI). A type is a question's first word (Xu et al., "Video Question Answering via Gradually Refined
Attention over Appearance and Motion", ACM MM 2017) or whatever the dataset says.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence

TYPES = ("what", "who", "how", "when", "where")
"""First words that are a type of their own; the rest is `other`."""


def question_type(question: str) -> str:
    """What a question asks for, by its first word: one of `TYPES`, or `other`."""
    words = question.lower().replace("'", " ").split()
    return words[0] if words and words[0] in TYPES else "other"


def answer_metrics(
    truths: Sequence[str],
    answers: Sequence[str],
    types: Sequence[str],
    *,
    vocabulary: Collection[str] | None = None,
    training: Iterable[tuple[str, str]] | None = None,
) -> dict[str, float]:
    """Percent of questions answered rightly, by protocol and type, and what the most common answer scores.

    truths, answers, types: of each question, in one order. vocabulary: the answers that the model can give; none: all.
    training: (type, answer) of each training question, where the most common answers come from; none: the questions
    at hand, which makes the baseline as high as it can be.

    Returns `accuracy` (all questions), `accuracy_in_vocabulary` (left out where no truth is in the vocabulary),
    `accuracy/<type>`; `baseline` (always the one most common answer), `baseline_by_type` (always the most common answer
    of the question's type), `baseline/<type>`; `in_vocabulary`, the percent of questions whose
    truth the model can give.

    ValueError: no question, lists that differ in length, an empty vocabulary.
    """
    if not len(truths):
        raise ValueError("truths: no question to judge answers of")
    if len({len(truths), len(answers), len(types)}) > 1:
        raise ValueError(
            f"answers: {len(truths)} truths, {len(answers)} answers, {len(types)} types; must be as many of each"
        )
    if vocabulary is not None and not len(vocabulary):
        raise ValueError("vocabulary: no answer in it; build it from the training questions")
    right = [truth == answer for truth, answer in zip(truths, answers, strict=True)]
    known = [vocabulary is None or truth in vocabulary for truth in truths]
    metrics = {"accuracy": _percent(right), "in_vocabulary": _percent(known)}
    if any(known):
        metrics["accuracy_in_vocabulary"] = _percent([r for r, k in zip(right, known, strict=True) if k])

    common, common_of_type = _most_common(zip(types, truths, strict=True) if training is None else training)
    metrics["baseline"] = _percent([truth == common for truth in truths])
    guesses = [truth == common_of_type.get(kind, common) for kind, truth in zip(types, truths, strict=True)]
    metrics["baseline_by_type"] = _percent(guesses)

    for kind in sorted(set(types)):
        rows = [row for row, other in enumerate(types) if other == kind]
        metrics[f"accuracy/{kind}"] = _percent([right[row] for row in rows])
        metrics[f"baseline/{kind}"] = _percent([guesses[row] for row in rows])
    return metrics


def _most_common(pairs: Iterable[tuple[str, str]]) -> tuple[str | None, dict[str, str]]:
    """The most common answer of all and of each type; of equally common ones the first in the alphabet."""
    every: Counter[str] = Counter()
    by_type: dict[str, Counter[str]] = defaultdict(Counter)
    for kind, answer in pairs:
        every[answer] += 1
        by_type[kind][answer] += 1

    def first(counts: Counter[str]) -> str:
        return min(counts, key=lambda answer: (-counts[answer], answer))

    return (first(every) if every else None), {kind: first(counts) for kind, counts in by_type.items()}


def _percent(right: Sequence[bool]) -> float:
    return 100.0 * sum(right) / len(right)
