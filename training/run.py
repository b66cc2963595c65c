"""A training run on a Ray cluster: `TorchTrainer` around the loop, and the model that comes out of it."""

import contextlib
import json
import os
import queue
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hbi.infra import storage
from hbi.infra.mlflow.registry import ModelPackage, NewVersion, log_and_register, tracking_uri
from hbi.infra.mlflow.tracker import Tracker, lineage
from hbi.infra.ray_runtime import ray_running
from hbi.model.hbi import HBI
from hbi.model.tokenizer import load_tokenizer, train_tokenizer
from hbi.model.weights import load_model
from hbi.pipelines.sample import ShardIndex, check_shards
from hbi.training.checkpoint import STATE, TRAINING, Checkpoints, fetched
from hbi.training.data.loader import captions_of
from hbi.training.evaluate.figures import recall_figure, similarity_figure
from hbi.training.evaluate.retrieval import EvalProtocol, evaluate
from hbi.training.init import START, with_start
from hbi.training.loop import Hooks, Stopped, Training
from hbi.training.parallel import Place
from hbi.training.settings import TrainConfig, flatten

CONFIG, RESULT, RUN_ID, TOKENIZER, MODEL = "config.json", "result.json", "run-id.txt", "tokenizer", "model"


@dataclass(frozen=True)
class TrainResult:
    """What a run left."""

    model: str
    """Folder of the chosen model: weights, configuration, tokenizer."""
    metrics: dict[str, float]
    """Metrics of that model on the final splits, as `test/t2v/R@1`."""
    run_id: str | None
    """The MLflow run."""
    version: str | None
    """The version that the registry gave the model."""


def train(
    config: TrainConfig,
    data: str,
    out: str,
    tracking: str | None = None,
    package: ModelPackage | None = None,
    say: Callable[[str], None] = lambda line: print(line, flush=True),
) -> TrainResult:
    """Trains on the shards `data` and leaves everything in the folder `out`; goes on where an earlier call stopped.

    data, out: local or s3://; on a cluster of several machines, a folder that all of them see. tracking: the MLflow
    store (default: MLFLOW_TRACKING_URI, else runs/mlflow.db). package: what the registry gets
    beside the weights; without one nothing is registered. say: gets lines of progress.

    Raises ValueError, in one line, where the shards, the checkpoints in `out` or the settings do not fit, where the
    loss is not finite, and where too much of the data cannot be read.
    """
    data, out = storage.absolute(data), storage.absolute(out)
    uri = tracking_uri(tracking) if config.tracking.enabled else ""
    index = ShardIndex.read(data)
    config = with_tokenizer(with_start(config, out, tracking), index, out)
    finished = _finished(config, out)
    if finished is not None:
        say(f"{out}: this run is finished; give another --out to train anew")
        return finished
    storage.write_bytes(storage.join(out, CONFIG), config.to_json().encode())
    with ray_running(), _lines(say) as lines:
        answer = _run_on_ray(Job(config, data, out, uri, lines))
    if isinstance(answer, str):
        raise ValueError(answer)
    metrics, run_id = answer
    folder, version = storage.join(out, MODEL), None
    if run_id and package and config.tracking.register:
        with fetched(folder) as local:
            new = NewVersion(metrics=metrics, tags=lineage(data), alias=config.tracking.alias)
            version = log_and_register(local, run_id, uri, package, new)
    result = TrainResult(folder, metrics, run_id, version)
    storage.write_bytes(storage.join(out, RESULT), json.dumps(asdict(result), indent=2).encode())
    return result


def _finished(config: TrainConfig, out: str) -> TrainResult | None:
    """What an earlier call with the same configuration gave, if it came to its end."""
    try:
        same = TrainConfig.from_json(storage.read_bytes(storage.join(out, CONFIG)).decode()) == config
        return TrainResult(**json.loads(storage.read_bytes(storage.join(out, RESULT)))) if same else None
    except FileNotFoundError:
        return None


def with_tokenizer(config: TrainConfig, index: ShardIndex, out: str) -> TrainConfig:
    """The configuration with its tokenizer's vocabulary; the captions give the tokenizer where no backbone has one."""
    index.of_split(config.data.split)
    if config.model.backbone and not config.start:
        return config
    check_shards(index, config.model, config.model_flags)
    if config.start:
        return config
    folder = storage.join(out, TOKENIZER)
    if not storage.exists(storage.join(folder, "tokenizer.json")):
        captions = captions_of(index, config.data.split)
        tokenizer = train_tokenizer(captions, config.model.towers.vocab_size)
        with tempfile.TemporaryDirectory() as made:
            tokenizer.save_pretrained(made)
            storage.put_files(Path(made).iterdir(), folder, last="tokenizer.json")
    with fetched(folder) as local:
        words = len(load_tokenizer(local))
    return replace(config, model=replace(config.model, towers=replace(config.model.towers, vocab_size=words)))


@dataclass(frozen=True)
class Job:
    """What every worker is told."""

    config: TrainConfig
    data: str
    out: str
    uri: str
    lines: Any


