"""The assembled model: padding, batches, errors, gradients, checkpointing."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hbi.model.config import LossSettings, ModelConfig, TowerConfig
from hbi.model.frames import normalise
from hbi.model.hbi import HBI, Encoded
from hbi.model.levels import LEVELS
from hbi.model.losses import hbi_loss
from hbi.model.tokens import Tokens

TOWERS = TowerConfig(
    image_size=16, patch_size=8, vision_width=32, vision_layers=2, vision_heads=2, text_width=32, text_layers=2,
    text_heads=2, vocab_size=50, context=16, dim=32,
)  # fmt: skip
CONFIG = ModelConfig(towers=TOWERS, words=12, frames=8, temporal_layers=2)


@pytest.fixture(scope="module")
def model() -> HBI:
    torch.manual_seed(0)
    model = HBI(CONFIG)
    with torch.no_grad():  # weights that are not almost nothing, so that every part has a say
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embedding" not in name:
                parameter.mul_(3)
    return model.eval()


def batch(size: int = 4, words: int = 12, frames: int = 8, seed: int = 0) -> tuple[Tensor, ...]:
    """Pairs of unequal lengths; padding is zeros in the ids and noise in the video."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 50, (size, words), generator=generator)
    text_mask = torch.arange(words) < torch.randint(2, words + 1, (size, 1), generator=generator)
    video = torch.randn(size, frames, 3, 16, 16, generator=generator)
    video_mask = torch.arange(frames) < torch.randint(1, frames + 1, (size, 1), generator=generator)
    return ids * text_mask, text_mask, video, video_mask.long()


def test_shapes_and_ranges(model: HBI) -> None:
    ids, text_mask, video, video_mask = batch()
    with torch.no_grad():
        words, sentence = model.encode_text(ids, text_mask)
        encoded = model(ids, text_mask, video, video_mask)
        similarities = model.similarities(ids[:3], text_mask[:3], video, video_mask)
    assert words.shape == (4, 12, 32) and sentence.shape == (4, 32)
    assert [tuple(encoded.predicted[level].shape) for level in LEVELS] == [(4, 12, 8), (4, 3, 2), (4, 2, 1)]
    for level in LEVELS:
        assert similarities[level].shape == (3, 4) and similarities[level].abs().max() <= 1 + 1e-6
        absent = ~(encoded.text[level].mask[:, :, None] & encoded.video[level].mask[:, None, :])
        assert (encoded.predicted[level][absent] == 0).all()
    assert encoded.estimated == {} and encoded.logit_scale.item() == pytest.approx(1 / 0.07, rel=1e-3)


def test_the_sentence_is_read_at_the_last_present_word(model: HBI) -> None:
    ids, text_mask, *_ = batch()
    with torch.no_grad():
        words, sentence = model.encode_text(ids, text_mask)
    for row, length in enumerate(text_mask.sum(1).tolist()):
        assert torch.equal(sentence[row], words[row, length - 1])


def test_more_padding_changes_nothing(model: HBI) -> None:
    ids, text_mask, video, video_mask = batch(words=9, frames=5)
    pad = torch.nn.functional.pad
    # As many clusters as before, or the two would be different games.
    wide = (
        pad(ids, (0, 3), value=7),
        pad(text_mask, (0, 3)),
        pad(video, (0,) * 7 + (3,), value=2.0),
        pad(video_mask, (0, 3)),
    )
    with torch.no_grad():
        narrow, wider = model(ids, text_mask, video, video_mask), model(*wide)
    assert torch.allclose(narrow.predicted["entity"], wider.predicted["entity"][:, :9, :5], atol=1e-5)
    for level in LEVELS[:2]:
        for ours, theirs in ((narrow.text, wider.text), (narrow.video, wider.video)):
            mask = ours[level].mask
            n = mask.shape[1]
            assert torch.equal(theirs[level].mask[:, :n], mask) and not theirs[level].mask[:, n:].any()
            assert torch.allclose(ours[level].tokens[mask], theirs[level].tokens[:, :n][mask], atol=1e-4)


