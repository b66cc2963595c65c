"""The weighted similarity of every text with every video, forward and backward: whole, and in chunks.

python -m benchmarks.similarity
"""

from collections.abc import Callable
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


def main(
    batches: tuple[int, ...] = (512, 2048),
    words: int = 24,
    frames: int = 12,
    dim: int = 512,
    chunks: tuple[int, ...] = (128,),
    repeats: int = 1,
    device: str = "",
) -> None:
    """Peak memory and time, whole and with each chunk, at each batch of pairs."""
    device = device or best_device()
    results: dict[str, Any] = {}
    for batch in batches:
        for chunk in (None, *chunks):
            measured = measure(
                prepare,
                device=device,
                repeats=repeats,
                batch=batch,
                words=words,
                frames=frames,
                dim=dim,
                chunk=chunk,
            )
            name = "whole" if chunk is None else f"chunk_{chunk}"
            results[f"batch_{batch}_{name}"] = measured.plain() | {"loss": measured.result}
            print(f"batch {batch:5}  {name:10} {measured}", flush=True)
    report("similarity", results, device=device, words=words, frames=frames, dim=dim, repeats=repeats)


if __name__ == "__main__":
    tyro.cli(main)
