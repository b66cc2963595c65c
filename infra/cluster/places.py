"""Whether a cluster sees what a command names: asked before anything is sent to it."""

import os
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from hbi.infra import storage

ANSWER_SECONDS = 3.0
"""How long an MLflow server may take to accept a connection."""


@dataclass(frozen=True)
class Place:
    """A path or address among a command's arguments."""

    name: str
    """What the user calls it: `MANIFEST`, `--out`."""
    path: str
    """Its value, or its default where none was given."""
    kind: Literal["input", "output", "model", "tracking"]
    """Inputs must be there; an output's bucket must; a model may be a name of the registry."""
    holds: str = ""
    """For a folder of input: the file that must lie in it."""
    flag: str = ""
    """The flag that a value which was not given has to be sent by, so that it is this machine's default."""

    @property
    def local(self) -> bool:
        """Whether it lies on this machine."""
        if self.kind == "tracking":
            return urlsplit(self.path).scheme not in ("http", "https", "databricks")
        return not self.path.startswith("models:/") and not storage.is_remote(self.path)


def require_visible(places: Iterable[Place], here: bool) -> None:
    """ValueError, in one line, for the first place that the cluster does not see.

    here: whether the cluster's only node is this machine. Buckets and servers are asked where they can be reached from
    here; a cluster may know others.
    """
    for place in places:
        if place.local:
            if not here:
                raise ValueError(_not_local(place))
        elif place.kind == "tracking":
            _require_server(place)
        elif not place.path.startswith("models:/") and os.environ.get("AWS_ACCESS_KEY_ID"):
            _require_object(place)


def _not_local(place: Place) -> str:
    said = f"{place.name} {place.path}: the cluster does not see this machine's files"
    mend = {
        "tracking": "start `mlflow server` and give its http:// address (MLFLOW_TRACKING_URI)",
        "model": "give a models:/ name or an s3:// folder",
    }
    return f"{said}: {mend.get(place.kind, 'give an s3:// path')}"


def _require_object(place: Place) -> None:
    try:
        if place.kind == "output":
            storage.require_bucket(place.path)
            return
        file = storage.join(place.path, place.holds) if place.holds else place.path
        if place.kind == "input" and not storage.exists(file):
            raise ValueError(
                f"{place.name} {place.path}: {file} is not there: name what is, or make it first"
            )
    except FileNotFoundError:
        raise ValueError(
            f"{place.name} {place.path}: there is no such bucket: make it, or name another"
        ) from None
    except PermissionError as error:
        raise ValueError(
            f"{place.name} {place.path}: refused ({error}): look at AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from None
    except storage.StorageError:
        return  # of an address that only the cluster reaches, perhaps


def _require_server(place: Place) -> None:
    """Of a name that is known here: whether something listens."""
    parts = urlsplit(place.path)
    address = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection(address, timeout=ANSWER_SECONDS).close()
    except socket.gaierror:
        return
    except OSError as error:
        raise ValueError(
            f"{place.name} {place.path}: the MLflow server does not answer ({error.strerror or error}): start it"
        ) from None


def made_absolute(command: Sequence[str], places: Iterable[Place]) -> list[str]:
    """The command with every local place as this machine knows it, wherever the job is started."""
    command = list(command)
    for place in places:
        if not place.local:
            continue
        whole = _absolute(place)
        if place.flag:
            command += [place.flag, whole]
        else:
            command = [_replaced(given, place.path, whole) for given in command]
    return command


def _absolute(place: Place) -> str:
    return place.path if "://" in place.path else storage.absolute(place.path)


def _replaced(given: str, path: str, whole: str) -> str:
    if given == path:
        return whole
    flag, equals, value = given.partition("=")
    return f"{flag}={whole}" if equals and flag.startswith("--") and value == path else given
