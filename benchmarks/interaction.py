"""The interaction side by side: exact in float32 and in float64, sampled with 100 and with 1,000 draws; and the learned
predictor.

python -m benchmarks.interaction
"""

from collections.abc import Callable
from typing import Any

import torch
import tyro
from torch import Tensor

from benchmarks.report import best_device, measure, report
from hbi.model.banzhaf import enumerated_interaction, exact_interaction, sampled_interaction
from hbi.model.predictor import InteractionPredictor

REFERENCE_NODES = 600


def game(batch: int, words: int, frames: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Similarities in [-0.2, 1] and weight logits from N(0, 1), float32, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    similarity = torch.rand(batch, words, frames, generator=generator) * 1.2 - 0.2
    return (
        similarity,
        torch.randn(batch, words, generator=generator),
        torch.randn(batch, frames, generator=generator),
    )


def prepare(device: str, method: str, batch: int, words: int, frames: int) -> Callable[[], dict[str, float]]:
    """The work of one method; it returns its errors against the exact value in float64 with many nodes."""
    similarity, a, b = (part.to(device) for part in game(batch, words, frames))
    truth = exact_interaction(similarity.double(), a.double(), b.double(), nodes=REFERENCE_NODES)
    generator = torch.Generator(device).manual_seed(0)
    # Blocks of samples of about 2^23 cells: what is in memory at once.
    chunk = max(2**23 // (batch * max(words, frames) ** 2), 1)

    def run() -> dict[str, float]:
        if method.startswith("exact"):
            kind = torch.float64 if method == "exact_float64" else torch.float32
            result = exact_interaction(similarity.to(kind), a.to(kind), b.to(kind))
        else:
            samples = int(method.removeprefix("sampled_"))
            result = sampled_interaction(similarity, a, b, samples=samples, generator=generator, chunk=chunk)
        difference = (result.double() - truth).abs()
        return {"largest_error": difference.max().item(), "mean_error": difference.mean().item()}

    sampled_interaction(
        similarity[:1], a[:1], b[:1], samples=2
    )  # first-call costs are no part of the measurement
    return run


def train_predictor(
    device: str, steps: int, words: int = 24, frames: int = 12, batch: int = 32, width: int = 64
) -> tuple[InteractionPredictor, dict[str, Any]]:
    """A predictor of the published shape, trained against the exact value, and what share of it it gets wrong.

    Fresh games in every step, as every pair of a training batch is a fresh game. The predictor sees similarities alone,
    so what the weight logits do to the interaction is beyond it: they are all equal here, to be fair to it.
    """
    torch.manual_seed(0)
    predictor = InteractionPredictor(width).to(device)
    optimiser = torch.optim.Adam(predictor.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=max(steps, 2))

    def pairs(seed: int) -> tuple[Tensor, Tensor]:
        similarity, a, b = (part.to(device) for part in game(batch, words, frames, seed))
        return similarity, exact_interaction(similarity, a * 0, b * 0, nodes=128)

    scale = 1 / pairs(0)[1].std()
    for step in range(steps):
        similarity, truth = pairs(step)
        loss = (predictor(similarity) - scale * truth).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    similarity, truth = pairs(10**6)
    with torch.no_grad():
        difference = predictor(similarity) / scale - truth
    return predictor, {
        "steps": steps,
        "largest_error": difference.abs().max().item(),
        "mean_error": difference.abs().mean().item(),
        "relative_error": (difference.norm() / truth.norm()).item(),
    }


def main(
    sizes: tuple[tuple[int, int], ...] = ((24, 12), (64, 64)),
    batches: tuple[int, ...] = (16, 128),
    draws: tuple[int, ...] = (100, 1000),
    predictor_steps: int = 400,
    repeats: int = 5,
    device: str = "",
) -> None:
    """Time, memory and error of each method at each size (words, frames) and batch."""
    device = device or best_device()
    results: dict[str, Any] = {}
    inputs = game(50, 7, 7)
    judged = (exact_interaction(*inputs).double() - enumerated_interaction(*inputs)).abs().max().item()
    results["exact_against_enumeration_7x7"] = judged
    print(f"exact against enumeration, 50 games of 7 words and 7 frames: largest error {judged:.1e}")
    for words, frames in sizes:
        for batch in batches:
            rows: dict[str, Any] = {}
            for method in ("exact", "exact_float64", *(f"sampled_{count}" for count in draws)):
                # A sampler takes its time: twice is enough.
                measured = measure(
                    prepare,
                    device=device,
                    repeats=repeats if method.startswith("exact") else 1,
                    method=method,
                    batch=batch,
                    words=words,
                    frames=frames,
                )
                rows[method] = measured.plain() | (measured.result or {})
                error = f"largest error {measured.result['largest_error']:.1e}" if measured.result else ""
                print(f"{words:3} x {frames:3}  batch {batch:4}  {method:13} {measured}  {error}", flush=True)
            exact, sampled = rows["exact"], rows[f"sampled_{draws[-1]}"]
            if exact["seconds"] and rows["exact_float64"]["seconds"]:
                rows["float32_times_faster"] = round(rows["exact_float64"]["seconds"] / exact["seconds"], 2)
                print(f"           float32 beats float64 {rows['float32_times_faster']} times in time")
            if exact["seconds"] and sampled["seconds"]:
                rows["times_faster"] = round(sampled["seconds"] / exact["seconds"], 1)
                rows["times_closer"] = round(sampled["largest_error"] / exact["largest_error"])
                print(
                    f"           exact beats {draws[-1]} draws {rows['times_faster']} times in time "
                    f"and {rows['times_closer']} times in error"
                )
            results[f"{words}x{frames}_batch_{batch}"] = rows
    if predictor_steps:
        _, results["predictor_24x12"] = train_predictor(device, predictor_steps)
        print(
            "learned predictor, 24 x 12: "
            + ", ".join(f"{k} {v:.3g}" for k, v in results["predictor_24x12"].items())
        )
    report("interaction", results, device=device, repeats=repeats)


if __name__ == "__main__":
    tyro.cli(main)
