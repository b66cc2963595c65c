"""Sizes of the model and weights of its loss: frozen, checked when made, the same after a round trip through JSON."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal


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


@dataclass(frozen=True)
class TowerConfig:
    """Sizes of the two CLIP-shaped towers; the defaults are a small pair that trains on a CPU."""

    image_size: int = 64
    """Height and width of a frame, pixels."""
    patch_size: int = 16
    """Height and width of a patch, pixels; divides `image_size`."""
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

    def __post_init__(self) -> None:
        _positive(
            self,
            "image_size patch_size vision_width vision_layers vision_heads text_width text_layers text_heads"
            " vocab_size context dim",
        )
        for part, whole in (
            ("patch_size", "image_size"),
            ("vision_heads", "vision_width"),
            ("text_heads", "text_width"),
        ):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(
                    f"TowerConfig.{part} is {getattr(self, part)}, must divide {whole} ({getattr(self, whole)})"
                )


@dataclass(frozen=True)
class ModelConfig:
    """Everything that says which arrays an HBI model has and what it computes with them."""

    backbone: str = ""
    """A CLIP checkpoint, by name or folder, that `build_model` starts from; empty: fresh towers of `towers`."""
    towers: TowerConfig = field(default_factory=TowerConfig)
    """Sizes of the towers; read from the checkpoint where `backbone` names one."""
    words: int = 24
    """Tokens a text is cut to, start and end included."""
    frames: int = 12
    """Frames of a clip."""
    temporal_layers: int = 4
    """Blocks of the transformer over frames; 0: frames stay apart."""
    word_ratios: tuple[float, float] = (0.25, 0.5)
    """Words kept by each of the two merges: entity to action, action to event."""
    frame_ratios: tuple[float, float] = (0.25, 0.5)
    """Frames kept by each of the two merges."""
    predictor_width: int = 64
    """Channels of the learned interaction predictors."""
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

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """The inverse of `to_dict`; an unknown field is an error, a missing one takes its default."""
        values = dict(values)
        towers = TowerConfig(**_known(TowerConfig, values.pop("towers", {})))
        return cls(towers=towers, **_known(cls, values))


@dataclass(frozen=True)
class LossSettings:
    """Weights and choices of the loss; the defaults are those of the published training."""

    interaction: float = 1.0
    """Weight of the alignment of interactions at each level (the published skl)."""
    distillation: float = 2.0
    """Weight of the self-distillation from the entity level (the published kl)."""
    objective: Literal["exact", "published"] = "exact"
    """`exact`: the loss as described. `published`: as the published code computes it, faults included."""
    target: Literal["exact", "estimator"] = "exact"
    """What interactions are aligned to: the exact one, or the model's frozen estimator."""
    target_scale: float = 100.0
    """The exact interaction is multiplied by this before its softmax (CLIP's largest logit scale; the published
    labels have 1000)."""
    chunk: int | None = None
    """Largest number of texts and of videos compared at once; none: all."""

    def __post_init__(self) -> None:
        if self.objective not in ("exact", "published"):
            raise ValueError(f"LossSettings.objective is {self.objective!r}, must be exact or published")
        if self.target not in ("exact", "estimator"):
            raise ValueError(f"LossSettings.target is {self.target!r}, must be exact or estimator")
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"LossSettings.chunk is {self.chunk}, must be at least 1")
        for name in ("interaction", "distillation"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"LossSettings.{name} is {getattr(self, name)}, must be at least 0")
        if not self.target_scale > 0:
            raise ValueError(f"LossSettings.target_scale is {self.target_scale}, must be above 0")
