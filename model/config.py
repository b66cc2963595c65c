"""Sizes of the model and weights of its loss: frozen, checked when made, the same after a round trip through JSON."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

LEVELS = ("entity", "action", "event")
"""From the words and frames themselves to what is left after two merges."""
NO_HEAD = {
    "qa": "this model answers no questions: train one with --set.task qa",
    "caption": "this model writes no captions: train one with --set.task caption",
}
"""What is said where a model lacks the head of a task."""


def _known(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    names = {entry.name for entry in fields(cls)}
    if unknown := sorted(set(values) - names):
        raise ValueError(
            f"{cls.__name__} has no field {', '.join(unknown)}; it has {', '.join(sorted(names))}"
        )
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _positive(owner: object, names: str) -> None:
    for name in names.split():
        if (value := getattr(owner, name)) < 1:
            raise ValueError(f"{type(owner).__name__}.{name} is {value}, must be at least 1")


def _share(owner: object, name: str) -> None:
    if not 0 <= (value := getattr(owner, name)) < 1:
        raise ValueError(f"{type(owner).__name__}.{name} is {value}, must be at least 0 and below 1")


@dataclass(frozen=True)
class FrameSettings:
    """How a clip becomes a few square frames."""

    num_frames: int = 12
    """Most frames of a clip. A clip that has fewer gives fewer, never copies."""
    size: int = 224
    """Height and width of a frame in pixels."""
    sampling: Literal["uniform", "fps", "segments"] = "uniform"
    """`uniform`: evenly from the first frame to the last; `segments`: the centres of `num_frames` equal segments;
    `fps`: the frame shown at each tick of `fps`, thinned evenly where that gives more than `num_frames`."""
    fps: float = 1.0
    """Frames per second of sampling `fps`."""

    def __post_init__(self) -> None:
        if self.num_frames < 1:
            raise ValueError(f"frames: num_frames is {self.num_frames}, must be at least 1")
        if not 1 <= self.size <= 4096:
            raise ValueError(f"frames: size is {self.size}, must lie between 1 and 4096 pixels")
        if self.sampling not in ("uniform", "fps", "segments"):
            raise ValueError(f"frames: sampling is {self.sampling!r}, must be uniform, fps or segments")
        if not 0 < self.fps < float("inf"):
            raise ValueError(f"frames: fps is {self.fps}, must be above 0")


@dataclass(frozen=True)
class TowerConfig:
    """Sizes of the two towers; the defaults are a small CLIP-shaped pair that trains on a CPU."""

    family: Literal["clip", "siglip", "siglip2"] = "clip"
    """How the towers are laid out (`hbi.model.backbones.pretrained` says which checkpoints are which)."""
    image_size: int = 64
    """Height and width of a frame, pixels."""
    patch_size: int = 16
    """Height and width of a patch, pixels; divides `image_size`."""
    stem: int = 0
    """Channels of the first of the small convolutions that make the patches, each of which halves height and width and
    all but the last of which double the channels; `patch_size` is then a power of 2. 0: CLIP's one convolution.
    Fresh towers learn shapes faster with it."""
    vision_width: int = 128
    """Width of the vision transformer."""
    vision_layers: int = 4
    """Blocks of the vision transformer."""
    vision_heads: int = 4
    """Attention heads of the vision transformer; divides `vision_width`."""
    vision_mlp: int = 0
    """Hidden width of the vision blocks' MLP; 0: four times `vision_width`."""
    text_width: int = 128
    """Width of the text transformer."""
    text_layers: int = 4
    """Blocks of the text transformer."""
    text_heads: int = 4
    """Attention heads of the text transformer; divides `text_width`."""
    text_mlp: int = 0
    """Hidden width of the text blocks' MLP; 0: four times `text_width`."""
    vocab_size: int = 1024
    """Rows of the word embedding."""
    context: int = 77
    """Most tokens of a text, start and end included."""
    dim: int = 128
    """Width of the joint space that words and frames are projected to."""
    activation: str = "quick_gelu"
    """The MLPs' activation, in the names of `transformers`; OpenAI's CLIP has quick_gelu."""
    norm_eps: float = 1e-5
    """Added to the variance in the towers' layer norms."""
    pad_id: int = 0
    """What SigLIP's texts are filled up with; CLIP's words never see their padding."""
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    """Of a pixel in 0..1, by colour: subtracted before the vision tower."""
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    """Of a pixel in 0..1, by colour: divided by before the vision tower."""

    def __post_init__(self) -> None:
        _positive(
            self,
            "image_size patch_size vision_width vision_layers vision_heads text_width text_layers text_heads"
            " vocab_size context dim",
        )
        if self.family not in ("clip", "siglip", "siglip2"):
            raise ValueError(f"TowerConfig.family is {self.family!r}, must be clip, siglip or siglip2")
        if self.family != "clip" and self.vision_width != self.dim:
            raise ValueError(
                f"TowerConfig.vision_width is {self.vision_width}, must be dim ({self.dim}): {self.family} "
                "projects no frame"
            )
        if self.patch_size > self.image_size:
            raise ValueError(
                f"TowerConfig.patch_size is {self.patch_size}, must be at most image_size ({self.image_size})"
            )
        if len(self.image_mean) != 3 or len(self.image_std) != 3 or not min(self.image_std) > 0:
            raise ValueError(
                f"TowerConfig.image_mean and image_std are {self.image_mean} and {self.image_std}, must be three "
                "numbers each, the latter above 0"
            )
        if self.stem < 0 or (self.stem and (self.patch_size < 2 or self.patch_size & (self.patch_size - 1))):
            raise ValueError(
                f"TowerConfig.stem is {self.stem} with patch_size {self.patch_size}: must be 0, or channels with a "
                "patch_size of 2, 4, 8, 16, ..."
            )
        for part, whole in (
            ("patch_size", "image_size"),
            ("vision_heads", "vision_width"),
            ("text_heads", "text_width"),
        ):
            cropped = (
                part == "patch_size" and self.family == "siglip"
            )  # as so400m-patch14-384: a rest is left out
            if getattr(self, whole) % getattr(self, part) and not cropped:
                raise ValueError(
                    f"TowerConfig.{part} is {getattr(self, part)}, must divide {whole} ({getattr(self, whole)})"
                )


