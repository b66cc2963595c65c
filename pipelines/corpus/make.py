"""The made corpus: short H.264 clips of coloured shapes, with captions and questions that need a close look.

Every clip plays a script of clauses, one after another: which entity does what. Clips come in families of four whose
captions differ from the first's in a single word (a colour, a shape, an action) or in the order of two clauses, so that
a model which matches bags of colours cannot tell them apart. A family stays within one split. There are two kinds
(`hbi.pipelines.corpus.scripts.Kind`); of moments the manifest says when each clause plays, for in them it can be seen.
The same seed gives the same bytes, whatever the number of processes.
"""

import json
import math
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np

from hbi.infra import storage
from hbi.infra.nodes import cores
from hbi.pipelines.corpus.captions import caption, moments, questions
from hbi.pipelines.corpus.render import encode, render
from hbi.pipelines.corpus.scripts import FAMILY, Kind, Script, make_scripts

TEST_CLIPS = 200
"""Most clips of the test split: a larger corpus learns from more, and is asked among as many."""


def make_corpus(
    out: str, clips: int, seed: int = 0, kind: Kind = "stories", processes: int | None = None
) -> Iterator[int]:
    """Writes `out/videos/*.mp4` and `out/manifest.jsonl` (written last); yields the number of clips done so far.

    A tenth of the families is the test split, a twentieth the validation split, at least one each and at most as many
    as `TEST_CLIPS` hold and half of that.
    Raises ValueError if there are fewer clips than three families hold.
    """
    check_clips(clips)
    return _make(out, clips, seed, kind, processes)


def check_clips(clips: int) -> None:
    """ValueError if three splits of whole families want more."""
    if clips < 3 * FAMILY:
        raise ValueError(
            f"--clips {clips}: the corpus has three splits of whole families: ask for {3 * FAMILY} or more"
        )


def _make(out: str, clips: int, seed: int, kind: Kind, processes: int | None) -> Iterator[int]:
    scripts = make_scripts(clips, seed, kind)
    families = math.ceil(clips / FAMILY)
    most = TEST_CLIPS // FAMILY
    tests, vals = max(1, min(most, round(families / 10))), max(1, min(most // 2, round(families / 20)))
    splits = ["test"] * tests + ["val"] * vals + ["train"] * (families - tests - vals)
    np.random.default_rng([seed, families]).shuffle(splits)
    write = partial(_write_clip, storage.absolute(out), seed, kind)
    rows = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes or cores(), mp_context=context) as pool:
        for row in pool.map(write, range(clips), scripts, chunksize=16):
            row["split"] = splits[(len(rows)) // FAMILY]
            rows.append(row)
            yield len(rows)
    lines = "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows)
    storage.write_bytes(storage.join(out, "manifest.jsonl"), lines.encode())


def _write_clip(out: str, seed: int, kind: Kind, number: int, script: Script) -> dict:
    """Renders, encodes and writes one clip; returns its manifest row, without its split."""
    rng = np.random.default_rng([seed, 2, number])
    name = f"videos/clip-{number:06d}.mp4"
    storage.write_bytes(storage.join(out, name), encode(render(script, rng, kind)))
    row = {
        "id": f"clip-{number:06d}",
        "video": name,
        "captions": [caption(script, style) for style in range(3 if len(script) > 1 else 2)],
        "qa": questions(script),
    }
    return row if kind == "stories" else row | {"moments": moments(script)}
