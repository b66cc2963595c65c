"""The clips of a held-out split: a part of them, in order, read once, with a reason for each that cannot be read."""

import tarfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from jaxtyping import UInt8

from hbi.infra import storage
from hbi.pipelines.sample import Sample, ShardIndex, read_shard

T = TypeVar("T")


def readable(
    index: ShardIndex, split: str, ours: range, frames: int, reasons: list[str]
) -> Iterator[tuple[Sample, UInt8[np.ndarray, "frames h w 3"]]]:
    """Our samples of a split with their frames, in order; why one is missing goes to `reasons`."""
    with ThreadPoolExecutor(4) as pool:  # decoding a JPEG frees the interpreter
        first = 0
        for shard in index.of_split(split):
            numbers = range(max(first, ours.start) - first, min(first + shard.samples, ours.stop) - first)
            first += shard.samples
            if not numbers:
                continue
            wanted = _samples(index.path(shard), shard.name, numbers, reasons)
            for sample, images in _ahead(pool, wanted, _images):
                count, expected = len(sample.frames), len(sample.timestamps)
                if count != expected or not 1 <= count <= frames:
                    reasons.append(
                        f"{shard.name}, clip {sample.id}: {count} of {expected} frames, limit {frames}"
                    )
                elif isinstance(images, Exception):
                    reasons.append(f"{shard.name}, clip {sample.id}: {images}")
                else:
                    yield sample, images


def _samples(path: str, name: str, numbers: range, reasons: list[str]) -> Iterator[Sample]:
    """The samples of these numbers in a shard, as far as it can be read."""
    number = -1
    try:
        with storage.open_file(path) as stream:
            for number, sample in enumerate(read_shard(stream)):
                if number in numbers:
                    yield sample
                if number + 1 >= numbers.stop:
                    return
        reasons.append(f"{name}: {number + 1} clips, the index says {numbers.stop} or more")
    except (OSError, EOFError, tarfile.TarError, ValueError, KeyError) as error:
        reasons.append(f"{name}: {type(error).__name__}: {error}")


def _images(sample: Sample) -> UInt8[np.ndarray, "frames h w 3"] | Exception:
    try:
        return sample.images()
    except Exception as error:  # whatever a broken picture makes a decoder raise
        return error


def _ahead(
    pool: ThreadPoolExecutor, items: Iterable[T], work: Callable[[T], Any], depth: int = 16
) -> Iterator[Any]:
    """(item, work(item)) in order, the work done up to `depth` items ahead."""
    waiting: list[tuple[T, Any]] = []
    for item in items:
        waiting.append((item, pool.submit(work, item)))
        if len(waiting) > depth:
            item, future = waiting.pop(0)
            yield item, future.result()
    for item, future in waiting:
        yield item, future.result()


def grouped(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items; the last may be shorter."""
    group: list[T] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
