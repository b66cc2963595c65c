"""One self-contained page about a shard folder: clips to look at, what they are like, and what failed."""

import base64
import io
import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from hbi.infra import storage
from hbi.pipelines.sample import FAILURES_NAME, Sample, read_shard
from hbi.pipelines.sharding.records import Failure, ShardManifest

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

    def add(self, record: ShardManifest) -> None:
        """Takes a shard into account."""
        for clip in record.clips:
            self.seconds[int(clip.seconds).bit_length() - 1] += 1
            self.fps[round(clip.fps)] += 1
            self._count((clip.width, clip.height))
            self.words[min(clip.words, 40)] += 1
        self.failures += record.failures[: FAILURES - len(self.failures)]
        if record.shard.samples:
            if self.seen % self.stride == 0:
                self.sheets.append(record.shard.name)
            if len(self.sheets) == 2 * SHEETS:
                self.sheets, self.stride = self.sheets[::2], self.stride * 2
            self.seen += 1

    def merge(self, other: "Page") -> None:
        """Takes other shards into account, as another page gathered them."""
        self.seconds.update(other.seconds)
        self.fps.update(other.fps)
        self.words.update(other.words)
        for size, count in other.sizes.items():
            self._count(size, count)
        self.failures += other.failures[: FAILURES - len(self.failures)]
        self.sheets += other.sheets

    def _count(self, size: tuple[int, int], count: int = 1) -> None:
        self.sizes[size if size in self.sizes or len(self.sizes) < 1000 else (0, 0)] += count

    def write(self, out: str, path: str, summary: str) -> None:
        """Writes the page; `summary` is what the run prints. Whatever it shows is escaped, wherever it came from."""
        import jinja2

        source = Path(__file__).with_name("report.html").read_text()
        template = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(source)
        page = template.render(
            out=out,
            summary=summary,
            charts=self._charts(),
            clips=map(_shown, self._samples(out)),
            failures=self.failures,
            most=FAILURES,
            failures_file=storage.join(out, FAILURES_NAME),
        )
        storage.write_bytes(path, page.encode("utf-8", "backslashreplace"))

    def _charts(self) -> list[dict[str, Any]]:
        """Histograms; of sizes only the most common."""
        sizes = dict(self.sizes.most_common(BARS))
        return [
            _chart("length", self.seconds, _seconds),
            _chart("frames per second", self.fps, str),
            _chart("size", sizes, lambda size: f"{size[0]} × {size[1]}" if size[0] else "other"),
            _chart("words of the first caption", self.words, lambda n: str(n) if n < 40 else "40 or more"),
        ]

    def _samples(self, out: str) -> Iterable[Sample]:
        """The first clips of the chosen shards."""
        for name in self.sheets[:: max(1, -(-len(self.sheets) // SHEETS))]:
            with storage.open_file(storage.join(out, name)) as stream:
                yield from itertools.islice(read_shard(stream), CLIPS)


def _chart(title: str, counts: "dict[Any, int]", name: Callable[[Any], str]) -> dict[str, Any]:
    """Bars, in order of their keys unless there are too many: then the largest."""
    keys: list[Hashable] = list(counts)
    if len(keys) > BARS:
        keys = sorted(keys, key=lambda key: -counts[key])[:BARS]
    most = max(counts.values(), default=1)
    bars = [
        {"name": name(key), "percent": f"{100 * counts[key] / most:.1f}", "count": f"{counts[key]:,}"}
        for key in sorted(keys)  # type: ignore[type-var]
    ]
    return {"title": title, "bars": bars}


def _seconds(power: int) -> str:
    return f"{2**power}–{2 ** (power + 1)} s" if power >= 0 else "under 1 s"


def _shown(sample: Sample) -> dict[str, Any]:
    """A clip: some of its frames, its captions, where it comes from."""
    count = len(sample.frames)
    chosen = [sample.frames[i * count // min(count, THUMBNAILS)] for i in range(min(count, THUMBNAILS))]
    where = f"{sample.id} · {sample.source} · {sample.start:.2f}–{sample.end:.2f} s · {sample.decoder}"
    return {"thumbnails": map(_thumbnail, chosen), "captions": sample.captions[:3], "where": where}


def _thumbnail(jpeg: bytes) -> str:
    picture = Image.open(io.BytesIO(jpeg))
    picture.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    small = io.BytesIO()
    picture.save(small, "JPEG", quality=75)
    return base64.b64encode(small.getvalue()).decode()
