"""The made corpus: same seed, same bytes; what captions say is what the clip shows; families differ in one word."""

import json
from pathlib import Path

import av
import numpy as np
import pytest

from hbi.pipelines.corpus.captions import caption
from hbi.pipelines.corpus.make import make_corpus
from hbi.pipelines.corpus.render import CLAUSE_FRAMES, FPS, STILL_FRAMES, render
from hbi.pipelines.corpus.scripts import COLOURS, Clause, Entity, make_scripts


def made(out: Path, **settings) -> list[dict]:
    list(make_corpus(str(out), **settings))
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]


def test_the_same_seed_gives_the_same_bytes_whatever_the_processes(tmp_path: Path) -> None:
    rows = made(tmp_path / "one", clips=24, seed=3, processes=1)
    made(tmp_path / "two", clips=24, seed=3, processes=2)
    made(tmp_path / "other", clips=24, seed=4, processes=2)
    one, two, other = (
        {p.relative_to(d): p.read_bytes() for p in sorted(d.rglob("*.*"))}
        for d in (tmp_path / "one", tmp_path / "two", tmp_path / "other")
    )
    assert one == two
    assert one != other
    assert len(rows) == 24
    assert {row["split"] for row in rows} == {"train", "val", "test"}
    assert all(len(row["captions"]) >= 2 and row["qa"] for row in rows)


def test_a_clip_is_h264_of_the_length_its_script_asks_for(tmp_path: Path) -> None:
    rows = made(tmp_path, clips=12, seed=0)
    for row in rows:
        with av.open(str(tmp_path / row["video"])) as container:
            stream = container.streams.video[0]
            clauses = row["captions"][0].count(" then ") + 1
            assert stream.codec.canonical_name == "h264"
            assert stream.frames == clauses * CLAUSE_FRAMES + 2 * STILL_FRAMES


def test_half_of_the_clips_or_more_differ_from_another_in_one_word() -> None:
    scripts = make_scripts(400, seed=0)
    told = [caption(script).split() for script in scripts]
    assert len({" ".join(words) for words in told}) == len(told), "two clips share a caption"

    def one_word_apart(a: list[str], b: list[str]) -> bool:
        return len(a) == len(b) and sum(x != y for x, y in zip(a, b, strict=True)) == 1

    near = sum(any(one_word_apart(a, b) for b in told if b is not a) for a in told)
    assert near / len(told) >= 0.5


@pytest.mark.parametrize(
    ("action", "holds"),
    [
        ("moves left", lambda first, last: last[0] < first[0] - 10),
        ("moves right", lambda first, last: last[0] > first[0] + 10),
        ("moves up", lambda first, last: last[1] < first[1] - 10),
        ("moves down", lambda first, last: last[1] > first[1] + 10),
        ("grows", lambda first, last: last[2] > 2 * first[2]),
        ("shrinks", lambda first, last: last[2] < first[2] / 2),
        ("appears", lambda first, last: first[2] == 0 < last[2]),
        ("vanishes", lambda first, last: last[2] == 0 < first[2]),
    ],
)
def test_the_entity_does_the_action(action: str, holds) -> None:
    script = (Clause(Entity("red", "square"), action),)
    frames = render(script, np.random.default_rng(5))

    def centre_and_area(frame: np.ndarray) -> tuple[float, float, int]:
        down, across = np.nonzero(frame[..., 0].astype(int) - frame[..., 1] > 100)
        return (float(across.mean()), float(down.mean()), len(down)) if len(down) else (0.0, 0.0, 0)

    assert holds(centre_and_area(frames[0]), centre_and_area(frames[-1]))


def test_too_few_clips_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--clips 5"):
        list(make_corpus(str(tmp_path), clips=5))


def test_of_moments_each_thing_is_seen_in_its_own_alone(tmp_path: Path) -> None:
    rows = made(tmp_path, clips=12, seed=1, kind="moments")
    scripts = make_scripts(12, 1, "moments")
    for number, (row, script) in enumerate(zip(rows, scripts, strict=True)):
        assert " then ".join(moment["text"] for moment in row["moments"]) == row["captions"][0]
        frames = render(script, np.random.default_rng([1, 2, number]), "moments")
        nothing = frames[0]
        for clause, moment in zip(script, row["moments"], strict=True):
            colour = np.array(COLOURS[clause.entity.colour])
            for i, frame in enumerate(frames):
                seen = (np.abs(frame.astype(int) - colour).max(-1) < 12) & (frame != nothing).any(-1)
                others = [c.entity.colour for c in script if c is not clause]
                if not moment["start"] <= i / FPS < moment["end"] and clause.entity.colour not in others:
                    assert not seen.any(), (number, clause, i)
            first = round(moment["start"] * FPS)
            assert any((frame != nothing).any() for frame in frames[first : first + CLAUSE_FRAMES])


def test_of_moments_a_family_is_told_with_the_same_words() -> None:
    scripts = make_scripts(200, 0, "moments")
    assert len(set(scripts)) == 200
    for first in range(0, 200, 4):
        told = {tuple(sorted(caption(script).split())) for script in scripts[first : first + 4]}
        assert len(told) == 1
        for script in scripts[first : first + 4]:
            assert 3 <= len(script) <= 4 and len({clause.entity for clause in script}) == len(script)
