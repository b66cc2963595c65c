"""The assembled model: texts and videos to tokens at three levels, and the similarities between them."""

from collections.abc import Collection, Iterator
from dataclasses import replace
from math import log
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from hbi.model.backbones.pretrained import fresh_backbone, towers_of
from hbi.model.config import DecodeSettings, LossSettings, ModelConfig
from hbi.model.frames import normalise
from hbi.model.heads import HeadInputs
from hbi.model.heads.beam import Marks, write
from hbi.model.heads.caption import CachedDecoder, CaptionDecoder
from hbi.model.heads.qa import OpenAnswerHead, PublishedAnswerHead, combined
from hbi.model.levels import LEVELS, TokenMerge
from hbi.model.predictor import InteractionPredictor
from hbi.model.reconstruct import Reconstruction
from hbi.model.similarity import matched_similarity, pair_similarity, weighted_similarity
from hbi.model.temporal import TemporalTransformer
from hbi.model.tokens import Tokens, longest, require_tokens

LARGEST_LOGIT_SCALE = 100.0
BACKBONE = ("text.", "video.", "logit_scale", "logit_bias")
"""Where the names of the backbone's own parameters begin."""
NO_RECONSTRUCTION = (
    "this model reconstructs nothing to rerank by: train one with --set.model.reconstruction.form attention"
)


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
    players: dict[str, Float[Tensor, "batch words frames"]] = {}  # noqa: RUF012 (nobody writes to it)
    """The similarities of the rebuilt words and frames that play each pair's game, where the model reconstructs, with
    no gradient; else empty: the tokens play as they are."""
    logit_bias: Float[Tensor, ""] | None = None
    """What is added to them before a sigmoid, with SigLIP's towers."""


def token_weights(dim: int) -> nn.Sequential:
    """The weight logit of a token: Linear(dim, 2 dim), ReLU, Linear(2 dim, 1)."""
    layers = nn.Sequential(nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, 1))
    for layer in (layers[0], layers[2]):
        nn.init.normal_(layer.weight, std=0.02)  # type: ignore[arg-type]
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layers


