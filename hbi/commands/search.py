"""From a model and shards to answers."""

import threading
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import OmitArgPrefixes, Positional, arg

from hbi.commands.arguments import Index, Text, Tracking
from hbi.serving.settings import IndexSettings, ServeSettings


@dataclass(frozen=True)
class BuildIndex:
    """Build the index of a shard folder with a model, add shards to it, or show what is in it.

    Run again, it does only what is missing.

    Example: hbi index models:/hbi@champion shards index
    """

    model: Annotated[Positional[str], arg(metavar="MODEL")] = ""
    """A model folder, models:/name@alias or models:/name/version."""
    shards: Annotated[Positional[str], arg(metavar="SHARDS")] = ""
    """A folder that `hbi shard` wrote, local or s3://."""
    index: Annotated[Positional[str], arg(metavar="INDEX")] = ""
    """Folder or s3:// URI to write to."""
    settings: OmitArgPrefixes[IndexSettings] = IndexSettings()  # noqa: RUF009 (frozen)
    """How it is made."""
    show: Annotated[str | None, arg(metavar="INDEX", help_behavior_hint="")] = None
    """Show what is in this index, and do nothing else."""
    tracking: Tracking = None
    """MLflow store of a models:/ name (default: MLFLOW_TRACKING_URI, else runs/mlflow.db)."""

    def run(self) -> None:
        from hbi.commands.progress import progress_bar
        from hbi.infra.mlflow.resolve import pin_model, resolve_model
        from hbi.infra.mlflow.store import tracking_uri
        from hbi.infra.ray_runtime import ray_running
        from hbi.pipelines.sample import ShardIndex
        from hbi.serving.index.build import Progress, describe, index_shards, show

        if self.show is not None:
            print(show(self.show))
            return
        if not (self.model and self.shards and self.index):
            raise ValueError("give MODEL, SHARDS and INDEX; or --show INDEX")
        shards = ShardIndex.read(self.shards)
        uri = tracking_uri(self.tracking) if self.model.startswith("models:/") else ""
        model = pin_model(self.model, uri)
        metadata = describe(model, uri, resolve_model(model, uri), shards)
        progress = Progress(0, 0)
        with ray_running(), progress_bar("index") as bar:
            for progress in index_shards(metadata, self.shards, self.index, self.settings):
                bar.total = progress.total
                bar.update(progress.done - bar.n)
        print(f"{self.index}: tokens of {progress.total} clips by {model}")
        if progress.renamed:
            print(
                f"{progress.renamed} clips had an id that another clip has: they are called id#2, id#3, ..."
            )


@dataclass(frozen=True)
class Search:
    """Find the videos that match a sentence.

    Example: hbi search index "the red square moves left" -k 5
    """

    index: Index
    """A folder that `hbi index` wrote, local or s3://."""
    text: Text
    """The sentence."""
    k: Annotated[int, arg(aliases=["-k"])] = 10
    """How many videos to show."""
    rerank: bool = False
    """Score the best 50 again, with tokens that are rebuilt with each other's help: for a model that reconstructs."""
    tracking: Tracking = None
    """MLflow store of the index's model (default: MLFLOW_TRACKING_URI, else the one that the index names)."""

    def run(self) -> None:
        from hbi.serving.engine import Engine
        from hbi.serving.front import model_of
        from hbi.serving.questions import Page
        from hbi.serving.refusal import Refused, require_text

        if self.k < 1:
            raise ValueError(f"-k {self.k}: ask for 1 video or more")
        try:
            text = require_text("the sentence", self.text, 100_000)
        except Refused as refused:
            raise ValueError(f"{refused.detail}: write what the video shows") from None
        answering = model_of(self.index, None, self.tracking)
        engine = Engine(answering.folder, answering.tracking, self.index)
        try:
            answer = engine.find(engine.encode([text])[0], Page(self.k, rerank=self.rerank))
        except Refused as refused:
            raise ValueError(refused.detail) from None
        for rank, found in enumerate(answer["results"], 1):
            first, last = found["moment"]
            print(
                f"{rank:3d}  {found['score']:6.3f}  {found['id']}  {found['video']}  "
                f"{found['start']:.2f}-{found['end']:.2f} s  moment {first:.2f}-{last:.2f} s"
            )
        if answer["note"]:
            print(answer["note"])


@dataclass(frozen=True)
class Serve:
    """Answer text-to-video queries over HTTP, with a search page at / and the schema at /docs. Until Ctrl-C.

    With INDEX alone, the model that made the index answers. HBI_API_KEY holds a key that clients must send.

    Example: hbi serve models:/hbi@champion index --port 8000 --media-root videos
    """

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """The model that made the index: a folder, models:/name@alias or models:/name/version. May be left out."""
    index: Annotated[Positional[str], arg(metavar="INDEX")] = ""
    """A folder that `hbi index` wrote, local or s3://."""
    settings: OmitArgPrefixes[ServeSettings] = ServeSettings()  # noqa: RUF009 (frozen)
    """Who may ask for what."""
    tracking: Tracking = None
    """MLflow store of a models:/ name (default: MLFLOW_TRACKING_URI, else the one that the index names)."""

    def run(self) -> None:
        from hbi.infra.ray_runtime import ray_running
        from hbi.serving.front import free_port, model_of, start

        model, index = (self.model, self.index) if self.index else (None, self.model)
        free_port(self.settings.host, self.settings.port)
        answering = model_of(index, model, self.tracking)
        with ray_running(), start(answering, index, self.settings) as served:
            from hbi.serving.deploy import logs, prometheus

            print(
                f"search page  {served.address}/\nschema       {served.address}/docs\nmodel        {answering.model}"
            )
            if not self.settings.media_root:
                print(
                    "videos       none are played but uploads: --media-root FOLDER allows those in a folder"
                )
            if metrics := prometheus():
                print(f"Prometheus   {metrics}")
            print(f"logs         {logs()}\nCtrl-C ends it", flush=True)
            threading.Event().wait()
