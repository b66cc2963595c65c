"""What the command that starts a run and its workers agree on. It is light: without the model, whoever only waits for
them is there at once, and small."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hbi.infra import storage
from hbi.infra.ray_runtime import Line
from hbi.training.settings import TrainConfig

CONFIG, MODEL, RUN_ID = "config.json", "model", "run-id.txt"
"""What lies in the folder of a run."""
INIT = "start"
"""The folder of a run that holds the model it began from."""


class TrainingAborted(ValueError):
    """The run cannot go on. Every rank raises it at the same step, with the same words."""


class TrainingStopped(KeyboardInterrupt):
    """The run was asked for an early end, and has kept all that it did. Raised on every rank at the same step."""


@dataclass(frozen=True)
class Job:
    """What every worker is told."""

    config: TrainConfig
    """The run."""
    data: str
    """Shards."""
    out: str
    """Where everything that the run makes lies."""
    uri: str
    """MLflow store; "" tracks nothing."""
    command: str
    """That began the run."""
    line: Line
    """To whoever started the run: progress there, and back whether it should end early."""


def has_init(config: TrainConfig) -> bool:
    """Whether the run begins from the model in OUT/start, and not from fresh weights."""
    return bool(config.init_from or config.model.backbone)


def metrics_prefix(config: TrainConfig, split: str) -> str:
    """What metrics of a split are called: a choice made on the test split must show."""
    return f"selected-on-{split}" if split == config.evaluate.select == "test" else split


@contextmanager
def fetched(path: str) -> Iterator[Path]:
    """A local folder with the files of a folder of a run."""
    if not storage.is_remote(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="hbi-checkpoint-") as folder:
        for file in storage.list_files(path):
            Path(storage.local_copy(file, folder)).rename(Path(folder) / file.rsplit("/", 1)[1])
        yield Path(folder)
