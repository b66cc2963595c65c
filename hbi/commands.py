"""The commands: one function a job, whose docstring is its help. What a job needs is imported when it runs."""

import sys
import threading
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional


def corpus(out: Positional[str], clips: int = 2000, seed: int = 0) -> None:
    """Make the corpus of moving shapes: videos and manifest.jsonl.

    Example: hbi corpus shapes --clips 2000 --seed 0

    Args:
        out: Folder or s3:// URI to write to.
        clips: How many clips.
        seed: The same seed gives the same bytes.
    """
    from tqdm import tqdm

    from hbi.pipelines.corpus.make import make_corpus

    making = make_corpus(out, clips, seed)
    with tqdm(total=clips, unit="clip", desc="corpus", **_calm()) as bar:
        for done in making:
            bar.update(done - bar.n)
    print(f"{out}: {clips} clips and manifest.jsonl")


def import_dataset(
    name: Positional[str], annotations: Positional[str], videos: Positional[str], out: Positional[str]
) -> None:
    """Turn a public dataset's annotation files into a manifest; `folder` takes any folder of videos.

    Example: hbi import-dataset msrvtt MSRVTT/anns MSRVTT/videos msrvtt.jsonl

    Args:
        name: msrvtt, msrvtt-full, msvd, didemo, activitynet, activitynet-segments, lsmdc, vatex, webvid, msrvtt-qa,
            msvd-qa, activitynet-qa; or folder, for videos without annotations.
        annotations: The folder of the published annotation files (for `folder`: any name, it is not read).
        videos: The folder of the videos, local or s3://.
        out: The manifest to write, JSON Lines.
    """
    from hbi.pipelines.datasets.table import import_dataset as made
    from hbi.pipelines.manifest import folder_manifest

    count = folder_manifest(videos, out) if name == "folder" else made(name, annotations, videos, out)
    print(f"{out}: {count} clips")


def split(
    manifest: Positional[str],
    out: Positional[str],
    by: Literal["stride", "shots"] = "stride",
    seconds: float = 10.0,
    min_seconds: float = 1.0,
    threshold: float = 27.0,
) -> None:
    """Cut the long videos of a manifest into clips: a manifest of clips, by stride or at shot boundaries.

    Example: hbi split films.jsonl clips.jsonl --by shots --seconds 20

    Args:
        manifest: JSON Lines or Parquet, local or s3://.
        out: The manifest to write, JSON Lines.
        by: stride cuts every so many seconds; shots cuts where the picture changes.
        seconds: Length of a clip; with shots, of the longest.
        min_seconds: Length of the shortest.
        threshold: How much the picture must change at a boundary, 0 to 255.
    """
    from hbi.pipelines.split import SplitSettings, split_manifest

    count = split_manifest(manifest, out, SplitSettings(by, seconds, min_seconds, threshold))
    print(f"{out}: {count} clips")


def shard(
    manifest: Positional[str],
    out: Positional[str],
    frames: int = 12,
    size: int = 224,
    choice: Literal["uniform", "fps", "segments"] = "uniform",
    fps: float = 1.0,
    samples_per_shard: int = 100,
    jpeg_quality: int = 95,
    clip_timeout: float = 60.0,
    clip_memory: int = 2048,
    report: str | None = None,
    filters: Any = None,
) -> Any:
    """Decode the clips of a manifest into WebDataset tars; every clip ends as a sample or as a failure with a reason.

    Run again, it does only what is missing.
    Example: hbi shard manifest.jsonl shards --frames 12 --size 224

    Args:
        manifest: JSON Lines or Parquet, local or s3://; one row a clip.
        out: Folder or s3:// URI for the tars, index.json and failures.jsonl.
        frames: Most frames of a clip.
        size: Height and width of a frame in pixels.
        choice: uniform from first to last; the centres of equal segments; or so many per second.
        fps: Frames per second of choice fps.
        samples_per_shard: Manifest rows per tar.
        jpeg_quality: Of the frames, 1 to 100.
        clip_timeout: Seconds after which a clip is given up.
        clip_memory: MiB that decoding a clip may take.
        report: Path of an HTML page to write: contact sheets, histograms, failures.
        filters: What a clip must be; those rejected are rows of failures.jsonl with stage filter.
    """
    from hbi.model.frames import FrameSettings
    from hbi.pipelines.sharding.filters import FilterSettings
    from hbi.pipelines.sharding.run import shard as make_shards
    from hbi.pipelines.sharding.shards import ShardSettings

    cut = FrameSettings(frames, size, choice, fps)
    settings = ShardSettings(
        cut, samples_per_shard, jpeg_quality, clip_timeout, clip_memory, filters or FilterSettings()
    )
    summary = make_shards(manifest, out, settings, report)
    print(summary)
    return summary


