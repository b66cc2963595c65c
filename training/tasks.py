"""The losses of the heads beside retrieval, over micro-batches and ranks: questions to answer, captions to write."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hbi.model.hbi import Encoded
from hbi.model.heads import HeadInputs
from hbi.model.heads.caption import caption_loss
from hbi.model.heads.qa import answer_distillation, answer_loss
from hbi.model.levels import LEVELS
from hbi.model.tokenizer import tokenize, tokenize_captions
from hbi.training.contrast import backward_into, contrast, token_gradients
from hbi.training.data.batch import Batch
from hbi.training.parallel import Process
from hbi.training.settings import TrainConfig


class HeadTasks:
    """Steps on questions and on captions.

    Their losses are means over the questions or the words of the global batch, so that ranks and micro-batches change
    nothing: each part counts as much as it holds. Of L levels,

        questions   1/L ( sum over levels ( cross entropy + qa_pairs * (contrastive + interaction * alignment) )
                          + qa_distillation * distillation )
        captions    cross entropy

    with the contrast and the alignment of `hbi_loss` on the questions and their videos, as the published code has them;
    with both weights 0 no question meets another's video, and nothing is gathered. Questions of one video are not told
    from each other; the published code shows one of a video at a time.
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
        call: Callable[[tuple[Any, ...]], Any],
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
        parts = list(self._micro_batches(batch, ids, mask))
        weight = self.config.heads.qa_weight if batch.task == "qa" else self.config.heads.caption_weight
        losses = {"loss": torch.zeros((), device=self.process.device)}
        encoded: list[Any] = []
        gradients: list[list[Tensor]] = []
        if self._with_pairs(batch):
            with torch.set_grad_enabled(len(parts) == 1):
                encoded = [call(inputs) for inputs, _ in parts]
            owners = torch.tensor(batch.video_of_text, dtype=torch.int64, device=self.process.device)
            found, gradients = token_gradients(
                [pairs for _, pairs in encoded], lambda tokens: self._contrast(tokens, owners, weight)
            )
            losses = {name if name == "loss" else f"qa/{name}": loss for name, loss in found.items()}
        for number, (inputs, labels) in enumerate(parts, 1):
            with averaging(number == len(parts)):
                output: Any = encoded[0] if encoded and len(parts) == 1 else call(inputs)
                logits, *pairs = output if encoded else (output,)
                sums = self._sums(logits, inputs, labels)
                each = {name: loss / count * self.process.world_size for name, loss in sums.items()}
                each["loss"] = weight * each["loss"]
                if pairs:
                    backward_into(pairs[0], gradients[number - 1], each["loss"])
                else:
                    each["loss"].backward()
            losses |= {name: losses.get(name, 0.0) + loss.detach() for name, loss in each.items()}
        return losses

    def _with_pairs(self, batch: Batch) -> bool:
        """Whether this step's questions are told from those of other videos."""
        return batch.task == "qa" and self.config.heads.qa_pairs > 0

    def _contrast(self, pairs: Encoded, owners: Tensor, weight: float) -> dict[str, Tensor]:
        """The losses of questions with their videos over all ranks, "loss" as much as it counts in the whole."""
        settings = replace(self.config.loss, distillation=0.0)  # what is distilled here are answers
        losses = contrast(pairs, settings, exchange=self.config.compute.exchange, videos=owners)
        return losses | {"loss": weight * self.config.heads.qa_pairs / len(LEVELS) * losses["loss"]}

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
            candidates = self.candidates if batch.task == "qa" else None
            head = HeadInputs(batch.task, owner, candidates, self._with_pairs(batch))  # type: ignore[arg-type]
            yield (*moved, head), labels[rows].to(device) if batch.task == "qa" else labels

    def _sums(self, logits: dict[str, Tensor], inputs: tuple[Any, ...], labels: Tensor) -> dict[str, Tensor]:
        """The losses summed over the questions, or over the words that follow a word; "loss" is the weighted one."""
        with torch.autocast(self.process.device.type, enabled=False):
            logits = {name: value.float() for name, value in logits.items()}
            if "caption" in logits:
                ids, mask = inputs[:2]
                smoothing = self.config.heads.smoothing
                loss = caption_loss(logits["caption"][:, :-1], ids[:, 1:], mask[:, 1:], smoothing)
                return {"loss": loss, "caption/cross_entropy": loss}
            loss, weight = answer_loss(logits, labels), self.config.heads.qa_distillation
            if not weight:
                return {"loss": loss, "qa/cross_entropy": loss}
            distilled = answer_distillation(logits, self.config.loss.objective == "published")
            total = loss + weight / len(LEVELS) * distilled
            return {"loss": total, "qa/cross_entropy": loss, "qa/distillation": distilled}
