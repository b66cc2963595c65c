"""Representation reconstruction: a pair's words and frames, each rebuilt with the help of the other side's tokens.

After the abstract of V2 (Jin et al., "Hierarchical Banzhaf Interaction for General Video-Language Representation
Learning", TPAMI 2024): "a fusion of single-modal and cross-modal components", as fine as the single-modal tokens and as
adaptive as cross-modal ones. Its formulas are not public; these are ours. With x the tokens of one side, y those of the
other side of the same pair, n(.) a layer norm of the direction alone, |x| a token's length, and
o = O softmax( Q n(x) (K n(y))^T / sqrt(d) ) V n(y):

    attention    x' = x + |x| o                     O starts at 0, so that training starts from the single-modal tokens
    gated        x' = g x + (1 - g) |x| o           g = sigmoid(w [n(x); o] + b) a token, starts near 0.98
    similarity   x' = (1 - s) x + s |x| sum_t softmax_t( cos(x, y_t) / temperature ) y_t / |y_t|

One vector in, one out; the direction of x' does not depend on the length of x or y, so tokens that an index keeps as
unit vectors are rebuilt alike. Weight logits and masks stay those of the single-modal tokens. Absent tokens are not
attended to; where all of the other side is absent, x' = x.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import normalize, scaled_dot_product_attention

from hbi.model.config import ReconstructionConfig
from hbi.model.tokens import Tokens

GATE_BIAS = 4.0
"""Of the gated form at the start: 98 % single-modal."""


class CrossAttention(nn.Module):
    """What each token of one side takes from the other side: o above."""

    def __init__(self, dim: int, head_width: int) -> None:
        super().__init__()
        self.head_width = head_width
        self.norm, self.other_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        for layer in (self.query, self.key_value, self.out):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        tokens: Float[Tensor, "batch n dim"],
        other: Float[Tensor, "batch m dim"],
        mask: Bool[Tensor, "batch m"],
    ) -> Float[Tensor, "batch n dim"]:
        """mask: of the other side; a row without a token there attends everywhere, for the sake of numbers."""

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (-1, self.head_width)).transpose(1, 2)

        key, value = self.key_value(self.other_norm(_direction(other))).chunk(2, dim=-1)
        seen = (mask | ~mask.any(-1, keepdim=True))[:, None, None, :]
        query = heads(self.query(self.norm(_direction(tokens))))
        found = scaled_dot_product_attention(query, heads(key), heads(value), attn_mask=seen)
        return self.out(found.transpose(1, 2).flatten(2))


def _direction(tokens: Float[Tensor, "batch n dim"]) -> Float[Tensor, "batch n dim"]:
    """Without the length, about 1 in each channel: so a layer norm's epsilon counts alike for any length."""
    return normalize(tokens, dim=-1) * tokens.shape[-1] ** 0.5


class ReconstructedSide(nn.Module):
    """Rebuilds the tokens of one side."""

    def __init__(self, config: ReconstructionConfig, dim: int, head_width: int) -> None:
        super().__init__()
        self.config = config
        self.cross = self.gate = None
        if config.form in ("attention", "gated"):
            self.cross = CrossAttention(dim, head_width)
        if config.form == "attention" and self.cross is not None:
            nn.init.zeros_(self.cross.out.weight)
        if config.form == "gated":
            self.gate = nn.Linear(2 * dim, 1)
            nn.init.zeros_(self.gate.weight)
            nn.init.constant_(self.gate.bias, GATE_BIAS)

    def forward(self, tokens: Tokens, other: Tokens) -> Tokens:
        """The rebuilt tokens, float32, with the weight logits and the mask of what they were."""
        x, length = tokens.tokens, tokens.tokens.detach().norm(dim=-1, keepdim=True)
        if self.cross is None:
            rebuilt = torch.lerp(x, length * self._nearest(tokens, other), self.config.share)
        else:
            found = self.cross(x, other.tokens, other.mask)
            if self.gate is None:
                rebuilt = x + length * found
            else:
                gate = self.gate(torch.cat([self.cross.norm(_direction(x)), found], dim=-1)).sigmoid()
                rebuilt = gate * x + (1 - gate) * length * found
        changed = tokens.mask[:, :, None] & other.mask.any(-1)[:, None, None]
        return tokens._replace(tokens=torch.where(changed, rebuilt.float(), x))

    def _nearest(self, tokens: Tokens, other: Tokens) -> Float[Tensor, "batch n dim"]:
        """The mean direction of the other side's tokens, each by its likeness to the token."""
        ours, theirs = normalize(tokens.tokens, dim=-1), normalize(other.tokens, dim=-1)
        absent = ~other.mask[:, None, :]
        cosines = (ours @ theirs.transpose(1, 2) / self.config.temperature).masked_fill(
            absent, torch.finfo(ours.dtype).min
        )
        return cosines.softmax(-1) @ theirs


class Reconstruction(nn.Module):
    """Both sides of the pairs at one level."""

    def __init__(self, config: ReconstructionConfig, dim: int, head_width: int) -> None:
        super().__init__()
        self.text = ReconstructedSide(config, dim, head_width)
        self.video = ReconstructedSide(config, dim, head_width)

    def forward(self, text: Tokens, video: Tokens) -> tuple[Tokens, Tokens]:
        """text, video: as many rows of each, row by row a pair. Both are rebuilt from what the other was before."""
        return self.text(text, video), self.video(video, text)
