"""The front door: the command `hbi`, one function a job. What a job needs is imported when it runs."""

import difflib
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional

END_SECONDS = 3.5
"""How long an interrupted command may tidy up before what it started is ended for it."""


def demo(
    out: str = "demo-out",
    clips: int = 2000,
    seed: int = 0,
    serve: bool = False,
    fresh: bool = False,
    port: int = 8000,
) -> None:
    """The whole chain on the made corpus: videos, shards, training, registry, index, search.

    Example: hbi demo --serve

    Args:
        out: Folder for everything that the demo makes.
        clips: How many clips to make; a tenth of them is the test.
        seed: Of the corpus and of the training.
        serve: Keep the search page and the MLflow UI up at the end, until Ctrl-C.
        fresh: Start clean even where an earlier demo could be resumed.
        port: Of the search page; the MLflow UI takes the next one.
    """
    from demo import run

    run(Path(out).resolve(), clips, seed, serve, fresh, port)


def corpus(out: Positional[str], clips: int = 2000, seed: int = 0) -> None:
    """Make the corpus of moving shapes: videos and manifest.jsonl.

    Example: hbi corpus shapes --clips 2000 --seed 0

    Args:
        out: Folder or s3:// URI to write to.
        clips: How many clips.
        seed: The same seed gives the same bytes.
    """
    from tqdm import tqdm

    from pipelines.corpus import make_corpus

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
    from pipelines import read

    if name == "folder":
        count = read.folder_manifest(videos, out)
    else:
        count = read.import_dataset(name, annotations, videos, out)
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
    from pipelines.split import SplitSettings, split_manifest

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
    from model.frames import FrameSettings
    from pipelines.filters import FilterSettings
    from pipelines.run import shard as make_shards
    from pipelines.shards import ShardSettings

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
    from training.evaluate import table
    from training.run import train as start

    result = start(set, data, out or f"runs/{run}", tracking)
    print(f"model  {result.model}")
    for split in dict.fromkeys(metric.split("/")[0] for metric in result.metrics):
        print(table(result.metrics, split))
    return result


def _fill_types(name: str, args: list[str]) -> None:
    """Gives the flags that come in groups their types, and `--set` the defaults of the run that is named.

    They stand in rooms that are not imported before a command is chosen, so the signatures above cannot hold them.
    """
    if name == "shard":
        from pipelines.filters import FilterSettings

        shard.__annotations__["filters"] = FilterSettings
        shard.__defaults__ = (*(shard.__defaults__ or ())[:-1], FilterSettings())
    if name == "train":
        from training.config import RUNS, TrainConfig

        run = args[0] if args and not args[0].startswith("-") else "debug"
        if run not in RUNS:
            raise ValueError(f"{run}: no such run: choose one of {', '.join(RUNS)}")
        train.__annotations__["set"] = TrainConfig
        train.__defaults__ = (*(train.__defaults__ or ())[:-1], RUNS[run])


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
    from training.evaluate import EvalProtocol, evaluate_command, table

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
    from infra.registry import runs_table

    print(runs_table(experiment, tracking))


def promote(run_id: Positional[str], alias: str = "champion", tracking: str | None = None) -> None:
    """Move an alias of the registered model to the version that a run made.

    Example: hbi promote 1f3a9c --alias champion

    Args:
        run_id: An MLflow run, as `hbi runs` shows it; its beginning is enough.
        alias: The alias to move.
        tracking: MLflow store (default: MLFLOW_TRACKING_URI, else runs/mlflow.db).
    """
    from infra.registry import promote as move

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

    from infra.cluster import ray_running
    from infra.index import Maker
    from infra.registry import pin_model, resolve_model, tracking_uri
    from pipelines.embed import index_shards
    from pipelines.sample import ShardIndex

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
    from infra.index import TokenIndex, encode_query
    from infra.registry import resolve_model
    from model.text import load_tokenizer
    from model.weights import load_model

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
    from infra.cluster import ray_running
    from infra.registry import resolve_model, tracking_uri
    from infra.serve import free_port, start

    free_port(host, port)
    folder = resolve_model(model, tracking_uri(tracking))
    with ray_running():
        address = start(folder, index, host, port)
        print(f"search page  {address}/\nschema       {address}/docs\nCtrl-C ends it", flush=True)
        threading.Event().wait()


