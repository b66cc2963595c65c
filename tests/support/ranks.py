"""Processes that train together, begun from one that has imported the model: importing takes longer than a test."""

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp


def start_ranks(work: Callable[..., None], args: tuple[Any, ...], world_size: int) -> None:
    """Runs work(rank, *args) in so many processes, and waits for all. Their environment is that of the first call."""
    multiprocessing.set_forkserver_preload(["hbi.training.loop", "hbi.training.worker"])
    mp.start_processes(work, args, world_size, start_method="forkserver")
