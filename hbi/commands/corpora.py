"""From videos to shards."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from hbi.commands.arguments import Manifest, Out, Path, Shards
from hbi.pipelines.sharding.settings import ShardSettings


@dataclass(frozen=True)
class Corpus:
    """Make the corpus of moving shapes: videos and manifest.jsonl.

    Example: hbi corpus shapes --clips 2000 --seed 0
    """

    out: Out
    """Folder or s3:// URI to write to."""
    clips: int = 2000
    """How many clips."""
    seed: int = 0
    """The same seed gives the same bytes."""
    kind: Literal["stories", "moments"] = "stories"
    """What the clips play. moments: each thing is in view while its clause plays and at no other time."""

    def run(self) -> None:
        from hbi.commands.progress import progress_bar
        from hbi.pipelines.corpus.make import make_corpus

        making = make_corpus(self.out, self.clips, self.seed, self.kind)
        with progress_bar("corpus", self.clips) as bar:
            for done in making:
                bar.update(done - bar.n)
        print(f"{self.out}: {self.clips} clips and manifest.jsonl")


@dataclass(frozen=True)
class ImportDataset:
    """Turn a public dataset's annotation files into a manifest; `folder` takes any folder of videos.

    Example: hbi import-dataset msrvtt MSRVTT/anns MSRVTT/videos msrvtt.jsonl
    """

    name: Annotated[Positional[str], arg(metavar="NAME")]
    """msrvtt, msrvtt-full, msvd, didemo, activitynet, activitynet-segments, lsmdc, vatex, webvid, msrvtt-qa, msvd-qa,
    activitynet-qa; or folder, for videos without annotations."""
    annotations: Annotated[Positional[str], arg(metavar="ANNOTATIONS")]
    """The folder of the published annotation files (for `folder`: any name, it is not read)."""
    videos: Annotated[Positional[str], arg(metavar="VIDEOS")]
    """The folder of the videos, local or s3://."""
    out: Annotated[Positional[str], arg(metavar="OUT.jsonl")]
    """The manifest to write."""

    def run(self) -> None:
        from hbi.pipelines.datasets.folder import folder_manifest
        from hbi.pipelines.datasets.table import import_dataset

        if self.name == "folder":
            count = folder_manifest(self.videos, self.out)
        else:
            count = import_dataset(self.name, self.annotations, self.videos, self.out)
        print(f"{self.out}: {count} clips")


@dataclass(frozen=True)
class Split:
    """Cut the long videos of a manifest into clips: a manifest of clips, by stride or at shot boundaries.

    Example: hbi split films.jsonl clips.jsonl --by shots --seconds 20
    """

    manifest: Manifest
    """JSON Lines, CSV, TSV or Parquet, gzip or not, local or remote."""
    out: Annotated[Positional[str], arg(metavar="OUT.jsonl")]
    """The manifest to write."""
    by: Literal["stride", "shots"] = "stride"
    """stride cuts every so many seconds; shots cuts where the picture changes."""
    seconds: float = 10.0
    """Length of a clip; with shots, of the longest."""
    min_seconds: float = 1.0
    """Length of the shortest."""
    threshold: float = 27.0
    """How much the picture must change at a boundary, 0 to 255."""

    def run(self) -> None:
        from hbi.pipelines.split import SplitSettings, split_manifest

        settings = SplitSettings(self.by, self.seconds, self.min_seconds, self.threshold)
        print(f"{self.out}: {split_manifest(self.manifest, self.out, settings)} clips")


@dataclass(frozen=True)
class Shard:
    """Decode the clips of a manifest into WebDataset tars; every clip ends as a sample or as a failure with a reason.

    Run again, it does only what is missing.

    Example: hbi shard manifest.jsonl shards --frames 12 --size 224
    """

    manifest: Manifest
    """JSON Lines, CSV, TSV or Parquet, gzip or not, local or remote; one row a clip."""
    out: Out
    """Folder or s3:// URI for the tars, index.json and failures.jsonl."""
    settings: Annotated[ShardSettings, arg(name="")] = field(default_factory=ShardSettings)
    """How clips become samples."""
    report: Path = None
    """Path of an HTML page to write: contact sheets, histograms, failures."""
    verify: bool = False
    """Read the tars that are there, and make those anew whose bytes are not those that were written."""

    def run(self) -> None:
        from hbi.pipelines.sharding.run import shard

        print(shard(self.manifest, self.out, self.settings, self.report, self.verify))


@dataclass(frozen=True)
class Inspect:
    """Say what a shard folder holds, or show one sample of it: its json, and its frames as a picture.

    Example: hbi inspect shards 17 --picture sample.png
    """

    shards: Shards
    """A folder that `hbi shard` wrote, local or s3://."""
    key: Annotated[Positional[str | None], arg(metavar="KEY")] = None
    """A sample's key: the number of its manifest row."""
    split: str | None = None
    """This split only; all of them otherwise."""
    picture: Path = None
    """Where the sample's frames go, a PNG (default: KEY.png)."""

    def run(self) -> None:
        from hbi.infra import storage
        from hbi.pipelines.sharding.inspect import contact_sheet, contents, describe_sample, find_sample

        if self.key is None:
            for split, held in contents(self.shards, self.split).items():
                print(f"{self.shards}, split {split}\n{held}")
            return
        sample = find_sample(self.shards, self.key, self.split)
        picture = self.picture or f"{sample.key}.png"
        storage.write_bytes(picture, contact_sheet(sample))
        print(describe_sample(sample))
        print(f"{picture}: its {len(sample.frames)} frames")