class HBI(nn.Module):
    """Hierarchical Banzhaf Interaction (Jin et al., CVPR 2023): CLIP or SigLIP towers, three levels of tokens for
    words and frames, a weighted token-wise similarity at each, and the learned interaction of words and frames at each.

    Made with fresh weights and without a network; `hbi.model.weights.build_model` starts from a checkpoint.
    """

    def __init__(self, config: ModelConfig, backbone: PreTrainedModel | None = None) -> None:
        """backbone: the towers to take, of the sizes in `config.towers`; none: fresh ones."""
        super().__init__()
        self.config = config
        dim = config.towers.dim
        if backbone is None:
            backbone = fresh_backbone(config.towers)
        pretrained: Any = backbone
        self.logit_scale = nn.Parameter(torch.tensor(log(1 / 0.07)))
        """Its logarithm."""
        with torch.no_grad():
            self.logit_scale.copy_(pretrained.logit_scale.squeeze())
        bias = getattr(pretrained, "logit_bias", None)
        self.logit_bias = None if bias is None else nn.Parameter(bias.detach().clone().squeeze(), False)
        """SigLIP's, added to its logits before the sigmoid; CLIP has none. It learns where the loss has one."""
        self.text, self.video = towers_of(pretrained, config.towers)
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
        # Last, so that the rest begins with the same random numbers whatever is added to it.
        self.reconstruction = self.answerer = self.captioner = None
        if config.reconstruction.form != "none":
            self.reconstruction = nn.ModuleDict(
                {level: Reconstruction(config.reconstruction, dim, config.head_width) for level in LEVELS}
            )
        if config.answers.head == "published":
            self.answerer = PublishedAnswerHead(dim, config.answers.vocabulary, config.answers.dropout)
        elif config.answers.head == "open":
            self.answerer = OpenAnswerHead(dim, config.answers.dropout)
        if config.captions.layers:
            self.captioner = CaptionDecoder(config)
        self.vocabulary: tuple[str, ...] = ()
        """The answers that the head for questions was trained on, in the order of its classifiers."""
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
        """Keep CLIP's scale at 100 at most; to be called after each step of the optimiser. SigLIP's is free."""
        if self.logit_bias is None:
            self.logit_scale.clamp_(max=log(LARGEST_LOGIT_SCALE))

    def learn_bias(self) -> None:
        """Let the bias of SigLIP's towers be trained; ValueError where the towers have none."""
        if self.logit_bias is None:
            raise ValueError(
                "LossSettings.contrast is 'sigmoid', but CLIP's towers have no bias: take SigLIP's, or softmax"
            )
        self.logit_bias.requires_grad_(True)

    def backbone_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters of the towers that a backbone brings: those with the small learning rate."""
        return ((name, value) for name, value in self.named_parameters() if name.startswith(BACKBONE))

    def new_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters of all the rest."""
        return ((name, value) for name, value in self.named_parameters() if not name.startswith(BACKBONE))

    def encode_text(
        self, input_ids: Int[Tensor, "batch words"], text_mask: Shaped[Tensor, "batch words"]
    ) -> tuple[Float[Tensor, "batch words dim"], Float[Tensor, "batch dim"]]:
        """Words and sentence of each text; ValueError for a text without a token."""
        mask = require_tokens(text_mask, "text")
        width = mask.shape[1]
        # CLIP's present words never look at padding behind them. SigLIP's do, and so does the published merge.
        used = longest(mask) if self.config.towers.family == "clip" and not self._published else width
        words, sentence = self.text(input_ids[:, :used], mask[:, :used])
        return pad(words.float(), (0, 0, 0, width - used)), sentence.float()

    def encode_video(
        self,
        video: Shaped[Tensor, "batch frames channels_or_height height_or_width width_or_channels"],
        video_mask: Shaped[Tensor, "batch frames"],
    ) -> Float[Tensor, "batch frames dim"]:
        """Frames of each video. video: float [batch, frames, 3, height, width], normalised, or uint8
        [batch, frames, height, width, 3], normalised here; ValueError for a video without a frame."""
        mask = require_tokens(video_mask, "video")
        return self.over_time(self.encode_frames(video), mask)

    def encode_frames(
        self, video: Shaped[Tensor, "batch frames channels_or_height height_or_width width_or_channels"]
    ) -> Float[Tensor, "batch frames dim"]:
        """Each frame by itself, as for `encode_video`: what the transformer over time begins with."""
        towers = self.config.towers
        raw = video.dtype == torch.uint8
        images = normalise(video, towers.image_mean, towers.image_std) if raw else video
        return self.video(images.flatten(0, 1)).float().unflatten(0, video.shape[:2])

    def over_time(
        self, frames: Float[Tensor, "batch frames dim"], video_mask: Bool[Tensor, "batch frames"]
    ) -> Float[Tensor, "batch frames dim"]:
        """Frames that have seen the other present frames, from those of `encode_frames`."""
        return frames if self.temporal is None else self.temporal(frames, video_mask).float()

    def text_levels(
        self,
        words: Float[Tensor, "batch words dim"],
        text_mask: Shaped[Tensor, "batch words"],
        levels: Collection[str] = LEVELS,
    ) -> dict[str, Tokens]:
        """The tokens of each of the levels, in the order of `LEVELS`, from the words of `encode_text`."""
        mask = require_tokens(text_mask, "text")
        return self._levels(words, mask, levels, self.text_merges, self.text_weights)

    def video_levels(
        self,
        frames: Float[Tensor, "batch frames dim"],
        video_mask: Shaped[Tensor, "batch frames"],
        levels: Collection[str] = LEVELS,
    ) -> dict[str, Tokens]:
        """The tokens of each of the levels, in the order of `LEVELS`, from the frames of `encode_video`."""
        mask = require_tokens(video_mask, "video")
        return self._levels(frames, mask, levels, self.video_merges, self.video_weights)

    def _levels(
        self,
        tokens: Tensor,
        mask: Tensor,
        wanted: Collection[str],
        merges: nn.ModuleList,
        weights: nn.ModuleDict,
    ) -> dict[str, Tokens]:
        levels = {}
        last = max(map(LEVELS.index, wanted))
        for level, merge in zip(LEVELS[: last + 1], [None, *merges][: last + 1], strict=True):
            if merge is not None:
                tokens, mask, _ = merge(tokens, mask, published=self._published)
            if level in wanted:
                logits = weights[level](tokens)[:, :, 0]
                levels[level] = Tokens(tokens.float(), logits.float(), mask)
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

    def reconstruct(
        self, text: dict[str, Tokens], video: dict[str, Tokens]
    ) -> tuple[dict[str, Tokens], dict[str, Tokens]]:
        """The players of each pair's game: the pair's tokens, rebuilt where the model reconstructs. Row by row."""
        if self.reconstruction is None:
            return text, video
        pairs = {level: self.reconstruction[level](text[level], video[level]) for level in text}
        return {level: pair[0] for level, pair in pairs.items()}, {
            level: pair[1] for level, pair in pairs.items()
        }

    def rerank(self, text: Tokens, video: Tokens, level: str = "entity") -> Float[Tensor, " batch"]:
        """The similarity of each text with the video of its own row, of tokens rebuilt with each other's help.

        For the few candidates that a search found: a text that is asked about many videos is repeated. ValueError where
        the model reconstructs nothing.
        """
        if self.reconstruction is None:
            raise ValueError(NO_RECONSTRUCTION)
        text, video = self.reconstruction[level](text, video)
        return matched_similarity(text, video, padding="zero" if self._published else "absent")

    def answer_levels(
        self,
        text: dict[str, Tokens],
        sentence: Float[Tensor, "questions dim"],
        video: dict[str, Tokens],
        candidates: tuple[Tensor, Tensor] | None = None,
    ) -> dict[str, Float[Tensor, "questions answers"]]:
        """Logits of the answers at each level, from `text_levels` and the sentence token of each question, and
        `video_levels` of its own video."""
        if isinstance(self.answerer, PublishedAnswerHead):
            if candidates is not None:
                raise ValueError(
                    f"answers: this model classifies into its own {self.config.answers.vocabulary} answers; a list "
                    "of others needs a model trained with --set.model.answers.head open"
                )
            return self.answerer(text, video, self._published)
        if not isinstance(self.answerer, OpenAnswerHead):
            raise ValueError("this model answers no questions: train one with --set.task qa")
        if candidates is None:
            raise ValueError("answers: the open head scores the answers that it is given: give candidates")
        with torch.no_grad():  # the towers learn from questions, and answers lie where sentences do
            _, answers = self.encode_text(*candidates)
        _, rebuilt = self.reconstruct(text, video)
        return self.answerer(sentence, rebuilt, answers)

    def answer_logits(
        self,
        input_ids: Int[Tensor, "questions words"],
        text_mask: Shaped[Tensor, "questions words"],
        frames: Float[Tensor, "questions frames dim"],
        video_mask: Shaped[Tensor, "questions frames"],
        candidates: tuple[Tensor, Tensor] | None = None,
    ) -> Float[Tensor, "questions answers"]:
        """How well each answer fits question i about video i; see `hbi.model.heads`.

        frames: of `encode_video`. ValueError where the model has no head for questions, or not one for candidates.
        """
        words, sentence = self.encode_text(input_ids, text_mask)
        text, video = self.text_levels(words, text_mask), self.video_levels(frames, video_mask)
        return combined(self.answer_levels(text, sentence, video, candidates))

    def caption_logits(
        self, input_ids: Int[Tensor, "captions words"], video: dict[str, Tokens]
    ) -> Float[Tensor, "captions words vocabulary"]:
        """Logits of the word after each word of a caption; video: `video_levels` of each caption's own video."""
        decoder = self._decoder()
        return decoder(input_ids, decoder.memory(video), self.text.embeddings.token_embedding.weight)

    def write_captions(
        self,
        frames: Float[Tensor, "videos frames dim"],
        video_mask: Shaped[Tensor, "videos frames"],
        marks: Marks,
        settings: DecodeSettings,
    ) -> list[list[int]]:
        """A caption for each video as token ids, without start and end; see `hbi.model.heads`.

        frames: of `encode_video`. ValueError where the model writes no captions.
        """
        decoder = self._decoder()
        memory = decoder.memory(self.video_levels(frames, video_mask))
        writer = CachedDecoder(decoder, memory, self.text.embeddings.token_embedding.weight)
        settings = replace(settings, words=min(settings.words, decoder.words - 1))
        return write(writer, len(frames), marks, settings, frames.device).ids

    def _decoder(self) -> CaptionDecoder:
        if self.captioner is None:
            raise ValueError("this model writes no captions: train one with --set.task caption")
        return self.captioner

    def forward(
        self,
        input_ids: Int[Tensor, "texts words"],
        text_mask: Shaped[Tensor, "texts words"],
        video: Shaped[Tensor, "videos frames a b c"],
        video_mask: Shaped[Tensor, "videos frames"],
        head: HeadInputs | None = None,
        loss: LossSettings | None = None,
    ) -> Encoded | dict[str, Tensor] | tuple[dict[str, Tensor], Encoded]:
        """A training step's batch to what its loss needs; a batch of nothing is one too.

        head None: matched pairs, for `hbi_loss`; what a `loss` that is given has no use for is left out. Else logits:
        of the answers at each level, or "caption"; with `head.pairs` the questions' pairs beside them.
        """
        frames = self.encode_video(video, video_mask)
        learned, align = (LEVELS, True) if loss is None else (loss.learned, loss.interaction > 0)
        if head is None:
            words, _ = self.encode_text(input_ids, text_mask)
            text = self.text_levels(words, text_mask, learned)
            return self._encode_pairs(text, self.video_levels(frames, video_mask, learned), align)
        own = {
            level: Tokens(*(part[head.video_of_text] for part in tokens))
            for level, tokens in self.video_levels(frames, video_mask).items()
        }
        if head.task == "caption":
            return {"caption": self.caption_logits(input_ids, own)}
        words, sentence = self.encode_text(input_ids, text_mask)
        text = self.text_levels(words, text_mask)
        logits = self.answer_levels(text, sentence, own, head.candidates)
        if not head.pairs:
            return logits
        asked, shown = ({level: side[level] for level in learned} for side in (text, own))
        return logits, self._encode_pairs(asked, shown, align)

    def _encode_pairs(self, text: dict[str, Tokens], video: dict[str, Tokens], align: bool) -> Encoded:
        """What the losses need of pairs, at the levels that the text and the video are given at."""
        words, frames = self.reconstruct(text, video)
        predictors = {level: self.predictors[level] for level in text} if align else {}
        predicted = self.interactions(predictors, words, frames)  # type: ignore[arg-type]
        estimated, players = {}, {}
        with torch.no_grad():
            if self.estimator is not None:
                estimated = self.interactions(dict.fromkeys(text, self.estimator), words, frames)
            if self.reconstruction is not None:
                players = {level: pair_similarity(words[level], frames[level]) for level in text}
        bias = None if self.logit_bias is None else self.logit_bias + 0  # DDP looks for it in a graph
        return Encoded(text, video, predicted, self.logit_scale.exp(), estimated, players, bias)
