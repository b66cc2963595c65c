"""A made corpus, its shards, a model with random weights, and the index of the one by the other."""

import shutil
from pathlib import Path

import pytest
import torch

from hbi.commands.corpora import Corpus, Shard
from hbi.commands.search import BuildIndex
from hbi.model.config import AnswerConfig, CaptionConfig, ModelConfig, ReconstructionConfig, TowerConfig
from hbi.model.tokenizer import train_tokenizer
from hbi.model.weights import build_model, save_model
from hbi.pipelines.sharding.settings import ShardSettings

TOWERS = TowerConfig(
    image_size=32, patch_size=16, vision_width=32, vision_layers=1, vision_heads=2,
    text_width=32, text_layers=1, text_heads=2, vocab_size=300, context=32, dim=32,
)  # fmt: skip
KNOWN = ("red", "blue", "square")
CLIPS = 16


def make_model(folder: Path, seed: int) -> str:
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(["the red square moves left then the blue star grows"] * 4, 300)
    heads = {
        "answers": AnswerConfig(head="open"),
        "captions": CaptionConfig(layers=1, words=8),
        "reconstruction": ReconstructionConfig("similarity"),
    }
    model = build_model(ModelConfig(towers=TOWERS, words=20, frames=4, temporal_layers=1, **heads))
    model.vocabulary = KNOWN
    save_model(model, str(folder), tokenizer)
    return str(folder)


@pytest.fixture(scope="session")
def chain(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chain")
    Corpus(str(folder / "corpus"), clips=CLIPS).run()
    Shard(
        str(folder / "corpus" / "manifest.jsonl"), str(folder / "shards"), ShardSettings(frames=4, size=32)
    ).run()
    BuildIndex(make_model(folder / "model", 0), str(folder / "shards"), str(folder / "index")).run()
    return folder


@pytest.fixture(scope="session")
def index(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A copy of the index, to write to."""
    return str(shutil.copytree(chain / "index", tmp_path_factory.mktemp("served") / "index"))