def train(
    run: Positional[str], data: str, out: str | None = None, tracking: str | None = None, set: Any = None
) -> Any:
    """Train a named run on shards; run again, it goes on from its last checkpoint.

    Example: hbi train demo --data shards --set.optim.lr 1e-3

    Args:
        run: A named run of training/config.py.
        data: A folder that `hbi shard` wrote, local or s3://.
        out: Folder or s3:// URI for checkpoints and the model (default: runs/RUN).
        tracking: MLflow store (default: MLFLOW_TRACKING_URI, else runs/mlflow.db).
        set: Any field of the run.
    """
    from hbi.serving.package import PACKAGE
    from hbi.training.evaluate.retrieval import table
    from hbi.training.run import train as start

    result = start(set, data, out or f"runs/{run}", tracking, PACKAGE)
    print(f"model  {result.model}")
    for split in dict.fromkeys(metric.split("/")[0] for metric in result.metrics):
        print(table(result.metrics, split))
    return result


def evaluate(
    model: Positional[str],
    shards: Positional[str],
    split: str = "test",
    paragraph: bool = False,
    rates: tuple[float, float, float] = (1.0, 0.0, 0.0),
    dsl: bool = False,
    qbnorm: int = 0,
    tokenizer: str | None = None,
    words: int | None = None,
    tracking: str | None = None,
) -> Any:
    """Measure retrieval, both ways, of a model on a split of shards.

    Example: hbi evaluate models:/hbi@champion shards --split test

    Args:
        model: A model folder, models:/name@alias or models:/name/version, or the file of a published checkpoint.
        shards: A folder that `hbi shard` wrote, local or s3://.
        split: Which split.
        paragraph: All captions of a clip as one text.
        rates: Weights of the entity, action and event similarities.
        dsl: Also with dual softmax, which sees all queries at once (t2v+dsl/R@1).
        qbnorm: Also with QB-Norm, on a bank of so many training clips (t2v+qbnorm/R@1).
        tokenizer: For a published checkpoint: a CLIP name or folder.
        words: For a published checkpoint: tokens a text is cut to.
        tracking: MLflow store of a models:/ name (default: MLFLOW_TRACKING_URI, else runs/mlflow.db).
    """
    from hbi.training.evaluate.retrieval import EvalProtocol, evaluate_command, table

    protocol = EvalProtocol(paragraph, rates, dsl, qbnorm)
    metrics = evaluate_command(model, shards, split, protocol, tracking, tokenizer, words)
    print(table(metrics, split))
    return metrics


def runs(experiment: str | None = None, tracking: str | None = None) -> None:
    """Compare training runs: a table, best first, of metrics and of the settings that differ.

    Example: hbi runs --experiment hbi

    Args:
        experiment: One MLflow experiment; all of them otherwise.
        tracking: MLflow store (default: MLFLOW_TRACKING_URI, else runs/mlflow.db).
    """
    from hbi.infra.mlflow.registry import runs_table

    print(runs_table(experiment, tracking))


def promote(run_id: Positional[str], alias: str = "champion", tracking: str | None = None) -> None:
    """Move an alias of the registered model to the version that a run made.

    Example: hbi promote 1f3a9c --alias champion

    Args:
        run_id: An MLflow run, as `hbi runs` shows it; its beginning is enough.
        alias: The alias to move.
        tracking: MLflow store (default: MLFLOW_TRACKING_URI, else runs/mlflow.db).
    """
    from hbi.infra.mlflow.registry import promote as move

    print(f"models:/hbi@{alias} is version {move(run_id, alias, tracking)}")


