"""Retrieval over a split of shards: every clip against every caption, in one process or on all ranks.

Each rank encodes its part of the clips and their captions; the tokens are gathered, each rank scores its part of the
texts against all videos, and the first rank counts. No pair is encoded twice, and what is published as `rate` decides
which levels count: the entity level alone, by default.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from hbi.model.hbi import HBI, NO_RECONSTRUCTION
from hbi.model.metrics import retrieval_metrics
from hbi.model.tokens import Tokens
from hbi.pipelines.sample import ShardIndex
from hbi.training.answers import training_answers
from hbi.training.evaluate.answers import HeadResult, evaluate_answers
from hbi.training.evaluate.captions import evaluate_captions
from hbi.training.evaluate.encode import EncodedSplit, NothingToMeasure, SplitEncoder, level_weights, share
from hbi.training.evaluate.explanations import explanation_metrics
from hbi.training.evaluate.score import reranked, score
from hbi.training.init import ModelSource, load_named
from hbi.training.parallel import Process
from hbi.training.settings import EvalProtocol


@dataclass(frozen=True)
class EvalResult:
    """What an evaluation found."""

    metrics: dict[str, float]
    """By name: `val/t2v/R@1`, ..., and how many texts and videos there were. The same on all ranks."""
    similarity: Float[Tensor, "texts videos"] | None = field(repr=False)
    """The scores, on the CPU of the first rank; None on others."""
    video_of_text: Int[Tensor, " texts"] = field(repr=False)
    """Which video (column) each text (row) describes."""
    ids: list[str] = field(repr=False)
    """The videos' ids."""


@torch.no_grad()
def evaluate(encoder: SplitEncoder, split: str, strict: bool = False) -> EvalResult:
    """Retrieval metrics of a model on a split, both ways. All ranks call it, with the same arguments.

    Clips without captions are passed over and counted (`<split>/uncaptioned`), and so are clips that cannot be read
    (`<split>/unread`), unless `strict`: then ValueError says which shard is at fault. ValueError too if the split is
    not there, or holds no captioned clip, or reranking is asked of a model that reconstructs nothing.
    """
    model, protocol, process = encoder.model, encoder.protocol, encoder.process
    if protocol.rerank and model.reconstruction is None:  # on all ranks
        raise ValueError(NO_RECONSTRUCTION)
    was_training = model.training
    model.eval()
    try:
        clips = encoder.encode(split)
        _check(clips, encoder.index, split, strict)
        scores = similarity(model, clips.text, clips.video, protocol, process)
        options: dict[str, Any] = {"dsl_temperature": 0.01} if protocol.dsl else {}
        if protocol.qbnorm:
            bank = encoder.encode("train", limit=protocol.qbnorm)
            options["text_bank"] = similarity(model, bank.text, clips.video, protocol, process)
            options["video_bank"] = similarity(model, clips.text, bank.video, protocol, process)
    finally:
        model.train(was_training)
    metrics: dict[str, float] = {}
    if scores is not None:
        found = retrieval_metrics(scores, clips.video_of_text.cpu(), **options)
        if protocol.rerank:
            again = reranked(model, clips.text, clips.video, scores, protocol.rerank)
            ranked = retrieval_metrics(again, clips.video_of_text.cpu())
            found |= {
                name.replace("t2v/", "t2v+rerank/"): value
                for name, value in ranked.items()
                if name.startswith("t2v/")
            }
        counts = {"texts": len(clips.video_of_text), "videos": len(clips.ids)}
        counts |= {"uncaptioned": clips.uncaptioned, "unread": clips.unread}
        metrics = {f"{split}/{name}": float(value) for name, value in (found | counts).items()}
    return EvalResult(process.of_first(metrics), scores, clips.video_of_text.cpu(), clips.ids)


def _check(clips: EncodedSplit, index: ShardIndex, split: str, strict: bool) -> None:
    if strict and clips.unread:
        raise ValueError(
            f"{index.folder}: {clips.unread} clips of {split} cannot be read ({clips.reasons[0]})"
        )
    if not len(clips.video_of_text):
        raise NothingToMeasure(
            f"{index.folder}: no clip of split {split!r} has a caption: nothing to retrieve"
        )


def similarity(
    model: HBI, text: dict[str, Tokens], video: dict[str, Tokens], protocol: EvalProtocol, process: Process
) -> Float[Tensor, "texts videos"] | None:
    """The weighted sum of the levels' similarities, a part of the texts on each rank; whole on the first one's CPU."""
    texts = len(next(iter(text.values())).mask)
    ours = share(texts, process)
    rows = slice(ours.start, ours.stop)
    scores = torch.zeros(len(ours), len(next(iter(video.values())).mask))
    published, products = model.config.masking == "published", getattr(torch, protocol.products)
    for level, rate in level_weights(protocol).items():
        part = Tokens(*(side[rows] for side in text[level]))
        scores += rate * score(part, video[level], published, products).cpu()
    return _to_first(
        scores, [len(share(texts, process, rank)) for rank in range(process.world_size)], process
    )


def _to_first(
    rows: Float[Tensor, "rows width"], counts: list[int], process: Process
) -> Float[Tensor, "all width"] | None:
    """The rows of all ranks (`counts` of them each) on the first rank's CPU."""
    if process.world_size == 1:
        return rows
    padded = torch.zeros(max(counts), rows.shape[1], device=process.device)
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts] if process.first else None
    dist.gather(padded, parts)
    return (
        None if parts is None else torch.cat([part[:n].cpu() for part, n in zip(parts, counts, strict=True)])
    )


def evaluate_named(
    source: ModelSource,
    shards: str,
    split: str = "test",
    protocol: EvalProtocol | None = None,
    explanations: int = 0,
    device: str | None = None,
) -> dict[str, float]:
    """`hbi evaluate`: metrics of what a model can do on a split, every clip of which must be readable.

    That is retrieval, and answers and captions where the model has the heads and the split the questions.

    explanations: how many matches to explain, for `explanation_metrics`.

    Raises ValueError, in one line, where the model, the shards or the split are not there or do not fit.
    """
    from tqdm import tqdm

    index = ShardIndex.read(shards)
    index.of_split(split)
    model, tokenizer = load_named(source, frames=index.settings.get("frames"))
    model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with tqdm(unit="clip", desc=f"encode {split}") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        process = Process.current(next(model.parameters()).device)
        encoder = SplitEncoder(model, tokenizer, index, process, protocol or EvalProtocol(), progress)
        metrics: dict[str, float] = {}
        nothing: list[NothingToMeasure] = []
        measures: list[Callable[[], EvalResult | HeadResult]] = [
            lambda: evaluate(encoder, split, strict=True)
        ]
        if model.vocabulary:
            trained = any(shard.split == "train" and shard.samples for shard in index.shards)
            asked = list(training_answers(index, "train")) if trained else []
            measures.append(lambda: evaluate_answers(encoder, split, asked, strict=True))
        if model.captioner is not None:
            measures.append(lambda: evaluate_captions(encoder, split, strict=True, with_meteor=True))
        for measure in measures:
            try:
                metrics |= measure().metrics
            except NothingToMeasure as error:
                nothing.append(error)
    if not metrics:
        raise nothing[0]
    if explanations:
        metrics |= explanation_metrics(model.cpu().eval(), tokenizer, index, split, explanations)
    return metrics
