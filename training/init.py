"""Models by name (a folder, the registry, a published checkpoint), and a run that begins from one."""

import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hbi.infra import storage
from hbi.infra.mlflow.resolve import resolve_model
from hbi.model.config import ModelConfig
from hbi.model.hbi import HBI
from hbi.model.tokenizer import load_tokenizer
from hbi.model.weights import CONFIG, load_model, load_published, read_config, save_model
from hbi.training.answers import TRAINED, trained_on
from hbi.training.checkpoint import fetched
from hbi.training.settings import TrainConfig

INIT = "start"
"""The folder of a run that holds the model it began from."""
CLIP_TOKENIZER = "openai/clip-vit-base-patch32"
PUBLISHED = (".bin", ".pt", ".pth", ".safetensors")
"""How the name of a published checkpoint in object storage ends; anything else there is a folder."""
ADDED = ("reconstruction.", "answerer.", "captioner.")
"""Where the names of parameters begin that a run may add to the model that it begins from."""
CHOICES = ("checkpointing", "freeze_patches", "masking")
"""What a run decides of a model that it begins from: the fields that are no sizes."""


@dataclass(frozen=True)
class ModelSource:
    """A model by name, and what the name does not tell."""

    model: str
    """A folder, models:/name@alias or models:/name/version, or the file of a published checkpoint; local or s3://."""
    tracking: str | None = None
    """MLflow store of a models:/ name (default: MLFLOW_TRACKING_URI, else runs/mlflow.db)."""
    tokenizer: str | None = None
    """Another tokenizer, by name or folder; a published checkpoint has none, and takes CLIP's own by default."""
    words: int | None = None
    """For a published checkpoint: tokens a text is cut to; None for the published number."""


def load_named(source: ModelSource, frames: int | None = None) -> tuple[HBI, Any]:
    """A model and its tokenizer. frames: of a clip, where a published checkpoint does not tell.

    ValueError, in one line, where there is no such model, or the tokenizer is not at hand.
    """
    model = source.model
    published = not model.startswith("models:/") and (
        Path(model).is_file() or (storage.is_remote(model) and Path(model).suffix in PUBLISHED)
    )
    if not published:
        folder = resolve_model(model, source.tracking)
        return load_model(folder), load_tokenizer(source.tokenizer or folder)
    untold = {"words": source.words, "frames": frames}
    with tempfile.TemporaryDirectory() as scratch:
        file = storage.local_copy(model, scratch)
        loaded = load_published(file, **{name: value for name, value in untold.items() if value is not None})
    name = source.tokenizer or CLIP_TOKENIZER
    try:
        return loaded, load_tokenizer(name)
    except OSError:
        raise ValueError(
            f"tokenizer {name!r} is not at hand: name a folder with CLIP's tokenizer.json "
            "(hbi evaluate --tokenizer, hbi train --set.model.backbone)"
        ) from None


def with_init(config: TrainConfig, out: str, tracking: str | None) -> TrainConfig:
    """The configuration with the sizes of the model that `config.init_from` names, which is kept as OUT/start.

    There every worker finds it, and a run that is taken up again, whatever became of the original.
    """
    if not config.init_from:
        return config
    wanted, folder = config.model, storage.join(out, INIT)
    if not storage.exists(storage.join(folder, CONFIG)):
        source = ModelSource(config.init_from, tracking, wanted.backbone or None, wanted.words)
        model, tokenizer = load_named(source, wanted.frames)
        with tempfile.TemporaryDirectory() as made:
            save_model(model, made, tokenizer)
            (Path(made) / TRAINED).write_text(json.dumps(trained_on(config.init_from, tracking)))
            storage.put_files(Path(made).iterdir(), folder, last=CONFIG)
    with fetched(folder) as local:
        held = read_config(local)
    return replace(config, model=replace(held, **_choices(wanted, held)))


def init_model(config: ModelConfig, folder: str) -> HBI:
    """The model of a folder, local or s3://, to be trained with the choices of `config`; new heads are fresh."""
    with fetched(folder) as local:
        held = load_model(local)
    choices = _choices(config, held.config)
    model = HBI(replace(held.config, **choices))
    state = model.state_dict()
    known = {
        name: value
        for name, value in held.state_dict().items()
        if name in state and state[name].shape == value.shape
    }
    fresh = [name for name in state.keys() - known.keys() if not name.startswith(ADDED)]
    assert not fresh, f"the choices change {fresh}"
    model.load_state_dict(state | known)
    model.vocabulary = held.vocabulary
    return model.train()


def _choices(wanted: ModelConfig, held: ModelConfig) -> dict[str, Any]:
    """What a run decides: the heads that it asks for are added to those that are there, or take their place."""
    choices: dict[str, Any] = {name: getattr(wanted, name) for name in CHOICES}
    if wanted.reconstruction.form != "none":
        choices["reconstruction"] = wanted.reconstruction
    if wanted.answers.head != "none":
        choices["answers"] = wanted.answers
    if wanted.captions.layers:
        choices["captions"] = wanted.captions
    return choices
