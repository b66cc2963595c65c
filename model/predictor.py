"""The learned interaction of words and frames: what a small network makes of their similarities."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import relu, scaled_dot_product_attention


class InteractionPredictor(nn.Module):
    """The published learned map from similarities to interactions: convolution, attention over the word-frame grid,
    convolution.

        h = relu(conv(s))      out = conv(h + softmax((h Q)(h K)^T) (h V))          attention over all cells, unscaled

    With masks the padding is absent: no cell attends to it and nothing leaks from it; the result there is 0.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.rise = nn.Conv2d(1, width, kernel_size=3, padding=1)
        self.query, self.key, self.value = (nn.Parameter(torch.empty(width, width)) for _ in range(3))
        self.fall = nn.Conv2d(width, 1, kernel_size=3, padding=1)
        for weight in (self.query, self.key, self.value):
            nn.init.xavier_uniform_(weight, gain=1.414)

    def forward(
        self,
        similarity: Float[Tensor, "batch words frames"],
        word_mask: Bool[Tensor, "batch words"] | None = None,
        frame_mask: Bool[Tensor, "batch frames"] | None = None,
    ) -> Float[Tensor, "batch words frames"]:
        """Both masks, or neither."""
        grid = similarity.shape[1:]
        present = attended = None
        if word_mask is not None and frame_mask is not None:
            present = word_mask[:, :, None] & frame_mask[:, None, :]
            cells = present.flatten(1)
            # A game without a cell attends everywhere, for the sake of numbers; its result is 0.
            attended = (cells | ~cells.any(-1, keepdim=True))[:, None, None, :]
            similarity = similarity * present
        hidden = relu(self.rise(similarity[:, None])).flatten(2).transpose(1, 2)
        query, key, value = (hidden @ weight for weight in (self.query, self.key, self.value))
        seen = scaled_dot_product_attention(
            query[:, None], key[:, None], value[:, None], attn_mask=attended, scale=1.0
        )[:, 0]
        hidden = (hidden + seen).transpose(1, 2).unflatten(2, grid)
        if present is None:
            return self.fall(hidden)[:, 0]
        return self.fall(hidden * present[:, None])[:, 0] * present
