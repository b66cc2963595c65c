"""What a model's folder holds, and what it says of itself: read without torch, which is not needed to know a model."""

import hashlib
import json
from pathlib import Path
from typing import Any

from hbi.model.config import ModelConfig

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
ANSWERS = "answers.json"
"""The list of answers, where the model has a head for questions."""
DIGEST = "digest"
FORMAT = 1


def read_config(folder: str | Path) -> ModelConfig:
    """The configuration of a model that `save_model` wrote; ValueError, in one line, where there is none."""
    return describe(Path(folder))[0]


def describe(folder: Path) -> tuple[ModelConfig, dict[str, str]]:
    """What a model folder says of itself: the configuration, and the digest of each file."""
    try:
        described = json.loads((folder / CONFIG).read_text())
        digest, version, digests = described[DIGEST], described["format"], described["sha256"]
        if version == FORMAT and digest != digest_of(described):
            raise ValueError("it was changed since it was saved (sha256 differs)")
        config = ModelConfig.from_dict(described["model"])
    except FileNotFoundError:
        raise ValueError(f"{folder} is no saved model: it has no {CONFIG}") from None
    except KeyError as error:
        raise ValueError(f"{folder / CONFIG} does not describe a model: it has no {error}") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG} does not describe a model: {error}") from None
    if version != FORMAT:
        raise ValueError(f"{folder / CONFIG}: format is {version}, this version reads {FORMAT}")
    return config, digests


def digest_of(described: dict[str, Any]) -> str:
    """Of the description itself, its own digest left out."""
    rest = {name: value for name, value in described.items() if name != DIGEST}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def model_digest(folder: str | Path) -> str:
    """SHA-256 over a model folder's settings and weights."""
    digest = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        with (Path(folder) / name).open("rb") as stream:
            while part := stream.read(1 << 20):
                digest.update(part)
    return digest.hexdigest()