@dataclass(frozen=True)
class ReconstructionConfig:
    """How the words and frames of a matched pair are rebuilt with each other's help before they play their game."""

    form: Literal["none", "attention", "gated", "similarity"] = "none"
    """`none`: they play as they are. `attention`: plus what they attend to on the other side, nothing at the start.
    `gated`: a learned share of that in place of themselves. `similarity`: a fixed share, without parameters."""
    share: float = 0.5
    """Cross-modal share of form `similarity`; 0 is `none`."""
    temperature: float = 0.1
    """Of the cosines of form `similarity` before their softmax."""

    def __post_init__(self) -> None:
        if self.form not in ("none", "attention", "gated", "similarity"):
            raise ValueError(
                f"ReconstructionConfig.form is {self.form!r}, must be none, attention, gated or similarity"
            )
        if not 0 <= self.share <= 1:
            raise ValueError(f"ReconstructionConfig.share is {self.share}, must lie between 0 and 1")
        if not self.temperature > 0:
            raise ValueError(f"ReconstructionConfig.temperature is {self.temperature}, must be above 0")


@dataclass(frozen=True)
class AnswerConfig:
    """The head that answers questions about a video."""

    head: Literal["none", "published", "open"] = "none"
    """`published`: a classifier a level over a fixed list of answers. `open`: one hidden layer, answers scored against
    their text embeddings, so that others than those of the list can be asked for."""
    vocabulary: int = 1500
    """Most answers of the list, the commonest of the training split; a trained model says how many it has."""
    dropout: float = 0.1
    """Of the pooled pair, in training."""

    def __post_init__(self) -> None:
        if self.head not in ("none", "published", "open"):
            raise ValueError(f"AnswerConfig.head is {self.head!r}, must be none, published or open")
        _positive(self, "vocabulary")
        _share(self, "dropout")


@dataclass(frozen=True)
class CaptionConfig:
    """The head that writes captions: a causal decoder over the tokens of a video."""

    layers: int = 0
    """Blocks; 0: the model writes no captions."""
    width: int = 0
    """Width of the blocks; 0: that of the text tower."""
    heads: int = 0
    """Attention heads; 0: one for each 64 of the width, at least one."""
    words: int = 24
    """Tokens of the longest caption, start and end included."""
    dropout: float = 0.1
    """In the blocks, in training."""

    def __post_init__(self) -> None:
        if self.layers < 0:
            raise ValueError(f"CaptionConfig.layers is {self.layers}, must be at least 0")
        if self.words < 3:
            raise ValueError(f"CaptionConfig.words is {self.words}, must be at least 3: start, a word, end")
        if self.width < 0 or self.heads < 0:
            raise ValueError(
                f"CaptionConfig.width and heads are {self.width} and {self.heads}, must be at least 0"
            )
        if self.width and self.heads and self.width % self.heads:
            raise ValueError(f"CaptionConfig.heads is {self.heads}, must divide width ({self.width})")
        _share(self, "dropout")