def _calm() -> dict[str, Any]:
    """A progress bar redraws itself on a terminal, and adds a line now and then to a file."""
    return {} if sys.stderr.isatty() else {"mininterval": 10, "maxinterval": 30}


CONTENTS: dict[str, dict[str, Callable[..., None]]] = {
    "Start here": {"demo": demo},
    "Corpora": {"corpus": corpus, "import-dataset": import_dataset, "split": split, "shard": shard},
    "Training": {"train": train, "evaluate": evaluate, "runs": runs, "promote": promote},
    "Search": {"index": index, "search": search, "serve": serve},
}


def main() -> None:
    """Runs one command; exits with 0 on success only, 1 on an error, 2 on a command line that cannot be read."""
    args = [arg for arg in sys.argv[1:] if arg != "--debug"]
    debug = len(args) < len(sys.argv) - 1
    commands = {name: command for group in CONTENTS.values() for name, command in group.items()}
    if not args or args[0] in ("-h", "--help", "help"):
        print(contents())
        return
    name, *rest = args
    if name not in commands:
        near = difflib.get_close_matches(name, commands, 1)
        print(
            f"hbi: no command {name!r}{f': did you mean {near[0]!r}?' if near else ''} (hbi --help)",
            file=sys.stderr,
        )
        sys.exit(2)
    _end_on_signal()
    status = 1
    try:
        _fill_types(name, rest)
        tyro.cli(commands[name], args=rest, prog=f"hbi {name}")
        status = 0
    except KeyboardInterrupt:
        print(f"hbi {name}: interrupted", file=sys.stderr)
        status = 130
    except SystemExit as ending:
        status = ending.code if isinstance(ending.code, int) else 0 if ending.code is None else 1
    except Exception as error:
        if debug:
            raise
        print(f"hbi {name}: {one_line(error)}", file=sys.stderr)
    finally:
        _stop_ray()
    if status:
        sys.exit(status)


def contents() -> str:
    """`hbi --help`: every command with its first line, by the job it belongs to."""
    lines = ["hbi: video-language representation learning with Hierarchical Banzhaf Interaction"]
    for title, commands in CONTENTS.items():
        lines += ["", title]
        lines += [
            f"  {name:15} {(command.__doc__ or '').splitlines()[0]}" for name, command in commands.items()
        ]
    return "\n".join(
        [*lines, "", "`hbi COMMAND --help` has the flags and an example; --debug shows tracebacks."]
    )


def one_line(error: BaseException) -> str:
    """What went wrong, in one line. Ray wraps a worker's error: the innermost one is the user's."""
    while (cause := getattr(error, "cause", None) or error.__cause__) is not None and isinstance(
        cause, BaseException
    ):
        error = cause
    text = " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
    if isinstance(error, ValueError) or (isinstance(error, OSError) and text):
        return text
    return f"{type(error).__name__}: {text} (--debug shows where)"


def _end_on_signal() -> None:
    """Ctrl-C and SIGTERM raise KeyboardInterrupt once; a moment later whatever is left of the command is ended."""

    def end(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        started = _descendants()
        timer = threading.Timer(END_SECONDS, lambda: (_kill(started | _descendants()), os._exit(130)))
        timer.daemon = True
        timer.start()
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, end)
    signal.signal(signal.SIGTERM, end)


def _descendants() -> set[Any]:
    import psutil

    return set(psutil.Process().children(recursive=True))


def _kill(processes: set[Any]) -> None:
    import psutil

    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def _stop_ray() -> None:
    """Stops a Ray that this command started (a cluster that it joined stays up)."""
    if (ray := sys.modules.get("ray")) is not None and ray.is_initialized():
        ray.shutdown()


if __name__ == "__main__":
    main()
