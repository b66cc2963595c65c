"""Shards made without Ray, the obvious way, and what they hold."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

from hbi.pipelines.decoding.decoder import Decoder
from hbi.pipelines.sample import Sample, ShardIndex, read_shard
from hbi.pipelines.sharding.account import Accountant
from hbi.pipelines.sharding.plan import Plan, plan, slices
from hbi.pipelines.sharding.records import ShardManifest, read_records, unfinished
from hbi.pipelines.sharding.settings import ShardSettings
from hbi.pipelines.sharding.shards import make_shard

SETTINGS = ShardSettings(frames=3, size=32, samples_per_shard=6)


def make(
    manifest: str, out: str, decoder: Decoder, settings: ShardSettings = SETTINGS
) -> list[ShardManifest]:
    """What `run.shard` does, one shard after the other: the obvious reference."""
    planned = plan(manifest, out, settings.identity(), settings.samples_per_shard)
    for shard_plan, record in list(unfinished(out, planned.shards)):
        if record is None:
            make_shard(out, shard_plan, settings, decoder)
    write_index(out, planned)
    return [record for _, record in read_records(out, sorted(plan.name for plan in planned.shards)) if record]


def write_index(out: str, planned: Plan, parts: bool = False) -> None:
    """What `run.shard` writes at the end, by the obvious loop."""
    accountant = Accountant(out, parts, ended=True)
    accountant.write_index(planned, [accountant.account(some) for some in slices(planned.shards)])


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]


def samples(out: Path) -> list[Sample]:
    index = ShardIndex.read(str(out))
    found = []
    for shard in index.shards:
        content = (out / shard.name).read_bytes()
        assert len(content) == shard.bytes and hashlib.sha256(content).hexdigest() == shard.sha256
        inside = list(read_shard(io.BytesIO(content)))
        assert len(inside) == shard.samples
        found += inside
    return found


def everything(out: Path) -> dict[str, bytes]:
    """All that a run leaves, by name."""
    return {
        str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()
    }
