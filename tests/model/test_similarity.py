"""The weighted similarity: against plain loops, in chunks, with padding."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hbi.model.similarity import pair_similarity, weighted_similarity
from hbi.model.tokens import Tokens


def tokens(
    seed: int, batch: int, n: int, dim: int = 8, padded: bool = True, dtype: torch.dtype = torch.float64
) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, n, generator=generator) < (0.7 if padded else 2.0)
    mask[torch.arange(batch), torch.randint(n, (batch,), generator=generator)] = True
    features = torch.randn(batch, n, dim, generator=generator, dtype=dtype)
    return Tokens(features, torch.randn(batch, n, generator=generator, dtype=dtype), mask)


def by_loops(text: Tokens, video: Tokens, zero: bool = False) -> Tensor:
    """The formula, one pair at a time, over present tokens; with `zero` a padded one counts as a cosine of 0."""
    result = torch.zeros(len(text.mask), len(video.mask), dtype=text.tokens.dtype)
    for a in range(len(text.mask)):
        for b in range(len(video.mask)):
            words, frames = text.tokens[a][text.mask[a]], video.tokens[b][video.mask[b]]
            p, q = text.logits[a][text.mask[a]].softmax(0), video.logits[b][video.mask[b]].softmax(0)
            s = torch.nn.functional.cosine_similarity(words[:, None], frames[None], dim=-1)
            best_frame, best_word = s.amax(1), s.amax(0)
            if zero and not video.mask[b].all():
                best_frame = best_frame.clamp(min=0)
            if zero and not text.mask[a].all():
                best_word = best_word.clamp(min=0)
            result[a, b] = ((p * best_frame).sum() + (q * best_word).sum()) / 2
    return result


@pytest.mark.parametrize("zero", [False, True])
def test_it_is_the_formula(zero: bool) -> None:
    text, video = tokens(0, 5, 4), tokens(1, 7, 3)
    ours = weighted_similarity(text, video, padding="zero" if zero else "absent")
    assert torch.allclose(ours, by_loops(text, video, zero), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("chunk", [1, 3, 5, 100])
def test_chunks_change_nothing(chunk: int, dtype: torch.dtype) -> None:
    text, video = tokens(2, 11, 6, 16, dtype=dtype), tokens(3, 7, 5, 16, dtype=dtype)
    weight = torch.randn(11, 7, generator=torch.Generator().manual_seed(0), dtype=dtype)
    results = []
    for size in (None, chunk):
        leaves = [part.clone().requires_grad_() for part in (*text[:2], *video[:2])]
        similarity = weighted_similarity(
            Tokens(*leaves[:2], text.mask), Tokens(*leaves[2:], video.mask), size
        )
        (similarity * weight).sum().backward()
        results.append((similarity.detach(), *(leaf.grad for leaf in leaves)))
    for whole, parts in zip(*results, strict=True):
        assert whole is not None and parts is not None
        assert (whole - parts).norm() <= 1e-6 * whole.norm()


def test_padding_may_hold_anything() -> None:
    text, video = tokens(4, 4, 5), tokens(5, 4, 6)
    other = [side._replace(tokens=side.tokens.masked_fill(~side.mask[..., None], 9.0),
                           logits=side.logits.masked_fill(~side.mask, 1e9)) for side in (text, video)]  # fmt: skip
    assert torch.equal(weighted_similarity(*other), weighted_similarity(text, video))
    assert torch.equal(pair_similarity(*other), pair_similarity(text, video))
    assert (pair_similarity(text, video)[~(text.mask[:, :, None] & video.mask[:, None, :])] == 0).all()


def test_half_precision_and_autocast_are_lifted_to_float32() -> None:
    text, video = tokens(6, 3, 4, dtype=torch.float32), tokens(7, 3, 4, dtype=torch.float32)
    expected = weighted_similarity(text, video)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(
            weighted_similarity(text, video, chunk=2), weighted_similarity(text, video, chunk=2).float()
        )
        assert torch.allclose(weighted_similarity(text, video), expected, atol=1e-6)
        assert pair_similarity(text, video).dtype == torch.float32
    halves = [side._replace(tokens=side.tokens.half(), logits=side.logits.half()) for side in (text, video)]
    assert torch.allclose(weighted_similarity(*halves), expected, atol=5e-3)


def test_no_rows_and_a_bad_chunk() -> None:
    text, video = tokens(8, 3, 4), tokens(9, 2, 4)
    none = Tokens(*(part[:0] for part in text))
    assert weighted_similarity(none, video, chunk=1).shape == (0, 2)
    with pytest.raises(ValueError, match="chunk is 0"):
        weighted_similarity(text, video, chunk=0)


class Largest(TorchDispatchMode):
    """The most elements of any tensor that is made, in the backward pass too."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = result if isinstance(result, tuple | list) else [result]
        self.elements = max(self.elements, *(part.numel() for part in made if isinstance(part, Tensor)), 0)
        return result


@pytest.mark.parametrize("chunk", [4, 8, None])
def test_memory_grows_with_the_chunk(chunk: int | None) -> None:
    """No tensor is larger than chunk^2 x words x frames (the inputs are smaller here)."""
    batch, words, frames = 32, 12, 10
    text, video = tokens(10, batch, words, 2), tokens(11, batch, frames, 2)
    leaves = [part.clone().requires_grad_() for part in (*text[:2], *video[:2])]
    with Largest() as largest:
        similarity = weighted_similarity(
            Tokens(*leaves[:2], text.mask), Tokens(*leaves[2:], video.mask), chunk
        )
        similarity.square().sum().backward()
    assert largest.elements == (chunk or batch) ** 2 * words * frames
