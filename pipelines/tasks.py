"""Ray Data over shards: one task a shard on every CPU, each with a decoder of its own."""

import functools
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass
from threading import Lock, Timer
from typing import Any

from pipelines import shards
from pipelines.child import Decoder
from pipelines.decode import DecodeError
from pipelines.plan import Unit
from pipelines.records import Record
from pipelines.repeats import thin_shard
from pipelines.shards import ShardError, ShardSettings

WAVE = 2000
"""Shards given to Ray Data at once: what the driver holds does not grow with the corpus."""
RETRIES = 2
"""How often a shard is begun again after its worker died."""
IDLE_SECONDS = 5.0
"""A decoder is kept so long for its worker's next shard."""


@dataclass(frozen=True)
class Done:
    """What a task says of its shard."""

    rows: int
    """Manifest rows that it stands for."""
    failures: int
    """How many of them have no sample."""


def start_workers(settings: ShardSettings) -> None:
    """Starts Ray Data's own actors, and a worker and its decoder on every CPU: their imports take seconds, once."""
    import ray

    for _ in _each(
        functools.partial(_warm, settings), [{"cpu": n} for n in range(int(ray.cluster_resources()["CPU"]))]
    ):
        pass


def _warm(settings: ShardSettings, row: dict[str, Any]) -> dict[str, Any]:
    with _decoder(settings) as decoder, suppress(DecodeError):
        decoder.decode(b"")
    return row


def make_shards(out: str, units: list[Unit], settings: ShardSettings, folder: str) -> Iterator[Done]:
    """Makes the shards of `units`, planned in `out`, in `folder`; yields as they finish."""
    return _spread(functools.partial(_make, out, settings, folder), units)


def thin_shards(out: str, units: list[Unit], repeats: dict[int, str]) -> Iterator[Done]:
    """Copies shards of the first pass to `out`, without the rows of `repeats`; yields as they finish."""
    import ray

    return _spread(functools.partial(_thin, out, ray.put(repeats)), units)


def _make(out: str, settings: ShardSettings, folder: str, unit: Unit) -> Record:
    with _decoder(settings) as decoder:
        return shards.make_shard(out, unit, settings, decoder, folder)


def _thin(out: str, repeats: Any, unit: Unit) -> Record:
    import ray

    return thin_shard(out, unit, ray.get(repeats))


def _spread(work: Callable[[Unit], Record], units: list[Unit]) -> Iterator[Done]:
    """`work` on every unit; what each says as it finishes, in any order. ShardError where the run must stop."""
    for start in range(0, len(units), WAVE):
        wave = [{"unit": json.dumps(astuple(unit))} for unit in units[start : start + WAVE]]
        for row in _each(functools.partial(_task, work), wave):
            if row["error"]:
                raise ShardError(row["error"])
            yield Done(row["rows"], row["failures"])


def _each(
    task: Callable[[dict[str, Any]], dict[str, Any]], rows: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Ray Data's map of `task` over `rows`, a task a row, as they finish."""
    import ray.data
    from ray.data.block import BlockAccessor
    from ray.exceptions import RayError, RayTaskError

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    data = ray.data.from_items(rows, override_num_blocks=len(rows))
    with warnings.catch_warnings():
        # Ray Data starts a task that kills its worker again for ever; the only bound is an argument that it calls
        # deprecated without naming another.
        warnings.simplefilter("ignore", DeprecationWarning)
        data = data.map(task, num_cpus=1, max_retries=RETRIES)
    data.context.enable_progress_bars = False
    data.context.print_on_execution_start = False
    # A shard may take its time; each clip has its own limit.
    data.context.execution_no_progress_timeout_s = -1
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


def _task(work: Callable[[Unit], Record], row: dict[str, Any]) -> dict[str, Any]:
    """What Ray runs. An error that stops the run travels as a row, for Ray would wrap an exception and log it."""
    try:
        record = work(Unit(*json.loads(row["unit"])))
    except ShardError as error:
        return {"error": str(error), "rows": 0, "failures": 0}
    return {"error": "", "rows": record.rows, "failures": len(record.failures)}


# --- The worker's decoder -------------------------------------------------------------------------------------------
_idle: tuple[ShardSettings, Decoder, Timer] | None = None
_idle_lock = Lock()


@contextmanager
def _decoder(settings: ShardSettings) -> Iterator[Decoder]:
    """The decoder of this worker's last shard, or a new one: starting one costs as much as decoding many clips."""
    global _idle
    with _idle_lock:
        last, _idle = _idle, None
    if last is not None:
        last[2].cancel()
    if last is not None and last[0] == settings:
        decoder = last[1]
    else:
        if last is not None:
            last[1].close()
        decoder = shards.decoder(settings)
    try:
        yield decoder
    except BaseException:
        decoder.close()
        raise
    timer = Timer(IDLE_SECONDS, _close_idle)
    timer.daemon = True
    with _idle_lock:
        _idle = settings, decoder, timer
    timer.start()


def _close_idle() -> None:
    """Ends a decoder that waited in vain for its worker's next shard."""
    global _idle
    with _idle_lock:
        last, _idle = _idle, None
    if last is not None:
        last[1].close()
