"""MLflow beside the training: one run, one thread, nothing that waits and nothing that gets lost.

What the loop hands over is put on a queue (a microsecond) and written by a thread, first as a line of a file, its
outbox, and then to the tracking server, many lines at a time. While the server is away the lines stay in the outbox;
they are sent in order when it is back, by this process or by the next one that opens the same run. A line sent twice
does no harm: MLflow keeps one of two points with the same metric, step, time and value.

Whether the server is there is asked first, with a short time limit.
"""

import io
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hbi.infra.mlflow.lineage import Shards
from hbi.infra.mlflow.machine import MachineMonitor
from hbi.infra.mlflow.outbox import Event, Outbox
from hbi.infra.mlflow.sending import RUNNING, Say, Written, replay, send, tell
from hbi.infra.mlflow.store import client, experiment_id, first_line, require_alive, require_answer, shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow import MlflowClient

GATHER_SECONDS = 1.0
"""How long the thread gathers events before it sends them together."""
RETRY_SECONDS = 5.0
"""Between two tries of a server that is away."""
CLOSE_SECONDS = 20.0
"""How long `close` waits for what is still to be sent."""
SYSTEM_SECONDS = 10.0
"""Between two measurements of the machine."""
MLFLOW_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
"""What a request that a dying server leaves hanging may take (MLflow's own 7 retries take four minutes), and no lines
between ours. They can be set for the process only: while a tracker lives, and where the user has not set them."""


