"""A block of CLIP's transformers, in fewer passes over memory than the library's.

The layers stay the library's own, with their weights and names; `as_blocks` gives them this way of running.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention, silu
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

STEEPNESS = 1.702
"""Of OpenAI's activation: quick_gelu(x) = x sigmoid(1.702 x) = silu(1.702 x) / 1.702."""


class Block(CLIPEncoderLayer):
    """Queries, keys and values come from one product, and both factors of the activation go into the products beside
    it."""

    def forward(
        self, hidden_states: Float[Tensor, "batch n width"], attention_mask: Any = None, **_: Any
    ) -> Float[Tensor, "batch n width"]:
        """attention_mask: broadcast to [batch, heads, n, n], True where a query sees a key; None: all."""
        attention: Any = self.self_attn
        layers = (attention.q_proj, attention.k_proj, attention.v_proj)
        query, key, value = _at_once(layers, self.layer_norm1(hidden_states))
        return self._transform(hidden_states + self._attend(query, key, value, attention_mask))

    def _attend(
        self,
        query: Float[Tensor, "batch queries width"],
        key: Float[Tensor, "batch n width"],
        value: Float[Tensor, "batch n width"],
        mask: Bool[Tensor, "..."] | None = None,
    ) -> Float[Tensor, "batch queries width"]:
        attention: Any = self.self_attn
        query, key, value = (
            each.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for each in (query, key, value)
        )
        found = scaled_dot_product_attention(query, key, value, mask, scale=attention.scale)
        return attention.out_proj(found.transpose(1, 2).flatten(2))

    def _transform(self, hidden: Float[Tensor, "batch n width"]) -> Float[Tensor, "batch n width"]:
        mlp: Any = self.mlp
        seen = self.layer_norm2(hidden)
        if mlp.config.hidden_act != "quick_gelu":
            return hidden + mlp(seen)
        bent = torch.addmm(STEEPNESS * mlp.fc1.bias, seen.flatten(0, 1), mlp.fc1.weight.T, alpha=STEEPNESS)
        steep = linear(silu(bent), mlp.fc2.weight, STEEPNESS * mlp.fc2.bias)
        return torch.add(hidden, steep.view_as(hidden), alpha=1 / STEEPNESS)


class ClassTokenBlock(Block):
    """CLIP's last vision block: of its tokens the first alone is read, so the others are only looked at."""

    def forward(
        self, hidden_states: Float[Tensor, "images n width"], attention_mask: Any = None, **_: Any
    ) -> Float[Tensor, "images 1 width"]:
        attention: Any = self.self_attn
        seen, first = self.layer_norm1(hidden_states), hidden_states[:, :1]
        key, value = _at_once((attention.k_proj, attention.v_proj), seen)
        return self._transform(first + self._attend(attention.q_proj(seen[:, :1]), key, value))


def _at_once(layers: Sequence[nn.Linear], seen: Float[Tensor, "batch n width"]) -> tuple[Tensor, ...]:
    """What each of the layers gives, [batch, n, width]: in training from one product, whose gradients are one as well.
    Without gradients a copy of the weights would cost a short text more than it saves."""
    if not torch.is_grad_enabled():
        return tuple(layer(seen) for layer in layers)
    weight, bias = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
    return linear(seen, weight, bias).chunk(len(layers), -1)


def as_blocks(layers: nn.ModuleList) -> nn.ModuleList:
    """The library's layers, from now on run as `Block`."""
    for layer in layers:
        layer.__class__ = Block
    return layers
