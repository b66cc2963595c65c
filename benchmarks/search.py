"""Search: how often the stages find what an exhaustive comparison finds, at what cost, and what writing costs.

    python -m benchmarks.search [--sizes 10000 50000] [--queries 12] [--dim 512 --frames 12] [--ann]

Clips are 12 tokens of 512 channels in clusters of twenty. A query is 16 words: near to a clip's frames (easy), at
some distance (medium), far from every clip (hard). Each size has an index of its own, filled and maintained by the
product's own table; the exhaustive scores come from the same tokens, held in memory. With --ann, all is measured
again with an ANN index, whatever the size.
"""

import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import tyro

from benchmarks.report import report
from hbi.model.similarity import weighted_similarity
from hbi.model.tokens import Tokens
from hbi.serving.index import table as table_module
from hbi.serving.index.rows import Clip, Encoded, rows_of
from hbi.serving.index.stages import SearchSettings, search, segments_of
from hbi.serving.index.table import ClipTable, IndexMetadata

WORDS, CLUSTER = 16, 20
DISTANCES = {"easy": 0.5, "medium": 2.0, "hard": 12.0}
"""Length of the noise on a query's words, which have length 1 themselves."""


def unit(array: np.ndarray) -> np.ndarray:
    return array / np.linalg.norm(array, axis=-1, keepdims=True)


