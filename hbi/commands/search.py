"""From a model and shards to answers."""

import threading
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import arg

from hbi.commands.arguments import Index, Model, Shards, Text, Tracking


@dataclass(frozen=True)
class BuildIndex:
    """Build the token index of a shard folder with a model.

    Example: hbi index models:/hbi@champion shards index
    """

    model: Model
    """A model folder, models:/name@alias or models:/name/version."""
    shards: Shards
    """A folder that `hbi shard` wrote, local or s3://."""
    index: Index
    """Folder or s3:// URI to write to."""
    split: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None
    """Index this split only; all of them otherwise."""
    batch: int = 32
    """Clips encoded at once."""
    gpus: int = 0
    """GPUs to encode on; 0 encodes on the CPU."""
    tracking: Tracking = None
    """MLflow store of a models:/ name (default: MLFLOW_TRACKING_URI, else runs/mlflow.db)."""

    def run(self) -> None:
        from hbi.commands.progress import progress_bar
        from hbi.infra.mlflow.resolve import pin_model, resolve_model
        from hbi.infra.mlflow.store import tracking_uri
        from hbi.infra.ray_runtime import ray_running
        from hbi.pipelines.sample import ShardIndex
        from hbi.serving.index.build import index_shards
        from hbi.serving.index.table import Maker

        uri = tracking_uri(self.tracking)
        maker = Maker(pin_model(self.model, uri), uri, ShardIndex.read(self.shards).settings)
        folder = resolve_model(maker.model, uri)
        with ray_running(), progress_bar("index") as bar:
            for done, bar.total in index_shards(
                folder, maker, self.shards, self.index, self.split, self.batch, self.gpus
            ):
                bar.update(done - bar.n)
        print(f"{self.index}: tokens of {bar.n} clips by {maker.model}")


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

    def run(self) -> None:
        from hbi.infra.mlflow.resolve import resolve_model
        from hbi.model.tokenizer import load_tokenizer
        from hbi.model.weights import load_model
        from hbi.serving.index.table import TokenIndex, encode_query

        if not self.text.strip():
            raise ValueError("the sentence is empty: write what the video shows")
        if self.k < 1:
            raise ValueError(f"-k {self.k}: ask for 1 video or more")
        held = TokenIndex.open(self.index)
        folder = resolve_model(held.maker.model, held.maker.tracking)
        query, _ = encode_query(load_model(folder).eval(), load_tokenizer(folder), self.text)
        for rank, (score, video) in enumerate(held.search(query, self.k), 1):
            print(f"{rank:3d}  {score:6.3f}  {video.id}  {video.video}  {video.start:.2f}-{video.end:.2f} s")


@dataclass(frozen=True)
class Serve:
    """Answer text-to-video queries over HTTP, with a search page at / and the schema at /docs. Until Ctrl-C.

    Example: hbi serve models:/hbi@champion index --port 8000
    """

    model: Model
    """The model that made the index: a folder, models:/name@alias or models:/name/version."""
    index: Index
    """A folder that `hbi index` wrote, local or s3://."""
    port: int = 8000
    """To listen on."""
    host: str = "127.0.0.1"
    """To listen on; 0.0.0.0 for every interface."""
    tracking: Tracking = None
    """MLflow store of a models:/ name (default: MLFLOW_TRACKING_URI, else runs/mlflow.db)."""

    def run(self) -> None:
        from hbi.infra.mlflow.resolve import resolve_model
        from hbi.infra.mlflow.store import tracking_uri
        from hbi.infra.ray_runtime import ray_running
        from hbi.serving.app import free_port, start

        free_port(self.host, self.port)
        folder = resolve_model(self.model, tracking_uri(self.tracking))
        with ray_running():
            address = start(folder, self.index, self.host, self.port)
            print(f"search page  {address}/\nschema       {address}/docs\nCtrl-C ends it", flush=True)
            threading.Event().wait()
