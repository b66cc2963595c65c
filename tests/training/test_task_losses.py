"""The losses of questions and captions: the published formulas, and the same over micro-batches and over ranks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hbi.model.config import AnswerConfig, LossSettings
from hbi.model.hbi import HBI, Encoded
from hbi.model.heads import HeadInputs
from hbi.model.levels import LEVELS
from hbi.model.losses import alignment_loss, interaction_targets
from hbi.model.similarity import weighted_similarity
from hbi.model.tokenizer import tokenize
from hbi.model.weights import build_model
from hbi.training.data.batch import Batch
from hbi.training.parallel import Process, averaging
from hbi.training.settings import ExchangeSettings, HeadSettings, TrainConfig
from hbi.training.tasks import HeadTasks
from hbi.training.tokenizers import tokenizer_of
from tests.support.ranks import start_ranks
from tests.support.task_runs import both_heads, first_batch, resolved
from tests.support.training_shards import make_shards, tiny_model

PUBLISHED = HeadSettings(texts_per_clip=2, qa_pairs=0.5, qa_distillation=2.0)
LOSSES: dict[str, dict[str, Any]] = {
    "qa": {"task": ("qa",)},
    "caption": {"task": ("caption",)},
    "qa with pairs": {"task": ("qa",), "heads": PUBLISHED, "loss": LossSettings(interaction=1.0)},
    "qa with one level's pairs": {
        "task": ("qa",),
        "heads": PUBLISHED,
        "loss": LossSettings(levels=(1.0, 0.0, 0.0), interaction=0.0),
    },
}
RANKS = {
    ("qa", 3): "gather",
    ("caption", 5): "gather",
    ("caption", 0): "gather",
    ("qa with pairs", 5): "gather",
    ("qa with pairs", 0): "gather",
    ("qa with pairs", 3): "ring",
    ("qa with one level's pairs", 2): "gather",
}
"""Losses, and how many of the batch's clips the first of two ranks has; how tokens travel."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("losses") / "shards"
    make_shards(folder, train=[9], questions=True)
    return folder


@pytest.fixture(scope="module")
def runs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[TrainConfig, Batch]]:
    """The resolved run of each loss, and a batch of it; the runs have one folder."""
    out = shards.parent / "out"
    configs = {name: resolved(both_heads(**changes), shards, out) for name, changes in LOSSES.items()}
    return {name: (config, first_batch(config, shards)) for name, config in configs.items()}


