"""Every text of a test against every video: the evaluation's blocks beside the model's own chunked similarity.

The blocks once in float32, and once with products in bfloat16 (`--set.evaluate.products bfloat16`).

python -m benchmarks.evaluation

Seconds are CPU seconds of this process on one thread, so that a busy machine does not decide it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from torch import Tensor

from benchmarks.report import report
from hbi.model.similarity import weighted_similarity
from hbi.model.tokens import Tokens
from hbi.training.evaluate.score import score


@dataclass(frozen=True)
class Bench:
    """What to measure: both ways to the same matrix, and how far they are apart."""

    sizes: tuple[tuple[int, int], ...] = ((1000, 500), (4000, 2000))
    """Texts and videos."""
    words: int = 24
    """Places of a text; its words are 7 to as many, as captions are."""
    frames: int = 12
    """Of a video."""
    dim: int = 512
    """Of a token."""
    chunk: int = 256
    """Texts and videos that the model's own way compares at once."""

    def run(self) -> None:
        torch.set_num_threads(1)
        results: dict[str, Any] = {}
        for texts, videos in self.sizes:
            text = side(texts, self.words, min(7, self.words), self.dim)
            video = side(videos, self.frames, self.frames, self.dim)
            ours, found = seconds(lambda text=text, video=video: score(text, video))
            theirs, expected = seconds(
                lambda text=text, video=video: weighted_similarity(text, video, self.chunk)
            )
            products, _ = seconds(lambda text=text, video=video: bare_products(text, video))
            halves, rounded = seconds(
                lambda text=text, video=video: score(text, video, products=torch.bfloat16)
            )
            error, off = (float((way - expected).abs().max()) for way in (found, rounded))
            results[f"{texts} x {videos}"] = {
                "seconds": round(ours, 3), "chunked_seconds": round(theirs, 3),
                "products_seconds": round(products, 3), "times_faster": round(theirs / ours, 2), "largest_error": error,
                "bfloat16_seconds": round(halves, 3), "bfloat16_times_faster": round(theirs / halves, 2),
                "bfloat16_largest_error": off,
            }  # fmt: skip
            print(
                f"{texts} x {videos}: {ours:.2f} s beside {theirs:.2f} s, {theirs / ours:.2f} times faster, "
                f"{products:.2f} s of it for the bare products, "
                f"largest error {error:.1e}; in bfloat16 {halves:.2f} s, {theirs / halves:.2f} times faster, {off:.1e}",
                flush=True,
            )
        report("evaluation", results, words=self.words, frames=self.frames, dim=self.dim, chunk=self.chunk)


def side(count: int, n: int, shortest: int, dim: int) -> Tokens:
    """Tokens of noise, `shortest` to n of each present."""
    generator = torch.Generator().manual_seed(count)
    lengths = torch.randint(shortest, n + 1, (count, 1), generator=generator)
    tokens = torch.randn(count, n, dim, generator=generator)
    return Tokens(tokens, torch.randn(count, n, generator=generator), torch.arange(n) < lengths)


def bare_products(text: Tokens, video: Tokens) -> Tensor:
    """Every present word with every frame, in one order and nothing else: what no float32 way can be faster than."""
    words, frames = text.tokens[text.mask], video.tokens.flatten(0, 1).T.contiguous()
    found = words[:0]
    for block in words.split(1024):
        found = block @ frames
    return found


@torch.no_grad()
def seconds(work: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """CPU seconds of a run, and what came of it."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


if __name__ == "__main__":
    tyro.cli(Bench, description=__doc__).run()
