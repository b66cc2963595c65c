"""Processes that train together, begun from one that has imported the model: importing takes longer than a test."""

import faulthandler
import multiprocessing
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp

RANK_SECONDS = 240.0
"""Ranks that wait for each other longer than this say where, and end."""


def start_ranks(work: Callable[..., None], args: tuple[Any, ...], world_size: int) -> None:
    """Runs work(rank, *args) in so many processes, and waits for all. Their environment is that of the first call."""
    multiprocessing.set_forkserver_preload(["hbi.training.loop", "hbi.training.worker"])
    mp.start_processes(_in_time, (work, args), world_size, start_method="forkserver")


def _in_time(rank: int, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    faulthandler.dump_traceback_later(RANK_SECONDS, exit=True)
    work(rank, *args)
    faulthandler.cancel_dump_traceback_later()
