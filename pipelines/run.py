"""From a manifest to shards as one chain: plan, shards on every CPU with Ray Data, index, summary."""

import fcntl
import functools
import json
import logging
import re
import shutil
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field
from pathlib import Path
from threading import Lock, Timer
from typing import Any

from infra import storage
from infra.cluster import ray_running
from pipelines import shards
from pipelines.child import Decoder
from pipelines.plan import FOLDER, Plan, Unit, plan
from pipelines.report import Page
from pipelines.shards import Record, ShardError, ShardSettings, make_shard

WAVE = 2000
"""Shards given to Ray Data at once: what the driver holds does not grow with the corpus."""
IDLE_SECONDS = 5.0
"""A decoder is kept so long for its worker's next shard."""
RETRIES = 2
"""How often a shard is begun again after its worker died."""
REASONS = 1000
"""Most kinds of failure that are counted apart."""


@dataclass
class Summary:
    """What a run did; print it."""

    out: str
    """The shard folder."""
    rows: int = 0
    """Rows of the manifest: samples plus failures."""
    samples: int = 0
    bytes: int = 0
    """Of all tars."""
    shards: int = 0
    """Tars."""
    kept: int = 0
    """Rows whose shards were there from an earlier run."""
    clip_seconds: float = 0.0
    """Length of all samples together."""
    failures: Counter[tuple[str, str]] = field(default_factory=Counter)
    """How many, by stage and kind of reason."""
    decoders: Counter[str] = field(default_factory=Counter)
    """Samples by decoder."""
    start_seconds: float = 0.0
    """Until Ray was up."""
    plan_seconds: float = 0.0
    """For reading the manifest and what was there."""
    work_seconds: float = 0.0
    """From the first shard to the last."""

    def add(self, record: Record) -> None:
        """Takes a finished shard into account."""
        self.rows += record.rows
        self.samples += record.shard.samples
        self.bytes += record.shard.bytes
        self.shards += record.shard.samples > 0
        for clip in record.clips:
            self.clip_seconds += clip.seconds
            self.decoders[clip.decoder] += 1
        for failure in record.failures:
            kind = failure.stage, kind_of(failure.reason)
            self.failures[kind if kind in self.failures or len(self.failures) < REASONS else ("…", "…")] += 1

    @property
    def clips_per_second(self) -> float:
        """Rows that this run worked on, by the time it took from the first shard to the last; 0 if none."""
        return (self.rows - self.kept) / self.work_seconds if self.work_seconds else 0.0

    def __str__(self) -> str:
        failed = self.rows - self.samples
        lines = [
            f"{self.out}: {self.samples:,} samples and {failed:,} failures of {self.rows:,} rows",
            f"  video     {self.clip_seconds / 3600:,.2f} hours in {self.shards:,} shards, {_size(self.bytes)}",
        ]
        if self.rows - self.kept:
            lines.append(
                f"  speed     {self.clips_per_second:,.1f} clips/s: {self.rows - self.kept:,} clips in"
                f" {self.work_seconds:,.1f} s (Ray's start {self.start_seconds:.1f} s, plan {self.plan_seconds:.1f} s)"
            )
        if self.kept:
            lines.append(f"  kept      {self.kept:,} rows of an earlier run")
        if self.decoders:
            lines.append(
                "  decoders  " + ", ".join(f"{n:,} {name}" for name, n in self.decoders.most_common())
            )
        if failed:
            lines.append(f"  failures  {storage.join(self.out, shards.FAILURES_NAME)}")
        lines += [f"    {n:>8,}  {stage}: {reason}" for (stage, reason), n in self.failures.most_common(20)]
        if len(self.failures) > 20:
            lines.append(f"    and {len(self.failures) - 20} more kinds")
        return "\n".join(lines)


