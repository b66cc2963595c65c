"""CLIP's two towers: every word and every frame as one token in the joint space."""

from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig, MetaClip2Model

from hbi.model.backbones.block import ClassTokenBlock, as_blocks
from hbi.model.config import TowerConfig
from hbi.model.tokens import last_present


def text_sizes(towers: TowerConfig) -> dict[str, Any]:
    """What the text configurations of all families in `transformers` take."""
    return {
        "vocab_size": towers.vocab_size,
        "hidden_size": towers.text_width,
        "intermediate_size": towers.text_mlp or 4 * towers.text_width,
        "num_hidden_layers": towers.text_layers,
        "num_attention_heads": towers.text_heads,
        "max_position_embeddings": towers.context,
        "hidden_act": towers.activation,
        "layer_norm_eps": towers.norm_eps,
        # Positions and masks come from us: these are never looked at, but must lie inside the vocabulary.
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def vision_sizes(towers: TowerConfig) -> dict[str, Any]:
    """What the vision configurations of all families in `transformers` take."""
    return {
        "hidden_size": towers.vision_width,
        "intermediate_size": towers.vision_mlp or 4 * towers.vision_width,
        "num_hidden_layers": towers.vision_layers,
        "num_attention_heads": towers.vision_heads,
        "patch_size": towers.patch_size,
        "hidden_act": towers.activation,
        "layer_norm_eps": towers.norm_eps,
    }


def clip_config(towers: TowerConfig) -> CLIPConfig:
    """The configuration of `transformers` for towers of these sizes; attention through SDPA."""
    text = CLIPTextConfig(**text_sizes(towers), projection_dim=towers.dim)
    vision = CLIPVisionConfig(**vision_sizes(towers), projection_dim=towers.dim, image_size=towers.image_size)
    return CLIPConfig(
        text_config=text.to_dict(),
        vision_config=vision.to_dict(),
        projection_dim=towers.dim,
        attn_implementation="sdpa",  # type: ignore[call-arg]
    )


def run_layers(
    layers: nn.ModuleList, hidden: Tensor, mask: Tensor | None, checkpointing: bool
) -> Float[Tensor, "batch n width"]:
    """A stack of CLIP blocks; with checkpointing each block's activations are computed again in the backward pass."""
    if not len(hidden):  # CLIP's attention cannot reshape a batch of none: let it have one, and drop it
        one = (0, 0, 0, 0, 0, 1)
        mask = mask if mask is None else pad(mask, (0, 0, *one), value=True)
        return run_layers(layers, pad(hidden, one), mask, checkpointing)[:0]
    for layer in layers:
        if checkpointing and torch.is_grad_enabled():
            hidden = checkpoint(layer, hidden, mask, use_reentrant=False, preserve_rng_state=False)
        else:
            hidden = layer(hidden, mask)
    return hidden


def require_size(images: Float[Tensor, "images 3 height width"], size: int) -> None:
    """ValueError for images of another size than the tower takes."""
    if images.shape[-2:] != (size, size):
        raise ValueError(
            f"video: frames are {tuple(images.shape[-2:])} pixels, the model takes {(size, size)}"
        )


class TextTower(nn.Module):
    """CLIP's text transformer with every word projected to the joint space."""

    def __init__(self, clip: CLIPModel | MetaClip2Model) -> None:
        super().__init__()
        self.embeddings = clip.text_model.embeddings
        self.layers = as_blocks(clip.text_model.encoder.layers)
        self.norm = clip.text_model.final_layer_norm
        self.projection = clip.text_projection
        self.checkpointing = False

    def forward(
        self, input_ids: Int[Tensor, "batch words"], mask: Bool[Tensor, "batch words"]
    ) -> tuple[Float[Tensor, "batch words dim"], Float[Tensor, "batch dim"]]:
        """Words and sentence. A word sees the present words up to itself; one that sees none (padding in front) sees
        itself. The sentence is read at the last word.

        ValueError for more words than there are positions.
        """
        n = input_ids.shape[1]
        if n > (most := len(self.embeddings.position_embedding.weight)):
            raise ValueError(f"text: {n} tokens, the model has positions for {most}")
        causal = torch.ones(n, n, dtype=torch.bool, device=mask.device).tril()
        seen = causal & mask[:, None, :]
        seen |= ~seen.any(-1, keepdim=True) & torch.eye(n, dtype=torch.bool, device=mask.device)
        hidden = run_layers(self.layers, self.embeddings(input_ids), seen[:, None], self.checkpointing)
        words = self.projection(self.norm(hidden))
        return words, last_present(words, mask)


class ConvStem(nn.Sequential):
    """Images to patches by small convolutions, 3 x 3 with stride 2, a ReLU between them (Xiao et al. 2021, "Early
    Convolutions Help Transformers See Better"): [images, 3, height, width] -> [images, width, rows, columns]."""

    def __init__(self, channels: int, patch_size: int, width: int) -> None:
        """channels: of the first; each later one has twice as many, the last `width`. patch_size: a power of 2."""
        halvings = patch_size.bit_length() - 1
        sizes = [3, *(channels * 2**i for i in range(halvings - 1)), width]
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes):
            layers += [nn.Conv2d(before, after, kernel_size=3, stride=2, padding=1), nn.ReLU()]
        super().__init__(*layers[:-1])

    @property
    def weight(self) -> Tensor:
        """CLIP's embeddings ask their patches' weight for its type."""
        return self[0].weight  # type: ignore[return-value]


class VisionTower(nn.Module):
    """CLIP's vision transformer: one token a frame, the projected class token."""

    def __init__(self, clip: CLIPModel | MetaClip2Model, stem: int = 0) -> None:
        """stem: channels of a `ConvStem` in place of CLIP's patch embedding; 0 keeps that."""
        super().__init__()
        self.embeddings: Any = clip.vision_model.embeddings
        if stem:
            settings: Any = clip.config.vision_config
            self.embeddings.patch_embedding = ConvStem(stem, settings.patch_size, settings.hidden_size)
        self.norm_before = clip.vision_model.pre_layrnorm
        self.layers = as_blocks(clip.vision_model.encoder.layers)
        self.layers[-1].__class__ = ClassTokenBlock
        self.norm = clip.vision_model.post_layernorm
        self.projection = clip.visual_projection
        self.checkpointing = False

    def forward(self, images: Float[Tensor, "images 3 height width"]) -> Float[Tensor, "images dim"]:
        """Images are normalised, of the tower's own size; ValueError for another."""
        size: Any = self.embeddings.image_size
        require_size(images, size)
        hidden = self.norm_before(self.embeddings(images))
        hidden = run_layers(self.layers, hidden, None, self.checkpointing)
        return self.projection(self.norm(hidden[:, 0]))
