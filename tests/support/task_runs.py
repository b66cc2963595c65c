"""A tiny run of several tasks, and its configuration with a tokenizer and answers, for the tests of the heads."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from hbi.model.config import AnswerConfig, CaptionConfig, ReconstructionConfig
from hbi.pipelines.sample import ShardIndex
from hbi.training.answers import with_vocabulary
from hbi.training.data.batch import Batch
from hbi.training.data.loader import Loader
from hbi.training.data.order import LoaderState
from hbi.training.parallel import Process
from hbi.training.settings import HeadSettings, TrainConfig
from hbi.training.tokenizers import with_tokenizer
from tests.support.training_shards import tiny_model, tiny_run

TASKS = ("retrieval", "qa", "caption")


def both_heads(**changes: Any) -> TrainConfig:
    """A tiny run of all three tasks, without dropout, so that ranks and micro-batches draw nothing."""
    model = tiny_model(
        reconstruction=ReconstructionConfig("attention"),
        answers=AnswerConfig("open", 10, dropout=0.0),
        captions=CaptionConfig(layers=1, words=12, dropout=0.0),
    )
    return replace(
        tiny_run(), **{"model": model, "task": TASKS, "heads": HeadSettings(texts_per_clip=2), **changes}
    )


def resolved(config: TrainConfig, shards: Path, out: Path, log: Callable[[str], None] = print) -> TrainConfig:
    index = ShardIndex.read(str(shards))
    return with_vocabulary(with_tokenizer(config, index, str(out)), index, str(out), log)


def first_batch(config: TrainConfig, shards: Path) -> Batch:
    loader = Loader(ShardIndex.read(str(shards)), config, Process.current())
    batch = next(iter(loader.batches(LoaderState())))
    loader.close()
    return batch
