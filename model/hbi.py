"""The assembled model: texts and videos to tokens at three levels, and the similarities between them."""

from collections.abc import Iterator
from math import log
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from transformers import CLIPModel

from hbi.model.backbones.clip import TextTower, VisionTower, clip_config
from hbi.model.config import ModelConfig
from hbi.model.frames import normalise
from hbi.model.levels import LEVELS, TokenMerge
from hbi.model.predictor import InteractionPredictor
from hbi.model.similarity import pair_similarity, weighted_similarity
from hbi.model.temporal import TemporalTransformer
from hbi.model.tokens import Tokens, last_present, require_tokens

LARGEST_LOGIT_SCALE = 100.0
BACKBONE = ("text.", "video.", "logit_scale")
"""Where the names of CLIP's own parameters begin."""


class Encoded(NamedTuple):
    """What the losses need of a batch of matched pairs."""

    text: dict[str, Tokens]
    """The texts' tokens at each level."""
    video: dict[str, Tokens]
    """The videos' tokens at each level."""
    predicted: dict[str, Float[Tensor, "batch words frames"]]
    """The learned interaction of each pair at each level; 0 at padding."""
    logit_scale: Float[Tensor, ""]
    """What similarities are multiplied by before a softmax (already exp'd)."""
    estimated: dict[str, Float[Tensor, "batch words frames"]]
    """The frozen estimator's interaction of each pair, where the model has one; else empty."""


def token_weights(dim: int) -> nn.Sequential:
    """The weight logit of a token: Linear(dim, 2 dim), ReLU, Linear(2 dim, 1)."""
    layers = nn.Sequential(nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, 1))
    for layer in (layers[0], layers[2]):
        nn.init.normal_(layer.weight, std=0.02)  # type: ignore[arg-type]
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layers


