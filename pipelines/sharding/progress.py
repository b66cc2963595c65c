"""How far the shards are, to the clip: on a bar, while whole shards are still being made."""

import sys
import threading
import time
from collections import deque
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from hbi.pipelines.sharding.plan import ShardPlan
from hbi.pipelines.sharding.summary import Summary
from hbi.pipelines.sharding.workers import ShardResult


class Progress:
    """A bar of clips. Close it by leaving its context."""

    def __init__(self, what: str, shard_plans: list[ShardPlan], summary: Summary) -> None:
        slow = 0.5 if sys.stderr.isatty() else 10
        rows = sum(shard_plan.rows for shard_plan in shard_plans)
        self.bar = tqdm(total=rows, unit="clip", desc=what, mininterval=slow)
        self.summary, self.begin = summary, time.time()
        self.finished = self.failures = 0
        self.under_way: dict[str, int] = {}
        self.done: deque[str] = deque(maxlen=4096)  # what is said of a shard may come after its result
        self.lock = threading.Lock()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def hear(self, message: tuple[str, int]) -> None:
        """A worker says how many clips of a shard it has done."""
        name, clips = message
        with self.lock:
            if name not in self.done:
                self.under_way[name] = clips
                self._show()

    def follow(self, results: Iterable[ShardResult]) -> None:
        """Shows the shards as they finish; the first result, of no rows, says that a worker is up."""
        for done in results:
            if not done.rows:  # by the worker's own clock, which may be another machine's
                self.summary.start_seconds += min(max(0.0, done.time - self.begin), time.time() - self.begin)
                self.bar.unpause()  # the speed is that of the work
                continue
            with self.lock:
                self.under_way.pop(done.name, None)
                self.done.append(done.name)
                self.finished += done.rows
                self.failures += done.failures
                self.bar.set_postfix(failures=self.failures, refresh=False)
                self._show()

    def _show(self) -> None:
        """Never backwards: a shard that is begun again was shown before."""
        clips: Any = self.finished + sum(self.under_way.values())
        self.bar.update(max(0, clips - self.bar.n))
