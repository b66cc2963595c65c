"""From a manifest to shards as one chain: plan, shards on every CPU, index, summary, report."""

import fcntl
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from hbi.infra import storage
from hbi.infra.claim import claimed
from hbi.infra.nodes import require_shared
from hbi.infra.ray_runtime import messages, ray_running
from hbi.infra.scratch import scratch_swept
from hbi.pipelines.sharding import dedup, records
from hbi.pipelines.sharding.account import MANY, Account, Accountant
from hbi.pipelines.sharding.plan import FOLDER, Plan, ShardPlan, Slice, plan, slices
from hbi.pipelines.sharding.progress import Progress
from hbi.pipelines.sharding.report import Page
from hbi.pipelines.sharding.settings import ShardSettings
from hbi.pipelines.sharding.shards import OUT_IS_FULL, ShardError
from hbi.pipelines.sharding.summary import Summary
from hbi.pipelines.sharding.tasks import on_tasks
from hbi.pipelines.sharding.workers import drop_duplicates, make_shards


def shard(
    manifest: str,
    out: str,
    settings: ShardSettings | None = None,
    report: str | None = None,
    verify: bool = False,
) -> Summary:
    """Makes the shards of a manifest that `out` lacks, on every CPU, and accounts for every row.

    manifest: JSON Lines or Parquet, local or s3://. out: folder or s3:// URI. report: path of an HTML page to write.
    verify: read the tars that are there, and make those anew whose bytes are not those that were recorded.
    Uses the Ray that is running, or starts one and stops it. ValueError for a manifest or folder that will not do;
    ShardError for what stopped it half-way: the same call goes on from there.
    """
    settings = settings or ShardSettings()
    out = storage.absolute(out)
    summary = Summary(out)
    places = {"MANIFEST": storage.parent(storage.absolute(manifest)), "OUT": out}
    print(f"plan: reading {manifest}", file=sys.stderr, flush=True)  # Ray's start is long and silent
    with _in_words(out), _alone(out), ExitStack() as stack:
        clock = time.monotonic()
        planned = _plan(manifest, out, settings)
        many = len(planned.shards) > MANY
        if many:
            _start_ray(stack, places, summary)
        of_plan = slices(planned.shards)
        accountant = Accountant(out, many, verify)
        accounts = list(_accounts(accountant, of_plan, many))
        missing = [shard_plan for found in accounts for shard_plan in found.missing]
        summary.kept = sum(found.summary.rows for found in accounts)
        summary.damaged = sum(found.damaged for found in accounts)
        summary.plan_seconds = time.monotonic() - clock - summary.start_seconds
        if missing:
            print(f"shard: {len(missing):,} shards to make; workers start", file=sys.stderr, flush=True)
            if not many:
                _start_ray(stack, places, summary)
            clock, started = time.monotonic(), summary.start_seconds
            with scratch_swept():
                _make(out, planned, missing, settings, summary)
            summary.work_seconds = time.monotonic() - clock - (summary.start_seconds - started)
            again = [number for number, found in enumerate(accounts) if found.missing]
            ended = replace(accountant, ended=True)
            made = _accounts(ended, [of_plan[number] for number in again], many)
            for number, found in zip(again, made, strict=True):
                accounts[number] = found
        if settings.filters.compares:
            dedup.delete_first_pass(out, planned, many)
        accountant.write_index(planned, accounts)
        page = Page()
        for found in accounts:
            summary.merge(found.summary)
            page.merge(found.page)
        if report is not None:
            page.write(out, storage.absolute(report), str(summary))
    return summary


def _start_ray(stack: ExitStack, places: dict[str, str], summary: Summary) -> None:
    """Starts Ray, or finds it, until the end of `stack`."""
    clock = time.monotonic()
    stack.enter_context(ray_running())
    require_shared(places)
    summary.start_seconds += time.monotonic() - clock


def _accounts(accountant: Accountant, of_plan: list[Slice], spread: bool) -> Iterator[Account]:
    with tqdm(total=len(of_plan), unit="slice", desc="records", leave=False, disable=None) as bar:
        for found in on_tasks(accountant.account, of_plan, spread):
            bar.update()
            yield found


def _plan(manifest: str, out: str, settings: ShardSettings) -> Plan:
    with tqdm(unit="row", desc="plan", leave=False, mininterval=1, disable=None) as bar:

        def progress(count: int) -> None:
            bar.update(count - bar.n)

        return plan(manifest, out, settings.identity(), settings.samples_per_shard, progress)


def _make(
    out: str, planned: Plan, missing: list[ShardPlan], settings: ShardSettings, summary: Summary
) -> None:
    """Makes the missing shards, in two passes where clips are compared with each other."""
    if not settings.filters.compares:
        _make_all(out, missing, settings, out, summary)
        return
    lacking = dedup.lacking(out, planned, missing, len(planned.shards) > MANY)
    _make_all(out, lacking, settings, storage.join(out, dedup.FIRST), summary)
    found = dedup.find_duplicates(out, planned, settings.filters)
    with Progress("compare", missing, summary) as progress:
        progress.follow(drop_duplicates(out, missing, found))


def _make_all(
    out: str, shard_plans: list[ShardPlan], settings: ShardSettings, folder: str, summary: Summary
) -> None:
    """Makes shards in `folder`, with their progress to the clip."""
    with Progress("shard", shard_plans, summary) as progress, messages(progress.hear) as line:
        progress.follow(make_shards(out, shard_plans, settings, folder, line.say))


@contextmanager
def _in_words(out: str) -> Iterator[None]:
    """Inside, what the disk or the storage refuses is one line: a ValueError where the user can mend it."""
    try:
        yield
    except (FileNotFoundError, PermissionError) as error:
        raise ValueError(f"{out}: {error}: look at the names, and at the credentials") from error
    except OSError as error:
        full = f"no space left ({error.strerror}): free some and run again; finished shards stay"
        reason = full if error.errno in OUT_IS_FULL else f"{type(error).__name__}: {error}"
        raise ShardError(f"{out}: {reason}") from error


@contextmanager
def _alone(out: str) -> Iterator[None]:
    """Inside, no other run writes to `out`, and nothing is left there of a killed one."""
    if storage.is_remote(out):
        with claimed(storage.join(out, FOLDER, "writing"), out):
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
    for folder in (out, storage.join(out, dedup.FIRST)):
        shutil.rmtree(storage.join(folder, records.STAGING), ignore_errors=True)
