"""The losses: each against plain loops, their shares over ranks, their settings."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hbi.model.banzhaf import enumerated_interaction
from hbi.model.config import LossSettings
from hbi.model.hbi import Encoded
from hbi.model.levels import LEVELS
from hbi.model.losses import (
    alignment_loss,
    contrastive_loss,
    distillation_loss,
    hbi_loss,
    interaction_targets,
    published_loss,
    sigmoid_loss,
    with_teacher,
)
from hbi.model.similarity import pair_similarity, weighted_similarity
from hbi.model.tokens import Tokens

SIZES = {"entity": (5, 4), "action": (2, 2), "event": (1, 1)}


def encoded(batch: int, seed: int = 0, estimated: bool = False) -> Encoded:
    """A batch as the model would give it, leaves everywhere, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    def side(n: int) -> Tokens:
        mask = torch.rand(batch, n, generator=generator) < 0.8
        mask[:, 0] = True
        return Tokens(random(batch, n, 6), random(batch, n), mask)

    text = {level: side(n) for level, (n, _) in SIZES.items()}
    video = {level: side(n) for level, (_, n) in SIZES.items()}
    predicted = {level: random(batch, *size) for level, size in SIZES.items()}
    teacher = {level: random(batch, *size).detach() for level, size in SIZES.items()} if estimated else {}
    scale = torch.tensor(14.0, dtype=torch.float64, requires_grad=True)
    return Encoded(text, video, predicted, scale, teacher)


def leaves(whole: Encoded) -> list[Tensor]:
    sides = [part for side in (whole.text, whole.video) for level in side.values() for part in level[:2]]
    return [*sides, *whole.predicted.values(), whole.logit_scale]


def rows(whole: Encoded, first: int, last: int) -> Encoded:
    def cut(levels: dict) -> dict:
        return {
            level: Tokens(*(part[first:last] for part in value))
            if isinstance(value, Tokens)
            else value[first:last]
            for level, value in levels.items()
        }

    return Encoded(
        cut(whole.text), cut(whole.video), cut(whole.predicted), whole.logit_scale, cut(whole.estimated)
    )


def divergence(p: Tensor, q: Tensor) -> float:
    """KL(softmax p || softmax q), term by term."""
    p, q = p.softmax(0), q.softmax(0)
    return sum((a * (a / b).log()).item() for a, b in zip(p, q, strict=True))


def test_contrastive_is_the_cross_entropy_of_its_rows() -> None:
    logits = torch.randn(3, 7, dtype=torch.float64)
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([2, 3, 4]), reduction="sum")
    assert contrastive_loss(logits, first=2).item() == pytest.approx(expected.item())


def test_sigmoid_tells_each_pair_by_itself() -> None:
    logits = torch.randn(3, 7, dtype=torch.float64)
    expected = 0.0
    for row in range(3):
        for candidate in range(7):
            sign = 1 if candidate == row + 2 else -1
            expected -= math.log(1 / (1 + math.exp(-sign * logits[row, candidate].item())))
    assert sigmoid_loss(logits, first=2).item() == pytest.approx(expected)
    far = torch.tensor([[-2000.0, 2000.0]], dtype=torch.float64)
    assert sigmoid_loss(far).item() == 4000.0


def test_sigmoid_contrast_is_siglips_loss() -> None:
    """Per level, over the batch's pairs, divided by the texts, as `transformers` has it; on all ranks' shares too."""
    whole = encoded(5)._replace(logit_bias=torch.tensor(-3.0, dtype=torch.float64))
    settings = LossSettings(interaction=0.0, distillation=0.0, contrast="sigmoid")
    losses = hbi_loss(whole, whole, 0, settings, 5)
    for level in ("entity", "action", "event"):
        logits = whole.logit_scale * weighted_similarity(whole.text[level], whole.video[level]) - 3.0
        eye = torch.eye(5, dtype=torch.float64)
        theirs = -torch.nn.functional.logsigmoid((2 * eye - 1) * logits).sum(-1).mean()
        assert losses[f"contrastive/{level}"].item() == pytest.approx(theirs.item())
    parts = [
        hbi_loss(rows(whole, a, b)._replace(logit_bias=whole.logit_bias), whole, a, settings, 5)["loss"]
        for a, b in ((0, 2), (2, 5))
    ]
    assert sum(part.item() for part in parts) == pytest.approx(losses["loss"].item())


