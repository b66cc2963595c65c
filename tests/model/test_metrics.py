"""Retrieval metrics against every order of the gallery, counted one by one."""

from itertools import permutations

import numpy as np
import pytest
import torch

from hbi.model import metrics
from hbi.model.metrics import (
    column_log_sums,
    dual_softmax,
    querybank_hubs,
    querybank_norm,
    recall_curve,
    retrieval_metrics,
)


def ranked_by_hand(scores: np.ndarray, positive: np.ndarray) -> dict[str, float]:
    """Every order of the gallery, a stable sort of each, the best positive's place: means over the orders."""
    ranks, hits = [], {1: [], 5: []}
    for row, good in zip(scores, positive, strict=True):
        if not good.any():
            continue
        places = []
        for order in permutations(range(len(row))):
            ranked = sorted(order, key=lambda column: -row[column])
            places.append(1 + next(i for i, column in enumerate(ranked) if good[column]))
        ranks.append(np.mean(places))
        for k in hits:
            hits[k].append(np.mean([place <= k for place in places]))
    recalls = {f"R@{k}": 100 * float(np.mean(hits[k])) for k in hits}
    return recalls | {"MdR": float(np.median(ranks)), "MnR": float(np.mean(ranks))}


def best_caption_by_hand(scores: np.ndarray, video_of_text: np.ndarray) -> dict[str, float]:
    """The published way: of each gallery video the best of its captions, then videos against videos."""
    captioned = sorted(set(video_of_text.tolist()))
    best = np.array([[max(column[video_of_text == video]) for video in captioned] for column in scores.T])
    return ranked_by_hand(best, np.arange(scores.shape[1])[:, None] == np.array(captioned))


@pytest.mark.parametrize("seed", range(4))
def test_ties_equal_the_mean_over_all_orders(seed: int) -> None:
    generator = np.random.default_rng(seed)
    scores = generator.integers(0, 3, (7, 6)).astype(np.float32)  # three values: ties everywhere
    video_of_text = generator.integers(0, 6, 7)
    found = retrieval_metrics(torch.from_numpy(scores), video_of_text.tolist())
    positive = video_of_text[:, None] == np.arange(6)
    for way, by_hand in (
        ("t2v", ranked_by_hand(scores, positive)),
        ("v2t-single", ranked_by_hand(scores.T, positive.T)),
        ("v2t", best_caption_by_hand(scores, video_of_text)),
    ):
        for name, value in by_hand.items():
            assert found[f"{way}/{name}"] == pytest.approx(value, abs=1e-9), (way, name)


def test_distinct_scores_give_the_published_numbers() -> None:
    scores = torch.randn(200, 200, generator=torch.Generator().manual_seed(0))
    scores += 2 * torch.eye(200)
    found = retrieval_metrics(scores)
    for way, matrix in (("t2v", scores.numpy()), ("v2t", scores.numpy().T)):
        rank = 1 + (matrix > np.diag(matrix)[:, None]).sum(1)
        for k in (1, 5, 10, 50):
            assert found[f"{way}/R@{k}"] == pytest.approx(100 * (rank <= k).mean())
        assert found[f"{way}/MdR"] == np.median(rank)
        assert found[f"{way}/MnR"] == pytest.approx(rank.mean())


def test_a_constant_matrix_scores_chance() -> None:
    found = retrieval_metrics(torch.ones(100, 100))
    for way in ("t2v", "v2t"):
        for k in (1, 5, 10, 50):
            assert found[f"{way}/R@{k}"] == pytest.approx(k)
        assert found[f"{way}/MdR"] == found[f"{way}/MnR"] == pytest.approx(50.5)


def test_the_best_caption_of_a_video_counts() -> None:
    scores = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.1, 0.7]])  # texts 0 and 1 describe video 0
    found = retrieval_metrics(scores, [0, 0, 1])
    # Video 0 finds text 0 first; video 1 finds text 1 (another's) first, whose video has no better one for it.
    assert found["v2t-single/R@1"] == found["v2t/R@1"] == 50.0
    assert found["t2v/R@1"] == pytest.approx(100 * 2 / 3)
    # Two captions of one other video are two single captions before its own, but one video.
    scores = torch.tensor([[0.9, 0.8], [0.9, 0.8], [0.1, 0.7]])
    found = retrieval_metrics(scores, [0, 0, 1])
    assert (found["v2t-single/MnR"], found["v2t/MnR"]) == (2.0, 1.5)


