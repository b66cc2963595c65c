"""Caption metrics that agree with the reference (pycocoevalcap 1.2) without its Java: BLEU, ROUGE-L, CIDEr.

BLEU (Papineni et al., ACL 2002): over the whole set, the closest reference's length. ROUGE-L (Lin, 2004): the largest
precision and the largest recall over the references, each by itself, beta 1.2. CIDEr (Vedantam et al., CVPR 2015): what
papers print is CIDEr-D with clipped counts and a Gaussian of the lengths (sigma 6, times 10), where the reference's
lengths are numbers of bigrams; document frequencies come from the references at hand, one count a video.
"""

from collections import Counter
from collections.abc import Sequence
from math import exp, log, prod, sqrt

from hbi.model.penn_treebank import caption_words

__all__ = ["caption_metrics", "caption_words"]

ORDERS = (1, 2, 3, 4)
"""Lengths of the n-grams of BLEU and CIDEr."""
BETA = 1.2
"""How much more ROUGE-L's recall counts than its precision."""
SIGMA = 6.0
"""Of CIDEr's Gaussian over the difference in length, in bigrams."""

Grams = Counter[tuple[str, ...]]


def caption_metrics(references: dict[str, list[str]], captions: dict[str, str]) -> dict[str, float]:
    """`BLEU@1` to `BLEU@4` and `ROUGE-L` in 0..1, `CIDEr` in 0..10 (identical captions: 10), over all videos.

    references: the captions of each video, by its id. captions: what is judged, one for each of those videos.
    Lines are raw; their words are those of `caption_words`. Of one video alone CIDEr is 0: nothing in it is rare.

    ValueError: no video, ids that differ between the two, a video without a reference.
    """
    _check(references, captions)
    words = {name: _joined(line) for name, line in captions.items()}
    truths = {name: [_joined(line) for line in lines] for name, lines in references.items()}
    pairs = [(words[name], truths[name]) for name in references]
    bleu = _bleu([(line.split(), [truth.split() for truth in lines]) for line, lines in pairs])
    # The reference splits here at plain spaces alone: a hard one inside a number or a tag is no border.
    rouge = [_rouge(line.split(" "), [truth.split(" ") for truth in lines]) for line, lines in pairs]
    cider = _cider(
        [(_grams(line.split()), [_grams(truth.split()) for truth in lines]) for line, lines in pairs]
    )
    return {**bleu, "ROUGE-L": _mean(rouge), "CIDEr": _mean(cider)}


def _check(references: dict[str, list[str]], captions: dict[str, str]) -> None:
    if not references:
        raise ValueError("references: no video to judge captions of")
    if odd := sorted(references.keys() ^ captions.keys()):
        where = "references" if odd[0] in captions else "captions"
        raise ValueError(
            f"{where}: nothing for {odd[0]!r} ({len(odd)} ids differ); give both the same videos"
        )
    for name, lines in references.items():
        if isinstance(lines, str) or not lines:
            raise ValueError(f"references: {name!r} has {lines!r}, must be a list of at least one caption")


def _joined(line: str) -> str:
    return " ".join(caption_words(line))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _grams(words: Sequence[str]) -> Grams:
    return Counter(tuple(words[i : i + n]) for n in ORDERS for i in range(len(words) - n + 1))


def _bleu(pairs: Sequence[tuple[list[str], list[list[str]]]]) -> dict[str, float]:
    small, tiny = 1e-9, 1e-15  # the reference's guards against dividing by nothing
    guessed, correct = Counter(), Counter()
    length = closest = 0
    for words, truths in pairs:
        most: Grams = Counter()
        for truth in truths:
            most |= _grams(truth)
        for gram, count in _grams(words).items():
            guessed[len(gram)] += count
            correct[len(gram)] += min(count, most[gram])
        length += len(words)
        closest += min((abs(len(truth) - len(words)), len(truth)) for truth in truths)[1]
    ratio = (length + tiny) / (closest + small)
    brevity = exp(1 - 1 / ratio) if ratio < 1 else 1.0
    precision = [(correct[n] + tiny) / (guessed[n] + small) for n in ORDERS]
    return {f"BLEU@{n}": brevity * prod(precision[:n]) ** (1 / n) for n in ORDERS}


def _rouge(words: list[str], truths: list[list[str]]) -> float:
    common = [_common_length(words, truth) for truth in truths]
    precision = max(common) / len(words)
    recall = max(length / len(truth) for length, truth in zip(common, truths, strict=True))
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _common_length(left: list[str], right: list[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(right) + 1)
    for word in left:
        diagonal = 0
        for i, other in enumerate(right, start=1):
            above = row[i]
            row[i] = diagonal + 1 if word == other else max(above, row[i - 1])
            diagonal = above
    return row[-1]


def _cider(videos: Sequence[tuple[Grams, list[Grams]]]) -> list[float]:
    documents = Counter(gram for _, truths in videos for gram in set().union(*truths))
    everything = log(len(videos))

    def weigh(grams: Grams) -> dict[tuple[str, ...], float]:
        return {gram: count * (everything - log(max(1, documents[gram]))) for gram, count in grams.items()}

    scores = []
    for grams, truths in videos:
        vector = weigh(grams)
        total = sum(_likeness(vector, weigh(truth), _bigrams(grams) - _bigrams(truth)) for truth in truths)
        scores.append(10 * total / len(truths))
    return scores


def _bigrams(grams: Grams) -> int:
    return sum(count for gram, count in grams.items() if len(gram) == 2)


def _likeness(
    vector: dict[tuple[str, ...], float], truth: dict[tuple[str, ...], float], longer: int
) -> float:
    """Mean over the orders of the clipped cosine, falling with the difference in length (in bigrams)."""
    total = 0.0
    for n in ORDERS:
        dot = sum(min(w, truth[g]) * truth[g] for g, w in vector.items() if len(g) == n and g in truth)
        norms = _norm(vector, n) * _norm(truth, n)
        total += dot / norms if norms else dot
    return total / len(ORDERS) * exp(-(longer**2) / (2 * SIGMA**2))


def _norm(vector: dict[tuple[str, ...], float], order: int) -> float:
    return sqrt(sum(weight**2 for gram, weight in vector.items() if len(gram) == order))
