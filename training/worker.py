"""What each worker of a run does: the loop, then the chosen model measured and put in place."""

import contextlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from hbi.infra import storage
from hbi.infra.mlflow.lineage import Shards, lineage, origin
from hbi.infra.mlflow.sending import INTERRUPTED
from hbi.infra.mlflow.tracker import Tracker
from hbi.infra.nodes import cores
from hbi.infra.ray_runtime import Line
from hbi.model.hbi import HBI
from hbi.model.weights import load_model
from hbi.pipelines.sample import ShardIndex
from hbi.training.answers import TRAINED, trained_on, training_answers
from hbi.training.checkpoint import STATE, TRAINING, Checkpoints, read_progress
from hbi.training.evaluate.answers import evaluate_answers
from hbi.training.evaluate.captions import evaluate_captions
from hbi.training.evaluate.encode import SplitEncoder
from hbi.training.evaluate.figures import recall_figure, similarity_figure
from hbi.training.evaluate.retrieval import evaluate
from hbi.training.job import (
    CONFIG,
    INIT,
    MODEL,
    RUN_ID,
    Job,
    TrainingAborted,
    TrainingStopped,
    fetched,
    has_init,
    metrics_prefix,
)
from hbi.training.loop import Hooks, Training
from hbi.training.parallel import Process
from hbi.training.settings import TrainConfig, flatten
from hbi.training.tokenizers import tokenizer_of


