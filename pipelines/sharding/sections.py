"""Files of records in sections, of which each is read by itself: what passes between the tasks of `dedup`."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from hbi.infra import storage

Records = np.ndarray[tuple[int], np.dtype[Any]]
"""Of a structured type."""
READERS = 32
"""Files that are read at a time."""


def write_sections(place: str, records: Records, section: np.ndarray, count: int) -> None:
    """Writes `records`, each into one of `count` sections; within one they keep their order."""
    order = np.argsort(section, kind="stable")
    ends = np.cumsum(np.bincount(section, minlength=count))
    header = np.concatenate([[0], ends]).astype("<i8")
    storage.write_bytes(place, header.tobytes() + records[order].tobytes(), durable=False)


def read_sections(places: Iterable[str], dtype: np.dtype[Any], number: int, count: int) -> Records:
    """One section of each of several files that `write_sections` wrote with `count` of them."""
    with ThreadPoolExecutor(READERS) as readers:
        read = partial(read_section, dtype=dtype, number=number, count=count)
        return np.concatenate([np.empty(0, dtype), *readers.map(read, places)])


def read_section(place: str, dtype: np.dtype[Any], number: int, count: int) -> Records:
    """One section of a file."""
    begin, end = np.frombuffer(storage.read_range(place, 8 * number, 16), "<i8").tolist()
    start, size = 8 * (count + 1), dtype.itemsize
    return np.frombuffer(storage.read_range(place, start + begin * size, (end - begin) * size), dtype)
