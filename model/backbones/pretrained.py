"""The backbones behind one interface: fresh towers, towers of a checkpoint, and the two modules that HBI is made of.

`clip` covers OpenAI's CLIP and what has its layout (LAION, DFN, MetaCLIP, and MetaCLIP 2, whose towers are CLIP's);
`siglip` covers SigLIP and the SigLIP 2 of fixed resolution; `siglip2` the one that takes patches ("NaFlex").
"""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedModel
from transformers.image_processing_base import ImageProcessingMixin

from hbi.model.backbones.clip import TextTower, VisionTower, clip_config
from hbi.model.backbones.siglip import SiglipTextTower, SiglipVisionTower, siglip_config
from hbi.model.config import TowerConfig
from hbi.model.frames import CLIP_MEAN, CLIP_STD

MODELS = {
    "clip": ("CLIP", "CLIPModel"),
    "metaclip_2": ("MetaCLIP 2", "MetaClip2Model"),
    "siglip": ("SigLIP", "SiglipModel"),
    "siglip2": ("SigLIP 2", "Siglip2Model"),
}
"""Name, and class of `transformers`, of each of its `model_type`s that we know."""
FAMILY = {"metaclip_2": "clip"}
"""Model types that are laid out as another's family."""
HALVES = (0.5, 0.5, 0.5)
"""SigLIP's mean and standard deviation of a pixel."""


def fresh_backbone(towers: TowerConfig) -> PreTrainedModel:
    """A model of `transformers` of these sizes with fresh weights, without a network."""
    if towers.family == "clip":
        return transformers.CLIPModel(clip_config(towers))
    config = siglip_config(towers)
    return getattr(transformers, MODELS[towers.family][1])(config)


def towers_of(backbone: PreTrainedModel, towers: TowerConfig) -> tuple[Any, Any]:
    """The text tower (ids and mask to words and sentence) and the vision tower (images to one token each)."""
    model: Any = backbone
    if towers.family == "clip":
        return TextTower(model), VisionTower(model, towers.stem)
    return SiglipTextTower(model, towers.pad_id), SiglipVisionTower(model, towers)


def load_backbone(name: str) -> tuple[PreTrainedModel, TowerConfig]:
    """A checkpoint of `transformers`, by name or folder, in float32, and its sizes and normalisation.

    ValueError, in one line, for a checkpoint that is not there, is not whole, or is of no family that we know.
    """
    where = f"backbone {name}"
    try:
        kind = AutoConfig.from_pretrained(name).model_type
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{where}: no CLIP checkpoint there, and none of SigLIP ({_first_line(error)})"
        ) from error
    if kind not in MODELS:
        raise ValueError(f"{where}: it is a {kind}, must be one of {', '.join(MODELS)}")
    title, of = MODELS[kind]
    try:
        loaded: Any = getattr(transformers, of).from_pretrained(
            name, attn_implementation="sdpa", dtype=torch.float32, output_loading_info=True
        )
    except OSError as error:
        raise ValueError(f"{where}: its weights are not there ({_first_line(error)})") from error
    except SafetensorError as error:
        raise ValueError(
            f"{where}: its weights are damaged ({_first_line(error)}): fetch or copy them again"
        ) from error
    backbone, loading = loaded
    if absent := sorted(loading["missing_keys"]):  # transformers fills them with noise and a warning
        raise ValueError(f"{where}: no whole {title} checkpoint, missing: {', '.join(absent)}")
    return backbone, _tower_config(name, backbone.config, FAMILY.get(kind, kind))


def _tower_config(name: str, config: Any, family: str) -> TowerConfig:
    text, vision = config.text_config, config.vision_config
    for field in ("hidden_act", "layer_norm_eps"):
        if getattr(text, field) != getattr(vision, field):
            raise ValueError(
                f"backbone {name}: its towers differ in {field}, "
                f"{getattr(text, field)} and {getattr(vision, field)}; we know towers that agree"
            )
    squares = family == "siglip2"  # its positions are a square of patches, whatever the pictures' sizes
    image_size = int(vision.num_patches**0.5) * vision.patch_size if squares else vision.image_size
    mean, std = _normalisation(name, (CLIP_MEAN, CLIP_STD) if family == "clip" else (HALVES, HALVES))
    return TowerConfig(
        family=family,  # type: ignore[arg-type]
        image_size=image_size,
        patch_size=vision.patch_size,
        vision_width=vision.hidden_size,
        vision_layers=vision.num_hidden_layers,
        vision_heads=vision.num_attention_heads,
        vision_mlp=vision.intermediate_size,
        text_width=text.hidden_size,
        text_layers=text.num_hidden_layers,
        text_heads=text.num_attention_heads,
        text_mlp=text.intermediate_size,
        vocab_size=text.vocab_size,
        context=text.max_position_embeddings,
        dim=config.projection_dim if family == "clip" else text.projection_size,
        activation=text.hidden_act,
        norm_eps=text.layer_norm_eps,
        pad_id=0 if family == "clip" else _pad_id(name, text),
        image_mean=mean,
        image_std=std,
    )


def _normalisation(
    name: str, usual: tuple[Sequence[float], Sequence[float]]
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation of a pixel in 0..1, by the checkpoint's own preprocessor, else the family's."""
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except OSError:
        settings = {}
    mean, std = (
        tuple(float(value) for value in settings.get(field) or default)
        for field, default in zip(("image_mean", "image_std"), usual, strict=True)
    )
    return mean, std  # type: ignore[return-value]


def _pad_id(name: str, text: Any) -> int:
    """What the checkpoint's tokenizer fills a text up with; without a tokenizer, what its configuration says."""
    from hbi.model.tokenizer import load_tokenizer

    try:
        found: Any = load_tokenizer(name).pad_token_id
    except (OSError, ValueError):
        found = None
    if found is None:
        found = text.pad_token_id or 0
    return int(found)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
