"""What a run said, sent to its MLflow store: batches of events, artifacts, and what an earlier process left behind."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from hbi.infra.mlflow.outbox import Event, Outbox
from hbi.infra.mlflow.store import client, first_line, mlflow_name, require_alive, shown

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput

UPLOAD_TRIES = 3
"""Tries of an artifact that fails while the server answers."""
METRICS_PER_REQUEST, PARAMS_PER_REQUEST = 1000, 100
PARAM_CHARACTERS, TAG_CHARACTERS = 6000, 8000
"""MLflow's limits on one request and on one value."""
RUNNING = "RUNNING"
"""The status of a run that is taken up again."""
INTERRUPTED = "interrupted"
"""Tag of a run that ended early and can go on; it is gone when the run does."""


Written = dict[str, set[int]]
"""By metric, the steps at which the store has a value."""
Say = Callable[[str], object]
"""Takes what there is to say about tracking."""


def tell(what: str) -> None:
    """A line about tracking, on standard error."""
    print(f"tracking: {what}", file=sys.stderr, flush=True)


def send(
    store: "MlflowClient",
    run_id: str,
    events: list[Event],
    outbox: Outbox,
    written: Written | None = None,
    say: Say = tell,
) -> None:
    """Sends events to a run. Raises when the store is away; what the store refuses is said, and not tried again.

    written: of a run that is taken up again; what it has is looked up, and a step that has a value gets no second one.
    """
    from mlflow.entities import RunTag

    while (again := _taken_up(events)) is not None:  # what came before is of an earlier process, its end too
        send(store, run_id, events[:again], outbox, written, say)
        store.update_run(run_id, RUNNING)
        if INTERRUPTED in store.get_run(run_id).data.tags:
            store.delete_tag(run_id, INTERRUPTED)
        events = events[again + 1 :]
    _send_metrics(store, run_id, events, written)
    params = {
        key: value for event in events if event["kind"] == "params" for key, value in event["values"].items()
    }
    tags = {
        key: value for event in events if event["kind"] == "tags" for key, value in event["values"].items()
    }
    tags |= _send_params(store, run_id, params)
    pairs = [RunTag(mlflow_name(key), value[:TAG_CHARACTERS]) for key, value in tags.items()]
    for first in range(0, len(pairs), PARAMS_PER_REQUEST):
        store.log_batch(run_id, tags=pairs[first : first + PARAMS_PER_REQUEST])
    for event in events:
        if event["kind"] == "artifact":
            _send_artifact(store, run_id, event, outbox, say)
        elif event["kind"] == "dataset":
            store.log_inputs(run_id, [_dataset_input(event)])
        elif event["kind"] == "status":
            store.set_terminated(run_id, event["status"], round(event["time"] * 1000))


def _send_metrics(store: "MlflowClient", run_id: str, events: list[Event], written: Written | None) -> None:
    from mlflow.entities import Metric

    metrics: list[Metric] = []
    now: Written = {}
    for event in events:
        for key, value in event["values"].items() if event["kind"] == "metrics" else ():
            name, step = mlflow_name(key), event["step"]
            if written is not None and not name.startswith("system/"):
                if name not in written:
                    written[name] = {point.step for point in store.get_metric_history(run_id, name)}
                if step in written[name] or step in now.setdefault(name, set()):
                    continue
                now[name].add(step)
            metrics.append(Metric(name, value, round(event["time"] * 1000), step))
    for first in range(0, len(metrics), METRICS_PER_REQUEST):
        store.log_batch(run_id, metrics=metrics[first : first + METRICS_PER_REQUEST])
    if written is not None:
        for name, steps in now.items():  # only now: what fails is sent again
            written[name] |= steps


def _taken_up(events: list[Event]) -> int | None:
    """Where a process took the run up, the first time."""
    return next((number for number, event in enumerate(events) if event.get("status") == RUNNING), None)


def _dataset_input(event: Event) -> "DatasetInput":
    from mlflow.entities import Dataset, DatasetInput, InputTag

    held = {key: event[key] for key in ("name", "digest", "source_type", "source", "profile")}
    return DatasetInput(Dataset(**held), [InputTag("mlflow.data.context", event["context"])])


def _send_params(store: "MlflowClient", run_id: str, params: dict[str, str]) -> dict[str, str]:
    """Sends settings; returns as tags those that the run has with another value (MLflow's parameters are final)."""
    from mlflow.entities import Param

    wanted = {mlflow_name(key): value[:PARAM_CHARACTERS] for key, value in params.items()}
    held = store.get_run(run_id).data.params if wanted else {}
    new = [Param(key, value) for key, value in wanted.items() if key not in held]
    for first in range(0, len(new), PARAMS_PER_REQUEST):
        store.log_batch(run_id, params=new[first : first + PARAMS_PER_REQUEST])
    return {f"resumed/{key}": value for key, value in wanted.items() if held.get(key, value) != value}


def _send_artifact(store: "MlflowClient", run_id: str, event: Event, outbox: Outbox, say: Say) -> None:
    """Uploads a file or folder. One that fails comes again later, behind what else waits, and then is given up."""
    path = Path(event["path"])
    try:
        if path.is_dir():
            folder = "/".join(part for part in (event["folder"], path.name) if part)
            store.log_artifacts(run_id, str(path), folder)
        elif path.exists():
            store.log_artifact(run_id, str(path), event["folder"])
        elif outbox.files not in path.parents:  # a picture that is gone was sent by an earlier try
            say(f"{path} was gone before it could be sent")
    except Exception as error:
        tries = event.get("tries", 0) + 1
        if tries < UPLOAD_TRIES:
            outbox.write([event | {"tries": tries}])
            return
        say(f"{path} could not be sent ({first_line(error)}): given up after {tries} tries")
    outbox.forget_file(path)


def replay(path: str | Path, uri: str) -> int:
    """Sends what a run left in its outbox, and returns how many records that were. ValueError if the store is away."""
    file = Path(path)
    if not file.exists():
        raise ValueError(f"{path}: no such outbox: nothing is left to send, or it lies elsewhere")
    outbox = Outbox(file)
    count = outbox.waiting
    try:
        require_alive(uri)
        store = client(uri)
        written: Written = {}
        for batch in outbox.batches():
            send(store, file.stem, batch, outbox, written)
    except Exception as error:
        raise ValueError(
            f"{shown(uri)} does not take {path} ({first_line(error)}): it stays as it is"
        ) from error
    outbox.close()
    return count
