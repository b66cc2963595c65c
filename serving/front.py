"""Starting and stopping: which model answers, the deployments on Ray Serve, and the HTTP server in front of them."""

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hbi.infra import storage
from hbi.infra.mlflow.resolve import pin_model, resolve_model
from hbi.infra.mlflow.store import tracking_uri
from hbi.model.folder import model_digest, read_config
from hbi.serving.index.table import ClipTable, IndexMetadata
from hbi.serving.settings import ServeSettings

HEADER_SECONDS = 15.0
"""How long a client may take to send the head of a request."""
START_SECONDS = 30.0
"""How long the HTTP server may take to listen."""


@dataclass(frozen=True)
class Answering:
    """Which model answers for an index."""

    model: str
    """Its folder or pinned name, which replicas resolve where they are."""
    tracking: str
    """The MLflow store of a `models:/` name."""
    folder: str
    """Where it lies on this machine."""
    heads: tuple[str, ...] = ()
    """What it does beside retrieval: `ModelConfig.heads`."""


def model_of(index: str, model: str | None = None, tracking: str | None = None) -> Answering:
    """The model that answers for an index: its own, which `model` may name in another way.

    tracking: the MLflow store (default: MLFLOW_TRACKING_URI, else the one that the index names). ValueError where
    `model` is another one than the index was made by, or where it cannot be had.
    """
    metadata = IndexMetadata.read(index)
    in_store = (model or metadata.model).startswith("models:/")
    uri = store_of(tracking, metadata.tracking) if in_store else ""
    name = pin_model(model, uri) if model else metadata.model
    folder = resolve_model(name, uri)
    if model_digest(folder) != metadata.digest:
        named = f"{model} is {name}" if model and model != name else name
        raise ValueError(
            f"{named}, not the model that made {index} ({metadata.model}): leave MODEL out to use the index's own, "
            "or index the shards anew with this one"
        )
    return Answering(name, uri, folder, read_config(folder).heads)


def store_of(tracking: str | None, recorded: str) -> str:
    """The MLflow store to ask: what was given, MLFLOW_TRACKING_URI, or the one that an index names.

    ValueError for an sqlite store that is gone: MLflow would make an empty one in its place.
    """
    given = tracking or os.environ.get("MLFLOW_TRACKING_URI") or recorded or "runs"
    sqlite = given.startswith("sqlite:///")
    file = Path(given.removeprefix("sqlite:///") if sqlite else f"{given}/mlflow.db").expanduser()
    if (sqlite or "://" not in given) and not file.is_file():
        raise ValueError(
            f"{given}: there is no such MLflow store: say where it is with --tracking, or in MLFLOW_TRACKING_URI"
        )
    return tracking_uri(given)


def free_port(host: str, port: int) -> None:
    """ValueError if nothing can listen there."""
    _listen(host, port).close()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host.strip("[]"), port))
        listener.listen(1024)
    except (OSError, OverflowError) as error:
        listener.close()
        raise ValueError(f"--port {port}: cannot listen on {host} ({error}): choose another --port") from None
    return listener


class Served:
    """What `start` started."""

    def __init__(self, address: str, name: str, mine: bool, server: Any, thread: threading.Thread) -> None:
        self.address = address
        """Where it answers."""
        self._name = name
        self._mine = mine
        """Whether Serve itself was started with it."""
        self._server = server
        self._thread = thread

    def stop(self) -> None:
        """Answers no more, at once, and takes the application down, on a cluster of others too."""
        self._server.should_exit = True
        self._server.force_exit = True
        with contextlib.suppress(Exception):  # the cluster may be gone already
            _take_down(self._name, self._mine)
        self._thread.join(5)

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *ending: object) -> None:
        self.stop()


