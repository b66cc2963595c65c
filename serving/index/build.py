"""The index of a shard folder: the tokens of every clip, as rows of the table; one commit a shard.

Restartable: a shard that is in the table is not done again. Ids are unique in an index: a clip whose id is taken by
another clip is called `id#2`, `id#3`, …
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from hbi.infra import storage
from hbi.infra.nodes import require_resources, require_shared
from hbi.model.folder import model_digest, read_config
from hbi.pipelines.sample import ShardIndex, ShardInfo, check_shards
from hbi.serving.index.embed import embed
from hbi.serving.index.table import INDEX_NAME, ClipTable, IndexMetadata
from hbi.serving.settings import IndexSettings


@dataclass(frozen=True)
class Progress:
    """How far an index is."""

    done: int
    """Clips that are in it, of those asked for."""
    total: int
    """Clips asked for."""
    renamed: int = 0
    """Clips whose id was taken by another clip."""


def index_shards(
    metadata: IndexMetadata, shards: str, out: str, settings: IndexSettings
) -> Iterator[Progress]:
    """Brings the clips of a shard folder into the index `out`, which is made if it is not there. Needs Ray.

    metadata: as `describe` gives it. Raises ValueError where `shards` is no shard folder or holds nothing, where its
    frames are not what the model takes, and where `out` was made by another model, or of other shards (without `add`);
    where the cluster lacks the GPUs, or a node of it does not see a folder.
    """
    require_resources("--gpus", {"GPU": settings.gpus})
    places = {"MODEL": metadata.model, "SHARDS": shards, "INDEX": out}
    require_shared(
        places | ({"--tracking": metadata.tracking} if metadata.model.startswith("models:/") else {})
    )
    index = ShardIndex.read(shards)
    wanted = index.of_split(settings.split) if settings.split else [s for s in index.shards if s.samples]
    if not wanted:
        raise ValueError(f"{shards}: no samples to index: look into failures.jsonl there")
    table = _open(out, metadata, {_part(shard) for shard in wanted}, settings)
    have = table.parts()
    missing = [shard for shard in wanted if _part(shard) not in have]
    total = sum(shard.samples for shard in wanted)
    done, renamed = total - sum(shard.samples for shard in missing), 0
    yield Progress(done, total)
    if missing:
        replace(metadata, complete=False).write(table.folder)
        taken = {id: (source, start, end) for id, source, start, end in table.snapshot().ids()}
        for rows in _embedded(index, missing, metadata, settings):
            rows, count = _unique(rows, taken)
            renamed += count
            done += len(rows)
            table.add(rows, replace=True)
            yield Progress(done, total, renamed)
    table.maintain()
    metadata.write(table.folder)


def describe(model: str, tracking: str, folder: str, shards: ShardIndex) -> IndexMetadata:
    """What an index of these shards by this model says of itself. folder: where the model lies on this machine.

    Raises ValueError for shards whose frames the model does not take.
    """
    config = read_config(folder)
    check_shards(shards, config)
    return IndexMetadata(model, model_digest(folder), tracking, shards.settings, config.towers.dim)


def show(folder: str) -> str:
    """What is in an index, as lines of text. ValueError says why the folder is none."""
    table = ClipTable.open(folder, unfinished=True)
    about, snapshot = table.metadata, table.snapshot()
    shards = {part.split(":")[0] for part in snapshot.counts("part") if not part.startswith("request:")}
    splits = ", ".join(
        f"{name or 'added'} {count}" for name, count in sorted(snapshot.counts("split").items())
    )
    size = sum(storage.list_sizes(table.folder, recursive=True).values())
    lines = {
        "index": table.folder
        + ("" if about.complete else "  (not finished: run the same `hbi index` again)"),
        "clips": f"{snapshot.rows} ({splits or 'none'})",
        "shards": f"{len(shards)}",
        "model": f"{about.model}  {about.digest[:16]}",
        "tracking": about.tracking or "none",
        "frames": ", ".join(f"{name} {value}" for name, value in _cut(about).items()),
        "tokens": f"{about.dim} channels",
        "size": f"{size / 1e6:.1f} MB, version {snapshot.version}, {table.about_ann()}",
    }
    return "\n".join(f"{name:9} {value}" for name, value in lines.items())


def _open(out: str, metadata: IndexMetadata, parts: set[str], settings: IndexSettings) -> ClipTable:
    """The index to write to, new or the one that is there."""
    if not storage.exists(storage.join(out, INDEX_NAME)):
        if settings.add:
            raise ValueError(f"--add: {out} is not an index: leave --add out to make it")
        return ClipTable.create(out, replace(metadata, complete=False))
    held = IndexMetadata.read(out)
    if held.digest != metadata.digest:
        raise ValueError(
            f"{out}: made by another model ({held.model}, this is {metadata.model}): tokens of two models do not "
            "compare; index into a new folder"
        )
    if (cut := _cut(held)) != _cut(metadata):
        raise ValueError(
            f"{out}: its clips were cut with {cut}, these with {_cut(metadata)}: shard them alike"
        )
    table = ClipTable.open(out, unfinished=True)
    if held.complete and not settings.add and not parts <= (have := table.parts()) and have:
        raise ValueError(f"{out}: already the index of other shards: --add merges these into it")
    return table


def _cut(metadata: IndexMetadata) -> dict[str, Any]:
    """The settings of the shards that say which frames a clip has."""
    return {
        name: metadata.shards.get(name)
        for name in ("frames", "size", "choice", "sampling", "fps")
        if name in metadata.shards
    }


def _part(shard: ShardInfo) -> str:
    return f"{shard.name}:{shard.sha256[:16]}"


def _embedded(
    index: ShardIndex, shards: list[ShardInfo], metadata: IndexMetadata, settings: IndexSettings
) -> Iterator[pa.Table]:
    """The rows of each shard, whole, in no order. ValueError for one that lacks samples."""
    batches: dict[str, dict[int, pa.Table]] = {_part(shard): {} for shard in shards}
    whole = {_part(shard): shard for shard in shards}
    rows = [{"path": storage.absolute(index.path(s)), "split": s.split, "part": _part(s)} for s in shards]
    for done in embed(rows, metadata.model, metadata.tracking, settings):
        held = batches[done.part]
        held[done.number] = pa.ipc.open_stream(done.rows).read_all()
        if sum(map(len, held.values())) == whole[done.part].samples:
            yield pa.concat_tables(held[number] for number in sorted(held))
            del batches[done.part]
    if batches:
        names = sorted(whole[part].name for part in batches)
        raise ValueError(
            f"{index.folder}: {names[0]} holds fewer samples than index.json says ({len(names)} such shards): "
            "`hbi shard --verify` makes them anew"
        )


def _unique(rows: pa.Table, taken: dict[str, tuple[str, float, float]]) -> tuple[pa.Table, int]:
    """The rows with ids that no other clip has, and how many had to be renamed; `taken` learns the new ones."""

    ids: list[str] = []
    seen: set[str] = set()
    renamed = 0
    columns = (rows[name].to_pylist() for name in ("id", "source", "start", "end"))
    for id, source, start, end in zip(*columns, strict=True):
        own, name, number = (os.fsdecode(source), start, end), id, 1
        while taken.setdefault(name, own) != own or name in seen:
            number += 1
            name = f"{id}#{number}"
        renamed += name != id
        ids.append(name)
        seen.add(name)
    return rows.set_column(0, "id", pa.array(ids, pa.string())), renamed
