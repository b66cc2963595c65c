"""The made corpus: short H.264 clips of coloured shapes, with captions and questions that need a close look.

Every clip plays a script of one to three clauses, one after another: which thing did what. Clips come in families
of four whose captions differ from the first's in a single word (a colour, a shape, a deed) or in the order of two
clauses, so that a model which matches bags of colours cannot tell them apart. A family stays within one split.
The same seed gives the same bytes, whatever the number of processes.
"""

import io
import json
import math
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from itertools import pairwise

import av
import numpy as np
from PIL import Image, ImageDraw

from hbi.infra import storage

SIDE = 96
"""Width and height of a clip in pixels."""
FPS = 10
CLAUSE_FRAMES = 9
"""Length of one clause; clips last one to three of them and a still moment at either end."""
STILL_FRAMES = 2
FAMILY = 4
SUPERSAMPLE = 2

COLOURS = {
    "red": (214, 40, 40),
    "green": (56, 158, 60),
    "blue": (40, 84, 210),
    "yellow": (244, 208, 38),
    "purple": (136, 46, 170),
    "orange": (244, 128, 22),
    "white": (246, 246, 246),
    "black": (16, 16, 16),
}
SHAPES = {  # corners as (angle in turns, radius)
    "circle": [(i / 24, 1.0) for i in range(24)],
    "square": [(1 / 8 + i / 4, 1.15) for i in range(4)],
    "triangle": [(-1 / 4 + i / 3, 1.2) for i in range(3)],
    "star": [(-1 / 4 + i / 10, 1.25 if i % 2 == 0 else 0.5) for i in range(10)],
    "cross": [(i / 4 + a, r) for i in range(4) for a, r in ((-0.05, 1.15), (0.05, 1.15), (1 / 8, 0.5))],
    "bar": [(0.06, 1.3), (0.44, 1.3), (0.56, 1.3), (0.94, 1.3)],
}
DEEDS = {  # the verb of the first caption, and how others say it
    "moves left": "goes to the left",
    "moves right": "goes to the right",
    "moves up": "rises",
    "moves down": "sinks",
    "grows": "gets bigger",
    "shrinks": "gets smaller",
    "turns": "spins",
    "appears": "shows up",
    "vanishes": "goes away",
}
STEPS = {"moves left": (-1, 0), "moves right": (1, 0), "moves up": (0, -1), "moves down": (0, 1)}
GROUNDS = ("plain", "stripes", "checks", "clouds")


@dataclass(frozen=True)
class Thing:
    """A coloured shape."""

    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Clause:
    """One thing does one deed."""

    thing: Thing
    deed: str


Script = tuple[Clause, ...]


def make_corpus(out: str, clips: int, seed: int = 0, processes: int | None = None) -> Iterator[int]:
    """Writes `out/videos/*.mp4` and `out/manifest.jsonl` (written last); yields the number of clips done so far.

    A tenth of the families is the test split, a twentieth the validation split, at least one each.
    Raises ValueError if there are fewer clips than three families hold.
    """
    if clips < 3 * FAMILY:
        raise ValueError(
            f"--clips {clips}: the corpus has three splits of whole families: ask for {3 * FAMILY} or more"
        )
    return _make(out, clips, seed, processes)


