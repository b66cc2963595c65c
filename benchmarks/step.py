"""A whole training step, beside the same step written as a baseline.

python -m benchmarks.step                        sizes of CLIP ViT-B/32 on a GPU, of the demo on a CPU
python -m benchmarks.step --towers b16 --batch 128

Ours: bfloat16 where the hardware has it, fused attention, the exact interaction, similarities in chunks; with and
without recomputed activations and torch.compile. The baseline: float32, attention that makes its whole matrix, the
whole [texts, videos, words, frames] tensor, an interaction sampled 100 times a pair. It needs no Ray and no data.
"""

import contextlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.report import best_device, measure, report
from hbi.model.banzhaf import sampled_interaction
from hbi.model.config import LossSettings, ModelConfig, TowerConfig
from hbi.model.hbi import HBI, Encoded
from hbi.model.levels import LEVELS
from hbi.model.losses import alignment_loss, contrastive_loss, distillation_loss
from hbi.model.similarity import pair_similarity
from hbi.model.tokens import Tokens
from hbi.training.contrast import backward, contrast, detach_tokens, tensors_of
from hbi.training.loop import has_bf16
from hbi.training.optim import make_optimizer
from hbi.training.parallel import clip_gradients
from hbi.training.settings import OptimSettings
from hbi.training.throughput import flops_per_clip, peak_flops

SAMPLES = 100
"""Of each pair's interaction in the baseline: as many as the published labels have."""
CLIP = TowerConfig(
    image_size=224, patch_size=32, vision_width=768, vision_layers=12, vision_heads=12,
    text_width=512, text_layers=12, text_heads=8, vocab_size=49408, dim=512,
)  # fmt: skip
TOWERS = {"b32": CLIP, "b16": replace(CLIP, patch_size=16), "small": TowerConfig()}
CASES: dict[str, dict[str, Any]] = {
    "baseline": {"baseline": True},
    "ours": {},
    "ours, recomputed": {"checkpointing": True},
    "ours, compiled": {"compiled": True},
    "ours, recomputed and compiled": {"checkpointing": True, "compiled": True},
}


def baseline_similarity(text: Tokens, video: Tokens) -> Tensor:
    """The weighted similarity from the whole pairwise tensor."""
    words = torch.nn.functional.normalize(text.tokens, dim=-1)
    frames = torch.nn.functional.normalize(video.tokens, dim=-1)
    present = text.mask[:, None, :, None] & video.mask[None, :, None, :]
    pairwise = torch.einsum("atd,bvd->abtv", words, frames).masked_fill(~present, -2.0)
    of_words = torch.einsum("abt,at->ab", pairwise.amax(3), text.weights())
    of_frames = torch.einsum("abv,bv->ab", pairwise.amax(2), video.weights())
    return (of_words + of_frames) / 2


def baseline_loss(encoded: Encoded) -> Tensor:
    """The same loss as `hbi_loss`, but for the sampled target."""
    total, entity = encoded.logit_scale.new_zeros(()), None
    for level in LEVELS:
        text, video = encoded.text[level], encoded.video[level]
        logits = encoded.logit_scale * baseline_similarity(text, video)
        total = total + (contrastive_loss(logits) + contrastive_loss(logits.T)) / 2
        with torch.no_grad():
            target = LossSettings.target_scale * sampled_interaction(
                pair_similarity(text, video),
                text.logits,
                video.logits,
                text.mask,
                video.mask,
                samples=SAMPLES,
            )
        total = total + alignment_loss(encoded.predicted[level], target, text.mask, video.mask)
        if entity is None:
            entity = logits
        else:
            total = total + 2 * (distillation_loss(logits, entity) + distillation_loss(logits.T, entity.T))
    return total / len(encoded.text["entity"].mask)


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
    baseline: bool = False
    """float32, unfused attention, whole tensors, sampled interaction."""
    checkpointing: bool = False
    """Activations are computed again in the backward pass."""
    compiled: bool = False
    """torch.compile."""

    def model(self) -> ModelConfig:
        return ModelConfig(
            towers=TOWERS[self.towers], words=self.words, frames=self.frames,
            checkpointing=self.checkpointing, freeze_patches=True,
        )  # fmt: skip

    def pair(self, device: str) -> tuple[Tensor, ...]:
        """A batch of noise."""
        sizes = TOWERS[self.towers]
        shape = (self.batch, self.frames, sizes.image_size, sizes.image_size, 3)
        return (
            torch.randint(1, sizes.vocab_size, (self.batch, self.words), device=device),
            torch.ones(self.batch, self.words, dtype=torch.bool, device=device),
            torch.randint(0, 256, shape, dtype=torch.uint8, device=device),
            torch.ones(self.batch, self.frames, dtype=torch.bool, device=device),
        )


def prepare(device: str, case: Case, parts: bool = False) -> Callable[[], Any]:
    """A step on one batch: encode, loss, backward, clip, AdamW. parts: seconds of each, measured apart."""
    torch.manual_seed(0)
    model = HBI(case.model()).to(device).train()
    optimizer = make_optimizer(model, OptimSettings())
    if case.compiled:
        model.compile()
    pair, settings = case.pair(device), LossSettings(chunk=case.chunk or None)
    kind = torch.device(device).type
    bf16 = not case.baseline and has_bf16(torch.device(device))

    def encode(piece: tuple[Tensor, ...]) -> Encoded:
        with torch.autocast(kind, torch.bfloat16, enabled=bf16):
            return model(*piece)

    def update() -> None:
        clip_gradients(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        model.clamp_logit_scale()

    def step() -> None:
        with sdpa_kernel(SDPBackend.MATH) if case.baseline else contextlib.nullcontext():
            if case.baseline:
                baseline_loss(encode(pair)).backward()
            else:
                backward(encode, [pair], settings)
            update()

    return (lambda: timed_parts(lambda: encode(pair), settings, update)) if parts else step


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
    repeats: int = 3
    """Measured steps of each case."""
    cases: tuple[str, ...] = tuple(CASES)
    """Which of the cases to run."""
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
        flops = base.batch * flops_per_clip(base.model())
        bf16 = has_bf16(torch.device(device))
        peak, peak_float32 = peak_flops(torch.device(device), bf16), peak_flops(torch.device(device))
        results: dict[str, Any] = {"flops_per_step": flops, "bf16": bf16, "peak_flops": peak}
        for name in self.cases:
            case = replace(base, **CASES[name])
            # One run more: the second step of a compiled model still compiles, for its gradients have changed their
            # layout.
            measured = measure(prepare, device=device, repeats=self.repeats + 1, case=case)
            results[name] = measured.plain()
            speed = ""
            if measured.seconds is not None:
                share = flops / measured.seconds / (peak_float32 if case.baseline else peak)
                rate = base.batch / measured.seconds
                results[name] |= {"clips_per_second": round(rate, 2), "flop_utilisation": round(share, 4)}
                speed = f"  {rate:9.1f} clips/s  {share:6.1%} of peak"
            print(f"{name:32} {measured}{speed}", flush=True)
        parts = measure(prepare, device=device, repeats=self.repeats, case=base, parts=True)
        if parts.result:
            whole = sum(parts.result.values())
            results["parts"] = {name: round(seconds / whole, 4) for name, seconds in parts.result.items()}
            shares = ", ".join(f"{name} {share:.1%}" for name, share in results["parts"].items())
            print(f"parts of ours: {shares}")
        report("step", results, device=device, repeats=self.repeats, **asdict(base))


if __name__ == "__main__":
    import tyro

    tyro.cli(Bench, description=__doc__).run()
