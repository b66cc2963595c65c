"""Words and scores of captions against what the reference (pycocoevalcap 1.2 with its Java) gave."""

import json
import os
from itertools import combinations
from pathlib import Path

import pytest

from hbi.model import penn_treebank
from hbi.model.caption_metrics import caption_metrics, caption_words

VECTORS = json.loads((Path(__file__).parents[1] / "data" / "captions.json").read_text())
RIDER = "a man is riding a horse"
SNOW = "two dogs play in the snow"
ONION = "a woman slices an onion now"


@pytest.mark.parametrize(("line", "words"), VECTORS["words"], ids=range(len(VECTORS["words"])))
def test_words_are_the_reference_tokenizers(line: str, words: str) -> None:
    assert " ".join(caption_words(line)) == words


@pytest.mark.parametrize("case", VECTORS["scores"], ids=range(len(VECTORS["scores"])))
def test_scores_are_the_references(case: dict) -> None:
    scores = caption_metrics(case["references"], case["captions"])
    assert scores == pytest.approx(case["scores"], abs=1e-12)


def test_more_vectors_where_they_are() -> None:
    folder = Path(os.environ.get("HBI_CAPTIONS", Path(__file__).parents[3] / "shared" / "captions"))
    if not (folder / "caption_vectors.json").exists():
        pytest.skip(f"needs caption vectors: set HBI_CAPTIONS to their folder (looked in {folder})")
    for case in json.loads((folder / "ptb_vectors.json").read_text()):
        assert " ".join(caption_words(case["raw"])) == case["ptb"]
    case = json.loads((folder / "caption_vectors.json").read_text())
    scores = caption_metrics(case["raw_refs"], case["raw_hyp"])
    expected = {f"BLEU@{n}": value for n, value in enumerate(case["BLEU"], start=1)}
    expected |= {"ROUGE-L": case["ROUGE_L"], "CIDEr": case["CIDEr"]}
    assert scores == pytest.approx(expected, abs=1e-9)


def test_plain_lines_take_a_short_way_to_the_same_words(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        RIDER,
        f"{RIDER} .",
        f"{SNOW}.",
        "I gotta go",
        "Mr.",
        "a man at St.",
        "plan b.",
        "A man. A dog",
        "x",
    ]
    short = [caption_words(line) for line in lines]
    monkeypatch.setattr(penn_treebank, "PLAIN", penn_treebank.regex.compile("(?!)"))
    assert [caption_words(line) for line in lines] == short


def test_a_line_without_words_has_none() -> None:
    assert [caption_words(line) for line in ("", "  ", "...", "? ! , .", "\n")] == [[]] * 5


def test_the_same_captions_score_the_most() -> None:
    captions = {"a": RIDER, "b": SNOW, "c": ONION}
    scores = caption_metrics({name: [line] for name, line in captions.items()}, captions)
    assert scores.pop("CIDEr") == pytest.approx(10)
    assert scores == pytest.approx({"BLEU@1": 1, "BLEU@2": 1, "BLEU@3": 1, "BLEU@4": 1, "ROUGE-L": 1})


def test_three_words_have_no_order_of_four_to_agree_in() -> None:
    captions = {"a": "a man rides", "b": "dogs in snow", "c": "onions being cut"}
    scores = caption_metrics({name: [line] for name, line in captions.items()}, captions)
    assert scores["CIDEr"] == pytest.approx(7.5)


def test_what_every_video_says_and_what_one_video_says_weighs_nothing() -> None:
    same = dict.fromkeys("abc", RIDER)
    assert caption_metrics({name: [RIDER] for name in same}, same)["CIDEr"] == 0
    assert caption_metrics({"a": [RIDER]}, {"a": RIDER})["CIDEr"] == 0


def test_rouge_counts_the_longest_common_subsequence() -> None:
    words, truth = ["the", "cat", "sat", "on", "a", "mat"], ["a", "cat", "on", "the", "red", "mat", "sat"]

    def common(left: list[str], right: list[str]) -> int:
        for n in range(len(left), 0, -1):
            if any(sub in combinations(right, n) for sub in combinations(left, n)):
                return n
        return 0

    precision, recall = common(words, truth) / len(words), common(words, truth) / len(truth)
    expected = (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)
    scores = caption_metrics({"a": [" ".join(truth)]}, {"a": " ".join(words)})
    assert scores["ROUGE-L"] == pytest.approx(expected)


def test_wrong_input_is_named() -> None:
    with pytest.raises(ValueError, match="no video"):
        caption_metrics({}, {})
    with pytest.raises(ValueError, match=r"captions: nothing for 'b' \(1 ids differ\)"):
        caption_metrics({"a": [RIDER], "b": [SNOW]}, {"a": RIDER})
    with pytest.raises(ValueError, match="references: nothing for 'b'"):
        caption_metrics({"a": [RIDER]}, {"a": RIDER, "b": SNOW})
    with pytest.raises(ValueError, match=r"'a' has \[\], must be a list of at least one caption"):
        caption_metrics({"a": []}, {"a": RIDER})