def test_alignment_is_its_formula() -> None:
    whole = encoded(4, seed=3)
    words, frames = whole.text["entity"].mask, whole.video["entity"].mask
    target, predicted = torch.randn(4, 5, 4, dtype=torch.float64), whole.predicted["entity"].detach()
    expected = 0.0
    for b in range(4):
        t, p = target[b][words[b]][:, frames[b]], predicted[b][words[b]][:, frames[b]]
        expected += sum(divergence(t[i], p[i]) for i in range(len(t))) / len(t)
        expected += sum(divergence(t[:, j], p[:, j]) for j in range(t.shape[1])) / t.shape[1]
    assert alignment_loss(predicted, target, words, frames).item() == pytest.approx(expected)
    assert alignment_loss(target, target, words, frames).item() == pytest.approx(0, abs=1e-12)


def test_alignment_ignores_padding_and_leaves_the_target_alone() -> None:
    whole = encoded(4, seed=3)
    words, frames = whole.text["entity"].mask, whole.video["entity"].mask
    absent = ~(words[:, :, None] & frames[:, None, :])
    target = torch.randn(4, 5, 4, dtype=torch.float64, requires_grad=True)
    predicted = whole.predicted["entity"]
    loss = alignment_loss(predicted, target, words, frames)
    loss.backward()
    assert target.grad is None
    assert (
        predicted.grad is not None and (predicted.grad[absent] == 0).all() and predicted.grad.isfinite().all()
    )
    dirty = alignment_loss(
        predicted.masked_fill(absent, 1e9), target.masked_fill(absent, -1e9), words, frames
    )
    assert dirty.item() == loss.item()