def work(settings: dict[str, Any]) -> Any:
    """What each worker does: (metrics, run id), or why the run ended early, the same on all ranks."""
    import ray.train
    from ray.train.torch import get_device

    job: Job = settings["job"]
    config, context = job.config, ray.train.get_context()
    torch.set_num_threads(max(1, cores() // context.get_local_world_size()))
    process = Process.current(get_device())
    try:
        with _asked_to_stop(job.line, process) as stop, _tracked(job, process) as tracker:
            hooks = Hooks(
                log=job.line.say,
                track=tracker.metrics,
                evaluate=evaluation(config, job.data, job.out, process, tracker),
                preempted=lambda: ray.train.get_preemption_info() is not None,
                stop=stop,
            )
            try:
                metrics = run(config, job.data, job.out, process, hooks)
            except TrainingStopped as stopped:
                tracker.tags({INTERRUPTED: str(stopped)})
                raise
            return metrics, tracker.run_id or None
    except (TrainingAborted, TrainingStopped) as early:
        return early


def _asked_to_stop(line: Line, process: Process) -> contextlib.AbstractContextManager[Callable[[], bool]]:
    """Whether an early end was asked for: the first rank knows it, which is enough."""
    return line.watched() if process.first else contextlib.nullcontext(lambda: False)


def run(config: TrainConfig, data: str, out: str, process: Process, hooks: Hooks) -> dict[str, float]:
    """The whole run on this rank, with Ray and without: trains, then measures the best model and puts it in place."""
    checkpoints = Checkpoints(
        storage.join(out, "checkpoints"),
        config.checkpoint.keep,
        f"{metrics_prefix(config, config.evaluate.select)}/{config.metric}",
        process,
    )
    try:
        training = Training(
            config,
            ShardIndex.read(data),
            tokenizer_of(config, out),
            checkpoints,
            hooks,
            storage.join(out, INIT) if has_init(config) else "",
        )
    except ValueError as error:  # of settings, shards or checkpoints: the same on all ranks
        raise TrainingAborted(str(error)) from error
    training.fit()
    best = checkpoints.best()
    assert best is not None
    metrics: dict[str, float] = {}
    with fetched(best) as folder:
        model = load_model(folder).to(process.device)
        for split in config.evaluate.final:
            if any(process.gather_objects(hooks.stop())):
                raise TrainingStopped(f"stopped before {split} was measured: run again to go on")
            metrics |= hooks.evaluate(model, split)
        if process.first:
            if metrics:
                chosen = read_progress(folder).step
                hooks.track({f"final/{name}": value for name, value in metrics.items()}, chosen)
            files = (file for file in folder.iterdir() if file.name not in (STATE, TRAINING))
            storage.put_files(files, storage.join(out, MODEL), last=CONFIG)
            before = trained_on(storage.join(out, INIT), None) if config.init_from else []
            sources = [*before, {"data": data, "split": config.data.split}]
            storage.write_bytes(storage.join(out, MODEL, TRAINED), json.dumps(sources, indent=1).encode())
    process.barrier()
    return metrics


def evaluation(
    config: TrainConfig, data: str, out: str, process: Process, tracker: Tracker
) -> Callable[[HBI, str], dict[str, float]]:
    """Measures a model on a split of the shards, on all ranks, and draws what it found on the first."""
    index, tokenizer = ShardIndex.read(data), tokenizer_of(config, out)
    have = {shard.split for shard in index.shards if shard.samples}

    asked = list(training_answers(index, config.data.split)) if "qa" in config.task else []

    def measure(model: HBI, split: str) -> dict[str, float]:
        if split not in have:
            return {}
        called, metrics = metrics_prefix(config, split), {}
        encoder = SplitEncoder(model, tokenizer, index, process, config.protocol)
        try:
            for task in dict.fromkeys(config.task):
                if task == "retrieval":
                    result = evaluate(encoder, split)
                    if process.first:
                        tracker.figure(f"{called}-similarity", similarity_figure(result, called))
                        tracker.figure(f"{called}-recall", recall_figure(result, called))
                else:
                    result = (
                        evaluate_answers(encoder, split, asked)
                        if task == "qa"
                        else evaluate_captions(encoder, split, config.heads.decode)
                    )
                    if process.first:
                        tracker.table(f"{called}-{task}", result.rows[: config.heads.samples])
                metrics |= result.metrics
        except ValueError as error:  # of the split: the same on all ranks
            raise TrainingAborted(str(error)) from error
        return {name.replace(split, called, 1): value for name, value in metrics.items()}

    return measure


@contextlib.contextmanager
def _tracked(job: Job, process: Process) -> Iterator[Tracker]:
    """The MLflow run of this training run: the same one when the run is taken up again."""
    config, known = job.config, storage.join(job.out, RUN_ID)
    enabled = config.tracking.enabled and process.first
    run_id = storage.read_bytes(known).decode() if enabled and storage.exists(known) else None
    outbox = storage.join(job.out, "tracking")
    if storage.is_remote(job.out):
        outbox = str(Path(tempfile.gettempdir()) / f"hbi-tracking-{os.getuid()}")
    name = f"{config.name}-{datetime.now():%m%d-%H%M%S}"
    uri = job.uri if enabled else ""

    def say(what: str) -> None:
        job.line.say(f"tracking: {what}")

    with Tracker(uri, config.tracking.experiment, name, outbox, run_id, say) as tracker:
        if enabled:
            storage.write_bytes(known, str(tracker.run_id).encode())
            # The answers lie in a file of the run, and are too long for a parameter.
            heads = replace(config.heads, vocabulary=())
            tracker.params(flatten(asdict(replace(config, heads=heads))))
            tracker.tags(lineage(job.data) | origin(_about(job), f"hbi train {config.name}", job.command))
            index = ShardIndex.read(job.data)
            counts = Counter({shard.split: 0 for shard in index.shards})
            for shard in index.shards:
                counts[shard.split] += shard.samples
            tracker.dataset(Shards.of(job.data, dict(counts)))
        yield tracker


def _about(job: Job) -> str:
    """A run in a sentence."""
    config = job.config
    return (
        f"{config.name} on {job.data}: batch {config.data.batch}, {config.optim.epochs} epochs, "
        f"{config.workers.count} workers, learning rate {config.optim.lr:g}. Everything lies in {job.out}."
    )
