"""SigLIP's and SigLIP 2's two towers (Zhai et al., ICCV 2023; Tschannen et al., arXiv 2502.14786): every word and every
frame as one token in the joint space.

Unlike CLIP, a text is always as long as the tower's context: it is filled up with padding that every word sees, since
that is how it was trained, and the sentence is read at the last position, which for most texts is padding.

The library's processor squashes a picture to the square; frames here keep their proportions and lose what lies beside
the centre, as for CLIP. Shards hold frames, are made before a backbone is chosen and serve all of them. Given the same
pixels, features are the library's.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import (
    Siglip2Config,
    Siglip2Model,
    Siglip2TextConfig,
    Siglip2VisionConfig,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
)

from hbi.model.backbones.clip import require_size, run_layers, text_sizes, vision_sizes
from hbi.model.config import TowerConfig


def siglip_config(towers: TowerConfig) -> SiglipConfig | Siglip2Config:
    """The configuration of `transformers` for towers of these sizes; attention through SDPA."""
    of_text = SiglipTextConfig if towers.family == "siglip" else Siglip2TextConfig
    text = of_text(**text_sizes(towers), projection_size=towers.dim)
    vision = vision_sizes(towers)
    attention: dict[str, Any] = {"attn_implementation": "sdpa"}
    if towers.family == "siglip":
        of_vision = SiglipVisionConfig(**vision, image_size=towers.image_size)
        return SiglipConfig(text_config=text.to_dict(), vision_config=of_vision.to_dict(), **attention)
    of_patches = Siglip2VisionConfig(**vision, num_patches=(towers.image_size // towers.patch_size) ** 2)
    return Siglip2Config(text_config=text.to_dict(), vision_config=of_patches.to_dict(), **attention)


class SiglipTextTower(nn.Module):
    """SigLIP's text transformer with every word projected to the joint space."""

    def __init__(self, siglip: SiglipModel | Siglip2Model, pad_id: int) -> None:
        """pad_id: the token that a text is filled up with."""
        super().__init__()
        self.embeddings = siglip.text_model.embeddings
        self.layers = siglip.text_model.encoder.layers
        self.norm = siglip.text_model.final_layer_norm
        self.projection = siglip.text_model.head
        self.pad_id = pad_id
        self.checkpointing = False

    def forward(
        self, input_ids: Int[Tensor, "batch words"], mask: Bool[Tensor, "batch words"]
    ) -> tuple[Float[Tensor, "batch words dim"], Float[Tensor, "batch dim"]]:
        """Words and sentence: every word sees the whole text and its padding, up to the tower's context.

        ValueError for more words than there are positions.
        """
        n, most = input_ids.shape[1], len(self.embeddings.position_embedding.weight)
        if n > most:
            raise ValueError(f"text: {n} tokens, the model has positions for {most}")
        filled = pad(input_ids.masked_fill(~mask, self.pad_id), (0, most - n), value=self.pad_id)
        hidden = run_layers(self.layers, self.embeddings(filled), None, self.checkpointing)
        words = self.projection(self.norm(hidden))
        return words[:, :n], words[:, -1]


class SiglipVisionTower(nn.Module):
    """SigLIP's vision transformer: one token a frame, pooled by attention."""

    def __init__(self, siglip: SiglipModel | Siglip2Model, towers: TowerConfig) -> None:
        super().__init__()
        self.embeddings = siglip.vision_model.embeddings
        self.layers = siglip.vision_model.encoder.layers
        self.norm = siglip.vision_model.post_layernorm
        self.pool = siglip.vision_model.head
        self.image_size, self.patch_size = towers.image_size, towers.patch_size
        self.takes_patches = towers.family == "siglip2"
        self.checkpointing = False

    def forward(self, images: Float[Tensor, "images 3 height width"]) -> Float[Tensor, "images dim"]:
        """Images are normalised, of the tower's own size; ValueError for another."""
        require_size(images, self.image_size)
        if not len(images):  # attention that pools cannot reshape a batch of none
            return self.pool(images.new_zeros(1, 1, self.norm.weight.shape[0]))[:0]
        hidden = self._patches(images) if self.takes_patches else self.embeddings(images)
        hidden = run_layers(self.layers, hidden, None, self.checkpointing)
        return self.pool(self.norm(hidden))

    def _patches(
        self, images: Float[Tensor, "images 3 height width"]
    ) -> Float[Tensor, "images patches hidden"]:
        """SigLIP 2 takes patches row by row, each as [height, width, colour] flattened."""
        side = self.patch_size
        cells = images.unfold(2, side, side).unfold(3, side, side)  # [images, 3, down, across, side, side]
        rows, columns = cells.shape[2:4]
        values = cells.permute(0, 2, 3, 4, 5, 1).reshape(len(images), rows * columns, -1)
        shapes = torch.tensor([[rows, columns]] * len(images), device=images.device)
        return self.embeddings(values, shapes)
