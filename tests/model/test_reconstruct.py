"""Rebuilt tokens: what they depend on, what they leave alone, and that without them the model is what it was."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hbi.model.config import LossSettings, ModelConfig, ReconstructionConfig, TowerConfig
from hbi.model.hbi import HBI
from hbi.model.levels import LEVELS
from hbi.model.losses import hbi_loss
from hbi.model.reconstruct import CrossAttention, Reconstruction
from hbi.model.similarity import matched_similarity, weighted_similarity
from hbi.model.tokens import Tokens

FORMS = ("attention", "gated", "similarity")
TOWERS = TowerConfig(
    image_size=16, patch_size=8, vision_width=16, vision_layers=1, vision_heads=2, text_width=16, text_layers=1,
    text_heads=2, vocab_size=50, context=16, dim=16,
)  # fmt: skip
CONFIG = ModelConfig(towers=TOWERS, words=8, frames=4, temporal_layers=1, predictor_width=4)


def with_form(form: str) -> ModelConfig:
    return replace(CONFIG, reconstruction=ReconstructionConfig(form=form))  # type: ignore[arg-type]


def pairs(size: int = 3, words: int = 5, frames: int = 4, seed: int = 0) -> tuple[Tokens, Tokens]:
    generator = torch.Generator().manual_seed(seed)

    def side(n: int) -> Tokens:
        mask = torch.arange(n) < torch.randint(1, n + 1, (size, 1), generator=generator)
        tokens = 3 * torch.randn(size, n, 16, generator=generator)
        return Tokens(tokens, torch.randn(size, n, generator=generator), mask)

    return side(words), side(frames)


def stirred(form: str) -> Reconstruction:
    """With weights that are not almost nothing."""
    torch.manual_seed(0)
    rebuild = Reconstruction(ReconstructionConfig(form=form), 16, 8)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in rebuild.parameters():
            parameter.normal_(std=0.5)
    return rebuild


def batch(seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 50, (4, 8), generator=generator)
    video = torch.randn(4, 4, 3, 16, 16, generator=generator)
    return ids, torch.arange(8) < torch.tensor([[3], [8], [5], [6]]), video, torch.ones(4, 4).bool()


def test_cross_attention_is_a_softmax_over_the_present_tokens_of_the_other_side() -> None:
    torch.manual_seed(0)
    attention = CrossAttention(16, 8)

    def unit(x: Tensor) -> Tensor:
        return 4 * x / x.norm(dim=-1, keepdim=True)

    text, video = pairs()
    found = attention(text.tokens, video.tokens, video.mask)
    for row in range(3):
        seen = attention.other_norm(unit(video.tokens[row][video.mask[row]]))
        key, value = attention.key_value(seen).chunk(2, -1)
        query = attention.query(attention.norm(unit(text.tokens[row])))
        heads = []
        for part in (slice(0, 8), slice(8, 16)):
            weights = (query[:, part] @ key[:, part].T / 8**0.5).softmax(-1)
            heads.append(weights @ value[:, part])
        assert torch.allclose(found[row], attention.out(torch.cat(heads, -1)), atol=1e-5)


def test_the_free_form_by_loops() -> None:
    text, video = pairs()
    rebuilt, _ = Reconstruction(ReconstructionConfig("similarity", share=0.3, temperature=0.2), 16, 8)(
        text, video
    )
    for row in range(3):
        for word in range(int(text.mask[row].sum())):
            x, frames = text.tokens[row, word], video.tokens[row][video.mask[row]]
            unit = frames / frames.norm(dim=-1, keepdim=True)
            weights = (unit @ x / x.norm() / 0.2).softmax(0)
            expected = 0.7 * x + 0.3 * x.norm() * (weights @ unit)
            assert torch.allclose(rebuilt.tokens[row, word], expected, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_it_depends_on_the_pair_s_other_side_alone(form: str) -> None:
    rebuild, (text, video) = stirred(form), pairs()
    words, frames = rebuild(text, video)
    other = pairs(seed=1)[1]
    changed = video._replace(tokens=torch.cat([other.tokens[:1], video.tokens[1:]]))
    words_again, frames_again = rebuild(text, changed)
    assert not torch.allclose(words.tokens[0][text.mask[0]], words_again.tokens[0][text.mask[0]])
    assert torch.equal(words.tokens[1:], words_again.tokens[1:])
    assert torch.equal(frames.tokens[1:], frames_again.tokens[1:])
    alone, _ = rebuild(Tokens(*(part[1:2] for part in text)), Tokens(*(part[1:2] for part in video)))
    assert torch.allclose(alone.tokens[0], words.tokens[1], atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_padding_says_nothing_and_stays_as_it_is(form: str) -> None:
    rebuild, (text, video) = stirred(form), pairs()
    noisy = video._replace(tokens=torch.where(video.mask[:, :, None], video.tokens, 99.0))
    words, frames = rebuild(text, video)
    same, others = rebuild(text, noisy)
    assert torch.equal(words.tokens, same.tokens)
    assert torch.equal(others.tokens[~video.mask], noisy.tokens[~video.mask])
    assert words.mask is text.mask and words.logits is text.logits and frames.logits is video.logits


@pytest.mark.parametrize("form", FORMS)
def test_a_side_that_is_all_padding_leaves_the_other_as_it_was(form: str) -> None:
    rebuild, (text, video) = stirred(form), pairs()
    nothing = video._replace(mask=torch.zeros_like(video.mask))
    words, frames = rebuild(text, nothing)
    assert torch.equal(words.tokens, text.tokens) and frames.tokens.isfinite().all()
    words.tokens.sum().backward() if words.tokens.requires_grad else None
    assert all(p.grad is None or p.grad.isfinite().all() for p in rebuild.parameters())


@pytest.mark.parametrize("form", FORMS)
def test_tokens_that_differ_stay_different_and_longer_tokens_turn_alike(form: str) -> None:
    rebuild, (text, video) = stirred(form), pairs()
    words, _ = rebuild(text, video)
    for row in range(3):
        present = words.tokens[row][text.mask[row]]
        distances = torch.cdist(present, present) + 9 * torch.eye(len(present))
        assert distances.min() > 1e-2
    # Differences are rebuilt too: not one vector is added to all of them.
    if form != "similarity":
        moved = (words.tokens - text.tokens)[1][text.mask[1]]
        assert len(moved) == 1 or (moved[0] - moved[1]).norm() > 1e-3
    longer, _ = rebuild(text._replace(tokens=5 * text.tokens), video._replace(tokens=video.tokens / 7))
    assert torch.allclose(longer.tokens, 5 * words.tokens, rtol=1e-3, atol=1e-3)


def test_with_attention_the_model_is_the_old_one_at_step_0_and_another_after_some() -> None:
    torch.manual_seed(0)
    plain = HBI(CONFIG).train()
    torch.manual_seed(0)
    model = HBI(with_form("attention")).train()
    shared = dict(model.state_dict())
    assert all(torch.equal(value, shared[name]) for name, value in plain.state_dict().items())
    parts = batch()

    def loss_of(which: HBI) -> tuple[Tensor, dict[str, Tensor]]:
        encoded = which(*parts)
        return hbi_loss(encoded, encoded, 0, LossSettings(), 4)["loss"], encoded.predicted

    (old_loss, old), (new_loss, new) = loss_of(plain), loss_of(model)
    assert torch.equal(old_loss, new_loss)
    assert all(torch.equal(old[level], new[level]) for level in LEVELS)
    for which in (plain, model):
        optimizer = torch.optim.SGD(which.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(which)[0].backward()
            optimizer.step()
    assert not torch.equal(loss_of(plain)[1]["entity"], loss_of(model)[1]["entity"])
    assert model.reconstruction is not None
    # Of the entity level: where the other side is a single token, a softmax over it leaves queries and keys alone.
    for name, parameter in model.reconstruction["entity"].named_parameters():
        assert parameter.grad is not None and (name.endswith("bias") or parameter.grad.abs().sum() > 0), name


@pytest.mark.parametrize("form", FORMS)
def test_what_is_merged_and_contrasted_stays_single_modal(form: str) -> None:
    torch.manual_seed(0)
    model = HBI(with_form(form)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("reconstruction."):
                parameter.normal_(std=0.3)
        first, second = model(*batch()), model(batch(1)[0], *batch()[1:])
    for level in LEVELS:
        assert torch.equal(first.video[level].tokens, second.video[level].tokens)
        assert not torch.equal(first.players[level], second.players[level])


@pytest.mark.parametrize("form", FORMS)
def test_reranking_is_the_similarity_of_rebuilt_pairs(form: str) -> None:
    torch.manual_seed(0)
    model = HBI(with_form(form)).eval()
    text, video = pairs()
    assert model.reconstruction is not None
    rebuilt = model.reconstruction["entity"](text, video)
    expected = weighted_similarity(*rebuilt).diagonal()
    assert torch.allclose(model.rerank(text, video), expected, atol=1e-6)
    with pytest.raises(ValueError, match="reconstructs nothing to rerank by: train one with"):
        HBI(CONFIG).rerank(text, video)
    published = weighted_similarity(text, video, padding="zero").diagonal()
    assert torch.allclose(matched_similarity(text, video, padding="zero"), published, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"share": 1.5}, "must lie between 0 and 1"),
        ({"temperature": 0.0}, "must be above 0"),
    ],
)
def test_settings_that_make_no_sense(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReconstructionConfig(**values)
