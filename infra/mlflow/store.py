"""The MLflow store: where it is, a client of it, and whether it answers. No global MLflow state.

MLflow is imported inside the functions; it takes a second.
"""

import http.client
import logging
import os
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from mlflow import MlflowClient

ALIVE_SECONDS = 3.0
"""How long a server may take to say that it is alive."""


def tracking_uri(uri: str | None = None) -> str:
    """The MLflow store: `uri`, else MLFLOW_TRACKING_URI, else the sqlite file runs/mlflow.db.

    A folder means the sqlite file mlflow.db inside it. The answer is absolute, since Ray's workers stand elsewhere.
    """
    given = uri or os.environ.get("MLFLOW_TRACKING_URI") or "runs"
    if "://" not in given:
        given = f"sqlite:///{Path(given).expanduser().absolute() / 'mlflow.db'}"
    if (file := _sqlite_file(given)) is None:
        return given
    file.parent.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{file}"


def _sqlite_file(uri: str) -> Path | None:
    """The file of a sqlite URI, absolute; None for any other store."""
    prefix = "sqlite:///"
    return Path(uri[len(prefix) :]).expanduser().absolute() if uri.startswith(prefix) else None


def is_server(uri: str) -> bool:
    """Whether the store is reached over HTTP (the server then decides where artifacts go)."""
    return urlsplit(uri).scheme in ("http", "https")


def client(uri: str) -> "MlflowClient":
    """A client of one store, tracking and registry both. A sqlite file that is not there yet is made."""
    from mlflow import MlflowClient

    file = _sqlite_file(uri)
    if file and not file.exists():
        # MLflow makes an experiment "Default" with every store, and would have its artifacts where we stand.
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        with quiet("mlflow.store.db.utils"):
            SqlAlchemyStore(uri, (file.parent / "artifacts").as_uri())
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def experiment_id(uri: str, name: str) -> str:
    """The experiment of that name, made if need be. Artifacts lie beside a sqlite file, never where we stand."""
    from mlflow.exceptions import MlflowException

    store = client(uri)
    found = store.get_experiment_by_name(name)
    if found is None:
        file = _sqlite_file(uri)
        folder = file.parent / "artifacts" if file else Path("runs/artifacts").absolute()
        location = None if is_server(uri) else (folder / re.sub(r"[^\w.-]", "_", name)).as_uri()
        try:
            return store.create_experiment(name, artifact_location=location)
        except MlflowException:  # someone made it in between
            found = store.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        raise ValueError(
            f"experiment {name!r} of {uri} is deleted: restore it (`mlflow experiments restore`) or name another"
        )
    return found.experiment_id


def mlflow_name(name: str) -> str:
    """Our metric names as MLflow allows them: `val/t2v+dsl/R@1` is `val/t2v-dsl/R1` there."""
    return re.sub(r"[^\w\-. :/]", "_", name.replace("@", "").replace("+", "-"))


def require_alive(uri: str) -> None:
    """OSError unless the server answers within a moment. Other stores than servers show it when they are used."""
    if not is_server(uri):
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


def require_answer(uri: str) -> None:
    """ValueError, in one line, unless the store answers."""
    try:
        require_alive(uri)
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(
            f"tracking store {shown(uri)} does not answer ({first_line(error)}): start it, or name another "
            "(--tracking, MLFLOW_TRACKING_URI)"
        ) from None


def shown(uri: str) -> str:
    """The store's address without a password."""
    user, at, rest = uri.rpartition("@")
    return f"{user.partition('://')[0]}://***@{rest}" if at else uri


def first_line(error: BaseException) -> str:
    """What an error says, as far as a line holds it."""
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, OSError):
        error = error.reason  # without urllib's brackets around it
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


@contextmanager
def quiet(logger: str) -> Iterator[None]:
    """Inside, MLflow says no more than warnings."""
    log = logging.getLogger(logger)
    before = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(before)


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """MLflow shows a bar for the copying of a few files, and can be told not to by the environment only."""
    name = "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before
