"""The plan: which manifest rows make which shard. Written once under `OUT/.plan`, read by every worker.

The manifest streams through: at most one unfinished shard per split is held in memory. Every later run into the
same folder follows the plan that is there, so that a shard's content depends on nothing but its place in the plan.
"""

import hashlib
import itertools
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import IO, Any

from hbi.infra import storage
from hbi.pipelines.manifest import Row, read_manifest

FOLDER = ".plan"
PART_BYTES = 32 * 2**20
"""Planned rows lie in parts of about this size, many shards in one: a million clips make some twenty files."""
DIGEST_BYTES = 2**20
VERSION = 4
"""Of what decides the bytes of a shard beside its settings. 2: pictures as players show them, with words of it.
3: HLG by a display's light. 4: files cut short in more formats, last pictures that stand."""


@dataclass(frozen=True)
class ShardPlan:
    """One shard to be made: its rows lie in `OUT/.plan/<part>`, from `offset` on."""

    name: str
    """The tar, `<split>-<000000>.tar`."""
    split: str
    """Every row's split."""
    rows: int
    """How many manifest rows it stands for."""
    part: str
    """File of the plan."""
    offset: int
    """First byte of its rows in that file."""
    bytes: int
    """Length of its rows in that file."""


@dataclass(frozen=True)
class Slice:
    """A thousand shards of a split, whose names differ in the last three digits: what is read of a folder at a time."""

    name: str
    """What their names have in common: `<split>-<000>`."""
    shards: list[ShardPlan]
    """By name."""


def slices(shard_plans: Iterable[ShardPlan]) -> list[Slice]:
    """Shards by slices, all of them in the order of their names."""
    named = sorted(shard_plans, key=lambda shard_plan: shard_plan.name)
    of_slice = itertools.groupby(named, key=lambda shard_plan: shard_plan.name[: -len("000.tar")])
    return [Slice(name, list(found)) for name, found in of_slice]


@dataclass(frozen=True)
class Plan:
    """All shards of a folder, and what they are made from."""

    identity: dict[str, Any]
    """Digest of the manifest and the settings: another run may go on in this folder only if they are the same."""
    rows: int
    """Rows of the manifest."""
    shards: list[ShardPlan]
    """In the order in which their last rows stand in the manifest."""


def plan(
    manifest: str,
    out: str,
    settings: dict[str, Any],
    rows_per_shard: int,
    progress: Callable[[int], object] | None = None,
) -> Plan:
    """The plan that lies in `out`, or a new one. ValueError if the one there is for another manifest or settings."""
    place = storage.join(out, FOLDER, "plan.json")
    identity = {
        "manifest": _digest(manifest),
        "relative to": storage.parent(storage.absolute(manifest)),
        "settings": settings,
    }
    try:
        found = json.loads(storage.read_bytes(place))
    except FileNotFoundError:
        return _write(manifest, out, identity, rows_per_shard, place, progress)
    except ValueError as error:
        raise ValueError(f"{place}: not a plan ({error}): delete {out} or choose another folder") from error
    if found.get("version") != VERSION:
        raise ValueError(
            f"{out} holds shards of another version of hbi, whose bytes differ for the same clips:"
            " choose another folder, or delete it and make all of them anew"
        )
    differences = list(_differences(found["identity"], identity))
    if differences:
        raise ValueError(
            f"{out} holds shards of another run: {'; '.join(differences)}. Run with the same, or choose another folder"
        )
    return Plan(identity, found["rows"], [ShardPlan(*shard_plan) for shard_plan in found["units"]])


def read_rows(out: str, shard_plan: ShardPlan) -> list[tuple[str, Row]]:
    """The rows of a planned shard with their keys."""
    place = storage.join(out, FOLDER, shard_plan.part)
    lines = storage.read_range(place, shard_plan.offset, shard_plan.bytes).splitlines()
    planned = [json.loads(line) for line in lines]
    return [(row.pop("key"), Row(**row)) for row in planned]


def _write(
    manifest: str,
    out: str,
    identity: dict[str, Any],
    rows_per_shard: int,
    place: str,
    progress: Callable[[int], object] | None,
) -> Plan:
    """Streams the manifest into parts; plan.json, written last, makes them count."""
    shard_plans: list[ShardPlan] = []
    waiting: dict[str, list[bytes]] = {}
    numbers: dict[str, Iterator[int]] = {}
    count = 0
    with ExitStack() as stack:
        staging = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hbi-plan-")))
        parts = itertools.count()
        part: tuple[str, IO[bytes]] | None = None

        def flush(split: str) -> None:
            nonlocal part
            if part is None:
                name = f"{next(parts):06d}.jsonl"
                part = name, stack.enter_context((staging / name).open("wb"))
            name, stream = part
            lines = waiting.pop(split)
            number = next(numbers.setdefault(split, itertools.count()))
            shard = f"{split}-{number:06d}.tar"
            offset = stream.tell()
            stream.writelines(lines)
            shard_plans.append(ShardPlan(shard, split, len(lines), name, offset, stream.tell() - offset))
            if stream.tell() >= PART_BYTES:
                put(part)
                part = None

        def put(finished: tuple[str, IO[bytes]]) -> None:
            finished[1].close()
            storage.put_file(str(staging / finished[0]), storage.join(out, FOLDER, finished[0]), move=True)

        for count, row in enumerate(read_manifest(manifest), 1):
            # Escaped to ASCII: file names that are not UTF-8, and lone surrogates, come back as they were.
            line = json.dumps({"key": f"{count - 1:09d}", **asdict(row)}, default=str).encode() + b"\n"
            waiting.setdefault(row.split, []).append(line)
            if len(waiting[row.split]) == rows_per_shard:
                flush(row.split)
            if progress is not None and count % 10_000 == 0:
                progress(count)
        for split in list(waiting):
            flush(split)
        if part is not None:
            put(part)
    if not count:
        raise ValueError(f"{manifest}: no rows: a manifest has one clip a line")
    content = {
        "version": VERSION,
        "identity": identity,
        "rows": count,
        "units": list(map(astuple, shard_plans)),
    }
    storage.write_bytes(place, json.dumps(content).encode())
    return Plan(identity, count, shard_plans)


def _digest(manifest: str) -> str:
    """sha256 of the manifest's bytes; FileNotFoundError becomes a ValueError with the mend."""
    digest = hashlib.sha256()
    try:
        with storage.open_file(manifest) as stream:
            while block := stream.read(DIGEST_BYTES):
                digest.update(block)
    except FileNotFoundError:
        raise ValueError(
            f"{manifest}: no such manifest: give a JSON Lines or Parquet file, local or s3://"
        ) from None
    except IsADirectoryError:
        raise ValueError(f"{manifest}: is a folder: give the manifest inside it") from None
    return digest.hexdigest()


def _differences(was: Any, now: Any, name: str = "") -> Iterator[str]:
    """What differs between two identities, in words: `frames 12, not 8`."""
    if isinstance(was, dict) and isinstance(now, dict):
        for key in sorted(was.keys() | now.keys()):
            yield from _differences(was.get(key), now.get(key), key)
    elif was != now:
        yield "another manifest" if name == "manifest" else f"{name} was {was!r} and is {now!r}"
