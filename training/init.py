"""Models by name (a folder, the registry, a published checkpoint), and a run that begins from one."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from hbi.infra import storage
from hbi.infra.mlflow.registry import resolve_model
from hbi.model.config import ModelConfig
from hbi.model.hbi import HBI
from hbi.model.tokenizer import load_tokenizer
from hbi.model.weights import CONFIG, load_model, load_published, read_config, save_model
from hbi.training.checkpoint import fetched
from hbi.training.settings import TrainConfig

START = "start"
CLIP_TOKENIZER = "openai/clip-vit-base-patch32"
PUBLISHED = (".bin", ".pt", ".pth", ".safetensors")
"""How the name of a published checkpoint in object storage ends; anything else there is a folder."""
CHOICES = ("checkpointing", "freeze_patches", "masking")
"""What a run decides of a model that it begins from: the fields that are no sizes."""


def load_named(
    model: str, tracking: str | None = None, tokenizer: str | None = None, **settings: Any
) -> tuple[HBI, Any]:
    """A model and its tokenizer; ValueError in one line.

    model: a folder, models:/name@alias, or the file of a published checkpoint, local or s3://. The last has no
    tokenizer: it is CLIP's own, by name, or from the folder `tokenizer`. settings: fields of `ModelConfig` that it does
    not tell either; those that are None are left to the published defaults.
    """
    published = not model.startswith("models:/") and (
        Path(model).is_file() or (storage.is_remote(model) and Path(model).suffix in PUBLISHED)
    )
    if not published:
        folder = resolve_model(model, tracking)
        return load_model(folder), load_tokenizer(tokenizer or folder)
    with tempfile.TemporaryDirectory() as scratch:
        file = storage.local_copy(model, scratch)
        loaded = load_published(
            file, **{name: value for name, value in settings.items() if value is not None}
        )
    name = tokenizer or CLIP_TOKENIZER
    try:
        return loaded, load_tokenizer(name)
    except OSError:
        raise ValueError(
            f"tokenizer {name!r} is not at hand: name a folder with CLIP's tokenizer.json "
            "(hbi evaluate --tokenizer, hbi train --set.model.backbone)"
        ) from None


def with_start(config: TrainConfig, out: str, tracking: str | None) -> TrainConfig:
    """The configuration with the sizes of the model that `config.start` names, which is kept as OUT/start.

    There every worker finds it, and a run that is taken up again, whatever became of the original.
    """
    if not config.start:
        return config
    wanted, folder = config.model, storage.join(out, START)
    if not storage.exists(storage.join(folder, CONFIG)):
        model, tokenizer = load_named(
            config.start, tracking, wanted.backbone or None, words=wanted.words, frames=wanted.frames
        )
        with tempfile.TemporaryDirectory() as made:
            save_model(model, made, tokenizer)
            storage.put_files(Path(made).iterdir(), folder, last=CONFIG)
    with fetched(folder) as local:
        held = read_config(local)
    return replace(config, model=replace(held, **_choices(wanted)))


def start_model(config: ModelConfig, folder: str) -> HBI:
    """The model of a folder, local or s3://, to be trained with the choices of `config`."""
    with fetched(folder) as local:
        return load_model(local, **_choices(config)).train()


def _choices(config: ModelConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in CHOICES}