class HBI(nn.Module):
    """Hierarchical Banzhaf Interaction (Jin et al., CVPR 2023): CLIP towers, three levels of tokens for words and
    frames, a weighted token-wise similarity at each, and the learned interaction of words and frames at each.

    Made with fresh weights and without a network; `hbi.model.weights.build_model` starts from a CLIP checkpoint.
    """

    def __init__(self, config: ModelConfig, clip: CLIPModel | None = None) -> None:
        """clip: the towers to take, of the sizes in `config.towers`; none: fresh ones."""
        super().__init__()
        self.config = config
        dim = config.towers.dim
        if clip is None:
            clip = CLIPModel(clip_config(config.towers))
        self.logit_scale = nn.Parameter(torch.tensor(log(1 / 0.07)))
        """Its logarithm."""
        with torch.no_grad():
            self.logit_scale.copy_(clip.logit_scale)
        self.text = TextTower(clip)
        self.video = VisionTower(clip)
        self.temporal = TemporalTransformer(config, self.text) if config.temporal_layers else None
        self.text_weights = nn.ModuleDict({level: token_weights(dim) for level in LEVELS})
        self.video_weights = nn.ModuleDict({level: token_weights(dim) for level in LEVELS})
        self.text_merges = nn.ModuleList(
            TokenMerge(dim, ratio, config.head_width) for ratio in config.word_ratios
        )
        self.video_merges = nn.ModuleList(
            TokenMerge(dim, ratio, config.head_width) for ratio in config.frame_ratios
        )
        self.predictors = nn.ModuleDict(
            {level: InteractionPredictor(config.predictor_width) for level in LEVELS}
        )
        self.estimator = InteractionPredictor(config.predictor_width) if config.estimator else None
        if self.estimator is not None:
            self.estimator.requires_grad_(False)
        if config.freeze_patches:
            self.video.embeddings.patch_embedding.requires_grad_(False)
        self.set_checkpointing(config.checkpointing)

    @property
    def _published(self) -> bool:
        return self.config.masking == "published"

    def set_checkpointing(self, on: bool) -> None:
        """Recompute the activations of both towers and the temporal transformer in the backward pass, or keep them."""
        self.text.checkpointing = on
        self.video.checkpointing = on
        if self.temporal is not None:
            self.temporal.checkpointing = on

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keep the scale at 100 at most; to be called after each step of the optimiser."""
        self.logit_scale.clamp_(max=log(LARGEST_LOGIT_SCALE))

    def backbone_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters of the towers that CLIP brings: those with the small learning rate."""
        return ((name, value) for name, value in self.named_parameters() if name.startswith(BACKBONE))

    def new_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters of all the rest."""
        return ((name, value) for name, value in self.named_parameters() if not name.startswith(BACKBONE))

    def encode_text(
        self, input_ids: Int[Tensor, "batch words"], text_mask: Shaped[Tensor, "batch words"]
    ) -> tuple[Float[Tensor, "batch words dim"], Float[Tensor, "batch dim"]]:
        """Words and sentence of each text; ValueError for a text without a token."""
        mask = require_tokens(text_mask, "text")
        words = self.text(input_ids, mask).float()
        return words, last_present(words, mask)

    def encode_video(
        self,
        video: Shaped[Tensor, "batch frames channels_or_height height_or_width width_or_channels"],
        video_mask: Shaped[Tensor, "batch frames"],
    ) -> Float[Tensor, "batch frames dim"]:
        """Frames of each video. video: float [batch, frames, 3, height, width], normalised, or uint8
        [batch, frames, height, width, 3], normalised here; ValueError for a video without a frame."""
        mask = require_tokens(video_mask, "video")
        images = normalise(video) if video.dtype == torch.uint8 else video
        frames = self.video(images.flatten(0, 1)).float().unflatten(0, mask.shape)
        return frames if self.temporal is None else self.temporal(frames, mask).float()

    def text_levels(
        self, words: Float[Tensor, "batch words dim"], text_mask: Shaped[Tensor, "batch words"]
    ) -> dict[str, Tokens]:
        """The tokens of each level from the words of `encode_text`."""
        return self._levels(words, require_tokens(text_mask, "text"), self.text_merges, self.text_weights)

    def video_levels(
        self, frames: Float[Tensor, "batch frames dim"], video_mask: Shaped[Tensor, "batch frames"]
    ) -> dict[str, Tokens]:
        """The tokens of each level from the frames of `encode_video`."""
        return self._levels(
            frames, require_tokens(video_mask, "video"), self.video_merges, self.video_weights
        )

    def _levels(
        self, tokens: Tensor, mask: Tensor, merges: nn.ModuleList, weights: nn.ModuleDict
    ) -> dict[str, Tokens]:
        levels = {}
        for level, merge in zip(LEVELS, [None, *merges], strict=True):
            if merge is not None:
                tokens, mask, _ = merge(tokens, mask, published=self._published)
            levels[level] = Tokens(tokens.float(), weights[level](tokens)[:, :, 0].float(), mask)
        return levels

    def similarity(
        self, text: Tokens, video: Tokens, chunk: int | None = None
    ) -> Float[Tensor, "texts videos"]:
        """`weighted_similarity` of every text with every video, padding treated as this model's config says."""
        return weighted_similarity(text, video, chunk, padding="zero" if self._published else "absent")

    def similarities(
        self,
        input_ids: Int[Tensor, "texts words"],
        text_mask: Shaped[Tensor, "texts words"],
        video: Shaped[Tensor, "videos frames a b c"],
        video_mask: Shaped[Tensor, "videos frames"],
        chunk: int | None = None,
    ) -> dict[str, Float[Tensor, "texts videos"]]:
        """Similarity in [-1, 1] of every text with every video at each level."""
        text = self.text_levels(self.encode_text(input_ids, text_mask)[0], text_mask)
        clips = self.video_levels(self.encode_video(video, video_mask), video_mask)
        return {level: self.similarity(text[level], clips[level], chunk) for level in LEVELS}

    def interactions(
        self, predictors: dict[str, InteractionPredictor], text: dict[str, Tokens], video: dict[str, Tokens]
    ) -> dict[str, Float[Tensor, "batch words frames"]]:
        """What a predictor for each level makes of the pairs' word-by-frame similarities."""
        result = {}
        for level, predictor in predictors.items():
            words, frames = text[level], video[level]
            masks = () if self._published else (words.mask, frames.mask)
            result[level] = predictor(pair_similarity(words, frames), *masks).float()
        return result

    def forward(
        self,
        input_ids: Int[Tensor, "batch words"],
        text_mask: Shaped[Tensor, "batch words"],
        video: Shaped[Tensor, "batch frames a b c"],
        video_mask: Shaped[Tensor, "batch frames"],
    ) -> Encoded:
        """A batch of matched pairs to what the losses need; a batch of no pairs is one too."""
        text = self.text_levels(self.encode_text(input_ids, text_mask)[0], text_mask)
        clips = self.video_levels(self.encode_video(video, video_mask), video_mask)
        predicted = self.interactions(dict(self.predictors.items()), text, clips)  # type: ignore[arg-type]
        estimated = {}
        if self.estimator is not None:
            with torch.no_grad():
                estimated = self.interactions(dict.fromkeys(LEVELS, self.estimator), text, clips)
        return Encoded(text, clips, predicted, self.logit_scale.exp(), estimated)
