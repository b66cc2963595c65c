"""Models by name (a folder, the registry, a published checkpoint), and a run that begins from one."""

import http.client
import json
import re
import tempfile
import threading
import urllib.request
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hbi.infra import storage
from hbi.infra.mlflow.resolve import resolve_model
from hbi.infra.mlflow.store import first_line
from hbi.model.config import ModelConfig
from hbi.model.folder import CONFIG, read_config
from hbi.model.hbi import HBI
from hbi.model.tokenizer import load_tokenizer
from hbi.model.weights import build_model, load_model, load_published, save_model
from hbi.training.answers import TRAINED, trained_on
from hbi.training.job import INIT, fetched, has_init
from hbi.training.settings import TrainConfig

CLIP_TOKENIZER = "openai/clip-vit-base-patch32"
REACH_SECONDS = 15.0
"""How long the hub may take to say that it has a backbone."""
FETCH_SECONDS = 1800.0
"""How long the whole of a backbone may take to come: a gigabyte at five megabits a second."""
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
    """The configuration with the sizes of the model that the run begins from, which is kept as OUT/start.

    That is the model of `config.init_from`, or a fresh one around `config.model.backbone`, fetched once and here,
    before any worker starts. In OUT every worker finds it, and a run that is taken up again, whatever became of the
    original. ValueError, in one line, where it is not to be had, or OUT holds one of other sizes.
    """
    if not has_init(config):
        return config
    wanted, folder = config.model, storage.join(out, INIT)
    if not storage.exists(storage.join(folder, CONFIG)):
        if config.init_from:
            source = ModelSource(config.init_from, tracking, wanted.backbone or None, wanted.words)
            model, tokenizer = load_named(source, wanted.frames)
        else:
            require_reachable(wanted.backbone)
            torch.manual_seed(config.seed)
            model, tokenizer = _fetched_in_time(wanted)
        with tempfile.TemporaryDirectory() as made:
            save_model(model, made, tokenizer)
            (Path(made) / TRAINED).write_text(json.dumps(trained_on(config.init_from, tracking)))
            storage.put_files(Path(made).iterdir(), folder, last=CONFIG)
    with fetched(folder) as local:
        held = read_config(local)
    held = replace(held, **_choices(wanted, held))
    if not config.init_from and held != replace(wanted, towers=held.towers):
        raise ValueError(
            f"{folder} is a model of other sizes than the run asks for: give this one another --out"
        )
    return replace(config, model=held)


def require_init(config: TrainConfig, out: str) -> None:
    """ValueError, within seconds, where the run begins from a backbone that is neither in OUT nor to be had."""
    if not config.init_from and not storage.exists(storage.join(storage.join(out, INIT), CONFIG)):
        require_reachable(config.model.backbone)


def require_reachable(backbone: str) -> None:
    """ValueError, within seconds, where a backbone is neither a folder, nor in the cache, nor to be had by network.

    Left to itself the hub's client tries for minutes, in every worker anew.
    """
    import huggingface_hub
    from huggingface_hub import constants

    if Path(backbone).is_dir():
        return
    mend = "give a folder that holds it (--set.model.backbone FOLDER), or fetch it where there is a network"
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", backbone):
        raise ValueError(f"--set.model.backbone {backbone}: no such folder, and no name of a model: {mend}")
    if isinstance(huggingface_hub.try_to_load_from_cache(backbone, "config.json"), str):
        return
    url = f"{constants.ENDPOINT}/{backbone}/resolve/main/config.json"
    try:
        if constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=REACH_SECONDS).close()
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(
            f"--set.model.backbone {backbone}: not in the cache of this machine, and {constants.ENDPOINT} does not "
            f"give it ({first_line(error)}): {mend}"
        ) from None


def _fetched_in_time(wanted: ModelConfig) -> tuple[HBI, Any]:
    """A fresh model around its backbone, and the tokenizer; ValueError where they have not come in `FETCH_SECONDS`."""
    done: Future[tuple[HBI, Any]] = Future()

    def fetch() -> None:
        try:
            done.set_result((build_model(wanted), _backbone_tokenizer(wanted.backbone)))
        except BaseException as error:
            done.set_exception(error)

    # A daemon: what hangs in a download must not keep the process from ending.
    threading.Thread(target=fetch, name="backbone", daemon=True).start()
    if not wait([done], FETCH_SECONDS).done:
        raise ValueError(
            f"--set.model.backbone {wanted.backbone}: not there after {FETCH_SECONDS / 60:.0f} minutes: run again, "
            "what has come is kept, or give a folder that holds it (--set.model.backbone FOLDER)"
        )
    return done.result()


def _backbone_tokenizer(backbone: str) -> Any:
    try:
        return load_tokenizer(backbone)
    except OSError as error:
        raise ValueError(
            f"--set.model.backbone {backbone}: its tokenizer is not at hand ({first_line(error)})"
        ) from None


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
