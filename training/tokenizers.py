"""Which tokenizer a run has: that of its backbone, of the model that it begins from, or one made of its captions."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from hbi.infra import storage
from hbi.model.tokenizer import load_tokenizer, train_tokenizer
from hbi.pipelines.sample import ShardIndex, check_shards
from hbi.training.data.shards import captions_of
from hbi.training.job import INIT, fetched, has_init
from hbi.training.settings import TrainConfig

TOKENIZER = "tokenizer"
"""The folder of a run that holds the tokenizer made of its captions."""


def with_tokenizer(config: TrainConfig, index: ShardIndex, out: str) -> TrainConfig:
    """The configuration with its tokenizer's vocabulary; the captions give the tokenizer where no backbone has one."""
    index.of_split(config.data.split)
    check_shards(index, config.model, config.model_flags)
    if has_init(config):
        return config
    folder = storage.join(out, TOKENIZER)
    if not storage.exists(storage.join(folder, "tokenizer.json")):
        captions = captions_of(index, config.data.split)
        tokenizer = train_tokenizer(captions, config.model.towers.vocab_size)
        with tempfile.TemporaryDirectory() as made:
            tokenizer.save_pretrained(made)
            storage.put_files(Path(made).iterdir(), folder, last="tokenizer.json")
    with fetched(folder) as local:
        words = len(load_tokenizer(local))
    return replace(config, model=replace(config.model, towers=replace(config.model.towers, vocab_size=words)))


def tokenizer_of(config: TrainConfig, out: str) -> Any:
    """The tokenizer of the model that the run began from, of the backbone, or the one made of the captions."""
    with fetched(storage.join(out, INIT if has_init(config) else TOKENIZER)) as folder:
        return load_tokenizer(folder)