def noise(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return unit(rng.standard_normal(shape, dtype=np.float32))


def made_clips(count: int, dim: int, frames: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens [n, frames, dim] in float16 and weight logits [n, frames], piece by piece."""
    rng = np.random.default_rng(count)
    centres = noise(rng, max(1, count // CLUSTER), dim)
    at_once = 2000 if count < 1_000_000 else 20_000
    for first in range(0, count, at_once):
        n = min(at_once, count - first)
        clip = unit(centres[rng.integers(0, len(centres), n)] + 0.8 * noise(rng, n, dim))
        drift = np.cumsum(noise(rng, n, frames, dim), axis=1) * 0.35  # neighbouring frames are alike
        tokens = unit(clip[:, None] + drift)
        yield tokens.astype(np.float16), rng.standard_normal((n, frames), dtype=np.float32)


def made_query(tokens: torch.Tensor, distance: float, rng: np.random.Generator) -> Tokens:
    """Words near some frames of a clip picked at random."""
    clip = tokens[int(rng.integers(len(tokens)))].float().numpy()
    frames = clip[rng.integers(0, len(clip), WORDS)]
    words = unit(frames + distance * noise(rng, *frames.shape))
    logits = torch.from_numpy(rng.standard_normal((1, WORDS), dtype=np.float32))
    return Tokens(torch.from_numpy(words)[None], logits, torch.ones(1, WORDS, dtype=torch.bool))


def encoded(tokens: np.ndarray, logits: np.ndarray) -> Encoded:
    return Encoded(tokens, logits, *segments_of(tokens.astype(np.float32), logits))


def clip(number: int, frames: int) -> Clip:
    return Clip(f"clip-{number:07d}", f"{number}.mp4", 0.0, 6.0, [0.5 * i for i in range(frames)])


def fill(folder: Path, count: int, dim: int, frames: int) -> tuple[ClipTable, Tokens, float]:
    """An index of `count` clips, the same tokens in memory, and the seconds that it took to write and index."""
    metadata = IndexMetadata("made", "made", "", {"frames": frames, "size": 32}, dim)
    table = ClipTable.create(str(folder), metadata)
    kept, weights, started, first = [], [], time.perf_counter(), 0
    for tokens, logits in made_clips(count, dim, frames):
        clips = [clip(first + i, frames) for i in range(len(tokens))]
        table.add(rows_of(clips, [encoded(t, w) for t, w in zip(tokens, logits, strict=True)]))
        kept.append(torch.from_numpy(tokens))
        weights.append(torch.from_numpy(logits))
        first += len(tokens)
    table.maintain()
    seconds = time.perf_counter() - started
    mask = torch.ones(count, frames, dtype=torch.bool)
    return table, Tokens(torch.cat(kept), torch.cat(weights), mask), seconds


def exhaustive(query: Tokens, held: Tokens, at_once: int = 4096) -> torch.Tensor:
    """The exact score of every clip."""
    parts = zip(*(part.split(at_once) for part in held), strict=True)
    return torch.cat([weighted_similarity(query, Tokens(t.float(), w, m))[0] for t, w, m in parts])


def cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


@dataclass(frozen=True)
class Question:
    """A query, and what comparing all finds for it."""

    query: Tokens
    best: frozenset[str]
    """Ids of the true ten best."""
    cpu_seconds: float
    """What finding them took."""


@torch.inference_mode()
def questions(held: Tokens, kind: str, count: int) -> list[Question]:
    """So many queries of a kind."""
    rng = np.random.default_rng(7)
    made = []
    for query in [made_query(held.tokens, DISTANCES[kind], rng) for _ in range(count)]:
        before = cpu()
        scores = exhaustive(query, held)
        best = frozenset(f"clip-{i:07d}" for i in scores.topk(10).indices.tolist())
        made.append(Question(query, best, cpu() - before))
    return made


@torch.inference_mode()
def compare(table: ClipTable, asked: list[Question], settings: SearchSettings) -> dict[str, float]:
    """Recall@10 of the stages, and the CPU and wall milliseconds of a query beside exhaustive ones."""
    search(table.snapshot(), asked[0].query, 10, settings=settings)
    found, times, walls = [], [], []
    for each in asked:
        before, began = cpu(), time.perf_counter()
        answer = search(table.snapshot(1.0), each.query, 10, settings=settings)
        ids = [clip.id for clip in table.snapshot(1.0).clips([row for _, row in answer])]
        times.append(cpu() - before)
        walls.append(time.perf_counter() - began)
        found.append(len(each.best & set(ids)) / 10)
    return {
        "recall@10": statistics.mean(found),
        "cpu_ms": 1000 * statistics.median(times),
        "wall_ms": 1000 * statistics.median(walls),
        "exhaustive_cpu_ms": 1000 * statistics.median(each.cpu_seconds for each in asked),
    }


def writing(table: ClipTable, times: int = 15) -> dict[str, float]:
    """Milliseconds of one add and of one delete, each committed, and whether another reader sees them."""
    rng = np.random.default_rng(3)
    frames = table.metadata.shards["frames"]
    made = [clip(9_000_000 + i, frames) for i in range(times)]
    adds, deletes = [], []
    for each in made:
        tokens = noise(rng, frames, table.metadata.dim).astype(np.float16)
        rows = rows_of([each], [encoded(tokens, np.zeros(frames, np.float32))])
        began = time.perf_counter()
        table.add(rows)
        adds.append(time.perf_counter() - began)
    other = ClipTable.open(table.folder).snapshot()
    assert all(other.row(each.id) >= 0 for each in made), "an add is not seen by another reader"
    for each in made:
        began = time.perf_counter()
        table.remove([each.id])
        deletes.append(time.perf_counter() - began)
    return {"add_ms": 1000 * statistics.median(adds), "delete_ms": 1000 * statistics.median(deletes)}


def disk_mb(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def replica_mb(folder: Path) -> float:
    """What opening the index and searching it once adds to a process of its own, in megabytes."""
    code = (
        "import sys, psutil, numpy as np, torch, lancedb\n"
        "from benchmarks.search import *\n"
        "before = psutil.Process().memory_info().rss\n"
        "table = ClipTable.open(sys.argv[1]); rng = np.random.default_rng(0)\n"
        "about = table.metadata\n"
        "for _ in range(10):\n"
        "    query = made_query(torch.from_numpy(noise(rng, 5, about.shards['frames'], about.dim)), 2.0, rng)\n"
        "    search(table.snapshot(), query, 10)\n"
        "print((psutil.Process().memory_info().rss - before) / 1e6)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def by_kind(
    table: ClipTable, asked: dict[str, list[Question]], settings: SearchSettings, label: str
) -> dict[str, Any]:
    """`compare` on the three kinds of query."""
    found: dict[str, Any] = {}
    for kind, of_kind in asked.items():
        m = found[kind] = compare(table, of_kind, settings)
        print(
            f"{label} {kind:6} recall@10 {m['recall@10']:.3f}  {m['cpu_ms']:5.0f} ms of CPU, exhaustive "
            f"{m['exhaustive_cpu_ms']:6.0f} (1/{m['exhaustive_cpu_ms'] / m['cpu_ms']:.0f})",
            flush=True,
        )
    return found


def add_ann(table: ClipTable) -> float:
    """Builds the ANN index over the segments whatever the size; the seconds that it took."""
    began, table_module.SCANNED_BYTES = time.perf_counter(), 0
    table.maintain()
    return time.perf_counter() - began


def main(
    sizes: tuple[int, ...] = (10_000, 50_000, 100_000),
    queries: int = 12,
    keep: str | None = None,
    dim: int = 512,
    frames: int = 12,
    ann: bool = False,
) -> None:
    """Recall, cost and memory at each size. keep: a folder in which the indexes stay."""
    torch.set_num_threads(psutil.cpu_count(logical=False) or 1)
    settings, results = SearchSettings(), {}
    for size in sizes:
        folder = Path(keep or tempfile.mkdtemp(prefix="search-")) / str(size)
        try:
            table, held, seconds = fill(folder, size, dim, frames)
            result: dict[str, Any] = {"build_seconds": seconds, "disk_mb": disk_mb(folder)}
            asked = {kind: questions(held, kind, queries) for kind in DISTANCES}
            del held
            result |= by_kind(table, asked, settings, f"{size:7}")
            result |= {"replica_mb": replica_mb(folder)} | writing(table)
            if ann:
                result["ann"] = {"build_seconds": add_ann(table)}
                result["ann"] |= by_kind(table, asked, settings, f"{size:7} ANN")
                result["ann"] |= {"replica_mb": replica_mb(folder)} | writing(table)
            for what in (result, result.get("ann", {})):
                told = (f"{name} {v:.0f} " for name, v in what.items() if isinstance(v, float))
                print(f"{size:7}", *told, flush=True)
            results[str(size)] = result
        finally:
            if not keep:
                shutil.rmtree(folder.parent, ignore_errors=True)
    report("search", results, queries=queries, dim=dim, frames=frames, words=WORDS)


if __name__ == "__main__":
    tyro.cli(main)