def start(answering: Answering, index: str, settings: ServeSettings) -> Served:
    """Deploys the application on the running Ray and listens. ValueError: the port is taken, or a setting is wrong."""
    from ray import serve

    from hbi.serving.app import build_api
    from hbi.serving.deploy import Backend, deployments, together
    from hbi.serving.operations import Front

    index = storage.absolute(index)
    table = ClipTable.open(index)
    listener = _listen(settings.host, settings.port)
    port = listener.getsockname()[1]
    name, mine = f"hbi-{port}", not _serve_runs()
    try:
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        # No proxies of Serve's: what listens is below. On a cluster where Serve runs already, this changes nothing.
        serve.start(proxy_location="Disabled")
        replica, writer = deployments(answering.model, answering.tracking, index, settings)
        serve.run(together(replica, writer), name=name, route_prefix=None)
        handles = [serve.get_deployment_handle(each, name) for each in ("Replica", "Writer")]
        backend = Backend(handles[0], handles[1], settings.request_seconds)
        api = build_api(Front(backend, table, settings, answering.heads))
        server, thread = _serve_http(api, listener)
    except BaseException:
        listener.close()
        with contextlib.suppress(Exception):
            _take_down(name, mine)
        raise
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return Served(f"http://{host}:{port}", name, mine, server, thread)


def _serve_runs() -> bool:
    """Whether Serve is up on the cluster already."""
    import ray

    try:
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return False
    return True


def _take_down(name: str, mine: bool) -> None:
    """The application; and Serve with it where we started it and nobody else has come to use it."""
    from ray import serve

    if mine and set(serve.status().applications) <= {name}:
        serve.shutdown()
    else:
        serve.delete(name)


def _serve_http(api: Any, listener: socket.socket) -> tuple[Any, threading.Thread]:
    """uvicorn on a socket, in a thread of its own."""
    import uvicorn

    config = uvicorn.Config(
        api, http=_patient_protocol(), ws="none", lifespan="off", log_config=None, access_log=False,
        server_header=False,
        timeout_keep_alive=10, timeout_graceful_shutdown=1, h11_max_incomplete_event_size=64 * 1024,
    )  # fmt: skip
    # A client's mistake and a lost connection are no news; what fails is said by the application.
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="http", daemon=True)
    thread.start()
    deadline = time.monotonic() + START_SECONDS
    while not server.started:
        if not thread.is_alive() or time.monotonic() > deadline:
            raise RuntimeError("the HTTP server did not start")
        time.sleep(0.01)
    return server, thread


def _patient_protocol() -> Any:
    """uvicorn's HTTP/1.1, which waits for ever for the head of a request, with an end to its patience."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Patient(H11Protocol):
        head_timer: Any = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait_for_head()

        def data_received(self, data: bytes) -> None:
            if self.cycle is None or self.cycle.response_complete:
                self._wait_for_head()
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop_waiting()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def _wait_for_head(self) -> None:
            if self.head_timer is None:
                self.head_timer = self.loop.call_later(HEADER_SECONDS, self._give_up)

        def _stop_waiting(self) -> None:
            if self.head_timer is not None:
                self.head_timer.cancel()
                self.head_timer = None

        def _give_up(self) -> None:
            self.head_timer = None
            if self.cycle is None or self.cycle.response_complete:
                self.transport.close()

    return Patient


def application(arguments: Mapping[str, Any]) -> Any:
    """A Serve application whose ingress is the same API, for clusters where Serve's proxies listen.

    arguments: `model`, `index` and `tracking`, and fields of `ServeSettings`. Whoever deploys it says who may reach
    it: without HBI_API_KEY everyone who reaches the proxies may ask.
    """
    from ray import serve

    from hbi.serving.deploy import deployments

    known = {field.name for field in fields(ServeSettings)}
    if unknown := sorted(set(arguments) - known - {"model", "index", "tracking"}):
        raise ValueError(f"application has no argument {', '.join(unknown)}")
    given: dict[str, Any] = {"allowed_host": ["*"]} | {
        name: value for name, value in arguments.items() if name in known
    }
    settings = ServeSettings(**given)
    index = storage.absolute(arguments["index"])
    answering = model_of(index, arguments.get("model"), arguments.get("tracking"))
    replica, writer = deployments(answering.model, answering.tracking, index, settings)

    def build() -> Any:
        from ray import serve

        from hbi.serving.app import build_api
        from hbi.serving.deploy import Backend
        from hbi.serving.operations import Front

        name = serve.get_replica_context().app_name
        replica, writer = (serve.get_deployment_handle(each, name) for each in ("Replica", "Writer"))
        backend = Backend(replica, writer, settings.request_seconds)
        return build_api(Front(backend, ClipTable.open(index), settings, answering.heads))

    ingress: Any = serve.deployment(serve.ingress(build)(), name="Front")
    options = {"num_cpus": 0.1}
    return ingress.options(max_ongoing_requests=1000, ray_actor_options=options).bind(replica, writer)
