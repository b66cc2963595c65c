"""One self-contained page about a shard folder: clips to look at, what they are like, and what failed."""

import base64
import html
import io
import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from hbi.infra import storage
from hbi.pipelines.sample import FAILURES_NAME, Sample, read_shard
from hbi.pipelines.sharding.records import Failure, Record

SHEETS = 12
"""Shards of which clips are shown, spread evenly over the folder."""
CLIPS = 4
"""Clips shown of each."""
THUMBNAILS = 6
"""Frames shown of each clip."""
THUMBNAIL_PIXELS = 96
FAILURES = 500
"""Failures listed one by one; all are counted."""
BARS = 20
"""Longest histogram."""

STYLE = """
:root { color-scheme: light dark; --bar: #4a7fd6; --line: #8884; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere } h2 { font-size: 1.1rem; margin-top: 2.5rem }
pre { overflow-x: auto; padding: .8rem; border: 1px solid var(--line); border-radius: 6px }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: 1.5rem }
.chart div { display: grid; grid-template-columns: 7rem 1fr 4.5rem; gap: .5rem; align-items: center }
.chart span { text-align: right; font-variant-numeric: tabular-nums }
.chart i { display: block; height: .8rem; background: var(--bar); border-radius: 2px; min-width: 1px }
figure { margin: 0 0 1.2rem } figure img { margin-right: 2px; border-radius: 3px }
figcaption { overflow-wrap: anywhere } small { opacity: .7 }
table { border-collapse: collapse; width: 100% } td, th { text-align: left; padding: .25rem .6rem .25rem 0;
  border-bottom: 1px solid var(--line); vertical-align: top; overflow-wrap: anywhere }
"""


@dataclass
class Page:
    """Gathers what the page needs from the commit records as they stream by; what it holds is bounded."""

    seconds: Counter[int] = field(default_factory=Counter)
    """Clips by length: n stands for 2**n to 2**(n + 1) seconds, -1 for less than one."""
    fps: Counter[int] = field(default_factory=Counter)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    """Clips by width and height."""
    words: Counter[int] = field(default_factory=Counter)
    """Clips by the number of words of their first caption, 40 and more as 40."""
    failures: list[Failure] = field(default_factory=list)
    """The first of them."""
    sheets: list[str] = field(default_factory=list)
    """Tars to look into."""
    seen: int = 0
    """Shards with samples so far."""
    stride: int = 1
    """Every how many of them is kept."""

    def add(self, record: Record) -> None:
        """Takes a shard into account."""
        for clip in record.clips:
            self.seconds[int(clip.seconds).bit_length() - 1] += 1
            self.fps[round(clip.fps)] += 1
            size = clip.width, clip.height
            self.sizes[size if size in self.sizes or len(self.sizes) < 1000 else (0, 0)] += 1
            self.words[min(clip.words, 40)] += 1
        self.failures += record.failures[: FAILURES - len(self.failures)]
        if record.shard.samples:
            if self.seen % self.stride == 0:
                self.sheets.append(record.shard.name)
            if len(self.sheets) == 2 * SHEETS:
                self.sheets, self.stride = self.sheets[::2], self.stride * 2
            self.seen += 1

    def write(self, out: str, path: str, summary: str) -> None:
        """Writes the page; `summary` is what the run prints."""
        parts = [
            "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
            f"<title>{_text(out)}</title><style>{STYLE}</style><h1>{_text(out)}</h1><pre>{_text(summary)}</pre>",
            "<h2>What the clips are like</h2><div class=charts>",
            _chart("length", self.seconds, _seconds),
            _chart("frames per second", self.fps, str),
            _chart(
                "size",
                dict(self.sizes.most_common(BARS)),
                lambda size: f"{size[0]} × {size[1]}" if size[0] else "other",
            ),
            _chart("words of the first caption", self.words, lambda n: str(n) if n < 40 else "40 or more"),
            "</div><h2>Clips</h2>",
            *(_figure(sample) for sample in self._samples(out)),
            *self._failures(out),
        ]
        storage.write_bytes(path, "".join(parts).encode("utf-8", "backslashreplace"))

    def _samples(self, out: str) -> Iterable[Sample]:
        """The first clips of the chosen shards."""
        for name in self.sheets[:: max(1, -(-len(self.sheets) // SHEETS))]:
            with storage.open_file(storage.join(out, name)) as stream:
                yield from itertools.islice(read_shard(stream), CLIPS)

    def _failures(self, out: str) -> Iterable[str]:
        if not self.failures:
            return
        yield "<h2>Failures</h2><table><tr><th>id<th>video<th>stage<th>reason"
        for failure in self.failures:
            cells = (failure.id, failure.video, failure.stage, failure.reason)
            yield "<tr>" + "".join(f"<td>{_text(cell)}" for cell in cells)
        yield "</table>"
        if len(self.failures) == FAILURES:
            yield f"<p>The first {FAILURES}; all are in {_text(storage.join(out, FAILURES_NAME))}.</p>"


def _chart(title: str, counts: "dict[Any, int]", name: Callable[[Any], str]) -> str:
    """Bars, in order of their keys unless there are too many: then the largest."""
    keys: list[Hashable] = list(counts)
    if len(keys) > BARS:
        keys = sorted(keys, key=lambda key: -counts[key])[:BARS]
    most = max(counts.values(), default=1)
    bars = (
        f"<div><span>{_text(name(key))}</span><i style='width:{100 * counts[key] / most:.1f}%'></i>"
        f"<span>{counts[key]:,}</span></div>"
        for key in sorted(keys)  # type: ignore[type-var]
    )
    return f"<section class=chart><h3>{_text(title)}</h3>{''.join(bars)}</section>"


def _seconds(power: int) -> str:
    return f"{2**power}–{2 ** (power + 1)} s" if power >= 0 else "under 1 s"


def _figure(sample: Sample) -> str:
    """A clip: some of its frames, its captions, where it comes from."""
    count = len(sample.frames)
    chosen = [sample.frames[i * count // min(count, THUMBNAILS)] for i in range(min(count, THUMBNAILS))]
    images = "".join(f"<img src='data:image/jpeg;base64,{_thumbnail(jpeg)}' alt=''>" for jpeg in chosen)
    captions = "<br>".join(_text(caption) for caption in sample.captions[:3]) or "<small>no caption</small>"
    where = f"{sample.id} · {sample.source} · {sample.start:.2f}–{sample.end:.2f} s · {sample.decoder}"
    return f"<figure>{images}<figcaption>{captions}<br><small>{_text(where)}</small></figcaption></figure>"


def _thumbnail(jpeg: bytes) -> str:
    picture = Image.open(io.BytesIO(jpeg))
    picture.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    small = io.BytesIO()
    picture.save(small, "JPEG", quality=75)
    return base64.b64encode(small.getvalue()).decode()


def _text(content: str) -> str:
    """Safe inside HTML, wherever it came from."""
    return html.escape(content)
