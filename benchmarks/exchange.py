"""Memory and time of a rank's loss and its gradient, by the number of ranks: frames gathered beside frames in a ring.

python -m benchmarks.exchange

Ranks are processes over gloo on this machine; memory is what the first of them holds at most beyond what it started
with, time the CPU seconds of it, since the ranks share this machine's cores.
"""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import tyro

from benchmarks.report import MEBIBYTE, forget_peak, report, resident
from hbi.model.config import LEVELS, LossSettings
from hbi.model.hbi import Encoded
from hbi.model.tokens import Tokens
from hbi.training.contrast import contrast, tensors_of
from hbi.training.settings import ExchangeSettings

TOKENS = {"entity": (24, 12), "action": (6, 3), "event": (3, 2)}
"""Words and frames of a pair at each level, as for MSR-VTT."""


@dataclass(frozen=True)
class Bench:
    """What to measure: both forms at each number of ranks."""

    ranks: tuple[int, ...] = (2, 4, 8)
    """Numbers of ranks."""
    clips: int = 64
    """Of each rank."""
    dim: int = 512
    """Of a token."""
    chunk: int = 32
    """Texts and videos compared at once."""

    def run(self) -> None:
        results: dict[str, Any] = {}
        for world_size in self.ranks:
            for form in ("gather", "ring"):
                with tempfile.TemporaryDirectory() as folder:
                    mp.spawn(rank, (folder, world_size, form, self), nprocs=world_size)
                    peak, took, loss = map(float, (Path(folder) / "found").read_text().split())
                found = {"peak_mib": round(peak, 1), "cpu_seconds": round(took, 3), "loss": loss}
                results[f"{form}, {world_size} ranks"] = found
                print(
                    f"{world_size} ranks, {form:6}  {peak:8.1f} MiB  {took:6.2f} s  loss {loss:.6f}",
                    flush=True,
                )
        report("exchange", results, clips=self.clips, dim=self.dim, chunk=self.chunk)


def rank(number: int, folder: str, world_size: int, form: str, bench: Bench) -> None:
    """One of the ranks; the first writes down what it found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=number, world_size=world_size)
    settings = LossSettings(interaction=0.0, distillation=1.0, chunk=bench.chunk)
    exchange = ExchangeSettings(form)  # type: ignore[arg-type]
    step(noise(2, bench.dim, number), settings, exchange)  # what is loaded at first use is no part of it
    encoded = noise(bench.clips, bench.dim, number)
    before, start = forget_peak(), time.process_time()
    loss = step(encoded, settings, exchange)
    took = time.process_time() - start
    dist.all_reduce(loss)
    if number == 0:
        peak = (resident("VmHWM") - before) / MEBIBYTE
        (Path(folder) / "found").write_text(f"{peak} {took} {loss.item() / world_size}")
    dist.destroy_process_group()


def step(encoded: Encoded, settings: LossSettings, exchange: ExchangeSettings) -> torch.Tensor:
    """The loss, and its gradient at the tokens."""
    loss = contrast(encoded, settings, None, exchange)["loss"]
    torch.autograd.grad(loss, tensors_of(encoded))
    return loss.detach()


def noise(clips: int, dim: int, seed: int) -> Encoded:
    """Tokens of a rank."""
    generator = torch.Generator().manual_seed(seed)

    def side(n: int) -> Tokens:
        tokens = torch.randn(clips, n, dim, generator=generator).requires_grad_()
        logits = torch.randn(clips, n, generator=generator).requires_grad_()
        return Tokens(tokens, logits, torch.ones(clips, n, dtype=torch.bool))

    text = {level: side(TOKENS[level][0]) for level in LEVELS}
    video = {level: side(TOKENS[level][1]) for level in LEVELS}
    return Encoded(text, video, {}, torch.tensor(20.0, requires_grad=True), {})


if __name__ == "__main__":
    tyro.cli(Bench, description=__doc__).run()
