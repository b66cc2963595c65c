"""The interaction: exact against its definition, the index's axioms, the sampler's error, the learned predictor."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hbi.model.banzhaf import enumerated_interaction, exact_interaction, sampled_interaction
from hbi.model.predictor import InteractionPredictor

few = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31)


def draw(
    generator: torch.Generator, batch: int, words: int, frames: int, spread: float = 1.0
) -> tuple[Tensor, ...]:
    """Similarities in [-0.2, 1], some of them equal, and weight logits, in float64."""
    similarity = torch.rand(batch, words, frames, generator=generator, dtype=torch.float64) * 1.2 - 0.2
    similarity[::3] = (similarity[::3] * 4).round() / 4
    word_logits = torch.randn(batch, words, generator=generator, dtype=torch.float64) * spread
    frame_logits = torch.randn(batch, frames, generator=generator, dtype=torch.float64) * spread
    return similarity, word_logits, frame_logits


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def by_loops(s: np.ndarray, a: np.ndarray, b: np.ndarray, i: int, j: int) -> float:
    """I(i, j) from the definition with Python sets: what even the enumeration answers to."""

    def half(values: np.ndarray, logits: np.ndarray, rows: list[int], columns: list[int]) -> float:
        if not rows or not columns:
            return 0.0
        weights = np.exp(logits[rows]) / np.exp(logits[rows]).sum()
        return float(sum(w * max(values[r, c] for c in columns) for w, r in zip(weights, rows, strict=True)))

    def value(words: list[int], frames: list[int]) -> float:
        return (half(s, a, words, frames) + half(s.T, b, frames, words)) / 2

    other_words, other_frames = [t for t in range(len(a)) if t != i], [v for v in range(len(b)) if v != j]
    values = []
    for bits in range(2 ** (len(other_words) + len(other_frames))):
        words = [t for k, t in enumerate(other_words) if bits >> k & 1]
        frames = [v for k, v in enumerate(other_frames) if bits >> (k + len(other_words)) & 1]
        pair = value([*words, i], [*frames, j]) + value(words, frames)
        values.append(pair - value([*words, i], frames) - value(words, [*frames, j]))
    return float(np.mean(values))


def test_enumeration_is_the_definition() -> None:
    similarity, a, b = draw(seeded(1), 2, 3, 2)
    result = enumerated_interaction(similarity, a, b)
    for game in range(2):
        for i in range(3):
            for j in range(2):
                expected = by_loops(similarity[game].numpy(), a[game].numpy(), b[game].numpy(), i, j)
                assert result[game, i, j].item() == pytest.approx(expected, abs=1e-12)


def test_enumeration_refuses_what_never_ends() -> None:
    with pytest.raises(ValueError, match="at most 20 players"):
        enumerated_interaction(torch.zeros(1, 11, 10), torch.zeros(1, 11), torch.zeros(1, 10))


@pytest.mark.parametrize("spread", [1.0, 5.0])
def test_exact_is_the_enumeration(spread: float) -> None:
    """240 games a spread: up to 7 words and frames, one of either too, padding anywhere, equal similarities."""
    generator = seeded(int(spread))
    worst = {torch.float32: 0.0, torch.float64: 0.0}
    for words, frames in [(1, 1), (1, 5), (6, 1), (2, 2), (3, 5), (5, 3), (4, 6), (7, 7)]:
        game = draw(generator, 30, words, frames, spread)
        masks = (
            torch.rand(30, words, generator=generator) < 0.8,
            torch.rand(30, frames, generator=generator) < 0.8,
        )
        truth = enumerated_interaction(*game, *masks)
        assert (truth[~(masks[0][:, :, None] & masks[1][:, None, :])] == 0).all()
        for dtype in worst:
            # Masks as bool, or as 0 and 1.
            marks = masks if dtype == torch.float64 else tuple(mask.long() for mask in masks)
            ours = exact_interaction(*(part.to(dtype) for part in game), *marks)
            assert ours.dtype == dtype
            worst[dtype] = max(worst[dtype], (ours.double() - truth).abs().max().item())
    assert worst[torch.float32] < 1e-6 and worst[torch.float64] < 1e-9


def test_padding_may_hold_anything() -> None:
    similarity, a, b = draw(seeded(3), 2, 4, 5)
    words, frames = torch.tensor([[1, 1, 0, 1]] * 2), torch.tensor([[0, 1, 1, 1, 0]] * 2)
    clean = exact_interaction(similarity, a, b, words, frames)
    absent = ~(words.bool()[:, :, None] & frames.bool()[:, None, :])
    for value in (torch.nan, torch.inf, -1e30):
        dirty = exact_interaction(
            similarity.masked_fill(absent, value),
            a.masked_fill(words == 0, value),
            b.masked_fill(frames == 0, value),
            words,
            frames,
        )
        assert torch.equal(dirty, clean)
    nothing = exact_interaction(similarity, a, b, words * 0, frames)
    assert (nothing == 0).all()
    assert exact_interaction(similarity[:0], a[:0], b[:0]).shape == (0, 4, 5)


@pytest.mark.parametrize("gap", [60.0, 400.0, 1e6])
def test_weights_far_apart(gap: float) -> None:
    """A word of no weight beside others still has all of it when it is alone."""
    similarity, a, b = draw(seeded(4), 4, 3, 3)
    a = a + torch.tensor([0.0, gap, -gap])
    truth = enumerated_interaction(similarity, a, b)
    assert (exact_interaction(similarity, a, b) - truth).abs().max() < 1e-8


def test_a_fixed_number_of_nodes() -> None:
    """What the loss uses: no look at the logits; good while they lie within 25."""
    game = draw(seeded(5), 50, 6, 6)
    game[1].clamp_(-12, 12), game[2].clamp_(-12, 12)
    game[1][:, 0], game[1][:, 1] = 12.0, -12.0
    assert (exact_interaction(*game, nodes=128) - enumerated_interaction(*game)).abs().max() < 1e-8


@pytest.mark.parametrize(("words", "frames"), [(1, 1), (7, 3), (24, 12), (32, 6), (64, 64), (128, 16)])
@pytest.mark.parametrize("weights", ["even", "spread", "peaked", "steps"])
@pytest.mark.parametrize("nodes", [None, 128])
def test_float32_stays_within_its_bound_of_float64(
    words: int, frames: int, weights: str, nodes: int | None
) -> None:
    """Whatever the size, the weights and the padding: one player with almost all of it, or each e times the next."""
    generator = seeded(words + frames)
    game = draw(generator, 6, words, frames, {"even": 0.01, "spread": 3.0}.get(weights, 0.5))
    for logits in game[1:]:
        if weights == "peaked":
            logits[:, 0] += 20
        if weights == "steps":
            logits += torch.linspace(0, 20, logits.shape[1], dtype=torch.float64)
    masks = torch.rand(6, words, generator=generator) < 0.8, torch.rand(6, frames, generator=generator) < 0.8
    masks[0][:2], masks[1][:2] = True, True
    singles = tuple(part.float() for part in game)
    truth = exact_interaction(*(part.double() for part in singles), *masks, nodes=400)
    found = exact_interaction(*singles, *masks, nodes=nodes)
    assert found.dtype == torch.float32
    assert (found - truth).abs().max() < 1e-5


@pytest.mark.parametrize("gap", [60.0, 1e6])
def test_weights_too_far_apart_for_float32_are_computed_in_float64(gap: float) -> None:
    similarity, a, b = (part.float() for part in draw(seeded(4), 4, 3, 3))
    a = a + torch.tensor([0.0, gap, -gap])
    truth = enumerated_interaction(similarity, a, b)
    assert (exact_interaction(similarity, a, b) - truth).abs().max() < 1e-6


def test_large_games() -> None:
    """128 by 128: finite, and the sum over a row is what a sampler says it is."""
    game = draw(seeded(6), 1, 128, 128)
    exact = exact_interaction(*game)
    assert exact.isfinite().all()
    sampled = sampled_interaction(*game, samples=400, generator=seeded(0), chunk=8)
    assert (exact - sampled).abs().max() < 0.02
    assert (exact.sum() - sampled.sum()).abs() < 0.1 * exact.sum().abs() + 0.05


def test_gradients_are_those_of_the_closed_form() -> None:
    similarity, a, b = (part.requires_grad_() for part in draw(seeded(8), 2, 3, 4, 0.5))
    with torch.no_grad():
        similarity += torch.rand(similarity.shape, generator=seeded(9)) * 0.01  # no ties: there it has a kink
    masks = torch.tensor([[1, 1, 1], [1, 0, 1]]), torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    assert torch.autograd.gradcheck(
        lambda *g: exact_interaction(*g, *masks, nodes=90), (similarity, a, b), atol=1e-6
    )


# --- axioms of the index ---------------------------------------------------------------------------------------


@few
@given(seed=seeds, words=st.integers(1, 6), frames=st.integers(1, 6))
def test_a_dummy_gets_nothing(seed: int, words: int, frames: int) -> None:
    """A word without weight, and without a similarity that could be a maximum, adds nothing to any coalition."""
    similarity, a, b = draw(seeded(seed), 2, words + 1, frames)
    similarity = similarity.abs()
    similarity[:, 0], a[:, 0] = 0.0, -80.0
    # Alone among words it has all the weight: then its value is that of its similarities, 0.
    assert exact_interaction(similarity, a, b)[:, 0].abs().max() < 1e-9


@few
@given(seed=seeds, words=st.integers(2, 6), frames=st.integers(1, 6))
def test_symmetric_players_get_the_same(seed: int, words: int, frames: int) -> None:
    similarity, a, b = draw(seeded(seed), 2, words, frames)
    similarity[:, 1], a[:, 1] = similarity[:, 0], a[:, 0]
    result = exact_interaction(similarity, a, b)
    assert (result[:, 0] - result[:, 1]).abs().max() < 1e-12
    turned = exact_interaction(similarity.transpose(1, 2), b, a)  # words and frames are alike
    assert (turned.transpose(1, 2) - result).abs().max() < 1e-12


@few
@given(
    seed=seeds,
    words=st.integers(1, 6),
    frames=st.integers(1, 6),
    first=st.floats(0, 3),
    second=st.floats(0, 3),
)
def test_linear_where_the_maximum_does_not_change_hands(
    seed: int, words: int, frames: int, first: float, second: float
) -> None:
    """Two games whose similarities are ordered alike, along every row and column, add up."""
    one, a, b = draw(seeded(seed), 1, words, frames)
    other = one**3 + 0.3 * one  # increasing: the same order everywhere
    mixed = exact_interaction(first * one + second * other, a, b)
    parts = first * exact_interaction(one, a, b) + second * exact_interaction(other, a, b)
    assert (mixed - parts).abs().max() < 1e-9


@few
@given(seed=seeds, words=st.integers(1, 7), frames=st.integers(1, 7))
def test_the_order_of_players_does_not_matter(seed: int, words: int, frames: int) -> None:
    generator = seeded(seed)
    similarity, a, b = draw(generator, 2, words, frames)
    t, v = torch.randperm(words, generator=generator), torch.randperm(frames, generator=generator)
    reordered = exact_interaction(similarity[:, t][:, :, v], a[:, t], b[:, v])
    assert (reordered - exact_interaction(similarity, a, b)[:, t][:, :, v]).abs().max() < 1e-12


# --- sampling --------------------------------------------------------------------------------------------------


def test_sampling_error_falls_as_the_root_of_the_samples() -> None:
    game = draw(seeded(10), 32, 5, 4)
    masks = torch.rand(32, 5, generator=seeded(11)) < 0.9, torch.rand(32, 4, generator=seeded(12)) < 0.9
    truth = enumerated_interaction(*game, *masks)

    def error(samples: int) -> Tensor:
        return sampled_interaction(*game, *masks, samples=samples, generator=seeded(samples)) - truth

    few_samples, many = error(100), error(1600)
    ratio = (few_samples.square().mean() / many.square().mean()).sqrt().item()
    assert 3 < ratio < 5.3  # the root of 16 is 4
    # Unbiased: over 32 games the mean error is within four of its standard errors of 0.
    cells = many[truth != 0]
    assert cells.mean().abs() < 4 * cells.std() / len(cells) ** 0.5
    assert (many[truth == 0] == 0).all()


def test_sampling_is_seeded() -> None:
    game = draw(seeded(13), 2, 4, 4)
    first, again, other = (sampled_interaction(*game, samples=70, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    with pytest.raises(ValueError, match="samples is 0"):
        sampled_interaction(*game, samples=0)


@few
@given(seed=seeds)
def test_sampled_difference_is_the_definition_s(seed: int) -> None:
    """One drawn coalition: the product of differences equals the four values of phi."""
    similarity, a, b = draw(seeded(seed), 1, 3, 4)
    sampled = sampled_interaction(similarity, a, b, samples=1, generator=seeded(seed))[0]
    generator = seeded(seed)
    words = (torch.rand(1, 1, 3, generator=generator) < 0.5)[0, 0]
    frames = (torch.rand(1, 1, 4, generator=generator) < 0.5)[0, 0]

    def value(chosen: Tensor, seen: Tensor) -> float:
        if not chosen.any() or not seen.any():
            return 0.0
        s = similarity[0][chosen][:, seen]
        p, q = a[0][chosen].softmax(0), b[0][seen].softmax(0)
        return ((p * s.amax(1)).sum() + (q * s.amax(0)).sum()).item() / 2

    for i in range(3):
        for j in range(4):
            with_i, without_i = words.clone(), words.clone()
            with_j, without_j = frames.clone(), frames.clone()
            with_i[i], without_i[i], with_j[j], without_j[j] = True, False, True, False
            mixed = value(with_i, with_j) + value(without_i, without_j)
            mixed -= value(with_i, without_j) + value(without_i, with_j)
            assert sampled[i, j].item() == pytest.approx(mixed, abs=1e-12)


# --- the learned predictor ---------------------------------------------------------------------------------------


def test_predictor_is_its_formula() -> None:
    torch.manual_seed(0)
    predictor, s = InteractionPredictor(8).double(), torch.randn(2, 3, 4, dtype=torch.float64)
    hidden = predictor.rise(s[:, None]).relu().flatten(2).transpose(1, 2)
    scores = (hidden @ predictor.query) @ (hidden @ predictor.key).transpose(1, 2)
    hidden = hidden + scores.softmax(-1) @ (hidden @ predictor.value)
    expected = predictor.fall(hidden.transpose(1, 2).unflatten(2, (3, 4)))[:, 0]
    assert torch.allclose(predictor(s), expected)


def test_predictor_does_not_see_padding() -> None:
    torch.manual_seed(0)
    predictor, s = InteractionPredictor(8), torch.randn(3, 3, 4)
    wide = torch.nn.functional.pad(s, (0, 2, 0, 3), value=5.0)
    words, frames = torch.arange(6).expand(3, -1) < 3, torch.arange(6).expand(3, -1) < 4
    alone = predictor(s, torch.ones(3, 3, dtype=torch.bool), torch.ones(3, 4, dtype=torch.bool))
    padded = predictor(wide, words, frames)
    assert torch.allclose(padded[:, :3, :4], alone, atol=1e-6)
    assert (padded[:, 3:] == 0).all() and (padded[:, :, 4:] == 0).all()
    assert torch.allclose(predictor(s), alone, atol=1e-6)
    assert (
        predictor(s, torch.zeros(3, 3, dtype=torch.bool), torch.ones(3, 4, dtype=torch.bool)).isfinite().all()
    )


def test_predictor_learns_the_exact_interaction() -> None:
    """Two hundred steps on 6 x 4 games explain most of what the interaction of fresh games is."""
    torch.manual_seed(0)
    predictor = InteractionPredictor(32)
    optimiser = torch.optim.Adam(predictor.parameters(), lr=3e-3)
    generator, scale = seeded(0), 10.0
    for _ in range(200):
        s, a, b = (part.float() for part in draw(generator, 64, 6, 4, 0.1))
        loss = (predictor(s) - scale * exact_interaction(s, a, b, nodes=64)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    s, a, b = (part.float() for part in draw(seeded(99), 256, 6, 4, 0.1))
    truth = exact_interaction(s, a, b)
    error = (predictor(s) / scale - truth).square().mean() / truth.var()
    print(f"share of the variance left: {error.item():.3f}")
    assert error < 0.25
