"""The losses of the heads beside retrieval, over micro-batches and ranks: questions to answer, captions to write."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from hbi.model.hbi import HeadInputs
from hbi.model.heads.caption import caption_loss
from hbi.model.heads.qa import answer_loss
from hbi.model.tokenizer import tokenize, tokenize_captions
from hbi.training.data.batch import Batch
from hbi.training.parallel import Process
from hbi.training.settings import TrainConfig


class HeadTasks:
    """Steps on questions and on captions.

    Their losses are means over the questions or the words of the global batch, so that ranks and micro-batches change
    nothing: each part counts as much as it holds. No text meets another's video, hence nothing is gathered.
    """

    def __init__(self, config: TrainConfig, tokenizer: Any, process: Process) -> None:
        """ValueError where questions are trained and no answer is known."""
        self.config, self.tokenizer, self.process = config, tokenizer, process
        self.candidates: tuple[Tensor, Tensor] | None = None
        if "qa" in config.task:
            if not config.heads.vocabulary:
                raise ValueError("--set.heads.vocabulary: empty: no training question has an answer")
            if config.model.answers.head == "open":
                ids, mask = tokenize(tokenizer, config.heads.vocabulary, config.model.words)
                longest = int(mask.sum(1).max())
                self.candidates = ids[:, :longest].to(process.device), mask[:, :longest].to(process.device)

    def backward(
        self,
        call: Callable[[tuple[Any, ...]], dict[str, Tensor]],
        batch: Batch,
        averaging: Callable[[bool], AbstractContextManager[None]],
    ) -> dict[str, Tensor]:
        """The losses of the global batch, and its gradient added to that of the weights behind `call`.

        call: the model, on what `HBI.forward` takes. averaging(on): a context in which backward passes average
        gradients over the ranks, or do not. Each part of the loss counts `world_size` times, since ranks average.
        """
        ids, mask = self._tokens(batch)
        counted = mask[:, 1:].sum() if batch.task == "caption" else torch.tensor(len(ids))
        count = self.process.all_reduce(counted.to(self.process.device, torch.float32)).clamp(min=1)
        total = torch.zeros((), device=self.process.device)
        parts = list(self._micro_batches(batch, ids, mask))
        weight = self.config.heads.qa_weight if batch.task == "qa" else self.config.heads.caption_weight
        for number, (inputs, labels) in enumerate(parts, 1):
            with averaging(number == len(parts)):
                loss = self._loss(call(inputs), inputs, labels) / count * self.process.world_size
                (weight * loss).backward()
            total = total + loss.detach()
        return {"loss": weight * total, f"{batch.task}/cross_entropy": total}

    def _tokens(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Ids and mask of the texts, no longer than the longest of them needs."""
        if batch.task == "qa":
            ids, mask = tokenize(self.tokenizer, batch.captions, self.config.model.words)
            return ids, mask
        return tokenize_captions(self.tokenizer, batch.captions, self.config.model.captions.words)

    def _micro_batches(
        self, batch: Batch, ids: Tensor, mask: Tensor
    ) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
        """What the model takes of each part, and the answers; texts stand in the order of their videos."""
        device = self.process.device
        owners = torch.tensor(batch.video_of_text, dtype=torch.int64)
        labels = torch.tensor(batch.answers, dtype=torch.int64)
        for videos in torch.arange(len(batch.video)).tensor_split(self.config.data.accumulate):
            first = int(videos[0]) if len(videos) else 0
            rows = ((owners >= first) & (owners < first + len(videos))).nonzero()[:, 0]
            tensors = (
                ids[rows],
                mask[rows],
                batch.video[videos],
                batch.video_mask[videos],
                owners[rows] - first,
            )
            *moved, owner = (tensor.to(device, non_blocking=True) for tensor in tensors)
            head = HeadInputs(batch.task, owner, self.candidates if batch.task == "qa" else None)  # type: ignore[arg-type]
            yield (*moved, head), labels[rows].to(device) if batch.task == "qa" else labels

    def _loss(self, logits: dict[str, Tensor], inputs: tuple[Any, ...], labels: Tensor) -> Tensor:
        """Summed over the questions, or over the words that follow a word."""
        with torch.autocast(self.process.device.type, enabled=False):
            if "caption" not in logits:
                return answer_loss({level: value.float() for level, value in logits.items()}, labels)
            ids, mask = inputs[:2]
            smoothing = self.config.heads.smoothing
            return caption_loss(logits["caption"][:, :-1].float(), ids[:, 1:], mask[:, 1:], smoothing)
