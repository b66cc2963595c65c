"""MLflow beside the training: one run, one thread, nothing that waits and nothing that gets lost.

What the loop hands over is put on a queue (a microsecond) and written by a thread, first as a line of a file, the
spool, and then to the tracking server, many lines at a time. While the server is away the lines stay in the spool;
they are sent in order when it is back, by this process or by the next one that opens the same run. A line sent twice
does no harm: MLflow keeps one of two points with the same metric, step, time and value.

Whether the server is there is asked first, with a short time limit.
"""

import contextlib
import hashlib
import http.client
import io
import os
import queue
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from hbi.infra import storage
from hbi.infra.mlflow import registry
from hbi.infra.mlflow.machine import measure
from hbi.infra.mlflow.outbox import Event, Spool
from hbi.infra.project import ROOT

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow import MlflowClient

GATHER_SECONDS = 1.0
"""How long the thread gathers events before it sends them together."""
RETRY_SECONDS = 5.0
"""Between two tries of a server that is away."""
ALIVE_SECONDS = 3.0
"""How long a server may take to say that it is alive."""
CLOSE_SECONDS = 20.0
"""How long `close` waits for what is still to be sent."""
SYSTEM_SECONDS = 10.0
"""Between two measurements of the machine."""
UPLOAD_TRIES = 3
"""Tries of an artifact that fails while the server answers."""
MLFLOW_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
"""What a request that a dying server leaves hanging may take (MLflow's own 7 retries take four minutes), and no lines
between ours. They can be set for the process only: while a tracker lives, and where the user has not set them."""
METRICS_PER_REQUEST, PARAMS_PER_REQUEST = 1000, 100
PARAM_CHARACTERS, TAG_CHARACTERS = 6000, 8000
"""MLflow's limits on one request and on one value."""