def gradients(
    config: TrainConfig, batch: Batch, out: Path, process: Process | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    process = process or Process.current()
    torch.manual_seed(0)
    model = build_model(config.model).train()
    wrapped: Any = model
    if process.world_size > 1:
        wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    tasks = HeadTasks(config, tokenizer_of(config, str(out)), process)
    losses = tasks.backward(
        lambda inputs: wrapped(*inputs, loss=config.loss), batch, lambda on: averaging(wrapped, on)
    )
    return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def alike(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.allclose(value, two[name], rtol=1e-4, atol=1e-5), name


# --- the published loss ---------------------------------------------------------------------------------------------


def asked(config: TrainConfig, batch: Batch, out: Path) -> tuple[HBI, dict[str, Tensor], Encoded]:
    """The model, its answers' logits and its pairs, of a whole batch in one graph."""
    torch.manual_seed(0)
    model = build_model(config.model).train()
    ids, mask = tokenize(tokenizer_of(config, str(out)), batch.captions, config.model.words)
    head = HeadInputs("qa", torch.tensor(batch.video_of_text), None, pairs=True)
    logits, pairs = model(ids, mask, batch.video, batch.video_mask, head)
    return model, logits, pairs


def published_answers_loss(logits: dict[str, Tensor], labels: Tensor, detached: bool) -> Tensor:
    """Cross entropies of the three classifiers, and twice the mean divergence of two of them from the first."""
    total = torch.zeros(())
    entity = logits["entity"].softmax(1)
    entity = entity.detach() if detached else entity
    for level in LEVELS:
        shares = logits[level].softmax(1)
        total = total - shares[torch.arange(len(labels)), labels].log().mean()
        if level != "entity":
            total = total + 2.0 * (entity * (entity.log() - shares.log())).mean()
    return total


def test_the_published_loss_of_questions_with_the_exact_target(shards: Path, tmp_path: Path) -> None:
    """By loops: each question told from those of other videos, and each video's from the questions of others."""
    model = tiny_model(answers=AnswerConfig("published", 10, dropout=0.0))
    settings = LossSettings(interaction=1.0)
    config = resolved(both_heads(task=("qa",), model=model, heads=PUBLISHED, loss=settings), shards, tmp_path)
    batch = first_batch(config, shards)
    owners, labels = batch.video_of_text, torch.tensor(batch.answers)
    assert len(set(owners)) < len(owners)
    reference, logits, pairs = asked(config, batch, tmp_path)
    expected = published_answers_loss(logits, labels, detached=True)
    targets = interaction_targets(pairs, settings)
    for level in LEVELS:
        text, video = pairs.text[level], pairs.video[level]
        similarity = pairs.logit_scale * weighted_similarity(text, video)
        terms = []
        for row, own in enumerate(owners):
            others = [k for k, other in enumerate(owners) if other != own or k == row]
            both = (similarity[row], similarity[:, row])
            terms += [told[others].logsumexp(0) - told[row] for told in both]
        aligned = alignment_loss(pairs.predicted[level], targets[level], text.mask, video.mask)
        expected = expected + 0.5 * (torch.stack(terms).sum() / 2 + aligned) / len(owners)
    expected = expected / 3  # the whole of it is a mean over levels here
    expected.backward()
    losses, found = gradients(config, batch, tmp_path)
    assert torch.allclose(losses["loss"], expected, rtol=1e-5)
    alike(found, {name: p.grad for name, p in reference.named_parameters() if p.grad is not None})
    assert losses["qa/alignment/event"] > 0 and losses["qa/distillation"] > 0


def test_the_published_loss_of_questions_with_its_faults(shards: Path, tmp_path: Path) -> None:
    """From the description of the published code: every mean over elements, transposition, padding, no detaching."""
    model = tiny_model(
        answers=AnswerConfig("published", 10, dropout=0.0), estimator=True, masking="published"
    )
    config = both_heads(
        task=("qa",),
        model=model,
        heads=replace(PUBLISHED, texts_per_clip=1),
        loss=LossSettings(interaction=1.0, distillation=2.0, objective="published"),
    )
    config = resolved(config, shards, tmp_path)
    batch = first_batch(config, shards)
    reference, logits, pairs = asked(config, batch, tmp_path)
    expected = published_answers_loss(logits, torch.tensor(batch.answers), detached=False)

    def divergence(student: Tensor, teacher: Tensor) -> Tensor:
        share = teacher.softmax(-1)
        return (share * (share.log() - student.softmax(-1).log())).mean()

    for level in LEVELS:
        text, video = pairs.text[level], pairs.video[level]
        similarity = pairs.logit_scale * weighted_similarity(text, video, padding="zero")
        own = torch.arange(len(similarity))
        contrast = -(similarity.log_softmax(1)[own, own] + similarity.log_softmax(0)[own, own]).mean() / 2
        student, teacher = pairs.predicted[level], pairs.estimated[level]
        aligned = divergence(student, teacher) + divergence(
            student.permute(2, 1, 0), teacher.permute(2, 1, 0)
        )
        expected = expected + 0.5 * (contrast + aligned)
    expected = expected / 3
    expected.backward()
    losses, found = gradients(config, batch, tmp_path)
    assert torch.allclose(losses["loss"], expected, rtol=1e-5)
    alike(found, {name: p.grad for name, p in reference.named_parameters() if p.grad is not None})


@pytest.mark.parametrize(
    ("heads", "loss", "message"),
    [
        (HeadSettings(qa_pairs=-1), LossSettings(), "--set.heads.qa-pairs -1: must be 0 or more"),
        (
            HeadSettings(qa_distillation=-1),
            LossSettings(),
            "--set.heads.qa-distillation -1: must be 0 or more",
        ),
        (
            PUBLISHED,
            LossSettings(objective="published"),
            "--set.heads.texts-per-clip 2: must be 1 where --set.loss.objective is published",
        ),
    ],
)
def test_settings_that_do_not_fit(heads: HeadSettings, loss: LossSettings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        both_heads(heads=heads, loss=loss)


# --- parts of the batch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("pieces", [3, 9])
def test_micro_batches_change_nothing(name: str, pieces: int, runs: dict, shards: Path) -> None:
    config, batch = runs[name]
    out = shards.parent / "out"
    losses, whole = gradients(config, batch, out)
    cut = replace(config, data=replace(config.data, accumulate=pieces))
    others, in_parts = gradients(cut, batch, out)
    assert {"loss", f"{name.split()[0]}/cross_entropy"} <= losses.keys()
    assert any("contrastive" in part for part in losses) == ("pairs" in name)
    alike(losses, others)
    alike(whole, in_parts)


def test_weights_of_the_tasks_scale_the_gradient(runs: dict, shards: Path) -> None:
    for name, (config, batch) in runs.items():
        heavier = replace(config, heads=replace(config.heads, qa_weight=3.0, caption_weight=3.0))
        one, three = (gradients(each, batch, shards.parent / "out") for each in (config, heavier))
        assert torch.allclose(3 * one[0].pop("loss"), three[0].pop("loss")), name
        alike(one[0], three[0])
        alike({key: 3 * gradient for key, gradient in one[1].items()}, three[1])


def part(batch: Batch, clips: range) -> Batch:
    texts = [i for i, owner in enumerate(batch.video_of_text) if owner in clips]
    return replace(
        batch,
        video=batch.video[clips.start : clips.stop],
        video_mask=batch.video_mask[clips.start : clips.stop],
        captions=[batch.captions[i] for i in texts],
        answers=[batch.answers[i] for i in texts] if batch.answers else [],
        video_of_text=[batch.video_of_text[i] - clips.start for i in texts],
    )


def _rank(rank: int, runs: dict[str, tuple[TrainConfig, Batch]], folder: Path) -> None:
    """One of two processes, through all cases."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    process, results = Process.current(), {}
    for (name, cut), form in RANKS.items():
        config, batch = runs[name]
        config = replace(config, compute=replace(config.compute, exchange=ExchangeSettings(form)))  # type: ignore[arg-type]
        mine = part(batch, range(cut) if rank == 0 else range(cut, len(batch.video)))
        losses, found = gradients(config, mine, folder, process)
        means = {key: process.all_reduce(loss) / 2 for key, loss in losses.items()}
        results[f"{name} {cut}"] = means, found
    if rank == 0:
        torch.save(results, folder / "found.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_two_ranks(runs: dict, shards: Path) -> dict:
    out = shards.parent / "out"
    start_ranks(_rank, (runs, out), 2)
    return torch.load(out / "found.pt", weights_only=True)


@pytest.mark.parametrize(("name", "cut"), RANKS)
def test_two_ranks_are_one_process(name: str, cut: int, of_two_ranks: dict, runs: dict, shards: Path) -> None:
    """With unequal parts, and with a rank that has nothing."""
    losses, alone = gradients(*runs[name], shards.parent / "out")
    found_losses, found = of_two_ranks[f"{name} {cut}"]
    alike(losses, found_losses)
    alike(alone, found)