def _make(out: str, clips: int, seed: int, processes: int | None) -> Iterator[int]:
    scripts = _scripts(clips, seed)
    families = math.ceil(clips / FAMILY)
    tests, vals = max(1, round(families / 10)), max(1, round(families / 20))
    splits = ["test"] * tests + ["val"] * vals + ["train"] * (families - tests - vals)
    np.random.default_rng([seed, families]).shuffle(splits)
    write = partial(_write_clip, storage.absolute(out), seed)
    rows = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes or os.cpu_count(), mp_context=context) as pool:
        for row in pool.map(write, range(clips), scripts, chunksize=16):
            row["split"] = splits[(len(rows)) // FAMILY]
            rows.append(row)
            yield len(rows)
    lines = "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows)
    storage.write_bytes(storage.join(out, "manifest.jsonl"), lines.encode())


def caption(script: Script, style: int = 0) -> str:
    """One of three ways (0, 1, 2) to tell a script."""
    if style == 0:
        return " then ".join(f"the {c.thing} {c.deed}" for c in script)
    if style == 1:
        told = [f"a {c.thing} {DEEDS[c.deed]}" for c in script]
        return told[0] if len(told) == 1 else "first " + " and after that ".join(told)
    told = [f"the {c.thing} {c.deed}" for c in reversed(script)]
    return " after ".join(told)


def questions(script: Script) -> list[dict[str, str]]:
    """Questions with one-word (or one-deed) answers, all decided by the script."""
    asked = []
    deeds = [c.deed for c in script]
    for clause in script:
        if deeds.count(clause.deed) == 1:
            asked.append((f"what colour is the thing that {clause.deed}?", clause.thing.colour))
            asked.append((f"which shape {clause.deed}?", clause.thing.shape))
    asked.append((f"what does the {script[0].thing} do first?", script[0].deed))
    asked.append(("how many things happen?", str(len(script))))
    if len(script) > 1 and script[0] != script[-1]:
        first, last = script[0], script[-1]
        asked.append(
            (
                f"is it the {first.thing} that does something last?",
                "yes" if first.thing == last.thing else "no",
            )
        )
    return [{"question": q, "answer": a} for q, a in asked]


def _scripts(clips: int, seed: int) -> list[Script]:
    """One script a clip, all different, in families of four that differ from their first in one word or in order."""
    rng = np.random.default_rng([seed, 1])
    seen: set[Script] = set()
    scripts: list[Script] = []
    while len(scripts) < clips:
        first = _script(rng)
        family = [first]
        for _ in range(64):
            if len(family) == FAMILY:
                break
            sibling = _sibling(rng, first)
            if _plays(sibling) and sibling not in family and sibling not in seen:
                family.append(sibling)
        if first not in seen and len(family) == FAMILY:
            seen.update(family)
            scripts.extend(family)
    return scripts[:clips]


def _script(rng: np.random.Generator) -> Script:
    """A script of one to three clauses about one or two things."""
    while True:
        things = [_thing(rng) for _ in range(2)]
        length = int(rng.choice([1, 2, 3], p=[0.2, 0.45, 0.35]))
        script = tuple(
            Clause(things[int(rng.integers(2))], str(rng.choice(list(DEEDS)))) for _ in range(length)
        )
        if _plays(script):
            return script


def _thing(rng: np.random.Generator) -> Thing:
    return Thing(str(rng.choice(list(COLOURS))), str(rng.choice(list(SHAPES))))


def _sibling(rng: np.random.Generator, script: Script) -> Script:
    """The same script with one word changed throughout, or with two clauses exchanged."""
    which = int(rng.integers(len(script)))
    clause = script[which]
    match int(rng.integers(4)):
        case 0:
            thing = replace(clause.thing, colour=str(rng.choice(list(COLOURS))))
        case 1:
            thing = replace(clause.thing, shape=str(rng.choice(list(SHAPES))))
        case 2:
            changed = replace(clause, deed=str(rng.choice(list(DEEDS))))
            return (*script[:which], changed, *script[which + 1 :])
        case _:
            other = int(rng.integers(len(script)))
            swapped = list(script)
            swapped[which], swapped[other] = swapped[other], swapped[which]
            return tuple(swapped)
    return tuple(replace(c, thing=thing) if c.thing == clause.thing else c for c in script)


def _plays(script: Script) -> bool:
    """Whether the script can be seen: a deed shows, and nothing acts before it appears or after it vanished."""
    for thing in {c.thing for c in script}:
        deeds = [c.deed for c in script if c.thing == thing]
        if "appears" in deeds[1:] or "vanishes" in deeds[:-1]:
            return False
    unseen = any(c.thing.shape == "circle" and c.deed == "turns" for c in script)
    return not unseen and all(one != two for one, two in pairwise(script))


def _write_clip(out: str, seed: int, number: int, script: Script) -> dict:
    """Renders, encodes and writes one clip; returns its manifest row, without its split."""
    rng = np.random.default_rng([seed, 2, number])
    name = f"videos/clip-{number:06d}.mp4"
    storage.write_bytes(storage.join(out, name), encode(render(script, rng)))
    return {
        "id": f"clip-{number:06d}",
        "video": name,
        "captions": [caption(script, style) for style in range(3 if len(script) > 1 else 2)],
        "qa": questions(script),
    }


def render(script: Script, rng: np.random.Generator) -> list[np.ndarray]:
    """The script as frames, uint8 [SIDE, SIDE, 3] each."""
    things = sorted({c.thing for c in script}, key=str)
    spots = [(x, y) for x in (0.3, 0.7) for y in (0.3, 0.7)]
    rng.shuffle(spots)
    places = {
        thing: np.array(spot) + rng.uniform(-0.05, 0.05, 2)
        for thing, spot in zip(things, spots, strict=False)
    }
    sizes = {thing: float(rng.uniform(0.15, 0.18)) for thing in things}
    angles = dict.fromkeys(things, 0.0)
    shown = {t: next(c.deed for c in script if c.thing == t) != "appears" for t in things}
    ground = _ground(rng, {t.colour for t in things})

    def draw() -> np.ndarray:
        image = ground.copy()
        pen = ImageDraw.Draw(image)
        for thing in things:
            if shown[thing] and sizes[thing] > 0.005:
                corners = [
                    (
                        SIDE
                        * SUPERSAMPLE
                        * (places[thing][0] + sizes[thing] * r * math.cos(math.tau * (a + angles[thing]))),
                        SIDE
                        * SUPERSAMPLE
                        * (places[thing][1] + sizes[thing] * r * math.sin(math.tau * (a + angles[thing]))),
                    )
                    for a, r in SHAPES[thing.shape]
                ]
                pen.polygon(corners, fill=COLOURS[thing.colour])
        return np.asarray(image.reduce(SUPERSAMPLE))

    frames = [draw()] * STILL_FRAMES
    for clause in script:
        thing = clause.thing
        place, size = places[thing], sizes[thing]
        toward = np.array(STEPS.get(clause.deed, (0, 0)))
        room = np.where(toward > 0, 0.88 - place, place - 0.12)
        way = toward * np.clip(room, 0.2, 0.4)
        for step in range(1, CLAUSE_FRAMES + 1):
            part = step / CLAUSE_FRAMES
            match clause.deed:
                case "grows":
                    sizes[thing] = size * (1 + 0.7 * part)
                case "shrinks":
                    sizes[thing] = size * (1 - 0.6 * part)
                case "turns":
                    angles[thing] = 0.5 * part
                case "appears":
                    shown[thing], sizes[thing] = True, size * part
                case "vanishes":
                    sizes[thing] = size * (1 - part)
                case _:
                    places[thing] = place + way * part
            frames.append(draw())
    return frames + [frames[-1]] * STILL_FRAMES


def _ground(rng: np.random.Generator, taken: set[str]) -> Image.Image:
    """A plain or textured grey ground that no thing's colour melts into."""
    while True:
        level = float(rng.uniform(70, 190))
        if all(np.abs(np.array(COLOURS[colour]) - level).max() > 50 for colour in taken):
            break
    across, down = np.meshgrid(np.arange(SIDE * SUPERSAMPLE), np.arange(SIDE * SUPERSAMPLE))
    period = int(rng.integers(12, 32)) * SUPERSAMPLE
    match str(rng.choice(GROUNDS)):
        case "stripes":
            pattern = np.sin((across * rng.uniform(-1, 1) + down) * math.tau / period)
        case "checks":
            pattern = ((across // period + down // period) % 2) * 2.0 - 1
        case "clouds":
            coarse = Image.fromarray(rng.uniform(-1, 1, (8, 8)).astype(np.float32))
            pattern = np.asarray(coarse.resize(across.shape, Image.Resampling.BICUBIC))
        case _:
            pattern = np.zeros(across.shape)
    grey = np.clip(level + 14 * pattern, 0, 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def encode(frames: list[np.ndarray]) -> bytes:
    """The frames as an H.264 mp4; the same frames give the same bytes."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(FPS))
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        # Slower presets let x264's lookahead decide from memory that it has not written: bytes then vary.
        stream.options = {"preset": "ultrafast", "crf": "20", "threads": "1"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()
