"""Token clustering and merging: entity to action, action to event, for words and for frames."""

from math import ceil
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import one_hot, scaled_dot_product_attention

from hbi.model.config import LEVELS as LEVELS

NEIGHBOURS = 3
"""Neighbours that a token's local density is measured on, itself included (the published k)."""


class Merged(NamedTuple):
    """The tokens of the next level."""

    tokens: Float[Tensor, "batch clusters dim"]
    mask: Bool[Tensor, "batch clusters"]
    cluster: Int[Tensor, "batch n"]
    """Which of the new tokens each old one went into (0 for padding, which goes nowhere)."""


@torch.no_grad()
def cluster_tokens(
    tokens: Float[Tensor, "batch n dim"], mask: Bool[Tensor, "batch n"], clusters: int
) -> tuple[Int[Tensor, "batch n"], Bool[Tensor, "batch {clusters}"]]:
    """Density-peak clustering of each row's present tokens (DPC-KNN; Du et al. 2016, Zeng et al. 2022).

        d[i, j]   = |x_i - x_j| / sqrt(dim)
        density_i = exp(-mean of d[i, .]^2 over the 3 nearest, i itself among them)
        peak_i    = min of d[i, j] over the j denser than i; the row's largest d for the densest
        centres   = the `clusters` tokens with the largest density_i * peak_i; every token joins its nearest centre

    Each row stands alone. Ties go to the earlier position (the published code adds random noise instead). A row with
    fewer tokens than clusters leaves the last clusters empty.

    Returns the cluster of each token and which clusters hold a token.
    """
    _, n, dim = tokens.shape
    # Not by matrix products: they would give duplicates a distance, and one that depends on the batch.
    distance = torch.cdist(tokens, tokens, compute_mode="donot_use_mm_for_euclid_dist") / dim**0.5
    present = mask[:, None, :] & mask[:, :, None]

    nearest = distance.masked_fill(~present, torch.inf).sort(dim=-1).values[:, :, :NEIGHBOURS]
    counted = nearest.isfinite()
    mean_square = nearest.masked_fill(~counted, 0.0).square().sum(-1) / counted.sum(-1).clamp(min=1)
    density = (-mean_square).exp()

    position = torch.arange(n, device=tokens.device)
    other, own = density[:, None, :], density[:, :, None]
    denser = ((other > own) | ((other == own) & (position[None, :] < position[:, None]))) & present
    farthest = distance.masked_fill(~present, 0.0).amax(dim=(1, 2))
    peak = distance.masked_fill(~denser, torch.inf).amin(-1).minimum(farthest[:, None])

    score = (density * peak).masked_fill(~mask, -1.0)
    centres = score.sort(dim=-1, descending=True, stable=True).indices[:, :clusters]
    taken = mask.gather(1, centres)
    to_centre = distance.gather(1, centres[:, :, None].expand(-1, -1, n)).masked_fill(
        ~taken[:, :, None], torch.inf
    )
    joined = to_centre.argmin(dim=1)
    # A centre is its own cluster's, even where it lies on top of another centre.
    itself = (centres[:, :, None] == position) & taken[:, :, None]
    joined = torch.where(itself.any(1), itself.int().argmax(1), joined)
    return joined.masked_fill(~mask, 0), taken


class TokenMerge(nn.Module):
    """Mixes neighbours, clusters, averages each cluster by learned weights, and lets the averages look back (the CTM
    and TCBlock of TCFormer, as the published HBI has them: no MLP).

        x     = LN(x + conv3(x))            score = Linear(x)
        merge = sum_n e^score_n x_n / (sum_n e^score_n + 1e-6)                     over the tokens n of a cluster
        out   = merge + proj(softmax(q(LN' merge) k(LN' x)^T / sqrt(head) + score) v(LN' x))
    """

    def __init__(self, dim: int, ratio: float, head_width: int) -> None:
        super().__init__()
        self.ratio = ratio
        self.heads = dim // head_width
        self.conv = nn.Conv1d(dim, dim, kernel_size=3, padding=1, bias=False)
        self.norm = nn.LayerNorm(dim)
        self.score = nn.Linear(dim, 1)
        self.attention_norm = nn.LayerNorm(dim)
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)
        for layer in (self.score, self.query, self.key_value, self.out):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def count(self, n: int) -> int:
        """Tokens that are left of n."""
        return max(ceil(n * self.ratio), 1)

    def forward(
        self, tokens: Float[Tensor, "batch n dim"], mask: Bool[Tensor, "batch n"], published: bool = False
    ) -> Merged:
        """published: let padding into the convolution, and call every cluster present, as the published code does."""
        batch, n, dim = tokens.shape
        clusters = self.count(n)
        if not published:
            tokens = tokens * mask[:, :, None]
        tokens = self.norm(tokens + self.conv(tokens.transpose(1, 2)).transpose(1, 2))
        score = self.score(tokens)[:, :, 0]
        cluster, present = cluster_tokens(tokens.float(), mask, clusters)

        # A product with the membership matrix, not index_add: the same sum, in the same order on every device.
        share = one_hot(cluster, clusters) * (score.float().exp() * mask)[:, :, None]
        share = share / (share.sum(1, keepdim=True) + 1e-6)
        merged = (share.transpose(1, 2) @ tokens.float()).to(tokens.dtype)

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.heads, dim // self.heads)).transpose(1, 2)

        query = self.query(self.attention_norm(merged))
        key, value = self.key_value(self.attention_norm(tokens)).chunk(2, dim=-1)
        bias = score.masked_fill(~mask, -torch.inf)[:, None, None, :].to(query.dtype)
        seen = scaled_dot_product_attention(heads(query), heads(key), heads(value), attn_mask=bias)
        merged = merged + self.out(seen.transpose(1, 2).reshape(batch, clusters, dim))
        return Merged(merged, torch.ones_like(present) if published else present, cluster)
