"""A script as pictures, and the pictures as a video."""

import io
import math
from collections.abc import Iterator
from fractions import Fraction

import av
import numpy as np
from PIL import Image, ImageDraw

from hbi.pipelines.corpus.scripts import COLOURS, SHAPES, Clause, Kind, Script

SIDE = 96
"""Width and height of a clip in pixels."""
FPS = 10
CLAUSE_FRAMES = 9
"""Length of one clause; clips last one to three of them and a still moment at either end."""
STILL_FRAMES = 2
SUPERSAMPLE = 2
STEPS = {"moves left": (-1, 0), "moves right": (1, 0), "moves up": (0, -1), "moves down": (0, 1)}
BACKGROUNDS = ("plain", "stripes", "checks", "clouds")


class Scene:
    """Where each entity of a script is, how large, at what angle, and whether it is seen."""

    def __init__(self, script: Script, rng: np.random.Generator, kind: Kind = "stories") -> None:
        self.kind = kind
        self.entities = sorted({clause.entity for clause in script}, key=str)
        spots = [(x, y) for x in (0.3, 0.7) for y in (0.3, 0.7)]
        rng.shuffle(spots)
        self.centres = {
            entity: np.array(spot) + rng.uniform(-0.05, 0.05, 2)
            for entity, spot in zip(self.entities, spots, strict=False)
        }
        self.sizes = {entity: float(rng.uniform(0.17, 0.2)) for entity in self.entities}
        self.turns = dict.fromkeys(self.entities, 0.0)
        self.seen = {
            entity: kind == "stories"
            and next(clause.action for clause in script if clause.entity == entity) != "appears"
            for entity in self.entities
        }
        self.background = _background(rng, {entity.colour for entity in self.entities})

    def draw(self) -> np.ndarray:
        """The scene as it stands, uint8 [SIDE, SIDE, 3]."""
        image = self.background.copy()
        pen = ImageDraw.Draw(image)
        for entity in self.entities:
            size = self.sizes[entity]
            if self.seen[entity] and size > 0.005:
                x, y = self.centres[entity]
                angles = [(math.tau * (a + self.turns[entity]), r) for a, r in SHAPES[entity.shape]]
                corners = [
                    (
                        SIDE * SUPERSAMPLE * (x + size * r * math.cos(angle)),
                        SIDE * SUPERSAMPLE * (y + size * r * math.sin(angle)),
                    )
                    for angle, r in angles
                ]
                pen.polygon(corners, fill=COLOURS[entity.colour])
        return np.asarray(image.reduce(SUPERSAMPLE))

    def play(self, clause: Clause) -> Iterator[np.ndarray]:
        """The frames of one clause, at whose end the scene stands as it left it."""
        entity = clause.entity
        centre, size = self.centres[entity], self.sizes[entity]
        toward = np.array(STEPS.get(clause.action, (0, 0)))
        room = np.where(toward > 0, 0.88 - centre, centre - 0.12)
        way = toward * np.clip(room, 0.25, 0.4)
        self.seen[entity] |= self.kind == "moments"
        for step in range(1, CLAUSE_FRAMES + 1):
            part = step / CLAUSE_FRAMES
            match clause.action:
                case "grows":
                    self.sizes[entity] = size * (1 + 0.7 * part)
                case "shrinks":
                    self.sizes[entity] = size * (1 - 0.6 * part)
                case "turns":
                    self.turns[entity] = 0.5 * part
                case "appears":
                    self.seen[entity], self.sizes[entity] = True, size * part
                case "vanishes":
                    self.sizes[entity] = size * (1 - part)
                case _:
                    self.centres[entity] = centre + way * part
            yield self.draw()
        self.seen[entity] &= self.kind == "stories"


def render(script: Script, rng: np.random.Generator, kind: Kind = "stories") -> list[np.ndarray]:
    """The script as frames, uint8 [SIDE, SIDE, 3] each."""
    scene = Scene(script, rng, kind)
    frames = [scene.draw()] * STILL_FRAMES
    for clause in script:
        frames += scene.play(clause)
    return frames + [scene.draw()] * STILL_FRAMES


def clause_times(number: int) -> tuple[float, float]:
    """When a clause, counted from 0, plays: start and end in seconds."""
    first = STILL_FRAMES + number * CLAUSE_FRAMES
    return first / FPS, (first + CLAUSE_FRAMES) / FPS


def _background(rng: np.random.Generator, taken: set[str]) -> Image.Image:
    """A plain or textured grey background that no entity's colour melts into."""
    while True:
        level = float(rng.uniform(70, 190))
        if all(np.abs(np.array(COLOURS[colour]) - level).max() > 50 for colour in taken):
            break
    across, down = np.meshgrid(np.arange(SIDE * SUPERSAMPLE), np.arange(SIDE * SUPERSAMPLE))
    period = int(rng.integers(12, 32)) * SUPERSAMPLE
    match str(rng.choice(BACKGROUNDS)):
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
