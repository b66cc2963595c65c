"""A model over shards: the frame tokens of every clip, written as parts of a token index; one Ray Data row a shard."""

from collections.abc import Iterator

import numpy as np

from hbi.infra import storage
from hbi.infra.ray_runtime import dataset_of
from hbi.model.tokens import Tokens
from hbi.model.weights import read_config
from hbi.pipelines.sample import Sample, ShardIndex, check_shards, read_shard
from hbi.serving.index.table import Maker, PartWriter, Video, encode_video


class EmbedShard:
    """An actor that holds the model and turns one shard into one part of the index."""

    def __init__(self, model_folder: str, out: str, batch: int, gpu: bool) -> None:
        import torch

        from hbi.model.weights import load_model

        self.model = load_model(model_folder).eval().to("cuda" if gpu else "cpu")
        self.writer = PartWriter(out)
        self.batch = batch
        if not gpu:
            torch.set_num_threads(max(1, (torch.get_num_threads() + 1) // 2))

    def __call__(self, row: dict) -> dict:
        """`{"path", "name"}` of a shard to the part's row `{"name", "videos"}`."""
        import torch

        tokens, videos = [], []
        with storage.open_file(row["path"]) as stream:
            for samples in _groups(read_shard(stream), self.batch):
                tokens.append(encode_video(self.model, np.stack([sample.images() for sample in samples])))
                videos += [Video(s.id, s.source, s.start, s.end, s.timestamps) for s in samples]
        stacked = Tokens(*(torch.cat(same) for same in zip(*tokens, strict=True)))
        return self.writer.write(row["name"], stacked, videos)


def index_shards(
    model_folder: str,
    maker: Maker,
    shards: str,
    out: str,
    split: str | None = None,
    batch: int = 32,
    gpus: int = 0,
) -> Iterator[tuple[int, int]]:
    """Builds the index `out` of one split, or of all; yields videos done and in all. Needs Ray to be running.

    Raises ValueError where `shards` is no shard folder, holds nothing, or holds frames that the model does not take.
    """
    import ray

    index = ShardIndex.read(shards)
    wanted = index.of_split(split) if split else [shard for shard in index.shards if shard.samples]
    check_shards(index, read_config(model_folder))
    if not wanted:
        raise ValueError(f"{shards}: no samples to index: look into failures.jsonl there")
    rows = [{"path": index.path(shard), "name": shard.name.removesuffix(".tar")} for shard in wanted]
    # A pool as large as the machine starves Ray Data's own tasks.
    workers = gpus or max(1, min(len(rows), int(ray.cluster_resources().get("CPU", 1)) - 1))
    parts = []
    done, total = 0, sum(shard.samples for shard in wanted)
    embedded = dataset_of(rows).map(
        EmbedShard,  # pyright: ignore[reportArgumentType]  (Ray's stub knows functions only)
        fn_constructor_args=(model_folder, storage.absolute(out), batch, gpus > 0),
        concurrency=workers,
        num_cpus=1,
        num_gpus=1 if gpus else 0,
    )
    yield done, total
    for part in embedded.iter_rows():
        parts.append(part)
        done += int(part["videos"])
        yield done, total
    PartWriter(out).finish(maker, sorted(parts, key=lambda part: part["name"]))


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
