"""A model over shards, on Ray Data: batches of clips are read and decoded, and encoded by actors that hold the model.

On CPUs an actor does both. For GPUs, tasks read and decode ahead, on CPUs of any node, so that the actors do nothing
but encode. Either way a lost node's work is done elsewhere, and a new node gets some.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from hbi.infra import storage
from hbi.infra.nodes import alive_nodes, decode_options
from hbi.infra.ray_runtime import dataset_of
from hbi.pipelines.sample import Sample, read_shard
from hbi.serving.index.rows import Clip, as_text, rows_of
from hbi.serving.index.thumbnails import thumbnails
from hbi.serving.settings import IndexSettings

AHEAD_BYTES = 1 << 30
"""Most that may lie decoded, for each actor: 18 batches of 32 clips of 12 frames of 224 pixels."""


@dataclass(frozen=True)
class Batch:
    """Neighbouring clips of a shard, decoded."""

    part: str
    """The shard, as the rows name it."""
    number: int
    """Which of its batches."""
    clips: list[Clip]
    """Who they are."""
    images: np.ndarray
    """uint8 [clips, frames, height, width, 3]."""
    thumbnails: list[list[bytes]]
    """Small JPEGs of each clip's frames; none where none are kept."""


@dataclass(frozen=True)
class Embedded:
    """Clips of a shard as rows of the index."""

    part: str
    """The shard."""
    number: int
    """Which of its batches."""
    rows: bytes
    """An Arrow stream."""


def decoded(row: dict[str, Any], settings: IndexSettings) -> Iterator[Batch]:
    """The batches of a shard, `{"path", "split", "part"}`, in order."""
    with storage.open_file(row["path"]) as stream:
        for number, samples in enumerate(_groups(read_shard(stream), settings.batch)):
            yield Batch(
                row["part"],
                number,
                [_clip(sample, row["split"], row["part"]) for sample in samples],
                np.stack([sample.images() for sample in samples]),
                [thumbnails(sample.frames, settings.thumbnail_pixels) for sample in samples],
            )


class Embedder:
    """An actor that holds the model and turns batches into rows of the index."""

    def __init__(self, model: str, tracking: str, settings: IndexSettings) -> None:
        """model: a name or folder, resolved here: this may be another machine."""
        import torch

        from hbi.infra.mlflow.resolve import resolve_model
        from hbi.model.weights import load_model

        device = "cuda" if settings.gpus else "cpu"
        if not settings.gpus:
            torch.set_num_threads(max(1, (torch.get_num_threads() + 1) // 2))
        self.model = load_model(resolve_model(model, tracking)).eval().to(device)
        self.settings = settings

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """`{"batch"}` to `{"embedded"}`."""
        batch: Batch = row["batch"]
        return {"embedded": Embedded(batch.part, batch.number, _stream(self.rows(batch)))}

    def rows(self, batch: Batch) -> pa.Table:
        """The rows of a batch."""
        from hbi.serving.encode import encode_video, encoded_rows

        return rows_of(batch.clips, encoded_rows(*encode_video(self.model, batch.images), batch.thumbnails))


class ShardEmbedder(Embedder):
    """One that reads and decodes, too: a whole shard at a time."""

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """`{"path", "split", "part"}` to `{"embedded"}`."""
        tables = [self.rows(batch) for batch in decoded(row, self.settings)]
        return {"embedded": Embedded(row["part"], 0, _stream(pa.concat_tables(tables)))}


def embed(
    shards: list[dict[str, Any]], model: str, tracking: str, settings: IndexSettings
) -> Iterator[Embedded]:
    """The rows of all clips of shards, `{"path", "split", "part"}` each, as they are done, in no order."""
    arguments = (model, tracking, settings)
    if settings.gpus:
        yield from decoded_ahead(shards, arguments, settings.gpus, num_cpus=0, num_gpus=1)
        return
    import ray.data

    # A pool as large as the machine starves Ray Data's own tasks; on a cluster it grows with the nodes.
    first = max(1, min(len(shards), int(ray.cluster_resources().get("CPU", 1)) - 1))
    pool = ray.data.ActorPoolStrategy(
        min_size=1, initial_size=first, max_size=first if len(alive_nodes()) == 1 else len(shards)
    )
    data = dataset_of(shards).map(
        ShardEmbedder,  # pyright: ignore[reportArgumentType]  (Ray's stub knows functions only)
        fn_constructor_args=arguments,
        compute=pool,
        num_cpus=1,
    )
    for row in data.iter_rows():
        yield row["embedded"]


def decoded_ahead(
    shards: list[dict[str, Any]], arguments: tuple[str, str, IndexSettings], actors: int, **each: Any
) -> Iterator[Embedded]:
    """What up to so many actors make of batches that tasks decode ahead of them.

    arguments: of `Embedder`. each: Ray's options for an actor; where they were those of a task, Ray would make one of
    both.
    """
    from ray.data import ActorPoolStrategy, ExecutionResources

    def batches(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for batch in decoded(row, arguments[-1]):
            yield {"batch": batch}

    data = dataset_of(shards)
    data.context.target_max_block_size = 1  # each batch goes on as soon as it is there
    most = ExecutionResources(object_store_memory=AHEAD_BYTES * actors)
    data.context.execution_options.resource_limits = most
    data = data.flat_map(batches, num_cpus=1, **decode_options()).map(
        Embedder,  # pyright: ignore[reportArgumentType]
        fn_constructor_args=arguments,
        compute=ActorPoolStrategy(min_size=1, initial_size=actors, max_size=actors),
        **each,
    )
    for row in data.iter_rows():
        yield row["embedded"]


def _stream(rows: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows)
    return sink.getvalue().to_pybytes()


def _clip(sample: Sample, split: str, part: str) -> Clip:
    return Clip(
        id=as_text(sample.id),
        video=as_text(sample.source),
        start=sample.start,
        end=sample.end,
        timestamps=sample.timestamps,
        captions=[as_text(caption) for caption in sample.captions],
        split=split,
        metadata=sample.extra,
        source=sample.source,
        part=part,
    )


def _groups(samples: Iterator[Sample], size: int) -> Iterator[list[Sample]]:
    """Lists of up to `size` samples with the same number of frames."""
    group: list[Sample] = []
    for sample in samples:
        if group and (len(group) == size or len(sample.frames) != len(group[0].frames)):
            yield group
            group = []
        group.append(sample)
    if group:
        yield group
