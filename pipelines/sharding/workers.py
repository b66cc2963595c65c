"""Ray Data over shards: a worker on every CPU, each with a decoder of its own, and a shard at a time."""

import json
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import astuple, dataclass
from typing import Any

from hbi.infra.ray_runtime import dataset_of
from hbi.pipelines.decoding.clip import DecodeError
from hbi.pipelines.sharding import shards
from hbi.pipelines.sharding.dedup import thin_shard
from hbi.pipelines.sharding.plan import Unit
from hbi.pipelines.sharding.records import Record
from hbi.pipelines.sharding.shards import ShardError, ShardSettings

WAVE, WAVE_PER_CPU = 2000, 100
"""Shards given to Ray Data at once, at least and for each CPU: what the driver holds does not grow with the corpus."""
RETRIES = 2
"""How often a shard is begun again after its worker died."""
WAITING = 2
"""Shards that a worker is given at once. Ray Data sees a tenth of a second late that one is done: the next is there."""


@dataclass(frozen=True)
class Done:
    """What a worker says of its shard. One, of no rows, says that the first worker is up."""

    rows: int
    """Manifest rows that it stands for."""
    failures: int
    """How many of them have no sample."""
    time: float
    """When it was said, in seconds since 1970."""


class ShardMaker:
    """A worker with a decoder of its own: makes the shard of each unit that it gets."""

    def __init__(self, out: str, settings: ShardSettings, folder: str) -> None:
        self.out, self.settings, self.folder = out, settings, folder
        self.decoder = shards.decoder(settings)
        with suppress(DecodeError):
            self.decoder.decode(b"")  # starts the child: its imports take a moment, once

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return _answer(
            row, lambda unit: shards.make_shard(self.out, unit, self.settings, self.decoder, self.folder)
        )


class ShardThinner:
    """A worker that copies the shard of each unit that it gets, without the rows that repeat earlier ones."""

    def __init__(self, out: str, repeats: Any) -> None:
        import ray

        self.out = out
        self.repeats: dict[int, str] = ray.get(repeats)  # pyright: ignore[reportAttributeAccessIssue]

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return _answer(row, lambda unit: thin_shard(self.out, unit, self.repeats))


def make_shards(out: str, units: list[Unit], settings: ShardSettings, folder: str) -> Iterator[Done]:
    """Makes the shards of `units`, planned in `out`, in `folder`; yields as they finish."""
    return _spread(ShardMaker, (out, settings, folder), units)


def thin_shards(out: str, units: list[Unit], repeats: dict[int, str]) -> Iterator[Done]:
    """Copies shards of the first pass to `out`, without the rows of `repeats`; yields as they finish."""
    import ray

    return _spread(ShardThinner, (out, ray.put(repeats)), units)


def _spread(worker: type, arguments: tuple[Any, ...], units: list[Unit]) -> Iterator[Done]:
    """The units to workers on every CPU; what they say of each as it finishes. ShardError where the run must stop."""
    import ray

    cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
    wave = max(WAVE, WAVE_PER_CPU * cpus)
    for start in range(0, len(units), wave):
        given = [json.dumps(astuple(unit)) for unit in units[start : start + wave]]
        # One more, of nothing: the answer to it says that a worker is up.
        rows = [{"unit": unit} for unit in ["", *given]]
        for row in _each(worker, arguments, min(cpus, len(given)), rows):
            if row["error"]:
                raise ShardError(row["error"])
            if row["rows"] or not start:
                yield Done(row["rows"], row["failures"], row["time"])


def _each(
    worker: type, arguments: tuple[Any, ...], workers: int, rows: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """What the workers say of each of `rows`, as they finish."""
    import ray.data
    from ray.data.block import BlockAccessor
    from ray.exceptions import RayError, RayTaskError

    with warnings.catch_warnings():
        # Ray Data begins a shard that kills its worker again for ever; the only bound is an argument that it calls
        # deprecated without naming another.
        warnings.simplefilter("ignore", DeprecationWarning)
        data = dataset_of(rows).map(
            worker,  # pyright: ignore[reportArgumentType]  (Ray's stub knows functions only)
            fn_constructor_args=arguments,
            compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=WAITING),
            num_cpus=1,
            max_task_retries=RETRIES,
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


def _answer(row: dict[str, Any], work: Callable[[Unit], Record]) -> dict[str, Any]:
    """What a worker says. An error that stops the run travels as a row, for Ray would wrap an exception and log it."""
    record, error = None, ""
    if row["unit"]:
        try:
            record = work(Unit(*json.loads(row["unit"])))
        except ShardError as stop:
            error = str(stop)
    rows, failures = (record.rows, len(record.failures)) if record is not None else (0, 0)
    return {"error": error, "rows": rows, "failures": failures, "time": time.time()}
