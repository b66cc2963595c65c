"""What gradient checkpointing costs and saves: one training step's loss and gradients, with and without.

python -m benchmarks.checkpointing
"""

from collections.abc import Callable
from typing import Any

import torch
import tyro

from benchmarks.report import best_device, measure, report
from hbi.model.config import LossSettings, ModelConfig, TowerConfig
from hbi.model.hbi import HBI
from hbi.model.losses import hbi_loss

VIT_B32 = TowerConfig(
    image_size=224,
    patch_size=32,
    vision_width=768,
    vision_layers=12,
    vision_heads=12,
    text_width=512,
    text_layers=12,
    text_heads=8,
    vocab_size=49408,
    dim=512,
)
"""The sizes of CLIP ViT-B/32."""


def prepare(device: str, on: bool, batch: int, frames: int, small: bool) -> Callable[[], float]:
    """Forward, loss and backward of one batch of pairs."""
    torch.manual_seed(0)
    towers = TowerConfig() if small else VIT_B32
    model = HBI(ModelConfig(towers=towers, frames=frames, checkpointing=on)).to(device).train()
    ids = torch.randint(1, towers.vocab_size, (batch, 24), device=device)
    video = torch.randn(batch, frames, 3, towers.image_size, towers.image_size, device=device)
    text_mask = torch.ones(batch, 24, dtype=torch.bool, device=device)
    video_mask = torch.ones(batch, frames, dtype=torch.bool, device=device)
    for parameter in model.parameters():  # gradients are there in every step but the first
        parameter.grad = torch.zeros_like(parameter)

    def run() -> float:
        model.zero_grad(set_to_none=False)
        encoded = model(ids, text_mask, video, video_mask)
        loss = hbi_loss(encoded, encoded, 0, LossSettings(), batch)["loss"]
        loss.backward()
        return loss.item()

    return run


def main(batch: int = 8, frames: int = 12, small: bool = False, repeats: int = 1, device: str = "") -> None:
    """Time and peak memory (beyond weights, gradients, inputs) of a step at ViT-B/32's sizes, or a small model's."""
    device = device or best_device()
    results: dict[str, Any] = {}
    for name, on in (("kept", False), ("recomputed", True)):
        measured = measure(
            prepare, device=device, repeats=repeats, on=on, batch=batch, frames=frames, small=small
        )
        results[name] = measured.plain() | {"loss": measured.result}
        print(f"activations {name:10} {measured}", flush=True)
    kept, recomputed = results["kept"], results["recomputed"]
    if kept["seconds"] and recomputed["seconds"] and kept["peak_mib"]:
        results["memory_share"] = round(recomputed["peak_mib"] / kept["peak_mib"], 3)
        results["time_share"] = round(recomputed["seconds"] / kept["seconds"], 3)
        print(
            f"recomputing takes {results['memory_share']} of the memory and {results['time_share']} of the time"
        )
    report("checkpointing", results, device=device, batch=batch, frames=frames, small=small)


if __name__ == "__main__":
    tyro.cli(main)
