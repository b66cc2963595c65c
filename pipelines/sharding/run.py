"""From a manifest to shards as one chain: plan, shards on every CPU, index, summary, report."""

import fcntl
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from hbi.infra import storage
from hbi.infra.ray_runtime import ray_running
from hbi.pipelines.sharding import dedup as repeats
from hbi.pipelines.sharding import records
from hbi.pipelines.sharding.plan import FOLDER, Plan, Unit, plan
from hbi.pipelines.sharding.records import unfinished
from hbi.pipelines.sharding.report import Page
from hbi.pipelines.sharding.shards import OUT_IS_FULL, ShardError, ShardSettings
from hbi.pipelines.sharding.summary import Summary
from hbi.pipelines.sharding.workers import Done, make_shards, thin_shards


def shard(
    manifest: str, out: str, settings: ShardSettings | None = None, report: str | None = None
) -> Summary:
    """Makes the shards of a manifest that `out` lacks, on every CPU, and accounts for every row.

    manifest: JSON Lines or Parquet, local or s3://. out: folder or s3:// URI. report: path of an HTML page to write.
    Uses the Ray that is running, or starts one and stops it. ValueError for a manifest or folder that will not do;
    ShardError for what stopped it half-way: the same call goes on from there.
    """
    settings = settings or ShardSettings()
    out = storage.absolute(out)
    summary = Summary(out)
    with _in_words(out), _alone(out):
        clock = time.monotonic()
        planned = _plan(manifest, out, settings)
        missing = []
        for unit, record in unfinished(out, planned.units):
            if record is None:
                missing.append(unit)
            else:
                summary.kept += record.rows
        summary.plan_seconds = time.monotonic() - clock
        if missing:
            clock = time.monotonic()
            with ray_running():
                summary.start_seconds = time.monotonic() - clock
                _make(out, planned, missing, settings, summary)
                summary.work_seconds = time.monotonic() - clock - summary.start_seconds
        page = Page()
        for record in records.write_index(out, planned):
            summary.add(record)
            page.add(record)
        if report is not None:
            page.write(out, storage.absolute(report), str(summary))
    return summary


def _plan(manifest: str, out: str, settings: ShardSettings) -> Plan:
    with tqdm(unit="row", desc="plan", leave=False, mininterval=1, disable=None) as bar:

        def progress(count: int) -> None:
            bar.update(count - bar.n)

        return plan(manifest, out, settings.identity(), settings.samples_per_shard, progress)


def _make(out: str, planned: Plan, missing: list[Unit], settings: ShardSettings, summary: Summary) -> None:
    """Makes the missing shards, in two passes where clips are compared with each other."""
    if not settings.compares:
        _follow("shard", missing, make_shards(out, missing, settings, out), summary)
        return
    first = storage.join(out, repeats.FIRST)
    wanted = {unit.name for unit in missing}
    others = [unit for unit in planned.units if unit.name not in wanted]
    # Of the others only the prints are needed, which lie in their records.
    there = [*unfinished(first, missing), *unfinished(first, others, tars=False)]
    lacking = [unit for unit, record in there if record is None]
    _follow("shard", lacking, make_shards(out, lacking, settings, first), summary)
    found = repeats.repeats_of(out, planned, settings.filters)
    _follow("compare", missing, thin_shards(out, missing, found), summary)
    repeats.forget_tars(out, planned)


def _follow(what: str, units: list[Unit], tasks: Iterator[Done], summary: Summary) -> None:
    """Shows the progress of tasks: clips, clips per second, time left."""
    begin, failures = time.time(), 0
    slow = 0.5 if sys.stderr.isatty() else 10
    with tqdm(total=sum(unit.rows for unit in units), unit="clip", desc=what, mininterval=slow) as bar:
        for done in tasks:
            if not done.rows:  # by the worker's own clock, which may be another machine's
                summary.start_seconds += min(max(0.0, done.time - begin), time.time() - begin)
                bar.unpause()  # the speed is that of the work
                continue
            failures += done.failures
            bar.set_postfix(failures=failures, refresh=False)
            bar.update(done.rows)


@contextmanager
def _in_words(out: str) -> Iterator[None]:
    """Inside, what the disk or the storage refuses is one line."""
    try:
        yield
    except OSError as error:
        full = f"no space left ({error.strerror}): free some and run again; finished shards stay"
        reason = full if error.errno in OUT_IS_FULL else f"{type(error).__name__}: {error}"
        raise ShardError(f"{out}: {reason}") from error


@contextmanager
def _alone(out: str) -> Iterator[None]:
    """Inside, no other run on this machine writes to a local `out`, and nothing is left of a killed one."""
    if storage.is_remote(out):
        yield
        return
    place = Path(out, FOLDER)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"{out}: is not a folder: choose another place for the shards") from None
    except PermissionError as error:
        raise ValueError(f"{out}: may not be written ({error.strerror}): choose another folder") from None
    with (place / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{out}: another run is writing there: wait, or choose another folder") from None
        _sweep(out)
        try:
            yield
        finally:
            _sweep(out)


def _sweep(out: str) -> None:
    """Removes unfinished files."""
    for folder in (out, storage.join(out, repeats.FIRST)):
        shutil.rmtree(storage.join(folder, records.SPOOL), ignore_errors=True)
