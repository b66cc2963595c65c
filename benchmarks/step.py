"""A whole training step beside what the published code does in one (`benchmarks.published_step`).

python -m benchmarks.step                        sizes of CLIP ViT-B/32 on a GPU, of the demo on a CPU
python -m benchmarks.step --towers b16 --batch 128

Ours: the exact interaction, fused attention, similarities in chunks; in float32 as the opponent, and in bfloat16 where
the hardware has it; with and without recomputed activations and torch.compile. A second opponent has the anomaly
detection that the published script leaves on. All of them take turns in one process, and each is compared with the
opponent of its own turn; on a CPU by the seconds of one thread. It needs no Ray and no data.
"""

import contextlib
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.published_step import BertAdam, loss_of, with_whole_frames
from benchmarks.report import best_device, measure, report
from hbi.model.config import LossSettings, ModelConfig, TowerConfig
from hbi.model.hbi import HBI, Encoded
from hbi.training.contrast import backward, contrast, detach_tokens, tensors_of
from hbi.training.loop import has_bf16
from hbi.training.optim import make_optimizer
from hbi.training.parallel import clip_gradients
from hbi.training.settings import OptimSettings
from hbi.training.throughput import flops_per_clip, peak_flops

OPPONENT = "published"
CLIP = TowerConfig(
    image_size=224, patch_size=32, vision_width=768, vision_layers=12, vision_heads=12,
    text_width=512, text_layers=12, text_heads=8, vocab_size=49408, dim=512,
)  # fmt: skip
TOWERS = {"b32": CLIP, "b16": replace(CLIP, patch_size=16), "small": TowerConfig()}
CASES: dict[str, dict[str, Any]] = {
    OPPONENT: {"published": True},
    "published, anomaly detection": {"published": True, "anomalies": True},
    "ours": {},
    "ours, compiled": {"compiled": True},
    "ours, bfloat16": {"bf16": True},
    "ours, bfloat16, recomputed": {"bf16": True, "checkpointing": True},
    "ours, bfloat16, compiled": {"bf16": True, "compiled": True},
}


@dataclass(frozen=True)
class Case:
    """A step that is measured."""

    towers: str
    """b32, b16 or small."""
    batch: int
    """Pairs in a step."""
    frames: int
    """Frames of a clip."""
    words: int
    """Words of a caption."""
    chunk: int
    """Texts and videos compared at once in our step; 0 compares all."""
    published: bool = False
    """What the published code does."""
    anomalies: bool = False
    """Under torch's anomaly detection."""
    bf16: bool = False
    """bfloat16 autocast."""
    checkpointing: bool = False
    """Activations are computed again in the backward pass."""
    compiled: bool = False
    """torch.compile."""

    def model(self) -> ModelConfig:
        return ModelConfig(
            towers=TOWERS[self.towers], words=self.words, frames=self.frames,
            checkpointing=self.checkpointing, freeze_patches=True, estimator=self.published,
            masking="published" if self.published else "exact",
        )  # fmt: skip

    def pair(self, device: str) -> tuple[Tensor, ...]:
        """A batch of noise."""
        sizes = TOWERS[self.towers]
        shape = (self.batch, self.frames, sizes.image_size, sizes.image_size, 3)
        lengths = torch.randint(min(7, self.words), self.words + 1, (self.batch, 1), device=device)
        return (
            torch.randint(1, sizes.vocab_size, (self.batch, self.words), device=device),
            torch.arange(self.words, device=device) < lengths,
            torch.randint(0, 256, shape, dtype=torch.uint8, device=device),
            torch.ones(self.batch, self.frames, dtype=torch.bool, device=device),
        )