def _run_on_ray(job: Job) -> Any:
    """Runs `work` on Ray Train's workers: what the first of them returned, or why it could not go on."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import WorkerGroupError

    workers = job.config.workers
    path, filesystem = _ray_storage(job.out)
    trainer = TorchTrainer(
        work,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if workers.gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=(workers.at_least, workers.count) if workers.at_least else workers.count,
            use_gpu=bool(workers.gpus),
            resources_per_worker={"CPU": workers.cpus} | ({"GPU": workers.gpus} if workers.gpus else {}),
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=workers.failures, max_preemption_failures=-1),
        ),
    )
    try:
        return trainer.fit().return_value
    except WorkerGroupError as error:
        rank, failure = min(error.worker_failures.items())
        raise RuntimeError(
            f"worker {rank} failed {workers.failures + 1} times, the last with: {failure}"
        ) from error


def _ray_storage(out: str) -> tuple[str, Any]:
    """Where Ray Train puts its marks. Its own way to s3 knows neither AWS_ENDPOINT_URL nor other servers than AWS."""
    if not storage.is_remote(out):
        return out, None
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    return out.removeprefix("s3://"), PyFileSystem(FSSpecHandler(storage.filesystem(out)))


@contextlib.contextmanager
def _lines(say: Callable[[str], None]) -> Iterator[Any]:
    """A queue whose lines are said here, wherever in the cluster they come from."""
    from ray.util.queue import Empty, Queue

    lines = Queue(actor_options={"num_cpus": 0})
    over = threading.Event()

    def listen() -> None:
        while not over.is_set():
            with contextlib.suppress(Empty, queue.Empty):
                say(lines.get(timeout=0.5))

    listener = threading.Thread(target=listen, name="lines", daemon=True)
    listener.start()
    try:
        yield lines
    finally:
        over.set()
        listener.join()
        while not lines.empty():
            say(lines.get())
        lines.shutdown()


def work(settings: dict[str, Any]) -> Any:
    """What each worker does: (metrics, run id), or the reason why the run cannot go on, the same on all ranks."""
    import ray.train
    from ray.train.torch import get_device

    job: Job = settings["job"]
    config, context = job.config, ray.train.get_context()
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // context.get_local_world_size()))
    place = Place.here(get_device())
    try:
        with _tracked(job, place) as tracker:
            hooks = Hooks(
                say=lambda line: job.lines.actor.put_nowait.remote(line),
                track=tracker.metrics,
                evaluate=evaluation(config, job.data, job.out, place, tracker),
                ending=lambda: ray.train.get_preemption_info() is not None,
            )
            metrics = run(config, job.data, job.out, place, hooks)
            return metrics, tracker.run_id or None
    except Stopped as stopped:
        return str(stopped)


def run(config: TrainConfig, data: str, out: str, place: Place, hooks: Hooks) -> dict[str, float]:
    """The whole run on this rank, with Ray and without: trains, then measures the best model and puts it in place."""
    checkpoints = Checkpoints(
        storage.join(out, "checkpoints"),
        config.checkpoint.keep,
        f"{_called(config, config.evaluate.select)}/{config.checkpoint.metric}",
        place,
    )
    try:
        training = Training(
            config,
            ShardIndex.read(data),
            tokenizer_of(config, out),
            checkpoints,
            place,
            hooks,
            storage.join(out, START) if config.start else "",
        )
    except ValueError as error:  # of settings, shards or checkpoints: the same on all ranks
        raise Stopped(str(error)) from error
    training.fit()
    best = checkpoints.best()
    assert best is not None
    metrics: dict[str, float] = {}
    with fetched(best) as folder:
        model = load_model(folder).to(place.device)
        for split in config.evaluate.final:
            metrics |= hooks.evaluate(model, split)
        if place.first:
            if metrics:
                hooks.track(metrics, training.progress.step)
            files = (file for file in folder.iterdir() if file.name not in (STATE, TRAINING))
            storage.put_files(files, storage.join(out, MODEL), last=CONFIG)
    place.wait()
    return metrics


def tokenizer_of(config: TrainConfig, out: str) -> Any:
    """The tokenizer of the model that the run began from, of the backbone, or the one made of the captions."""
    if config.model.backbone and not config.start:
        return load_tokenizer(config.model.backbone)
    with fetched(storage.join(out, START if config.start else TOKENIZER)) as folder:
        return load_tokenizer(folder)


def evaluation(
    config: TrainConfig, data: str, out: str, place: Place, tracker: Tracker
) -> Callable[[HBI, str], dict[str, float]]:
    """Measures a model on a split of the shards, on all ranks, and draws what it found on the first."""
    index, tokenizer, settings = ShardIndex.read(data), tokenizer_of(config, out), config.evaluate
    have = {shard.split for shard in index.shards if shard.samples}
    protocol = EvalProtocol(
        config.data.paragraph, settings.rates, settings.dsl, settings.qbnorm, settings.batch, settings.chunk
    )

    def measure(model: HBI, split: str) -> dict[str, float]:
        if split not in have:
            return {}
        try:
            result = evaluate(model, tokenizer, index, split, protocol, place)
        except ValueError as error:  # of the split: the same on all ranks
            raise Stopped(str(error)) from error
        called = _called(config, split)
        if place.first:
            tracker.figure(f"{called}-similarity", similarity_figure(result, called))
            tracker.figure(f"{called}-recall", recall_figure(result, called))
        return {name.replace(split, called, 1): value for name, value in result.metrics.items()}

    return measure


def _called(config: TrainConfig, split: str) -> str:
    """What metrics of a split are called: a choice made on the test split must show."""
    return f"selected-on-{split}" if split == config.evaluate.select == "test" else split


@contextlib.contextmanager
def _tracked(job: Job, place: Place) -> Iterator[Tracker]:
    """The MLflow run of this training run: the same one when the run is taken up again."""
    config, known = job.config, storage.join(job.out, RUN_ID)
    enabled = config.tracking.enabled and place.first
    run_id = storage.read_bytes(known).decode() if enabled and storage.exists(known) else None
    spool = tempfile.gettempdir() if storage.is_remote(job.out) else job.out
    spool = str(Path(spool) / "tracking")
    with Tracker(job.uri, config.tracking.experiment, config.name, spool, run_id, enabled) as tracker:
        if enabled:
            storage.write_bytes(known, str(tracker.run_id).encode())
            tracker.params(flatten(asdict(config)))
            tracker.tags(lineage(job.data))
        yield tracker
