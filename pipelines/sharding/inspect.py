"""What is in a shard folder: counts, hours, captions, sizes; and one sample, by its key, to look at."""

import io
import json
import tarfile
from collections import Counter
from dataclasses import asdict, dataclass, field

from PIL import Image

from hbi.infra import storage
from hbi.pipelines.sample import Sample, ShardIndex, read_shard, sample_of
from hbi.pipelines.sharding.records import ClipStats, read_records
from hbi.pipelines.sharding.shards import stats_of

SHOWN = 5
"""Sizes that are listed."""
COLUMNS = 4
"""Frames beside each other in a sample's picture."""


@dataclass
class Contents:
    """What the samples of a folder, or of one split of it, are like."""

    shards: int = 0
    samples: int = 0
    bytes: int = 0
    seconds: float = 0.0
    """Length of all clips together."""
    captions: int = 0
    captionless: int = 0
    """Samples without a caption."""
    truncated: int = 0
    """Samples whose source breaks off before its end."""
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    """Samples by width and height of the source."""
    decoders: Counter[str] = field(default_factory=Counter)

    def add(self, clip: ClipStats) -> None:
        """Takes a sample into account."""
        self.seconds += clip.seconds
        self.captions += clip.captions
        self.captionless += not clip.captions
        self.truncated += clip.truncated
        self.sizes[clip.width, clip.height] += 1
        self.decoders[clip.decoder] += 1

    def __str__(self) -> str:
        sizes = [f"{n:,} of {width}x{height}" for (width, height), n in self.sizes.most_common(SHOWN)]
        sizes += [f"{len(self.sizes) - SHOWN} more sizes"] if len(self.sizes) > SHOWN else []
        lines = [
            f"  samples   {self.samples:,} in {self.shards:,} shards, {self.bytes / 1e6:,.1f} MB",
            f"  video     {self.seconds / 3600:,.2f} hours, {self.seconds / max(1, self.samples):.1f} s a clip",
            f"  captions  {self.captions:,}" + f", none for {self.captionless:,}" * (self.captionless > 0),
            f"  sizes     {', '.join(sizes)}",
            f"  decoders  {', '.join(f'{n:,} {name}' for name, n in self.decoders.most_common())}",
        ]
        return "\n".join(lines + [f"  cut short {self.truncated:,}"] * (self.truncated > 0))


def contents(folder: str, split: str | None = None) -> dict[str, Contents]:
    """What each split holds, by its name. ValueError for a folder that is none, and a split that it lacks.

    From the commit records; a tar whose record is not there (a copied folder), or says too little, is read.
    """
    index = ShardIndex.read(folder)
    shards = index.of_split(split) if split is not None else [s for s in index.shards if s.samples]
    found: dict[str, Contents] = {}
    by_name = {shard.name: shard for shard in shards}
    for name, record in read_records(folder, list(by_name)):
        shard = by_name[name]
        held = found.setdefault(shard.split, Contents())
        held.shards += 1
        held.samples += shard.samples
        held.bytes += shard.bytes
        if record is not None and all(clip.captions >= 0 for clip in record.clips):
            clips = record.clips
        else:
            with storage.open_file(index.path(shard)) as stream:
                clips = [stats_of(sample) for sample in read_shard(stream)]
        for clip in clips:
            held.add(clip)
    return found


def find_sample(folder: str, key: str, split: str | None = None) -> Sample:
    """The sample of a key (leading zeros may be left out). ValueError where there is none."""
    index = ShardIndex.read(folder)
    wanted = key.zfill(9) if key.isdecimal() else key
    for shard in index.of_split(split) if split is not None else index.shards:
        if not shard.samples:
            continue
        with storage.open_file(index.path(shard)) as stream, tarfile.open(fileobj=stream) as tar:
            members: dict[str, bytes] = {}
            for member in tar:
                name, _, extension = member.name.partition(".")
                content = tar.extractfile(member) if name == wanted else None
                if content is not None:
                    members[extension] = content.read()
                elif members:
                    break
            if members:
                return sample_of(wanted, members)
    where = f"{folder}, split {split}" if split is not None else folder
    raise ValueError(
        f"{where}: no sample {key!r}: a key is the number of a manifest row, see failures.jsonl too"
    )


def describe_sample(sample: Sample) -> str:
    """A sample's json, for people; characters beyond ASCII as they are where they can be written."""
    meta = {name: value for name, value in asdict(sample).items() if name != "frames"}
    text = json.dumps(meta, indent=1, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(meta, indent=1)
    return text


def contact_sheet(sample: Sample) -> bytes:
    """The frames of a sample in rows, in time order, as a PNG."""
    frames = [Image.open(io.BytesIO(jpeg)) for jpeg in sample.frames]
    width, height = frames[0].size
    columns = min(COLUMNS, len(frames))
    sheet = Image.new("RGB", (columns * width, -(-len(frames) // columns) * height))
    for number, frame in enumerate(frames):
        sheet.paste(frame, (number % columns * width, number // columns * height))
    stream = io.BytesIO()
    sheet.save(stream, "PNG")
    return stream.getvalue()
