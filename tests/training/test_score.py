"""The blocks of the evaluation give the model's own similarity, whatever the lengths and the sizes of a block."""

import pytest
import torch

from hbi.model.similarity import weighted_similarity
from hbi.model.tokens import Tokens
from hbi.training.evaluate import score as scoring
from hbi.training.evaluate.score import score


def noise(count: int, n: int, seed: int) -> Tokens:
    """Tokens of every length, some with holes, as a merge leaves them."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(n) < torch.randint(1, n + 1, (count, 1), generator=generator)
    mask[: count // 3] &= torch.rand(count // 3, n, generator=generator) < 0.6
    mask[:, 1] |= ~mask.any(1)
    return Tokens(
        torch.randn(count, n, 8, generator=generator), 3 * torch.randn(count, n, generator=generator), mask
    )


@pytest.mark.parametrize("padding", ["absent", "zero"])
@pytest.mark.parametrize(("block", "videos"), [(4, 64), (400, 3), (2**20, 64)])
def test_it_is_the_similarity_of_the_model(
    padding: str, block: int, videos: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(scoring.BLOCK_BYTES, "cpu", block)
    monkeypatch.setattr(scoring, "BLOCK_VIDEOS", videos)
    text, video = noise(23, 7, 0), noise(11, 5, 1)
    expected = weighted_similarity(text, video, padding=padding)  # type: ignore[arg-type]
    found = score(text, video, padding == "zero")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_no_text_is_no_row() -> None:
    text, video = noise(3, 4, 0), noise(2, 5, 1)
    assert score(Tokens(*(side[:0] for side in text)), video).shape == (0, 2)


def test_products_in_bfloat16_are_off_by_their_rounding_alone() -> None:
    text, video = noise(23, 7, 0), noise(11, 5, 1)
    exact, found = score(text, video), score(text, video, products=torch.bfloat16)
    assert found.dtype == torch.float32
    assert 0 < (found - exact).abs().max() <= 2**-7
