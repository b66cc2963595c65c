"""What a run did, counted from the commit records."""

import re
from collections import Counter
from dataclasses import dataclass, field

from hbi.infra import storage
from hbi.pipelines.sample import FAILURES_NAME
from hbi.pipelines.sharding.records import ShardManifest

REASONS = 1000
"""Most kinds of failure that are counted apart."""
SHOWN = 20
"""Kinds of failure that are printed."""


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
    damaged: int = 0
    """Tars whose bytes were not those that were recorded, made anew."""
    clip_seconds: float = 0.0
    """Length of all samples together."""
    failures: Counter[tuple[str, str]] = field(default_factory=Counter)
    """How many, by stage and kind of reason."""
    truncated: int = 0
    """Samples whose source breaks off before its end."""
    captionless: int = 0
    """Samples without a caption."""
    decoders: Counter[str] = field(default_factory=Counter)
    """Samples by decoder."""
    start_seconds: float = 0.0
    """Until Ray and its workers were up."""
    plan_seconds: float = 0.0
    """For reading the manifest and what was there."""
    work_seconds: float = 0.0
    """From the first shard to the last."""

    def add(self, record: ShardManifest) -> None:
        """Takes a finished shard into account."""
        self.rows += record.rows
        self.samples += record.shard.samples
        self.bytes += record.shard.bytes
        self.shards += record.shard.samples > 0
        for clip in record.clips:
            self.clip_seconds += clip.seconds
            self.decoders[clip.decoder] += 1
            self.truncated += clip.truncated
            self.captionless += not clip.captions
        for failure in record.failures:
            self._count((failure.stage, kind_of(failure.reason)))

    def merge(self, other: "Summary") -> None:
        """Takes other shards into account, as they were counted elsewhere."""
        for name in ("rows", "samples", "bytes", "shards", "clip_seconds", "truncated", "captionless"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.decoders.update(other.decoders)
        for kind, count in other.failures.items():
            self._count(kind, count)

    def _count(self, kind: tuple[str, str], count: int = 1) -> None:
        self.failures[kind if kind in self.failures or len(self.failures) < REASONS else ("…", "…")] += count

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
        if self.damaged:
            lines.append(f"  damaged   {self.damaged:,} tars had other bytes than were written: made anew")
        if self.decoders:
            lines.append(
                "  decoders  " + ", ".join(f"{n:,} {name}" for name, n in self.decoders.most_common())
            )
        if self.captionless:
            lines.append(f"  captions  none for {self.captionless:,} samples")
        if self.truncated:
            lines.append(
                f"  cut short {self.truncated:,} samples are of files that break off before their end"
            )
        if failed:
            lines.append(f"  failures  {storage.join(self.out, FAILURES_NAME)}")
        lines += [
            f"    {n:>8,}  {stage}: {reason}" for (stage, reason), n in self.failures.most_common(SHOWN)
        ]
        if len(self.failures) > SHOWN:
            lines.append(f"    and {len(self.failures) - SHOWN} more kinds")
        return "\n".join(lines)


def kind_of(reason: str) -> str:
    """A reason without its particulars, so that equal troubles are counted together."""
    reason = re.sub(r"'[^']*'|\"[^\"]*\"|s3://\S+|(?<![\w.])/\S+", "…", reason)
    return re.sub(r"(?<![A-Za-z])\d+(\.\d+)?", "N", reason)[:160]


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"
