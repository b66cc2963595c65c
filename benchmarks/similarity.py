"""The weighted similarity of every text with every video, forward and backward: whole, and in chunks.

python -m benchmarks.similarity
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import tyro

from benchmarks.report import best_device, measure, report
from hbi.model.similarity import weighted_similarity
from hbi.model.tokens import Tokens


def prepare(
    device: str, batch: int, words: int, frames: int, dim: int, chunk: int | None
) -> Callable[[], float]:
    """One forward and backward pass over batch x batch pairs."""
    generator = torch.Generator().manual_seed(0)

    def side(n: int) -> Tokens:
        mask = torch.arange(n) < torch.randint(1, n + 1, (batch, 1), generator=generator)
        tokens = torch.randn(batch, n, dim, generator=generator).to(device).requires_grad_()
        logits = torch.randn(batch, n, generator=generator).to(device).requires_grad_()
        return Tokens(tokens, logits, mask.to(device))

    text, video = side(words), side(frames)
    target = torch.arange(batch, device=device)

    def run() -> float:
        for tensor in (*text[:2], *video[:2]):
            tensor.grad = None
        loss = torch.nn.functional.cross_entropy(100 * weighted_similarity(text, video, chunk), target)
        loss.backward()
        return loss.item()

    return run


@dataclass(frozen=True)
class Bench:
    """What to measure: peak memory and time, whole and with each chunk, at each batch of pairs."""

    batches: tuple[int, ...] = (512, 2048)
    """Texts, and as many videos."""
    words: int = 24
    """Of a text."""
    frames: int = 12
    """Of a video."""
    dim: int = 512
    """Of a token."""
    chunks: tuple[int, ...] = (128,)
    """Texts and videos compared at once."""
    repeats: int = 1
    """Measured runs of each."""
    device: str = ""
    """cuda or cpu; empty: the best there is."""

    def run(self) -> None:
        device = self.device or best_device()
        sizes = {"words": self.words, "frames": self.frames, "dim": self.dim}
        results: dict[str, Any] = {}
        for batch in self.batches:
            for chunk in (None, *self.chunks):
                measured = measure(
                    prepare, device=device, repeats=self.repeats, batch=batch, chunk=chunk, **sizes
                )
                name = "whole" if chunk is None else f"chunk_{chunk}"
                results[f"batch_{batch}_{name}"] = measured.plain() | {"loss": measured.result}
                print(f"batch {batch:5}  {name:10} {measured}", flush=True)
        report("similarity", results, device=device, repeats=self.repeats, **sizes)


if __name__ == "__main__":
    tyro.cli(Bench, description=__doc__).run()
