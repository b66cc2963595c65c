"""A transformer over time: what a frame says after it has seen the others."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import CLIPTextConfig

from hbi.model.backbones.block import Block
from hbi.model.backbones.clip import run_layers
from hbi.model.config import ModelConfig


class TemporalTransformer(nn.Module):
    """frames + T(frames + positions), with T a few of CLIP's text blocks that see all present frames.

    Starts from the text tower's first blocks and positions where the widths agree (CLIP4Clip, Luo et al. 2021).
    """

    def __init__(self, config: ModelConfig, text: Any) -> None:
        super().__init__()
        towers = config.towers
        shared = towers.dim == towers.text_width
        settings = CLIPTextConfig(
            hidden_size=towers.dim,
            intermediate_size=(shared and towers.text_mlp) or 4 * towers.dim,
            num_attention_heads=towers.text_heads if shared else towers.dim // config.head_width,
            hidden_act=towers.activation,
            layer_norm_eps=1e-12,  # the published code's own, and not CLIP's 1e-5
            attn_implementation="sdpa",  # type: ignore[call-arg]
        )
        self.positions = nn.Embedding(max(towers.context, config.frames), towers.dim)
        self.layers = nn.ModuleList(Block(settings) for _ in range(config.temporal_layers))
        self.checkpointing = False
        self.window = config.temporal_window
        nn.init.normal_(self.positions.weight, std=0.02)
        if shared:
            with torch.no_grad():
                self.positions.weight[: towers.context] = text.embeddings.position_embedding.weight
            for layer, source in zip(self.layers, text.layers, strict=False):
                layer.load_state_dict(source.state_dict())

    def forward(
        self, frames: Float[Tensor, "batch frames dim"], mask: Bool[Tensor, "batch frames"]
    ) -> Float[Tensor, "batch frames dim"]:
        """A frame sees every present frame; in a row without one (an error elsewhere) every frame, never NaN.

        ValueError for more frames than there are positions.
        """
        n = frames.shape[1]
        if n > len(self.positions.weight):
            raise ValueError(f"video: {n} frames, the model has positions for {len(self.positions.weight)}")
        seen = (mask | ~mask.any(-1, keepdim=True))[:, None, None, :]
        seen = seen.expand(-1, 1, n, -1)
        if self.window:
            place = torch.arange(n, device=frames.device)
            near = (place[:, None] - place).abs() <= self.window
            # A frame always sees itself: one whose neighbours are absent has nothing else.
            seen = (seen & near) | torch.eye(n, dtype=torch.bool, device=frames.device)
        hidden = frames + self.positions.weight[:n]
        return frames + run_layers(self.layers, hidden, seen, self.checkpointing)