class Tracker:
    """One MLflow run. Its methods return at once; a disabled one (every rank but 0) does nothing.

    `spool` is the local folder for what is not sent yet. `run_id` goes on with a run: what an earlier process left in
    the spool is sent first, and a server that is away is waited for. Without it a run is made, and ValueError says so
    if the server does not answer. Leaving the context ends the run: FINISHED, KILLED or FAILED.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        run_name: str,
        spool: str | Path,
        run_id: str | None = None,
        enabled: bool = True,
    ) -> None:
        self.uri, self.enabled, self.run_id = uri, enabled, run_id or ""
        self.step = self.unsent = 0
        self.closed = not enabled
        if not enabled:
            return
        self.settings = {name: value for name, value in MLFLOW_SETTINGS.items() if name not in os.environ}
        os.environ.update(self.settings)
        self.run_id = _open_run(uri, experiment, run_name, run_id)
        self.spool = Spool(Path(spool) / f"{self.run_id}.jsonl")
        self.queue: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        # A daemon: a server that hangs must not keep the process from ending; the spool has what it holds.
        self.thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self.thread.start()

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        killed = kind is not None and not issubclass(kind, Exception)
        self.close("FINISHED" if kind is None else "KILLED" if killed else "FAILED")

    # ------------------------------------------------------------------------------ what the loop calls

    def params(self, values: Mapping[str, Any]) -> None:
        """Settings of the run, by their path (`optim.lr`). Changed ones become tags `resumed/optim.lr`."""
        self._put({"kind": "params", "values": {key: str(value) for key, value in values.items()}})

    def tags(self, values: Mapping[str, Any]) -> None:
        """Facts about the run; the last one of a name holds."""
        self._put({"kind": "tags", "values": {key: str(value) for key, value in values.items()}})

    def metrics(self, values: Mapping[str, Any], step: int) -> None:
        """Numbers of a step, by our names (`val/t2v/R@1`): floats, or tensors that nobody writes to any more."""
        self.step = step
        self._put({"kind": "metrics", "values": dict(values), "step": step, "time": time.time()})

    def figure(self, name: str, figure: "bytes | Figure") -> None:
        """A picture, as PNG bytes or as a matplotlib Figure (drawn by the thread), kept as `figures/<name>.png`."""
        self._put({"kind": "figure", "name": name, "figure": figure})

    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        """A file or a folder, which must stay where it is until it is sent; `folder` is where it goes."""
        self._put({"kind": "artifact", "path": str(Path(path).absolute()), "folder": folder})

    def close(self, status: str = "FINISHED", timeout: float = CLOSE_SECONDS) -> int:
        """Ends the run, waits at most `timeout` seconds, and returns how many records are left, having said where."""
        if self.closed:
            return self.unsent
        self._put({"kind": "status", "status": status, "time": time.time()})
        self.closed = True
        self.queue.put(None)
        self.thread.join(timeout)
        for name in self.settings:
            os.environ.pop(name, None)
        self.unsent = self.spool.waiting + self.queue.qsize()
        if self.unsent:
            _say(
                f"{self.unsent} records of run {self.run_id} are not sent to {shown(self.uri)}; {self.spool.path} "
                "keeps them: they are sent when the run is resumed, or by "
                f"`python -m hbi.infra.mlflow.tracker {self.spool.path} {shown(self.uri)}`"
            )
        return self.unsent

    def _put(self, event: Event) -> None:
        if self.enabled:
            assert not self.closed, "the tracker is closed"
            self.queue.put(event)

    # ---------------------------------------------------------------------------------------- the thread

    def _work(self) -> None:
        """Queue to spool, spool to server, until the end is asked for."""
        store = registry.client(self.uri)
        events: list[Event] = []
        away = ""
        next_try = next_system = 0.0
        ended = False
        while not ended:
            if time.monotonic() >= next_system:
                next_system = time.monotonic() + SYSTEM_SECONDS
                with contextlib.suppress(Exception):  # a container may hide what is asked for
                    events.append(
                        {"kind": "metrics", "values": measure(), "step": self.step, "time": time.time()}
                    )
            ended = self._gather(events)
            try:
                self.spool.write([plain for event in events if (plain := self._plain(event))])
                events.clear()
                if self.spool.waiting and (ended or time.monotonic() >= next_try):
                    _require_alive(self.uri)
                    for batch in self.spool.batches():
                        send(store, self.run_id, batch, self.spool)
                    if away:
                        _say(f"{shown(self.uri)} is back, and has everything")
                    away = ""
            except (
                Exception
            ) as error:  # whatever a store may raise: the training goes on, the spool keeps the lines
                if not away:
                    away = _first_line(error)
                    _say(f"{shown(self.uri)} is away ({away}): records are kept in {self.spool.path}")
                next_try = time.monotonic() + RETRY_SECONDS
        self.spool.close()

    def _gather(self, events: list[Event]) -> bool:
        """Adds what comes within a second; true if it was the last."""
        until = time.monotonic() + GATHER_SECONDS
        while (left := until - time.monotonic()) > 0:
            try:
                event = self.queue.get(timeout=left)
            except queue.Empty:
                break
            if event is None:
                return True
            events.append(event)
        return False

    def _plain(self, event: Event) -> Event | None:
        """The event as JSON can hold it; None (said so) for what cannot be a number or a picture."""
        if event["kind"] == "metrics":
            numbers = {}
            for key, value in event["values"].items():
                try:
                    numbers[key] = float(value)
                except (TypeError, ValueError, RuntimeError) as error:
                    _say(f"left out {key} of step {event['step']}: {_first_line(error)}")
            return event | {"values": numbers}
        if event["kind"] == "figure":
            figure, place = event["figure"], Path(event["name"] + ".png")
            try:
                content = figure if isinstance(figure, bytes) else png(figure)
            except Exception as error:  # whatever drawing may raise
                _say(f"left out the figure {event['name']}: {_first_line(error)}")
                return None
            file = self.spool.keep_file(place.name, content)
            return {"kind": "artifact", "path": str(file), "folder": str("figures" / place.parent)}
        return event


# ------------------------------------------------------------------------------------------------ sending


def send(store: "MlflowClient", run_id: str, events: list[Event], spool: Spool) -> None:
    """Sends events to a run. Raises when the store is away; what the store refuses is said, and not tried again."""
    from mlflow.entities import Metric, RunTag

    metrics = [
        Metric(registry.mlflow_name(key), value, round(event["time"] * 1000), event["step"])
        for event in events
        if event["kind"] == "metrics"
        for key, value in event["values"].items()
    ]
    for first in range(0, len(metrics), METRICS_PER_REQUEST):
        store.log_batch(run_id, metrics=metrics[first : first + METRICS_PER_REQUEST])
    params = {
        key: value for event in events if event["kind"] == "params" for key, value in event["values"].items()
    }
    tags = {
        key: value for event in events if event["kind"] == "tags" for key, value in event["values"].items()
    }
    tags |= _send_params(store, run_id, params)
    pairs = [RunTag(registry.mlflow_name(key), value[:TAG_CHARACTERS]) for key, value in tags.items()]
    for first in range(0, len(pairs), PARAMS_PER_REQUEST):
        store.log_batch(run_id, tags=pairs[first : first + PARAMS_PER_REQUEST])
    for event in events:
        if event["kind"] == "artifact":
            _send_artifact(store, run_id, event, spool)
        elif event["kind"] == "status":
            store.set_terminated(run_id, event["status"], round(event["time"] * 1000))


def _send_params(store: "MlflowClient", run_id: str, params: dict[str, str]) -> dict[str, str]:
    """Sends settings; returns as tags those that the run has with another value (MLflow's parameters are final)."""
    from mlflow.entities import Param

    wanted = {registry.mlflow_name(key): value[:PARAM_CHARACTERS] for key, value in params.items()}
    held = store.get_run(run_id).data.params if wanted else {}
    new = [Param(key, value) for key, value in wanted.items() if key not in held]
    for first in range(0, len(new), PARAMS_PER_REQUEST):
        store.log_batch(run_id, params=new[first : first + PARAMS_PER_REQUEST])
    return {f"resumed/{key}": value for key, value in wanted.items() if held.get(key, value) != value}


def _send_artifact(store: "MlflowClient", run_id: str, event: Event, spool: Spool) -> None:
    """Uploads a file or folder. One that fails comes again later, behind what else waits, and then is given up."""
    path = Path(event["path"])
    try:
        if path.is_dir():
            folder = "/".join(part for part in (event["folder"], path.name) if part)
            store.log_artifacts(run_id, str(path), folder)
        elif path.exists():
            store.log_artifact(run_id, str(path), event["folder"])
        elif spool.files not in path.parents:  # a picture that is gone was sent by an earlier try
            _say(f"{path} was gone before it could be sent")
    except Exception as error:
        tries = event.get("tries", 0) + 1
        if tries < UPLOAD_TRIES:
            spool.write([event | {"tries": tries}])
            return
        _say(f"{path} could not be sent ({_first_line(error)}): given up after {tries} tries")
    spool.forget_file(path)


def replay(path: str | Path, uri: str) -> int:
    """Sends what a run left in its spool, and returns how many records that were. ValueError if the store is away."""
    file = Path(path)
    if not file.exists():
        raise ValueError(f"{path}: no such spool: nothing is left to send, or it lies elsewhere")
    spool = Spool(file)
    count = spool.waiting
    try:
        _require_alive(uri)
        store = registry.client(uri)
        for batch in spool.batches():
            send(store, file.stem, batch, spool)
    except Exception as error:
        raise ValueError(
            f"{shown(uri)} does not take {path} ({_first_line(error)}): it stays as it is"
        ) from error
    spool.close()
    return count


def _open_run(uri: str, experiment: str, run_name: str, run_id: str | None) -> str:
    """The id of a new run, or of the old one, which is running again."""
    from mlflow.exceptions import MlflowException

    try:
        _require_alive(uri)
    except (OSError, http.client.HTTPException) as error:
        if run_id:
            return run_id
        raise ValueError(
            f"tracking store {shown(uri)} does not answer ({_first_line(error)}): start it, or name another "
            "(--tracking, MLFLOW_TRACKING_URI)"
        ) from None
    store = registry.client(uri)
    tags = {}
    if run_id:
        try:
            if store.get_run(run_id).info.lifecycle_stage == "active":
                store.update_run(run_id, "RUNNING")
                return run_id
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                return run_id
        # A week of training must not end because someone tidied up the store.
        _say(f"run {run_id} is not in {shown(uri)} any more: going on in a new run")
        tags = {"resumes": run_id}
    return store.create_run(registry.experiment_id(uri, experiment), run_name=run_name, tags=tags).info.run_id


def _require_alive(uri: str) -> None:
    """OSError unless the server answers within a moment. Other stores than servers show it when they are used."""
    if not registry.is_server(uri):
        return
    parts = urlsplit(uri)
    address = parts._replace(
        netloc=parts.netloc.rpartition("@")[2], path=parts.path.rstrip("/") + "/health"
    ).geturl()
    try:
        urllib.request.urlopen(address, timeout=ALIVE_SECONDS).close()
    except urllib.error.HTTPError as error:
        error.close()
        if error.code >= 500:
            raise OSError(f"it answers {error.code}") from None
    except urllib.error.URLError as error:
        if not isinstance(error.reason, ssl.SSLError):  # a certificate that MLflow may be told to trust
            raise


def shown(uri: str) -> str:
    """The store's address without a password."""
    user, at, rest = uri.rpartition("@")
    return f"{user.partition('://')[0]}://***@{rest}" if at else uri


def _say(what: str) -> None:
    print(f"tracking: {what}", file=sys.stderr, flush=True)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


# --------------------------------------------------------------------------------------------- what to say


def lineage(shards: str) -> dict[str, str]:
    """Where a run comes from, as tags: the commit, whether tracked files differ from it, and the shards' digest."""

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(ROOT), *arguments]
        try:
            return subprocess.run(
                command, capture_output=True, text=True, timeout=20, check=True
            ).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None

    commit = git("rev-parse", "HEAD") or "unknown"
    changed = git("status", "--porcelain", "--untracked-files=no")
    index = storage.read_bytes(storage.join(shards, "index.json"))
    return {
        "mlflow.source.git.commit": commit,
        "commit": commit,
        "dirty": "unknown" if changed is None else str(bool(changed)).lower(),
        "data": storage.absolute(shards),
        "data_sha256": hashlib.sha256(index).hexdigest(),
    }


def png(figure: "Figure") -> bytes:
    """A figure's picture."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=100)
    return content.getvalue()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(
            "python -m hbi.infra.mlflow.tracker SPOOL.jsonl TRACKING_URI: send what a run could not send"
        )
    try:
        print(f"{replay(*sys.argv[1:])} records sent")
    except ValueError as failure:
        sys.exit(str(failure))
