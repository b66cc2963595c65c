"""Captions written for the clips of a split, against those that people gave them."""

import torch

from hbi.model.caption_metrics import caption_metrics
from hbi.model.config import DecodeSettings
from hbi.model.meteor import has_meteor, meteor
from hbi.model.tokenizer import caption_marks, detokenize
from hbi.training.evaluate.answers import HeadResult
from hbi.training.evaluate.encode import NothingToMeasure, SplitEncoder, grouped, readable, share


@torch.no_grad()
def evaluate_captions(
    encoder: SplitEncoder,
    split: str,
    settings: DecodeSettings | None = None,
    strict: bool = False,
    with_meteor: bool = False,
) -> HeadResult:
    """BLEU, ROUGE-L and CIDEr of a model's captions on a split, and METEOR where it is asked for and installed. All
    ranks call it, with the same arguments.

    ValueError where the split is not there or holds no captioned clip, or the model writes none; with `strict` also
    where a clip cannot be read.
    """
    model, process = encoder.model, encoder.process
    settings = settings or DecodeSettings()
    marks = caption_marks(encoder.tokenizer)
    ours = share(sum(shard.samples for shard in encoder.index.of_split(split)), process)
    written: list[tuple[str, str, list[str]]] = []
    reasons: list[str] = []
    was_training = model.training
    model.eval()
    for group in grouped(
        readable(encoder.index, split, ours, model.config.frames, reasons), encoder.protocol.batch
    ):
        told = [(s, frames) for s, frames in group if any(caption.strip() for caption in s.captions)]
        if told:
            video, mask = encoder.padded([frames for _, frames in told])
            ids = model.write_captions(model.encode_video(video, mask), mask, marks, settings)
            for (sample, _), caption in zip(told, detokenize(encoder.tokenizer, ids), strict=True):
                written.append((sample.id, caption, [text for text in sample.captions if text.strip()]))
    model.train(was_training)
    written = encoder.collected(written, reasons, split, strict)
    if not written:
        raise NothingToMeasure(
            f"{encoder.index.folder}: no clip of split {split!r} has a caption: nothing to compare with"
        )
    truths = {id: references for id, _, references in written}
    captions = {id: caption for id, caption, _ in written}
    found = caption_metrics(truths, captions)
    if with_meteor and has_meteor():
        found["METEOR"] = process.of_first(meteor(truths, captions) if process.first else 0.0)
    metrics = {f"{split}/caption/{name}": value for name, value in (found | {"videos": len(written)}).items()}
    rows = [{"id": id, "caption": caption, "truth": " | ".join(truth)} for id, caption, truth in written]
    return HeadResult(metrics, rows)