class Tracker:
    """One MLflow run. Its methods return at once; without a `uri` (every rank but 0) they do nothing.

    `outbox` is the local folder for what is not sent yet. `say` gets a line where the store is away or refuses
    something. `run_id` goes on with a run: what an earlier process left in
    the outbox is sent first, and a server that is away is waited for. Without it a run is made, and ValueError says so
    if the server does not answer. Leaving the context ends the run: FINISHED, KILLED or FAILED.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        run_name: str,
        outbox: str | Path,
        run_id: str | None = None,
        say: Say = tell,
    ) -> None:
        self.uri, self.run_id, self.say = uri, run_id or "", say
        self.unsent = 0
        self.step: int | None = None
        self.closed, self.away = not uri, ""
        self.written: Written | None = {} if run_id else None
        if not uri:
            return
        self.settings = {name: value for name, value in MLFLOW_SETTINGS.items() if name not in os.environ}
        os.environ.update(self.settings)
        self.run_id = self._open_run(experiment, run_name, run_id)
        self.outbox = Outbox(Path(outbox) / f"{self.run_id}.jsonl")
        self.queue: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        if run_id:  # behind what an earlier process said of its end, which may not have been sent
            self._put({"kind": "status", "status": RUNNING, "time": time.time()})
        # A daemon: a server that hangs must not keep the process from ending; the outbox has what it holds.
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
        self.step = max(step, self.step or 0)  # the final scores are those of an earlier one
        self._put({"kind": "metrics", "values": dict(values), "step": step, "time": time.time()})

    def figure(self, name: str, figure: "bytes | Figure") -> None:
        """A picture, as PNG bytes or as a matplotlib Figure (drawn by the thread), kept as `figures/<name>.png`."""
        self._put({"kind": "figure", "name": name, "figure": figure})

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows with the same columns, kept as `tables/<name>.json` in the form of MLflow's own tables."""
        columns = list(rows[0]) if rows else []
        data = [[row[column] for column in columns] for row in rows]
        content = json.dumps({"columns": columns, "data": data}, ensure_ascii=False).encode()
        self._put({"kind": "file", "name": f"tables/{name}.json", "content": content})

    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        """A file or a folder, which must stay where it is until it is sent; `folder` is where it goes."""
        self._put({"kind": "artifact", "path": str(Path(path).absolute()), "folder": folder})

    def dataset(self, shards: Shards, context: str = "training") -> None:
        """What the run reads, as an input of the run."""
        self._put({"kind": "dataset", "context": context, **asdict(shards)})

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
        self.unsent = self.outbox.waiting + self.queue.qsize()
        if self.unsent:
            self.say(
                f"{self.unsent} records of run {self.run_id} are not sent to {shown(self.uri)}; "
                f"{self.outbox.path} keeps them: they are sent when the run is resumed, or by "
                f"`python -m hbi.infra.mlflow.tracker {self.outbox.path} {shown(self.uri)}`"
            )
        return self.unsent

    def _put(self, event: Event) -> None:
        if self.uri:
            assert not self.closed, "the tracker is closed"
            self.queue.put(event)

    def _open_run(self, experiment: str, run_name: str, run_id: str | None) -> str:
        """The id of a new run, or of the old one."""
        from mlflow.exceptions import MlflowException

        try:
            require_answer(self.uri)
        except ValueError:
            if run_id:
                return run_id
            raise
        store = client(self.uri)
        tags = {}
        if run_id:
            try:
                if store.get_run(run_id).info.lifecycle_stage == "active":
                    return run_id
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    return run_id
            # A week of training must not end because someone tidied up the store.
            self.say(f"run {run_id} is not in {shown(self.uri)} any more: going on in a new run")
            tags = {"resumes": run_id}
        made = store.create_run(experiment_id(self.uri, experiment), run_name=run_name, tags=tags)
        return made.info.run_id

    # ---------------------------------------------------------------------------------------- the thread

    def _work(self) -> None:
        """Queue to outbox, outbox to server, until the end is asked for."""
        store, monitor = client(self.uri), MachineMonitor()
        events: list[Event] = []
        next_try = next_measurement = 0.0
        ended = False
        while not ended:
            ended = self._gather(events)
            if self.step is not None and time.monotonic() >= next_measurement:
                next_measurement = time.monotonic() + SYSTEM_SECONDS
                values = monitor.measure()
                events.append({"kind": "metrics", "values": values, "step": self.step, "time": time.time()})
            try:
                self.outbox.write([plain for event in events if (plain := self._plain(event))])
                events.clear()
                if self.outbox.waiting and (ended or time.monotonic() >= next_try):
                    self._send(store)
            except Exception as error:
                # Whatever a store may raise: the training goes on, the outbox keeps the lines.
                if not self.away:
                    self.away = first_line(error)
                    self.say(
                        f"{shown(self.uri)} is away ({self.away}): records are kept in {self.outbox.path}"
                    )
                next_try = time.monotonic() + RETRY_SECONDS
        self.outbox.close()

    def _send(self, store: "MlflowClient") -> None:
        """Sends all that waits; raises when the store is away."""
        require_alive(self.uri)
        for batch in self.outbox.batches():
            send(store, self.run_id, batch, self.outbox, self.written, self.say)
        if self.away:
            self.say(f"{shown(self.uri)} is back, and has everything")
        self.away = ""

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
                    self.say(f"left out {key} of step {event['step']}: {first_line(error)}")
            return event | {"values": numbers}
        if event["kind"] == "file":
            place = Path(event["name"])
            file = self.outbox.keep_file(place.name, event["content"])
            return {"kind": "artifact", "path": str(file), "folder": str(place.parent)}
        if event["kind"] == "figure":
            figure, place = event["figure"], Path(event["name"] + ".png")
            try:
                content = figure if isinstance(figure, bytes) else png(figure)
            except Exception as error:  # whatever drawing may raise
                self.say(f"left out the figure {event['name']}: {first_line(error)}")
                return None
            file = self.outbox.keep_file(place.name, content)
            return {"kind": "artifact", "path": str(file), "folder": str("figures" / place.parent)}
        return event


def png(figure: "Figure") -> bytes:
    """A figure's picture."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=100)
    return content.getvalue()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(
            "python -m hbi.infra.mlflow.tracker OUTBOX.jsonl TRACKING_URI: send what a run could not send"
        )
    try:
        print(f"{replay(*sys.argv[1:])} records sent")
    except ValueError as failure:
        sys.exit(str(failure))
