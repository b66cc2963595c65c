"""The batches of a rank, read ahead by worker processes."""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from torch.utils.data import DataLoader

from hbi.infra import storage
from hbi.pipelines.sample import ShardIndex
from hbi.training.data.batch import Batch, ClipDataset
from hbi.training.data.order import LoaderState, epoch_order
from hbi.training.parallel import Process
from hbi.training.settings import Task, TrainConfig

AHEAD_BATCHES = 16
"""How many batches before its first use a remote shard is fetched."""


def _leave_group(worker: int) -> None:
    """A signal to the group of the training process is its business: it still needs its loader workers for a while."""
    os.setpgrp()


class Loader:
    """The batches of one rank, from any state on."""

    def __init__(self, index: ShardIndex, config: TrainConfig, process: Process):
        settings = config.data
        cache = settings.cache or str(Path(tempfile.gettempdir()) / f"hbi-shards-{os.getuid()}")
        cache = str(
            Path(cache) / hashlib.sha256(index.folder.encode()).hexdigest()[:12] / f"rank-{process.rank}"
        )
        self.clips = ClipDataset(index, config, cache)
        self.settings, self.seed, self.process = settings, config.seed, process
        self.remote = storage.is_remote(index.folder)
        self.samples = [shard.samples for shard in self.clips.shards]
        self.plan: list[tuple[int, Any, list[int], Task]] = []
        self.tasks = config.task
        workers = settings.workers
        # Spawned, not forked: Ray's and s3fs's threads do not survive a fork.
        spawned = {
            "multiprocessing_context": "spawn",
            "persistent_workers": True,
            "prefetch_factor": 4,
            "worker_init_fn": _leave_group,
        }
        # The sampler is our own plan, looked at anew in each epoch; one item of the plan is one batch.
        self.loader = DataLoader(
            self.clips,
            sampler=self.plan,  # type: ignore[arg-type]
            batch_size=None,
            num_workers=workers,
            pin_memory=process.device.type == "cuda",
            **(spawned if workers else {}),
        )

    @property
    def steps_per_epoch(self) -> int:
        """Steps of a whole epoch, the same for every rank and every number of ranks."""
        return -(-sum(self.samples) // self.settings.batch)

    def steps_left(self, state: LoaderState) -> int:
        """Steps that are left of the epoch."""
        return len(self._remaining(state))

    def _remaining(self, state: LoaderState) -> list[Int[np.ndarray, "_ 2"]]:
        """The samples of this rank in each step that is left of the epoch."""
        order = epoch_order(self.samples, self.seed, state.epoch, self.settings.shuffle_window)
        process = self.process
        return state.remaining(order, process.rank, process.world_size, self.settings.batch)

    def batches(self, state: LoaderState, step: int = 0) -> Iterator[Batch]:
        """What is left of the epoch for this rank, every rank the same number of batches.

        step: of the run, the next one: it says which task's turn it is.
        """
        mine = self._remaining(state)
        soon = self._soon(mine) if self.remote else [[]] * len(mine)
        self.plan[:] = [
            (state.epoch, ids, first, self.tasks[(step + turn) % len(self.tasks)])
            for turn, (ids, first) in enumerate(zip(mine, soon, strict=True))
        ]
        yield from self.loader

    def _soon(self, batches: list[Int[np.ndarray, "_ 2"]]) -> list[list[int]]:
        """For each batch the shards that are first needed `AHEAD_BATCHES` later."""
        soon: list[list[int]] = [[] for _ in batches]
        seen: set[int] = set()
        for step, ids in enumerate(batches):
            new = set(ids[:, 0].tolist()) - seen
            seen |= new
            soon[max(0, step - AHEAD_BATCHES)].extend(sorted(new))
        return soon

    def close(self) -> None:
        """Ends the loader workers."""
        self.clips.close()
        iterator = getattr(self.loader, "_iterator", None)
        if iterator is not None:
            iterator._shutdown_workers()
            self.loader._iterator = None
