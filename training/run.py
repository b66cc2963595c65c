"""A training run on a Ray cluster: `TorchTrainer` around the loop, and the model that comes out of it."""

import contextlib
import json
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import asdict, dataclass
from typing import Any

from hbi.infra import storage
from hbi.infra.mlflow.lineage import lineage
from hbi.infra.mlflow.registry import ModelPackage, NewVersion, better_holder, log_and_register
from hbi.infra.mlflow.sending import INTERRUPTED
from hbi.infra.mlflow.store import client, require_alive, require_answer, tracking_uri
from hbi.infra.nodes import require_shared
from hbi.infra.ray_runtime import messages, ray_running
from hbi.infra.scratch import scratch_swept
from hbi.infra.signals import Interrupted, stop_requests
from hbi.pipelines.sample import ShardIndex
from hbi.training.answers import refuse_seen_tests, with_vocabulary
from hbi.training.checks import check_cluster, check_splits
from hbi.training.command import command_line
from hbi.training.job import CONFIG, MODEL, RUN_ID, Job, TrainingStopped, fetched, has_init, metrics_prefix
from hbi.training.settings import TrainConfig
from hbi.training.tokenizers import with_tokenizer

RESULT = "result.json"
STOP_SECONDS = 25.0
"""How long a run that is asked to end may take for its step and its checkpoint: less than the 30 s after which
Kubernetes and Slurm end whatever they asked to."""
POLL_SECONDS = 0.1
GO_ON = "run again to go on from the last checkpoint"


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
    log: Callable[[str], None] = lambda line: print(line, flush=True),
) -> TrainResult:
    """Trains on the shards `data` and leaves everything in the folder `out`; goes on where an earlier call stopped.

    data, out: local or s3://; on a cluster of several machines, a folder that all of them see. tracking: the MLflow
    store (default: MLFLOW_TRACKING_URI, else runs/mlflow.db). package: what the registry gets
    beside the weights; without one nothing is registered. log: gets lines of progress.

    Raises ValueError, in one line, where the shards, the checkpoints in `out` or the settings do not fit, where the
    loss is not finite, where too much of the data cannot be read, and where a cluster has not the CPUs or GPUs that the
    run asks for, or does not see a folder on all its nodes.
    """
    data, out = storage.absolute(data), storage.absolute(out)
    uri = tracking_uri(tracking) if config.tracking.enabled else ""
    command = command_line(config, data, out)
    index = ShardIndex.read(data)
    for line in check_splits(config, index):
        log(line)
    refuse_seen_tests(config, index, tracking, log)
    if storage.exists(storage.join(out, RESULT)):  # then nothing needs to be fetched to know what the run is
        finished = _finished(_resolved(config, index, out, tracking, log), out)
        if finished is not None:
            log(f"{out}: this run is finished; give another --out to train anew")
            return finished
    if uri and not storage.exists(storage.join(out, RUN_ID)):  # one that goes on may wait for its server
        require_answer(uri)
    if has_init(config):  # said before Ray starts
        from hbi.training.init import require_init

        require_init(config, out)
    with ray_running():
        check_cluster(config)
        require_shared({"--data": data, "--out": out} | ({"--tracking": uri} if uri else {}))
        config = _resolved(config, index, out, tracking, log)
        storage.write_bytes(storage.join(out, CONFIG), config.to_json().encode())
        with stop_requests() as stop, messages(log) as line:
            job = Job(config, data, out, uri, command, line)
            try:
                answer = _followed(job, stop, log)
            except KeyboardInterrupt as end:
                _mark_killed(uri, out)
                raise Interrupted(getattr(end, "number", signal.SIGINT), f"interrupted: {GO_ON}") from None
            if isinstance(answer, TrainingStopped):
                raise Interrupted(stop() or signal.SIGINT, str(answer))
    if isinstance(answer, Exception):
        raise ValueError(str(answer))
    metrics, run_id = answer
    version = None
    if run_id and package and config.tracking.register:
        version = _registered(job, metrics, run_id, package, log)
    result = TrainResult(storage.join(out, MODEL), metrics, run_id, version)
    storage.write_bytes(storage.join(out, RESULT), json.dumps(asdict(result), indent=2).encode())
    return result


def _registered(
    job: Job, metrics: dict[str, float], run_id: str, package: ModelPackage, log: Callable[[str], None]
) -> str:
    """The version that the registry gives the run's model."""
    config = job.config
    new = NewVersion(
        metrics=metrics,
        tags=lineage(job.data),
        alias=config.tracking.alias,
        alias_metric=f"{metrics_prefix(config, config.evaluate.select)}/{config.metric}",
    )
    with fetched(storage.join(job.out, MODEL)) as local:
        if kept := better_holder(job.uri, new):
            log(f"{new.alias} stays version {kept}: this model is not better by {new.alias_metric}")
        return log_and_register(local, run_id, job.uri, package, new)


def _resolved(
    config: TrainConfig, index: ShardIndex, out: str, tracking: str | None, log: Callable[[str], None]
) -> TrainConfig:
    """The run with everything that it takes from elsewhere: a model to begin with, a tokenizer, a list of answers."""
    if has_init(config):
        from hbi.training.init import with_init

        config = with_init(config, out, tracking)
    config = with_tokenizer(config, index, out)
    return with_vocabulary(config, index, out, log)


def _followed(job: Job, stop: Callable[[], int], log: Callable[[str], None]) -> Any:
    """What the workers return. Asked to end, they are told, and have `STOP_SECONDS`; then KeyboardInterrupt.

    Ray Train runs in a thread: in the main one it has a handler of its own for Ctrl-C, which ends the process without
    a word.
    """
    future: Future[Any] = Future()

    def follow() -> None:
        try:
            future.set_result(_run_on_ray(job))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=follow, name="ray-train", daemon=True).start()
    deadline = float("inf")
    while not wait([future], POLL_SECONDS).done:
        if time.monotonic() > deadline:
            raise Interrupted(stop())
        if stop() and deadline == float("inf"):
            deadline = time.monotonic() + STOP_SECONDS
            log("stopping after this step, with a checkpoint; a second signal ends at once")
            job.line.stop()
    return future.result()


def _mark_killed(uri: str, out: str) -> None:
    """Says so in MLflow, too: the worker that held the run is gone."""
    known = storage.join(out, RUN_ID)
    if uri and storage.exists(known):
        with contextlib.suppress(Exception):  # an end that must not wait for a server that is away
            require_alive(uri)
            client(uri).set_terminated(storage.read_bytes(known).decode(), "KILLED")
            client(uri).set_tag(storage.read_bytes(known).decode(), INTERRUPTED, GO_ON)


def _finished(config: TrainConfig, out: str) -> TrainResult | None:
    """What an earlier call with the same configuration gave, if it came to its end."""
    try:
        same = TrainConfig.from_json(storage.read_bytes(storage.join(out, CONFIG)).decode()) == config
        return TrainResult(**json.loads(storage.read_bytes(storage.join(out, RESULT)))) if same else None
    except FileNotFoundError:
        return None


def _run_on_ray(job: Job) -> Any:
    """Runs `work` on Ray Train's workers: what the first of them returned, or why it could not go on."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import WorkerGroupError

    def work(settings: dict[str, Any]) -> Any:  # in here, so that the workers alone import the model
        from hbi.training.worker import work

        return work(settings)

    workers = job.config.workers
    path, filesystem = _ray_storage(job.out)
    trainer = TorchTrainer(
        work,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if workers.gpus else "gloo"),
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
    with scratch_swept():
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
