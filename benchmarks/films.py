"""Many clips of one long film: `hbi shard` over the loop that keeps one container open, in CPU seconds and in bytes.

python -m benchmarks.films [--s3 s3://BUCKET/FOLDER]

The loop is what a user would write: PyAV, one open container, seek, decode up to the clip's end, twelve frames, resize,
JPEG, tar. Dense clips follow each other; sparse ones are spread over the film. Each side runs in a process of its own,
whose CPU time counts with that of its children, and they take turns. With --s3 the film is also put there, and read
from there by ours and, through s3fs, by the loop.
"""

import io
import json
import multiprocessing
import os
import statistics
import tarfile
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks.report import report
from hbi.infra import storage
from hbi.model.frames import resize_crop
from hbi.pipelines.decoding.clip import DecodeError
from hbi.pipelines.decoding.decoder import Decoder, DecodeWorker
from hbi.pipelines.decoding.worker import encode_jpeg
from hbi.pipelines.sharding import shards
from hbi.pipelines.sharding.plan import plan
from hbi.pipelines.sharding.settings import ShardSettings

RATE, WIDTH, HEIGHT = 25, 1280, 720
Clips = list[tuple[float, float]]


def make_film(path: Path, minutes: int) -> None:
    """An mp4 of one minute that repeats: H.264 with B-frames, a keyframe every five seconds, about 3 Mbit/s."""
    import av

    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 128, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    fine = rng.integers(0, 24, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    options = {"preset": "ultrafast", "g": "125", "bf": "2", "b": "3M", "x264-params": "scenecut=0"}
    with av.open(str(path), "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=RATE, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        packets = []
        for number in range(60 * RATE):
            image = np.roll(coarse, (3 * number, 5 * number), (0, 1)) + fine
            packets += stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24"))
        packets += stream.encode(None)
        minute = [(bytes(p), p.pts or 0, p.dts or 0, p.is_keyframe) for p in packets]
        for turn in range(minutes):
            for content, pts, dts, key in minute:
                packet = av.Packet(content)
                packet.pts, packet.dts = pts + turn * 60 * RATE, dts + turn * 60 * RATE
                packet.time_base, packet.duration, packet.is_keyframe = Fraction(1, RATE), 1, key
                packet.stream = stream
                out.mux(packet)


def read_by(pid: int | str) -> int:
    """Bytes that a process has read so far, whatever it read them from."""
    return int(Path(f"/proc/{pid}/io").read_text().split()[1])


def one_container(film: str, clips: Clips, out: str, settings: ShardSettings) -> int:
    """The loop; the bytes that it read."""
    import av

    av.VideoFrame(16, 16, "yuv420p").to_ndarray(format="rgb24")
    encode_jpeg(np.zeros((8, 8, 3), np.uint8), 95)
    source: Any = storage.filesystem(film).open(film, "rb") if storage.is_remote(film) else film
    before = read_by("self")
    container: Any
    with av.open(source) as container, tarfile.open(f"{out}/loop.tar", "w") as tar:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        base = float(stream.time_base or 1)
        for number, (start, end) in enumerate(clips):
            container.seek(int(start / base), stream=stream)
            frames = []
            for frame in container.decode(stream):
                if (frame.time or 0) >= end - 1e-6:
                    break
                if (frame.time or 0) >= start - 1e-6:
                    frames.append(frame)
            for place in np.linspace(0, len(frames) - 1, settings.frames).astype(int):
                image = resize_crop(frames[place].to_ndarray(format="rgb24"), settings.size)
                jpeg = encode_jpeg(image, settings.jpeg_quality)
                header = tarfile.TarInfo(f"{number:06}.{place:04}.jpg")
                header.size = len(jpeg)
                tar.addfile(header, io.BytesIO(jpeg))
    return source.cache.total_requested_bytes if storage.is_remote(film) else read_by("self") - before


def ours(film: str, clips: Clips, out: str, settings: ShardSettings) -> int:
    """A shard as `hbi shard` makes it, without Ray; the bytes that were read."""
    manifest = Path(out, "manifest.jsonl")
    rows = [{"video": film, "id": f"{n}", "start": start, "end": end} for n, (start, end) in enumerate(clips)]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    planned = plan(str(manifest), f"{out}/shards", settings.identity(), len(rows))
    fetched, real = [], storage.read_range

    def counted(path: str, start: int, length: int) -> bytes:
        fetched.append(length)
        return real(path, start, length)

    storage.read_range = counted
    read, end = [], DecodeWorker.end

    def ended(self: DecodeWorker) -> None:
        if self.alive:
            read.append(read_by(self._process.pid) - worker_start)
        end(self)

    with Decoder(settings.frame_settings) as idle:
        with suppress(DecodeError):
            idle.decode(b"")
        assert idle._worker is not None
        worker_start = read_by(idle._worker._process.pid)
    DecodeWorker.end = ended
    with shards.decoder(settings) as decoder:
        for shard_plan in planned.shards:
            record = shards.make_shard(f"{out}/shards", shard_plan, settings, decoder)
            assert record.shard.samples == len(clips), record.failures
    return sum(fetched) if storage.is_remote(film) else sum(read)


def measured(side: Callable[..., int], film: str, clips: Clips, settings: ShardSettings) -> dict[str, float]:
    """CPU seconds of a side, its children's and their start too, and megabytes read."""
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    process = context.Process(target=_measure, args=(side, film, clips, settings, answers))
    process.start()
    answer = answers.get()
    process.join()
    return answer


def _measure(
    side: Callable[..., int], film: str, clips: Clips, settings: ShardSettings, answers: Any
) -> None:
    with tempfile.TemporaryDirectory() as out:
        begin = sum(os.times()[:4])
        read = side(film, clips, out, settings)
        answers.put({"cpu_seconds": sum(os.times()[:4]) - begin, "megabytes": read / 1e6})


@dataclass(frozen=True)
class Bench:
    """What to measure."""

    minutes: int = 30
    """Length of the film."""
    clips: int = 20
    """How many clips of eight seconds."""
    repeats: int = 3
    """How often each side runs."""
    s3: str = ""
    """A folder in object storage for the film; empty: local only."""

    def run(self) -> dict[str, Any]:
        """Medians of both sides, and ours over the loop."""
        results: dict[str, Any] = {}
        with tempfile.TemporaryDirectory(prefix="hbi-bench-") as folder:
            path = Path(folder, "film.mp4")
            make_film(path, self.minutes)
            results["film_megabytes"] = round(path.stat().st_size / 1e6, 1)
            places = {"local": str(path)}
            if self.s3:
                places["s3"] = storage.join(self.s3, path.name)
                storage.put_file(str(path), places["s3"])
            step = (self.minutes * 60 - 8) / max(1, self.clips - 1)
            kinds = {"dense": 8.0, "sparse": step}
            for place, film in places.items():
                for kind, gap in kinds.items():
                    clips = [(round(n * gap, 2), round(n * gap, 2) + 8) for n in range(self.clips)]
                    clips = [clip for clip in clips if clip[0] + 8 <= self.minutes * 60]
                    results[f"{place}_{kind}"] = self._turns(film, clips)
        return results

    def _turns(self, film: str, clips: Clips) -> dict[str, float]:
        settings, found = ShardSettings(), []
        for _ in range(self.repeats):
            loop, hbi = (measured(side, film, clips, settings) for side in (one_container, ours))
            found.append([loop["cpu_seconds"], hbi["cpu_seconds"], loop["megabytes"], hbi["megabytes"]])
        seconds, our_seconds, megabytes, our_megabytes = (
            statistics.median(each) for each in zip(*found, strict=True)
        )
        return {
            "loop_cpu_seconds": round(seconds, 2),
            "ours_cpu_seconds": round(our_seconds, 2),
            "cpu_ratio": round(statistics.median(turn[1] / turn[0] for turn in found), 2),
            "loop_megabytes": round(megabytes, 1),
            "ours_megabytes": round(our_megabytes, 1),
            "bytes_ratio": round(our_megabytes / megabytes, 2),
        }


def main() -> None:
    bench = tyro.cli(Bench, description=__doc__)
    results = bench.run()
    for name, found in results.items():
        print(f"{name}: {found}")
    report("films", results, minutes=bench.minutes, clips=bench.clips, repeats=bench.repeats)


if __name__ == "__main__":
    main()