@dataclass(frozen=True)
class ModelConfig:
    """Everything that says which arrays an HBI model has and what it computes with them."""

    backbone: str = ""
    """A CLIP, MetaCLIP 2, SigLIP or SigLIP 2 checkpoint of `transformers`, by name or folder, that `build_model` starts
    from; empty: fresh towers of `towers`."""
    towers: TowerConfig = field(default_factory=TowerConfig)
    """Sizes of the towers; read from the checkpoint where `backbone` names one."""
    words: int = 24
    """Tokens a text is cut to, start and end included."""
    frames: int = 12
    """Frames of a clip."""
    temporal_layers: int = 4
    """Blocks of the transformer over frames; 0: frames stay apart."""
    temporal_window: int = 0
    """How many neighbours on either side a frame sees in each of those blocks; 0: all frames."""
    word_ratios: tuple[float, float] = (0.25, 0.5)
    """Words kept by each of the two merges: entity to action, action to event."""
    frame_ratios: tuple[float, float] = (0.25, 0.5)
    """Frames kept by each of the two merges."""
    predictor_width: int = 64
    """Channels of the learned interaction predictors."""
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    """Whether the players of the game are rebuilt with the other side's help."""
    answers: AnswerConfig = field(default_factory=AnswerConfig)
    """The head for questions."""
    captions: CaptionConfig = field(default_factory=CaptionConfig)
    """The head for captions."""
    estimator: bool = False
    """Whether a frozen estimator of the published method is part of the model (`load_published` brings it)."""
    freeze_patches: bool = False
    """Whether the patch embedding stays as it is, as in the published training."""
    checkpointing: bool = False
    """Whether the towers and the temporal transformer recompute their activations in the backward pass."""
    masking: Literal["exact", "published"] = "exact"
    """`exact`: padding is absent everywhere. `published`: as the published code has it, for its checkpoints and
    numbers: padding enters a maximum as 0 and the merges' convolution as it is, and is forgotten after a merge."""

    def __post_init__(self) -> None:
        _positive(self, "frames predictor_width")
        if not 2 <= self.words <= self.towers.context:
            raise ValueError(
                f"ModelConfig.words is {self.words}, must lie between 2 (start and end) and the towers' "
                f"context ({self.towers.context})"
            )
        if self.temporal_layers < 0:
            raise ValueError(f"ModelConfig.temporal_layers is {self.temporal_layers}, must be at least 0")
        if self.temporal_window < 0:
            raise ValueError(f"ModelConfig.temporal_window is {self.temporal_window}, must be at least 0")
        for name in ("word_ratios", "frame_ratios"):
            ratios = getattr(self, name)
            if len(ratios) != 2 or not all(0 < ratio <= 1 for ratio in ratios):
                raise ValueError(f"ModelConfig.{name} is {ratios}, must be two numbers above 0 and at most 1")
        if self.masking not in ("exact", "published"):
            raise ValueError(f"ModelConfig.masking is {self.masking!r}, must be exact or published")

    @property
    def head_width(self) -> int:
        """Width of an attention head in the merges and over frames: CLIP's 64, or as many as `dim` allows."""
        return 64 if self.towers.dim % 64 == 0 else self.towers.dim

    @property
    def heads(self) -> tuple[str, ...]:
        """What the model does beside retrieval, in the names of training's tasks."""
        there = {"qa": self.answers.head != "none", "caption": self.captions.layers > 0}
        return tuple(task for task, has in there.items() if has)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """The inverse of `to_dict`; an unknown field is an error, a missing one takes its default."""
        parts = {
            "towers": TowerConfig,
            "reconstruction": ReconstructionConfig,
            "answers": AnswerConfig,
            "captions": CaptionConfig,
        }
        built = {
            name: kind(**_known(kind, values[name])) if name in values else kind()
            for name, kind in parts.items()
        }
        return cls(**{**_known(cls, values), **built})


