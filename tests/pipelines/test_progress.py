"""The bar: to the clip while shards are being made, and never backwards."""

import time

from hbi.pipelines.sharding.plan import ShardPlan
from hbi.pipelines.sharding.progress import Progress
from hbi.pipelines.sharding.summary import Summary
from hbi.pipelines.sharding.workers import ShardResult


def test_clips_count_before_their_shard_is_done():
    shards = [ShardPlan(name, "train", 10, "p", 0, 0) for name in ("a", "b")]
    with Progress("shard", shards, Summary("")) as progress:
        shown = []
        for message in (("a", 4), ("b", 3), ("a", 9), ("b", 1)):  # b is begun again
            progress.hear(message)
            shown.append(progress.bar.n)
        assert shown == [4, 7, 12, 12]
        progress.follow([ShardResult("", 0, 0, time.time()), ShardResult("a", 10, 1, time.time())])
        progress.hear(("a", 9))  # which it said before it was done
        assert (progress.bar.n, progress.failures) == (12, 1)
        progress.follow([ShardResult("b", 10, 0, time.time())])
        assert progress.bar.n == progress.bar.total == 20
