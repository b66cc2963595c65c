"""Save and load a model, start from a checkpoint of towers, and read published HBI checkpoints."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load, save_file
from transformers import PreTrainedTokenizerBase

from hbi.model.backbones.pretrained import load_backbone
from hbi.model.config import ModelConfig
from hbi.model.folder import ANSWERS, CONFIG, DIGEST, FORMAT, WEIGHTS, describe, digest_of
from hbi.model.hbi import HBI
from hbi.model.published import load_estimator, load_published, load_strictly

__all__ = ["build_model", "load_estimator", "load_model", "load_published", "save_model"]


def build_model(config: ModelConfig) -> HBI:
    """A model to train: towers from `config.backbone` (a checkpoint of `transformers`, by name or folder, whose sizes
    and normalisation replace `config.towers`), the rest fresh. Without a backbone everything is fresh.

    ValueError, in one line, where there is no whole checkpoint of a family that we know.
    """
    if not config.backbone:
        return HBI(config)
    backbone, towers = load_backbone(config.backbone)
    return HBI(replace(config, towers=towers), backbone)


def save_model(model: HBI, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Write weights, answers, the tokenizer's files and, last, `config.json` with everything's sha256."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)  # an interrupted save must not look whole
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / WEIGHTS)
    files = [WEIGHTS]
    if model.vocabulary:
        (folder / ANSWERS).write_text(json.dumps(list(model.vocabulary), ensure_ascii=False, indent=1) + "\n")
        files.append(ANSWERS)
    if tokenizer is not None:
        files += sorted(
            Path(path).name for path in tokenizer.save_pretrained(str(folder)) if Path(path).exists()
        )
    described = {
        "format": FORMAT,
        "model": model.config.to_dict(),
        "sha256": {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files},
    }
    (folder / CONFIG).write_text(json.dumps({**described, DIGEST: digest_of(described)}, indent=2) + "\n")


def load_model(folder: str | Path, **settings: Any) -> HBI:
    """The model that `save_model` wrote, on the CPU, in eval mode, without a network.

    settings: fields of `ModelConfig` to change, of those that decide no array (`checkpointing`, `masking`, …).
    ValueError, in one line, for a file that is missing, cut short or changed.
    """
    folder = Path(folder)
    config, digests = describe(folder)
    contents: dict[str, bytes] = {}
    for name, digest in {WEIGHTS: "", **digests}.items():
        if not (folder / name).exists():
            raise ValueError(f"{folder} is no whole model: it has no {name}")
        contents[name] = (folder / name).read_bytes()
        if hashlib.sha256(contents[name]).hexdigest() != digest:
            raise ValueError(f"{folder / name} was cut short or changed since it was saved (sha256 differs)")
    model = HBI(replace(config, **settings))
    load_strictly(model, load(contents[WEIGHTS]), str(folder / WEIGHTS))
    if ANSWERS in contents:
        model.vocabulary = tuple(json.loads(contents[ANSWERS]))
    return model.eval()