def test_a_video_without_text_stays_in_the_gallery() -> None:
    scores = torch.tensor([[0.5, 0.1, 0.9], [0.1, 0.5, 0.2]])
    found = retrieval_metrics(scores, [0, 1])
    assert found["t2v/R@1"] == 50.0 and found["t2v/MnR"] == 1.5
    assert found["v2t/R@1"] == 100.0 and found["v2t/MnR"] == 1.0


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(31, 17, generator=generator).round(decimals=1)
    labels = torch.arange(31) % 17
    bank = torch.randn(9, 17, generator=generator)
    whole = retrieval_metrics(scores, labels, dsl_temperature=0.1, text_bank=bank)
    monkeypatch.setattr(metrics, "BLOCK", 40)
    assert retrieval_metrics(scores, labels, dsl_temperature=0.1, text_bank=bank) == pytest.approx(whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_type(dtype: torch.dtype) -> None:
    scores = torch.eye(4, dtype=dtype)
    assert retrieval_metrics(scores)["t2v/R@1"] == 100.0
    assert retrieval_metrics(scores) == retrieval_metrics(scores.double().numpy())


def test_refusals() -> None:
    broken = torch.zeros(3, 3)
    broken[1, 2] = torch.nan
    with pytest.raises(ValueError, match="query 1, gallery entry 2 is NaN"):
        retrieval_metrics(broken)
    with pytest.raises(ValueError, match="5 texts and 3 videos: give video_of_text"):
        retrieval_metrics(torch.zeros(5, 3))
    with pytest.raises(ValueError, match="one entry per text"):
        retrieval_metrics(torch.zeros(5, 3), [0, 1])
    with pytest.raises(ValueError, match=r"video_of_text: 0\.\.3 for 3 videos"):
        retrieval_metrics(torch.zeros(2, 3), [0, 3])
    with pytest.raises(ValueError, match="no text or no video"):
        retrieval_metrics(torch.zeros(0, 3))


def test_dual_softmax_is_the_published_product() -> None:
    scores = torch.randn(6, 4, generator=torch.Generator().manual_seed(2)).double() / 10
    expected = scores * torch.softmax(scores / 0.01, dim=0)
    torch.testing.assert_close(dual_softmax(scores, column_log_sums(scores, 0.01), 0.01), expected)


def test_dual_softmax_mends_a_hub_both_ways() -> None:
    scores = torch.eye(5) * 0.3
    scores[:, 0] += 0.4  # video 0 is near to every text
    found = retrieval_metrics(scores, dsl_temperature=0.01)
    assert found["t2v/R@1"] == 20.0
    assert found["t2v+dsl/R@1"] == 100.0
    assert retrieval_metrics(scores.T, dsl_temperature=0.01)["v2t+dsl/R@1"] == 100.0


def test_querybank_norm_is_the_published_quotient_and_only_for_hubs() -> None:
    generator = torch.Generator().manual_seed(3)
    scores, bank = (
        torch.rand(8, 5, generator=generator).double(),
        torch.rand(3, 5, generator=generator).double(),
    )
    hubs = querybank_hubs(bank)
    found = querybank_norm(scores, column_log_sums(bank, 0.05), hubs)
    quotient = torch.exp(20 * scores) / torch.exp(20 * bank).sum(0)
    for row in range(8):
        expected = quotient[row] if hubs[scores[row].argmax()] else scores[row]
        assert found[row].argsort().tolist() == expected.argsort().tolist()
    assert 0 < hubs.sum() < 5


def test_querybank_names() -> None:
    scores = torch.eye(5) * 0.3
    scores[:, 0] += 0.4
    bank = torch.full((3, 5), 0.2)
    bank[:, 0] = 0.6
    found = retrieval_metrics(scores, text_bank=bank)
    assert found["t2v+qbnorm/R@1"] == 100.0 and "v2t+qbnorm/R@1" not in found
    assert retrieval_metrics(scores.T, video_bank=bank.T)["v2t+qbnorm/R@1"] == 100.0


def test_recall_curve() -> None:
    ranks = torch.tensor([1.0, 2.5, 4.0, 9.0], dtype=torch.float64)
    assert recall_curve(ranks, 5).tolist() == [25.0, 25.0, 50.0, 75.0, 75.0]