def test_only_what_the_longest_text_needs_is_encoded(model: HBI, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, text_mask, *_ = batch(words=9)
    text_mask[:, 7:] = 0
    widths, tower = [], model.text.forward

    def forward(input_ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        widths.append(input_ids.shape[1])
        return tower(input_ids, mask)

    monkeypatch.setattr(model.text, "forward", forward)
    with torch.no_grad():
        (short, sentence), (whole, _) = model.encode_text(ids, text_mask), tower(ids, text_mask.bool())
    assert widths == [7] and short.shape == whole.shape and not short[:, 7:].any()
    present = text_mask.bool()
    torch.testing.assert_close(short[present], whole[present])
    assert torch.equal(sentence, short[range(len(ids)), text_mask.sum(1) - 1])


def test_padding_may_hold_anything(model: HBI) -> None:
    ids, text_mask, video, video_mask = batch()
    other_ids = torch.where(text_mask, ids, 33)
    other_video = torch.where(video_mask[:, :, None, None, None].bool(), video, -3.0)
    with torch.no_grad():
        expected = model.similarities(ids, text_mask, video, video_mask)
        result = model.similarities(other_ids, text_mask, other_video, video_mask)
    for level in LEVELS:
        assert torch.allclose(result[level], expected[level], atol=1e-6)


def test_padding_in_front_works_too(model: HBI) -> None:
    ids, text_mask, video, video_mask = batch()
    with torch.no_grad():
        encoded = model(ids.flip(1), text_mask.flip(1), video.flip(1), video_mask.flip(1))
    assert all(
        part.isfinite().all() for level in LEVELS for part in (*encoded.text[level], *encoded.video[level])
    )


def test_a_row_does_not_depend_on_its_batch(model: HBI) -> None:
    parts = batch(6)
    with torch.no_grad():
        together = model(*parts)
        for row in range(6):
            alone = model(*(part[row : row + 1] for part in parts))
            for level in LEVELS:
                for one, all_of_them in ((alone.text, together.text), (alone.video, together.video)):
                    present = one[level].mask[0]
                    assert torch.equal(present, all_of_them[level].mask[row])
                    ours, theirs = one[level].tokens[0, present], all_of_them[level].tokens[row, present]
                    assert torch.allclose(ours, theirs, atol=1e-4)


def test_a_row_without_a_token_is_an_error(model: HBI) -> None:
    ids, text_mask, video, video_mask = batch()
    text_mask[2], video_mask[1] = False, 0
    with pytest.raises(ValueError, match="text_mask: row 2 has no valid text"):
        model(ids, text_mask, video, video_mask.clamp(min=1))
    with pytest.raises(ValueError, match="video_mask: row 1 has no valid video"):
        model.encode_video(video, video_mask)


def test_other_sizes_are_errors(model: HBI) -> None:
    *_, video, video_mask = batch()
    with pytest.raises(ValueError, match=r"frames are \(16, 8\) pixels, the model takes \(16, 16\)"):
        model.encode_video(video[..., :8], video_mask)
    with pytest.raises(ValueError, match="17 frames, the model has positions for 16"):
        model.encode_video(torch.zeros(1, 17, 3, 16, 16), torch.ones(1, 17))
    with pytest.raises(ValueError, match="17 tokens, the model has positions for 16"):
        model.encode_text(torch.ones(1, 17, dtype=torch.int64), torch.ones(1, 17))


def test_uint8_is_normalised_on_the_way_in(model: HBI) -> None:
    raw = torch.randint(
        0, 256, (2, 3, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    mask = torch.ones(2, 3, dtype=torch.bool)
    with torch.no_grad():
        assert torch.equal(model.encode_video(raw, mask), model.encode_video(normalise(raw), mask))


def test_a_batch_of_none_gives_zero_gradients() -> None:
    torch.manual_seed(0)
    model = HBI(CONFIG).train()
    whole = model(*batch())
    pool = detached(whole)
    none = model(*(part[:0] for part in batch()))
    for settings in (
        LossSettings(interaction=1.0, distillation=2.0),
        LossSettings(interaction=1.0, distillation=2.0, chunk=2),
    ):
        model.zero_grad()
        losses = hbi_loss(none, pool, 0, settings, 4)
        losses["loss"].backward(retain_graph=True)
        assert losses["loss"].item() == 0
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and (parameter.grad == 0).all(), name


def detached(encoded: Encoded) -> Encoded:
    def cut(levels: dict[str, Tokens]) -> dict[str, Tokens]:
        return {level: Tokens(*(part.detach() for part in tokens)) for level, tokens in levels.items()}

    predicted = {level: part.detach() for level, part in encoded.predicted.items()}
    return Encoded(cut(encoded.text), cut(encoded.video), predicted, encoded.logit_scale.detach(), {})


def test_in_a_window_a_frame_is_told_by_its_neighbours_alone() -> None:
    torch.manual_seed(0)
    config = replace(CONFIG, temporal_layers=1, temporal_window=1)
    model = HBI(config).eval()
    frames, present = torch.randn(2, 8, 32), torch.ones(2, 8, dtype=torch.bool)
    present[1, 5] = False
    with torch.no_grad():
        seen = model.over_time(frames, present)
        for changed in (0, 7):
            other = frames.clone()
            other[:, changed] += 1
            moved = (model.over_time(other, present) != seen).any(-1)
            near = (torch.arange(8) - changed).abs() <= 1
            assert torch.equal(moved, near.expand(2, 8))
        other = frames.clone()
        other[1, 5] += 1  # absent: nobody sees it but itself
        assert (model.over_time(other, present) != seen).any(-1).nonzero().tolist() == [[1, 5]]
        wide = HBI(replace(config, temporal_window=7)).eval()
        wide.load_state_dict(model.state_dict())
        full = HBI(replace(config, temporal_window=0)).eval()
        full.load_state_dict(model.state_dict())
        everyone = torch.ones(2, 8, dtype=torch.bool)
        assert torch.equal(wide.over_time(frames, everyone), full.over_time(frames, everyone))


@pytest.mark.parametrize("masking", ["exact", "published"])
def test_every_parameter_learns(masking: str) -> None:
    torch.manual_seed(0)
    # Two frames at the last level: the weight of a single one is always 1.
    config = ModelConfig(
        towers=TOWERS, words=12, frames=8, frame_ratios=(0.5, 0.5), temporal_layers=1, masking=masking
    )  # type: ignore[arg-type]
    model = HBI(config).train()
    encoded = model(*batch())
    hbi_loss(encoded, encoded, 0, LossSettings(interaction=1.0, distillation=2.0), 4)["loss"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # Softmaxes forget a constant.
        if not name.endswith((".2.bias", "score.bias", "fall.bias", "k_proj.bias")):
            assert parameter.grad.abs().sum() > 0, name


def test_checkpointing_changes_neither_loss_nor_gradient() -> None:
    torch.manual_seed(0)
    model, parts = HBI(CONFIG).train(), batch()
    results = []
    for on in (False, True):
        model.set_checkpointing(on)
        model.zero_grad()
        encoded = model(*parts)
        loss = hbi_loss(encoded, encoded, 0, LossSettings(interaction=1.0, distillation=2.0), 4)["loss"]
        loss.backward()
        results.append(
            (
                loss.detach(),
                {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
            )
        )
    (loss, gradients), (again, others) = results
    assert abs(loss - again) <= 1e-6 * abs(loss)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        assert (gradient - others[name]).norm() <= 1e-6 * gradient.norm() + 1e-12, name


def test_checkpointing_keeps_less() -> None:
    """What the forward pass saves for the backward pass, counted in elements."""
    torch.manual_seed(0)
    model, parts = HBI(CONFIG).train(), batch()

    def saved(on: bool) -> int:
        model.set_checkpointing(on)
        sizes: list[int] = []

        def count(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model.encode_video(parts[2], parts[3])
        return sum(sizes)

    assert saved(True) < saved(False) / 3


def test_bfloat16_autocast_stays_close() -> None:
    torch.manual_seed(0)
    model, parts = HBI(CONFIG).train(), batch()
    losses = []
    for on in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
            encoded = model(*parts)
            losses.append(
                hbi_loss(encoded, encoded, 0, LossSettings(interaction=0.0, distillation=0.0), 4)["loss"]
            )
        assert all(
            part.dtype in (torch.float32, torch.bool) for tokens in encoded.text.values() for part in tokens
        )
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=0.05)


def test_two_learning_rate_groups_cover_the_model(model: HBI) -> None:
    backbone, new = dict(model.backbone_parameters()), dict(model.new_parameters())
    assert not backbone.keys() & new.keys()
    assert backbone.keys() | new.keys() == dict(model.named_parameters()).keys()
    assert "logit_scale" in backbone and "video.projection.weight" in backbone
    assert any(name.startswith("temporal.") for name in new) and any(
        name.startswith("predictors.") for name in new
    )


def test_logit_scale_is_clamped() -> None:
    model = HBI(CONFIG)
    with torch.no_grad():
        model.logit_scale.fill_(9.0)
    model.clamp_logit_scale()
    assert model.logit_scale.exp().item() == pytest.approx(100.0)


def test_frozen_parts() -> None:
    model = HBI(ModelConfig(towers=TOWERS, words=12, frames=8, estimator=True, freeze_patches=True))
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert "video.embeddings.patch_embedding.weight" in frozen
    assert all(name.startswith(("estimator.", "video.embeddings.patch")) for name in frozen)
    encoded = model(*batch())
    assert set(encoded.estimated) == set(LEVELS)
    losses = hbi_loss(
        encoded, encoded, 0, LossSettings(interaction=1.0, distillation=2.0, target="estimator"), 4
    )
    losses["loss"].backward()
    assert model.estimator is not None and model.estimator.query.grad is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_computes_the_same() -> None:
    torch.manual_seed(0)
    model, parts = HBI(CONFIG).train(), batch()
    losses = []
    for device in ("cpu", "cuda"):
        model.to(device)
        encoded = model(*(part.to(device) for part in parts))
        losses.append(
            hbi_loss(encoded, encoded, 0, LossSettings(interaction=1.0, distillation=2.0), 4)["loss"]
        )
    losses[1].backward()
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-3)
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


def test_what_a_loss_has_no_use_for_is_not_computed(model: HBI) -> None:
    settings = LossSettings(levels=(1.0, 0.0, 0.0), interaction=0.0, distillation=0.0)
    pairs = batch()
    with torch.no_grad():
        whole, some = model(*pairs), model(*pairs, loss=settings)
        event = model(*pairs, loss=LossSettings(levels=(1.0, 0.0, 1.0), interaction=0.5))
    assert list(some.text) == list(some.video) == ["entity"] and not some.predicted
    assert torch.equal(some.text["entity"].tokens, whole.text["entity"].tokens)
    assert list(event.text) == list(event.predicted) == ["entity", "event"]
    assert torch.equal(event.video["event"].tokens, whole.video["event"].tokens)
    expected = hbi_loss(whole, whole, 0, settings, 4)["loss"]
    torch.testing.assert_close(hbi_loss(some, some, 0, settings, 4)["loss"], expected)
