"""Ray Data over shards: a worker on every CPU, each with a decoder of its own, and a shard at a time."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import astuple, dataclass
from typing import Any

from hbi.infra.nodes import decode_options
from hbi.infra.ray_runtime import dataset_of
from hbi.infra.scratch import claim_scratch
from hbi.pipelines.decoding.clip import DecodeError
from hbi.pipelines.sharding import attempts, shards
from hbi.pipelines.sharding.dedup import Comparison, without_duplicates
from hbi.pipelines.sharding.plan import ShardPlan
from hbi.pipelines.sharding.records import ShardManifest
from hbi.pipelines.sharding.settings import ShardSettings
from hbi.pipelines.sharding.shards import ShardError

WAVE, WAVE_PER_CPU = 2000, 100
"""Shards given to Ray Data at once, at least and for each CPU: what the driver holds does not grow with the corpus."""
WAITING = 2
"""Shards that a worker is given at once. Ray Data sees a tenth of a second late that one is done: the next is there."""

TELL_SECONDS = 2.0
"""How often a worker says how far its shard is."""

Tell = Callable[[tuple[str, int]], object]


@dataclass(frozen=True)
class ShardResult:
    """What a worker says of its shard. One, of no rows, says that the first worker is up."""

    name: str
    """The shard."""
    rows: int
    """Manifest rows that it stands for."""
    failures: int
    """How many of them have no sample."""
    time: float
    """When it was said, in seconds since 1970."""


class ShardMaker:
    """A worker with a decoder of its own: makes the shard of each plan that it gets."""

    def __init__(self, out: str, settings: ShardSettings, folder: str, tell: Tell) -> None:
        claim_scratch()
        self.out, self.settings, self.folder, self.tell = out, settings, folder, tell
        self.decoder = shards.decoder(settings)
        with suppress(DecodeError):
            self.decoder.decode(b"")  # starts the child: its imports take a moment, once

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return _answer(row, self.make)

    def make(self, shard_plan: ShardPlan) -> ShardManifest:
        """The shard's record; it says how far it is, now and then."""
        with shards.stopping(self.folder, shard_plan.name):
            if not attempts.begin(self.folder, shard_plan.name):
                return attempts.give_up(self.out, self.folder, shard_plan)
        rows, told = 0, time.monotonic()

        def row_done() -> None:
            nonlocal rows, told
            rows += 1
            if time.monotonic() - told > TELL_SECONDS:
                told = time.monotonic()
                self.tell((shard_plan.name, rows))

        return shards.make_shard(self.out, shard_plan, self.settings, self.decoder, self.folder, row_done)


class DuplicateDropper:
    """A worker that copies the shard of each plan that it gets, without the rows that repeat earlier ones."""

    def __init__(self, out: str, comparison: Comparison) -> None:
        claim_scratch()
        self.out, self.comparison = out, comparison

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return _answer(row, self.copy)

    def copy(self, shard_plan: ShardPlan) -> ShardManifest:
        """The record of the shard without its duplicates."""
        with shards.stopping(self.out, shard_plan.name):
            if not attempts.begin(self.out, shard_plan.name):
                return attempts.give_up(self.out, self.out, shard_plan)
        return without_duplicates(self.out, shard_plan, self.comparison)


def make_shards(
    out: str, shard_plans: list[ShardPlan], settings: ShardSettings, folder: str, tell: Tell
) -> Iterator[ShardResult]:
    """Makes the shards of `shard_plans`, planned in `out`, in `folder`; yields as they finish.

    tell: is given, by the workers, the name of a shard and how many of its rows are done.
    """
    return _spread(ShardMaker, (out, settings, folder, tell), shard_plans)


def drop_duplicates(out: str, shard_plans: list[ShardPlan], comparison: Comparison) -> Iterator[ShardResult]:
    """Copies shards of the first pass to `out`, without what repeats earlier rows; yields as they finish."""
    return _spread(DuplicateDropper, (out, comparison), shard_plans)


def _spread(worker: type, arguments: tuple[Any, ...], shard_plans: list[ShardPlan]) -> Iterator[ShardResult]:
    """The plans to workers; what they say of each as it finishes. ShardError where the run must stop."""
    wave = max(WAVE, WAVE_PER_CPU * _cpus())
    for start in range(0, len(shard_plans), wave):
        given = [json.dumps(astuple(shard_plan)) for shard_plan in shard_plans[start : start + wave]]
        # One more, of nothing: the answer to it says that a worker is up.
        rows = [{"plan": shard_plan} for shard_plan in ["", *given]]
        for row in on_workers(worker, arguments, rows):
            if row["error"]:
                raise ShardError(row["error"])
            if row["rows"] or not start:
                yield ShardResult(row["name"], row["rows"], row["failures"], row["time"])


def _cpus() -> int:
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def on_workers(
    worker: type, arguments: tuple[Any, ...], rows: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """What decoding workers on every CPU, `worker(*arguments)`, say of each of `rows`, as they finish.

    There are as many as CPUs to begin with, and then more or fewer, as nodes come and go. ShardError where Ray fails.
    """
    import ray.data
    from ray.data.block import BlockAccessor
    from ray.exceptions import RayError, RayTaskError

    # Ray Data begins again, without end, what is lost with its worker; `attempts` gives up what is to blame itself.
    pool = ray.data.ActorPoolStrategy(
        min_size=1,
        initial_size=min(_cpus(), len(rows)),
        max_size=len(rows),
        max_tasks_in_flight_per_actor=WAITING,
    )
    data = dataset_of(rows).map(
        worker,  # pyright: ignore[reportArgumentType]  (Ray's stub knows functions only)
        fn_constructor_args=arguments,
        compute=pool,
        num_cpus=1,
        **decode_options(),
    )
    try:
        # Not iter_rows: where it is left half-way (Ctrl-C), it waits for the running tasks to finish.
        for bundle in data.iter_internal_ref_bundles():
            references: list[Any] = bundle.block_refs
            for reference in references:
                yield from BlockAccessor.for_block(ray.get(reference)).iter_rows(public_row_format=True)
    except RayTaskError:
        raise  # our own mistake, with its traceback
    except RayError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ShardError(f"Ray lost a worker for good ({reason}): run again to go on") from error


def _answer(row: dict[str, Any], work: Callable[[ShardPlan], ShardManifest]) -> dict[str, Any]:
    """What a worker says. An error that stops the run travels as a row, for Ray would wrap an exception and log it."""
    record, error, name = None, "", ""
    if row["plan"]:
        shard_plan = ShardPlan(*json.loads(row["plan"]))
        name = shard_plan.name
        try:
            record = work(shard_plan)
        except ShardError as stop:
            error = str(stop)
    rows, failures = (record.rows, len(record.failures)) if record is not None else (0, 0)
    return {"error": error, "name": name, "rows": rows, "failures": failures, "time": time.time()}
