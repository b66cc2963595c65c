"""Questions of a split, answered: accuracy by both protocols and by type, beside what guessing scores."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from hbi.model.answer_metrics import answer_metrics, question_type
from hbi.model.tokenizer import tokenize
from hbi.training.evaluate.encode import NothingToMeasure, SplitEncoder, grouped, readable, share

QUESTIONS_AT_ONCE = 256


@dataclass(frozen=True)
class HeadResult:
    """What a head did on a split."""

    metrics: dict[str, float]
    """By name, as `val/qa/accuracy`; the same on all ranks."""
    rows: list[dict[str, str]] = field(repr=False)
    """Each thing that it said, beside the truth; on the first rank alone."""


@torch.no_grad()
def evaluate_answers(
    encoder: SplitEncoder, split: str, training: Iterable[tuple[str, str]] = (), strict: bool = False
) -> HeadResult:
    """Accuracy of a model's answers on a split. All ranks call it, with the same arguments.

    training: (type, answer) of the training questions, where the baselines come from; without any, those of the split.
    An answer outside the vocabulary counts as wrong in `accuracy` and is left out of `accuracy_in_vocabulary`.

    ValueError where the split is not there or holds no question, or the model has no head for them; with `strict` also
    where a clip cannot be read.
    """
    model, process = encoder.model, encoder.process
    if model.answerer is None:
        raise ValueError("this model answers no questions: train one with --set.task qa")
    candidates = None
    if model.config.answers.head == "open":
        encoded = tokenize(encoder.tokenizer, model.vocabulary, model.config.words)
        candidates = encoded[0].to(process.device), encoded[1].to(process.device)
    ours = share(sum(shard.samples for shard in encoder.index.of_split(split)), process)
    rows: list[dict[str, str]] = []
    reasons: list[str] = []
    was_training = model.training
    model.eval()
    for group in grouped(
        readable(encoder.index, split, ours, model.config.frames, reasons), encoder.protocol.batch
    ):
        video, mask = encoder.padded([frames for _, frames in group])
        frames = model.encode_video(video, mask)
        asked = [(row, sample, entry) for row, (sample, _) in enumerate(group) for entry in sample.qa]
        for part in grouped(asked, QUESTIONS_AT_ONCE):
            encoded = tokenize(encoder.tokenizer, [e["question"] for *_, e in part], model.config.words)
            ids, words = (tensor.to(process.device) for tensor in encoded)
            own = torch.tensor([row for row, *_ in part], device=process.device)
            logits = model.answer_logits(ids, words, frames[own], mask[own], candidates)
            for (_, sample, entry), best in zip(part, logits.argmax(-1).tolist(), strict=True):
                kind = entry.get("type") or question_type(entry["question"])
                said = {"answer": model.vocabulary[best], "truth": entry["answer"], "type": kind}
                rows.append({"id": sample.id, "question": entry["question"], **said})
    model.train(was_training)
    rows = encoder.collected(rows, reasons, split, strict)
    if not rows:
        raise NothingToMeasure(
            f"{encoder.index.folder}: no clip of split {split!r} has a question: nothing to answer"
        )
    found = answer_metrics(
        [row["truth"] for row in rows],
        [row["answer"] for row in rows],
        [row["type"] for row in rows],
        vocabulary=set(model.vocabulary),
        training=list(training) or None,
    )
    metrics = {f"{split}/qa/{name}": value for name, value in (found | {"questions": len(rows)}).items()}
    return HeadResult(metrics, rows)