def prepare(device: str, case: Case, parts: bool = False) -> Callable[[], Any]:
    """A step on one batch: encode, loss, backward, clip, optimiser. parts: seconds of each, measured apart."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = HBI(case.model()).to(device).train()
    pair, settings = case.pair(device), LossSettings(chunk=case.chunk or None)
    if case.published:
        return published_step(with_whole_frames(model), pair, case.anomalies)
    optimizer = make_optimizer(model, OptimSettings())
    if case.compiled:
        model.compile()

    def encode(piece: tuple[Tensor, ...]) -> Encoded:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=case.bf16):
            return model(*piece)

    def update() -> None:
        clip_gradients(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        model.clamp_logit_scale()

    def step() -> None:
        backward(encode, [pair], settings)
        update()

    return (lambda: timed_parts(lambda: encode(pair), settings, update)) if parts else step


def published_step(model: HBI, pair: tuple[Tensor, ...], anomalies: bool) -> Callable[[], None]:
    """The opponent's."""
    optimizer = BertAdam(model.parameters())

    def step() -> None:
        with (
            sdpa_kernel(SDPBackend.MATH),
            torch.autograd.detect_anomaly() if anomalies else contextlib.nullcontext(),
        ):
            loss_of(model, model(*pair)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        model.clamp_logit_scale()

    return step


def in_turns(device: str, cases: dict[str, Case], turns: int) -> Callable[[], dict[str, list[float]]]:
    """Seconds of each case in each of the turns, after two that do not count: a compiled model compiles twice, for its
    gradients have changed their layout in the second step."""
    steps = {name: prepare(device, case) for name, case in cases.items()}
    clock = time.perf_counter if device.startswith("cuda") else time.process_time

    def run() -> dict[str, list[float]]:
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(2 + turns):
            for name, step in steps.items():
                start = clock()
                step()
                if device.startswith("cuda"):
                    torch.cuda.synchronize()
                seconds[name].append(clock() - start)
        return {name: found[2:] for name, found in seconds.items()}

    return run


def timed_parts(
    encode: Callable[[], Encoded], settings: LossSettings, update: Callable[[], None]
) -> dict[str, float]:
    """Seconds of each part of our step."""
    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds[name] = time.perf_counter() - start
        return result

    encoded = timed("encode", encode)
    cut, leaves = detach_tokens(encoded)
    losses = timed("loss", lambda: contrast(cut, settings))
    timed("loss, backward", losses["loss"].backward)
    gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    into = [g.to(t.dtype) for t, g in zip(tensors_of(encoded), gradients, strict=True)]
    timed("encode, backward", lambda: torch.autograd.backward(tensors_of(encoded), into))
    timed("update", update)
    return seconds


@dataclass(frozen=True)
class Bench:
    """What to measure: time, peak memory and clips per second of each case, and the parts of our step."""

    towers: str = ""
    """b32, b16 or small; empty: b32 on a GPU, small without."""
    batch: int = 0
    """Pairs in a step; 0: 128 on a GPU, 32 without."""
    frames: int = 12
    """Frames of a clip."""
    words: int = 24
    """Words of a caption."""
    chunk: int = 32
    """Texts and videos compared at once in our step; 0 compares all."""
    turns: int = 5
    """Measured steps of each case."""
    cases: tuple[str, ...] = tuple(CASES)
    """Which of the cases to run beside the opponent."""
    device: str = ""
    """cuda or cpu; empty: the best there is."""

    def run(self) -> None:
        device = self.device or best_device()
        base = Case(
            self.towers or ("b32" if device == "cuda" else "small"),
            self.batch or (128 if device == "cuda" else 32),
            self.frames,
            self.words,
            self.chunk,
        )
        bf16 = has_bf16(torch.device(device))
        names = [name for name in CASES if name == OPPONENT or name in self.cases]
        cases = {name: replace(base, **CASES[name]) for name in names if bf16 or "bf16" not in CASES[name]}
        flops = base.batch * flops_per_clip(base.model())
        results: dict[str, Any] = {"flops_per_step": flops}
        timed = measure(in_turns, device=device, repeats=0, cases=cases, turns=self.turns)
        if timed.result is None:
            raise RuntimeError(timed.error)
        opponent = timed.result[OPPONENT]
        memory = {name: measure(prepare, device=device, repeats=0, case=case) for name, case in cases.items()}
        for name, case in cases.items():
            seconds = statistics.median(timed.result[name])
            faster = [theirs / ours for theirs, ours in zip(opponent, timed.result[name], strict=True)]
            peak, theirs = memory[name].peak_mib, memory[OPPONENT].peak_mib
            results[name] = {
                "seconds": round(seconds, 4),
                "clips_per_second": round(base.batch / seconds, 2),
                "times_faster": round(statistics.median(faster), 3),
                "times_faster_range": [round(min(faster), 3), round(max(faster), 3)],
                "peak_mib": round(peak) if peak else None,
                "memory_share": round(peak / theirs, 3) if peak and theirs else None,
            }
            if device.startswith("cuda"):
                share = flops / seconds / peak_flops(torch.device(device), case.bf16)
                results[name]["flop_utilisation"] = round(share, 4)
            print(f"{name:32} {results[name]}", flush=True)
        parts = measure(prepare, device=device, repeats=1, case=base, parts=True)
        if parts.result:
            whole = sum(parts.result.values())
            results["parts"] = {name: round(seconds / whole, 4) for name, seconds in parts.result.items()}
            shares = ", ".join(f"{name} {share:.1%}" for name, share in results["parts"].items())
            print(f"parts of ours: {shares}")
        report("step", results, device=device, turns=self.turns, **asdict(base))


if __name__ == "__main__":
    import tyro

    tyro.cli(Bench, description=__doc__).run()