@dataclass(frozen=True)
class LossSettings:
    """Weights and choices of the loss; the defaults have the strength of the published training.

    The published weights, skl 1 and kl 2, belong to the published reductions, which average a divergence over every
    element; `objective` "published" wants them. The other objective sums each distribution, and multiplies cosines by
    the logit scale before it compares them, so that the same strength is another number.
    """

    levels: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Weight of the contrast at the levels entity, action and event. A level of weight 0 has no loss of any kind and is
    not computed for it; entity, which others are distilled from, has one."""
    interaction: float = 1 / 12
    """Weight of the alignment of interactions at each level. A published divergence over V frames is divided by V:
    the published strength is 1 / V, here for 12 frames."""
    distillation: float = 2e-6
    """Weight of the self-distillation from the entity level. A published divergence over the B candidates of a batch is
    divided by B, and compares cosines without the logit scale, in whose square it grows: the published strength is
    2 / (B scale^2), here for 128 pairs and a scale of 100. A weight of 2 pulls at the encoders harder than the contrast
    does, and against it."""
    teacher: float = 0.0
    """Weight of the distillation from the average of the weights, which tells the weights how near each text of the
    batch is to each video (entity level); the run then keeps one (`optim.ema`). 0: nothing is taught."""
    contrast: Literal["softmax", "sigmoid"] = "softmax"
    """`softmax`: a text is told from the batch's other videos, and a video from its texts. `sigmoid`: each pair is told
    by itself to match or not, with the bias of SigLIP's towers, whose own loss that is."""
    objective: Literal["exact", "published"] = "exact"
    """`exact`: the loss as described. `published`: as the published code computes it, faults included."""
    target: Literal["exact", "estimator"] = "exact"
    """What interactions are aligned to: the exact one, or the model's frozen estimator."""
    target_scale: float = 100.0
    """The exact interaction is multiplied by this before its softmax (CLIP's largest logit scale; the published
    labels have 1000)."""
    chunk: int | None = None
    """Largest number of texts and of videos compared at once; none: as many as fit into 256 MiB."""

    def __post_init__(self) -> None:
        if self.objective not in ("exact", "published"):
            raise ValueError(f"LossSettings.objective is {self.objective!r}, must be exact or published")
        if self.contrast not in ("softmax", "sigmoid"):
            raise ValueError(f"LossSettings.contrast is {self.contrast!r}, must be softmax or sigmoid")
        if self.contrast == "sigmoid" and self.objective == "published":
            raise ValueError("LossSettings.contrast is 'sigmoid', must be softmax in the published objective")
        if self.teacher and self.objective == "published":
            raise ValueError(f"LossSettings.teacher is {self.teacher}, must be 0 in the published objective")
        if self.target not in ("exact", "estimator"):
            raise ValueError(f"LossSettings.target is {self.target!r}, must be exact or estimator")
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"LossSettings.chunk is {self.chunk}, must be at least 1")
        if (
            len(self.levels) != 3
            or not self.levels[0] > 0
            or not all(0 <= x < float("inf") for x in self.levels)
        ):
            raise ValueError(
                f"LossSettings.levels is {self.levels}, must be three numbers of at least 0, the first above"
            )
        for name in ("interaction", "distillation", "teacher"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"LossSettings.{name} is {getattr(self, name)}, must be at least 0")
        if not self.target_scale > 0:
            raise ValueError(f"LossSettings.target_scale is {self.target_scale}, must be above 0")

    @property
    def learned(self) -> dict[str, float]:
        """The levels that have a loss, with the weight of their contrast."""
        return {level: weight for level, weight in zip(LEVELS, self.levels, strict=True) if weight}


@dataclass(frozen=True)
class DecodeSettings:
    """How a caption is written."""

    beam: int = 4
    """Captions that are tried side by side; 1: the likeliest word, again and again."""
    length_power: float = 0.7
    """The sum of log probabilities is divided by the length to this power: 0 favours short captions, 1 long ones."""
    words: int = 22
    """Most tokens of a caption, its end included; a model with fewer positions writes fewer."""
    no_repeat: int = 0
    """No run of so many tokens is written twice in a caption; 0 forbids none. 2 helps a weak model (CIDEr 87 for 72
    with a beam of 4, 91 for 53 with a beam of 1: 40 test clips of `hbi demo --clips 400`, once); captions that rightly
    name a thing twice are lost with it."""

    def __post_init__(self) -> None:
        _positive(self, "beam words")
        if self.no_repeat < 0:
            raise ValueError(f"DecodeSettings.no_repeat is {self.no_repeat}, must be at least 0")
        if not 0 <= self.length_power <= 2:
            raise ValueError(f"DecodeSettings.length_power is {self.length_power}, must lie between 0 and 2")
