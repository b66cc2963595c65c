"""A whole training step, beside the same step written the obvious way.

python -m benchmarks.step                        sizes of CLIP ViT-B/32 on a GPU, of the demo on a CPU
python -m benchmarks.step --towers b16 --batch 128

Ours: bfloat16 where the hardware has it, fused attention, the exact interaction, similarities in chunks; with and
without recomputed activations and torch.compile. Obvious: float32, attention that makes its whole matrix, the whole
[texts, videos, words, frames] tensor, an interaction sampled 100 times a pair. It needs no Ray and no data.
"""

import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
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
"""Of each pair's interaction in the obvious step: as many as the published labels have."""
CLIP = TowerConfig(
    image_size=224, patch_size=32, vision_width=768, vision_layers=12, vision_heads=12,
    text_width=512, text_layers=12, text_heads=8, vocab_size=49408, dim=512,
)  # fmt: skip
TOWERS = {"b32": CLIP, "b16": replace(CLIP, patch_size=16), "small": TowerConfig()}
CASES: dict[str, dict[str, Any]] = {
    "obvious": {"obvious": True},
    "ours": {},
    "ours, recomputed": {"checkpointing": True},
    "ours, compiled": {"compiled": True},
    "ours, recomputed and compiled": {"checkpointing": True, "compiled": True},
}


def obvious_similarity(text: Tokens, video: Tokens) -> Tensor:
    """The weighted similarity from the whole pairwise tensor."""
    words = torch.nn.functional.normalize(text.tokens, dim=-1)
    frames = torch.nn.functional.normalize(video.tokens, dim=-1)
    present = text.mask[:, None, :, None] & video.mask[None, :, None, :]
    pairwise = torch.einsum("atd,bvd->abtv", words, frames).masked_fill(~present, -2.0)
    of_words = torch.einsum("abt,at->ab", pairwise.amax(3), text.weights())
    of_frames = torch.einsum("abv,bv->ab", pairwise.amax(2), video.weights())
    return (of_words + of_frames) / 2


def obvious_loss(encoded: Encoded) -> Tensor:
    """The same loss as `hbi_loss`, but for the sampled target."""
    total, entity = encoded.logit_scale.new_zeros(()), None
    for level in LEVELS:
        text, video = encoded.text[level], encoded.video[level]
        logits = encoded.logit_scale * obvious_similarity(text, video)
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


def prepare(
    device: str,
    towers: str,
    batch: int,
    frames: int,
    words: int,
    chunk: int,
    obvious: bool = False,
    checkpointing: bool = False,
    compiled: bool = False,
    parts: bool = False,
) -> Callable[[], Any]:
    """A step on one batch of noise: encode, loss, backward, clip, AdamW. parts: seconds of each, measured apart."""
    torch.manual_seed(0)
    sizes = TOWERS[towers]
    config = ModelConfig(
        towers=sizes, words=words, frames=frames, checkpointing=checkpointing, freeze_patches=True
    )
    model = HBI(config).to(device).train()
    optimizer = make_optimizer(model, OptimSettings())
    if compiled:
        model.compile()
    shape = (batch, frames, sizes.image_size, sizes.image_size, 3)
    pair = (
        torch.randint(1, sizes.vocab_size, (batch, words), device=device),
        torch.ones(batch, words, dtype=torch.bool, device=device),
        torch.randint(0, 256, shape, dtype=torch.uint8, device=device),
        torch.ones(batch, frames, dtype=torch.bool, device=device),
    )
    kind = torch.device(device).type
    bf16 = not obvious and has_bf16(torch.device(device))
    settings = LossSettings(chunk=chunk or None)

    def encode(piece: tuple[Tensor, ...]) -> Encoded:
        with torch.autocast(kind, torch.bfloat16, enabled=bf16):
            return model(*piece)

    def update() -> None:
        clip_gradients(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        model.clamp_logit_scale()

    def step() -> None:
        with sdpa_kernel(SDPBackend.MATH) if obvious else contextlib.nullcontext():
            if obvious:
                obvious_loss(encode(pair)).backward()
            else:
                backward(encode, [pair], settings)
            update()

    def timed_parts() -> dict[str, float]:
        seconds: dict[str, float] = {}

        def timed(name: str, work: Callable[[], Any]) -> Any:
            start = time.perf_counter()
            result = work()
            if kind == "cuda":
                torch.cuda.synchronize()
            seconds[name] = time.perf_counter() - start
            return result

        encoded = timed("encode", lambda: encode(pair))
        cut, leaves = detach_tokens(encoded)
        losses = timed("loss", lambda: contrast(cut, settings))
        timed("loss, backward", losses["loss"].backward)
        gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        into = [g.to(t.dtype) for t, g in zip(tensors_of(encoded), gradients, strict=True)]
        timed("encode, backward", lambda: torch.autograd.backward(tensors_of(encoded), into))
        timed("update", update)
        return seconds

    return timed_parts if parts else step


def main(
    towers: str = "",
    batch: int = 0,
    frames: int = 12,
    words: int = 24,
    chunk: int = 32,
    repeats: int = 3,
    cases: tuple[str, ...] = tuple(CASES),
    device: str = "",
) -> None:
    """Time, peak memory and clips per second of each case, and the parts of our step.

    Args:
        towers: b32, b16 or small.
        batch: Pairs in a step.
        frames: Frames of a clip.
        words: Words of a caption.
        chunk: Texts and videos compared at once in our step; 0 compares all.
        repeats: Measured steps of each case.
        cases: Which of the cases to run.
        device: cuda or cpu.
    """
    device = device or best_device()
    towers = towers or ("b32" if device == "cuda" else "small")
    batch = batch or (128 if device == "cuda" else 32)
    sizes = {"towers": towers, "batch": batch, "frames": frames, "words": words, "chunk": chunk}
    flops = batch * flops_per_clip(ModelConfig(towers=TOWERS[towers], frames=frames, words=words))
    bf16 = has_bf16(torch.device(device))
    peak, peak_float32 = peak_flops(torch.device(device), bf16), peak_flops(torch.device(device))
    results: dict[str, Any] = {"flops_per_step": flops, "bf16": bf16, "peak_flops": peak}
    for name in cases:
        # One run more: the second step of a compiled model still compiles, for its gradients have changed their layout.
        measured = measure(prepare, device=device, repeats=repeats + 1, **sizes, **CASES[name])
        results[name] = measured.plain()
        if measured.seconds is not None:
            share = flops / measured.seconds / (peak_float32 if "obvious" in CASES[name] else peak)
            results[name] |= {
                "clips_per_second": round(batch / measured.seconds, 2),
                "flop_utilisation": round(share, 4),
            }
            print(
                f"{name:32} {measured}  {batch / measured.seconds:9.1f} clips/s  {share:6.1%} of peak",
                flush=True,
            )
        else:
            print(f"{name:32} {measured}", flush=True)
    parts = measure(prepare, device=device, repeats=repeats, **sizes, parts=True)
    if parts.result:
        whole = sum(parts.result.values())
        results["parts"] = {name: round(seconds / whole, 4) for name, seconds in parts.result.items()}
        print(
            "parts of ours: " + ", ".join(f"{name} {share:.1%}" for name, share in results["parts"].items())
        )
    report("step", results, device=device, repeats=repeats, **sizes)


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
