"""The command line of a run, from its settings."""

import shlex
from dataclasses import asdict
from typing import Any

from hbi.training.runs.table import RUNS
from hbi.training.settings import TrainConfig, flatten


def command_line(config: TrainConfig, data: str, out: str) -> str:
    """`hbi train` with the flags of all that differs from the named run.

    config: as it was asked for, before a tokenizer or another model's sizes came in. Of a name that is no named run,
    what Python began, there are no flags.
    """
    words = ["hbi", "train", config.name, "--data", data, "--out", out]
    usual = flatten(asdict(RUNS.get(config.name, config)))
    for name, value in flatten(asdict(config)).items():
        if value != usual[name]:
            words += _flag(f"set.{name}".replace("_", "-"), value)
    return shlex.join(words)


def _flag(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        group, _, last = name.rpartition(".")
        return [f"--{name}" if value else f"--{group}.no-{last}"]
    values = value if isinstance(value, tuple) else (value,)
    return [f"--{name}", *map(str, values)]