def index(
    model: Positional[str],
    shards: Positional[str],
    index: Positional[str],
    split: str | None = None,
    batch: int = 32,
    gpus: int = 0,
    tracking: str | None = None,
) -> None:
    """Build the token index of a shard folder with a model.

    Example: hbi index models:/hbi@champion shards index

    Args:
        model: A model folder, models:/name@alias or models:/name/version.
        shards: A folder that `hbi shard` wrote, local or s3://.
        index: Folder or s3:// URI to write to.
        split: Index this split only; all of them otherwise.
        batch: Clips encoded at once.
        gpus: GPUs to encode on; 0 encodes on the CPU.
        tracking: MLflow store of a models:/ name (default: MLFLOW_TRACKING_URI, else runs/mlflow.db).
    """
    from tqdm import tqdm

    from hbi.infra.mlflow.registry import pin_model, resolve_model, tracking_uri
    from hbi.infra.ray_runtime import ray_running
    from hbi.pipelines.sample import ShardIndex
    from hbi.serving.index.build import index_shards
    from hbi.serving.index.table import Maker

    uri = tracking_uri(tracking)
    maker = Maker(pin_model(model, uri), uri, ShardIndex.read(shards).settings)
    folder = resolve_model(maker.model, uri)
    with ray_running(), tqdm(unit="clip", desc="index", **_calm()) as bar:
        for done, bar.total in index_shards(folder, maker, shards, index, split, batch, gpus):
            bar.update(done - bar.n)
    print(f"{index}: tokens of {bar.n} clips by {maker.model}")


def search(
    index: Positional[str],
    text: Positional[str],
    k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 10,
) -> None:
    """Find the videos that match a sentence.

    Example: hbi search index "the red square moves left" -k 5

    Args:
        index: A folder that `hbi index` wrote, local or s3://.
        text: The sentence.
        k: How many videos to show.
    """
    from hbi.infra.mlflow.registry import resolve_model
    from hbi.model.tokenizer import load_tokenizer
    from hbi.model.weights import load_model
    from hbi.serving.index.table import TokenIndex, encode_query

    if not text.strip():
        raise ValueError("the sentence is empty: write what the video shows")
    if k < 1:
        raise ValueError(f"-k {k}: ask for 1 video or more")
    held = TokenIndex.open(index)
    folder = resolve_model(held.maker.model, held.maker.tracking)
    query, _ = encode_query(load_model(folder).eval(), load_tokenizer(folder), text)
    for rank, (score, video) in enumerate(held.search(query, k), 1):
        print(f"{rank:3d}  {score:6.3f}  {video.id}  {video.video}  {video.start:.2f}-{video.end:.2f} s")


def serve(
    model: Positional[str],
    index: Positional[str],
    port: int = 8000,
    host: str = "127.0.0.1",
    tracking: str | None = None,
) -> None:
    """Answer text-to-video queries over HTTP, with a search page at / and the schema at /docs. Until Ctrl-C.

    Example: hbi serve models:/hbi@champion index --port 8000

    Args:
        model: The model that made the index: a folder, models:/name@alias or models:/name/version.
        index: A folder that `hbi index` wrote, local or s3://.
        port: To listen on.
        host: To listen on; 0.0.0.0 for every interface.
        tracking: MLflow store of a models:/ name (default: MLFLOW_TRACKING_URI, else runs/mlflow.db).
    """
    from hbi.infra.mlflow.registry import resolve_model, tracking_uri
    from hbi.infra.ray_runtime import ray_running
    from hbi.serving.app import free_port, start

    free_port(host, port)
    folder = resolve_model(model, tracking_uri(tracking))
    with ray_running():
        address = start(folder, index, host, port)
        print(f"search page  {address}/\nschema       {address}/docs\nCtrl-C ends it", flush=True)
        threading.Event().wait()


def _calm() -> dict[str, Any]:
    """A progress bar redraws itself on a terminal, and adds a line now and then to a file."""
    return {} if sys.stderr.isatty() else {"mininterval": 10, "maxinterval": 30}