def test_distillation_is_its_formula() -> None:
    student, teacher = torch.randn(2, 3, 5, dtype=torch.float64)
    expected = sum(divergence(t, s) for t, s in zip(teacher, student, strict=True))
    teacher.requires_grad_(), student.requires_grad_()
    loss = distillation_loss(student, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(expected)
    assert teacher.grad is None and student.grad is not None


def test_the_loss_is_the_weighted_sum_of_its_parts() -> None:
    whole, settings = encoded(5), LossSettings(interaction=0.7, distillation=1.3)
    losses = hbi_loss(whole, whole, 0, settings, 5)
    expected = 0.0
    logits = {level: 14 * weighted_similarity(whole.text[level], whole.video[level]) for level in LEVELS}
    for level in LEVELS:
        target = torch.arange(5)
        cross = torch.nn.functional.cross_entropy
        contrast = (cross(logits[level], target) + cross(logits[level].T, target)) / 2
        assert losses[f"contrastive/{level}"].item() == pytest.approx(contrast.item())
        expected += contrast.item() + 0.7 * losses[f"alignment/{level}"].item()
        if level != "entity":
            both = zip(
                torch.cat([logits["entity"], logits["entity"].T]),
                torch.cat([logits[level], logits[level].T]),
                strict=True,
            )
            distillation = sum(divergence(t, s) for t, s in both) / 5
            assert losses[f"distillation/{level}"].item() == pytest.approx(distillation)
            expected += 1.3 * distillation
    assert losses["loss"].item() == pytest.approx(expected)
    assert "distillation/entity" not in losses


def test_a_teacher_tells_how_near_the_texts_are_to_the_videos() -> None:
    whole, teacher = encoded(5), encoded(5, seed=1)
    teacher = teacher._replace(video=whole.video)
    plain = LossSettings(interaction=0.0, distillation=0.0)
    untaught = hbi_loss(whole, whole, 0, plain, 5)
    taught = with_teacher(whole, teacher)
    losses = hbi_loss(taught, taught, 0, replace(plain, teacher=1.3), 5)
    student, told = (
        14 * weighted_similarity(e.text["entity"], whole.video["entity"]) for e in (whole, teacher)
    )
    both = zip(torch.cat([told, told.T]), torch.cat([student, student.T]), strict=True)
    expected = sum(divergence(t, s) for t, s in both) / 5
    assert expected > 1e-3 and losses["teacher"].item() == pytest.approx(expected)
    assert losses["loss"].item() == pytest.approx(untaught["loss"].item() + 1.3 * expected)
    with pytest.raises(ValueError, match=r"teacher is 1\.0, must be 0 in the published objective"):
        LossSettings(teacher=1.0, objective="published")


def test_the_target_is_the_exact_interaction() -> None:
    whole = encoded(3)
    targets = interaction_targets(whole, LossSettings(target_scale=10.0))
    for level in LEVELS:
        text, video = whole.text[level], whole.video[level]
        truth = enumerated_interaction(
            pair_similarity(text, video), text.logits, video.logits, text.mask, video.mask
        )
        assert torch.allclose(targets[level], 10 * truth, atol=1e-7)
        assert not targets[level].requires_grad
    estimated = encoded(3, estimated=True)
    assert (
        interaction_targets(estimated, LossSettings(interaction=1.0, distillation=2.0, target="estimator"))
        is estimated.estimated
    )
    with pytest.raises(ValueError, match="has no estimator"):
        interaction_targets(whole, LossSettings(interaction=1.0, distillation=2.0, target="estimator"))


@pytest.mark.parametrize(
    "settings",
    [
        LossSettings(interaction=1.0, distillation=2.0),
        LossSettings(interaction=1.0, distillation=2.0, chunk=2),
        LossSettings(interaction=1.0, distillation=2.0, objective="published"),
    ],
)
@pytest.mark.parametrize("cuts", [(0, 3, 7), (0, 0, 5, 7), (0, 7)])
def test_shares_of_ranks_add_up(settings: LossSettings, cuts: tuple[int, ...]) -> None:
    """Loss and gradient of one process that holds all, from ranks of unequal sizes, one of them empty."""
    whole = encoded(7, seed=1, estimated=True)
    expected = hbi_loss(whole, whole, 0, settings, 7)
    gradients = torch.autograd.grad(expected["loss"], leaves(whole), allow_unused=True)
    shares = [
        hbi_loss(rows(whole, first, last), whole, first, settings, 7)
        for first, last in itertools.pairwise(cuts)
    ]
    for name in expected:
        assert sum(share[name].item() for share in shares) == pytest.approx(expected[name].item(), rel=1e-9)
    total = torch.stack([share["loss"] for share in shares]).sum()
    for ours, theirs in zip(
        gradients, torch.autograd.grad(total, leaves(whole), allow_unused=True), strict=True
    ):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert torch.allclose(ours, theirs, atol=1e-12)


def test_published_loss_differs_where_its_faults_are() -> None:
    whole = encoded(6, estimated=True)
    losses = published_loss(whole, LossSettings(interaction=1.0, distillation=2.0, objective="published"))
    ours = hbi_loss(whole, whole, 0, LossSettings(interaction=1.0, distillation=2.0, target="estimator"), 6)
    assert losses["alignment/entity"] < ours["alignment/entity"] / 2  # averaged over elements
    assert losses["distillation/action"] < ours["distillation/action"] / 2  # without the logit scale
    # Its teacher learns too: the entity level's weights get a gradient from the distillation alone.
    gradient = torch.autograd.grad(losses["distillation/action"], whole.text["entity"].logits)[0]
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize(
    ("field", "value"),
    [("chunk", 0), ("target_scale", 0.0), ("interaction", -1.0), ("distillation", float("nan"))],
)
def test_settings_are_checked(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"LossSettings\.{field} is"):
        LossSettings(**{field: value})  # type: ignore[arg-type]


def published_mean(student: Tensor, teacher: Tensor, across: int) -> Tensor:
    """A divergence as the published code reduces it: averaged over every element."""
    divergence = torch.nn.functional.kl_div(
        student.log_softmax(across), teacher.softmax(across), reduction="none"
    )
    return divergence.mean()


def test_the_default_weights_have_the_published_strength() -> None:
    generator = torch.Generator().manual_seed(0)
    pairs, tokens, scale = 128, 12, 100.0
    predicted, target = (
        torch.randn(pairs, tokens, tokens, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    everyone = torch.ones(pairs, tokens, dtype=torch.bool)
    published = published_mean(predicted, target, 2) + published_mean(predicted, target, 1)
    ours = LossSettings().interaction * alignment_loss(predicted, target, everyone, everyone) / pairs
    torch.testing.assert_close(ours, published)
    student, teacher = (
        1e-3 * torch.randn(pairs, pairs, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    published = 2 * published_mean(student, teacher, 1)
    ours = LossSettings().distillation * distillation_loss(scale * student, scale * teacher) / pairs
    assert float(ours / published) == pytest.approx(2e-6 * pairs * scale**2 / 2, rel=0.05)
    assert float(ours / published) == pytest.approx(1, rel=0.4)


def test_a_level_without_weight_has_no_loss_of_any_kind() -> None:
    whole = encoded(5)
    all_of_it = hbi_loss(whole, whole, 0, LossSettings(interaction=0.5, distillation=1.0), 5)
    settings = LossSettings(levels=(2.0, 0.0, 0.5), interaction=0.5, distillation=1.0)
    losses = hbi_loss(whole, whole, 0, settings, 5)
    assert not [name for name in losses if name.endswith("/action")]
    expected = 2.0 * all_of_it["contrastive/entity"] + 0.5 * all_of_it["contrastive/event"]
    expected += 0.5 * (all_of_it["alignment/entity"] + all_of_it["alignment/event"])
    torch.testing.assert_close(losses["loss"], expected + all_of_it["distillation/event"])


@pytest.mark.parametrize("levels", [(0.0, 1.0, 1.0), (1.0, -1.0, 0.0), (1.0, float("nan"), 1.0)])
def test_the_entity_level_is_always_learned(levels: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match=r"LossSettings\.levels is"):
        LossSettings(levels=levels)