def kind_of(reason: str) -> str:
    """A reason without its particulars, so that equal troubles are counted together."""
    reason = re.sub(r"'[^']*'|\"[^\"]*\"|s3://\S+|(?<![\w.])/\S+", "…", reason)
    return re.sub(r"0x[0-9a-f]+|\d+(\.\d+)?", "N", reason)[:160]


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def shard(
    manifest: str, out: str, settings: ShardSettings | None = None, report: str | None = None
) -> Summary:
    """Makes the shards of a manifest that `out` lacks, on every CPU, and accounts for every row.

    manifest: JSON Lines or Parquet, local or s3://. out: folder or s3:// URI. report: path of an HTML page to write.
    Uses the Ray that is running, or starts one and stops it. ValueError for a manifest or folder that will not do;
    ShardError for what stopped it half-way: the same call goes on from there.
    """
    from tqdm import tqdm

    settings = settings or ShardSettings()
    out = storage.absolute(out)
    summary = Summary(out)
    with _alone(out):
        clock = time.monotonic()
        progress = tqdm(unit="row", desc="plan", leave=False, mininterval=1, disable=None)
        with progress:
            planned = plan(
                manifest,
                out,
                settings.identity(),
                settings.samples_per_shard,
                lambda count: progress.update(count - progress.n),
            )
        missing = []
        for unit, record in shards.unfinished(out, planned):
            if record is None:
                missing.append(unit)
            else:
                summary.kept += record.rows
        summary.plan_seconds = time.monotonic() - clock
        if missing:
            _make_all(out, planned, missing, settings, summary)
        page = Page()
        for record in shards.write_index(out, planned):
            summary.add(record)
            page.add(record)
        if report is not None:
            page.write(out, storage.absolute(report), str(summary))
    return summary


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
    with (place / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{out}: another run is writing there: wait for it, or choose another folder"
            ) from None
        spool = Path(out, shards.SPOOL)
        shutil.rmtree(spool, ignore_errors=True)
        try:
            yield
        finally:
            shutil.rmtree(spool, ignore_errors=True)


def _make_all(
    out: str, planned: Plan, missing: list[Unit], settings: ShardSettings, summary: Summary
) -> None:
    """Makes the missing shards with Ray Data, one task a shard."""
    from tqdm import tqdm

    clock = time.monotonic()
    with ray_running():
        summary.start_seconds = time.monotonic() - clock
        clock = time.monotonic()
        quiet = not sys.stderr.isatty()
        with tqdm(
            total=planned.rows,
            initial=summary.kept,
            unit="clip",
            desc="shard",
            mininterval=10 if quiet else 0.5,
        ) as bar:
            failed = 0
            for row in _done(out, missing, settings):
                if row["error"]:
                    raise ShardError(row["error"])
                failed += row["failures"]
                bar.set_postfix(failures=failed, refresh=False)
                bar.update(row["rows"])
        summary.work_seconds = time.monotonic() - clock


def _done(out: str, missing: list[Unit], settings: ShardSettings) -> Iterator[dict[str, Any]]:
    """What each task says of its shard, as they finish."""
    import ray.data
    from ray.data.block import BlockAccessor
    from ray.exceptions import RayError, RayTaskError

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    for start in range(0, len(missing), WAVE):
        wave = [{"unit": json.dumps(astuple(unit))} for unit in missing[start : start + WAVE]]
        data = ray.data.from_items(
            wave, override_num_blocks=len(wave)
        )  # a block a shard, hence a task a shard
        with warnings.catch_warnings():
            # Ray Data starts a task that kills its worker again for ever; the only bound is an argument that it
            # calls deprecated without naming another.
            warnings.simplefilter("ignore", DeprecationWarning)
            task = functools.partial(_make, out=out, settings=settings)
            data = data.map(task, num_cpus=1, max_retries=RETRIES)
        data.context.enable_progress_bars = False
        data.context.print_on_execution_start = False
        data.context.execution_no_progress_timeout_s = (
            -1
        )  # a shard may take its time; each clip has its limit
        try:
            # Not iter_rows: where it is left half-way (Ctrl-C), it waits for the running tasks to finish.
            for bundle in data.iter_internal_ref_bundles():
                references: list[Any] = bundle.block_refs
                for reference in references:
                    block = BlockAccessor.for_block(ray.get(reference))
                    yield from block.iter_rows(public_row_format=True)
        except RayTaskError:
            raise  # our own mistake, with its traceback
        except RayError as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ShardError(f"Ray lost a worker for good ({reason}): run again to go on") from error


def _make(row: dict[str, Any], out: str, settings: ShardSettings) -> dict[str, Any]:
    """The task: makes one shard. What stops the run travels as a row, for Ray would wrap and log an exception."""
    unit = Unit(*json.loads(row["unit"]))
    try:
        with _decoder(settings) as decoder:
            record = make_shard(out, unit, settings, decoder)
    except ShardError as error:
        return {"error": str(error), "rows": 0, "failures": 0}
    return {"error": "", "rows": record.rows, "failures": len(record.failures)}


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
