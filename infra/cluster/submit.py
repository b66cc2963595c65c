"""A command as a job on a Ray cluster, over Ray's own job server: sent, followed, tried again, stopped, listed.

What travels is the project's own code (a few hundred kilobytes, by content: an unchanged project is sent once) and the
environment's credentials. What a job is called is a name with the number of the attempt: `shard-3`.
"""

import asyncio
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hbi.infra.project import ROOT
from hbi.infra.ray_runtime import use_token

if TYPE_CHECKING:
    from ray.dashboard.modules.job.pydantic_models import JobDetails
    from ray.job_submission import JobSubmissionClient

ADDRESS = "http://127.0.0.1:8265"
"""Where a job server listens that nobody named: a local one, or one behind `kubectl port-forward`."""
TRAVELS = re.compile(r"AWS_|MLFLOW_|FSSPEC_S3|HF_|HBI_")
"""How the names of variables begin that go with a job."""
NAME, COMMAND = "hbi-name", "hbi-command"
"""Under these the cluster keeps what a job is called and does."""
RAYS_OWN = re.compile(r"^Running entrypoint for job|INFO job_manager\.py")
"""Lines of a job's log that are Ray's."""
POLL_SECONDS = 1.0
STOP_SECONDS = 40.0
ENDING = {"RAY_JOB_STOP_WAIT_TIME_S": "30"}
"""How long the cluster lets a job that is stopped keep what it has done: Ray's own 3 s are short for a checkpoint."""


@dataclass(frozen=True)
class Cluster:
    """A cluster whose job server answers, with the versions of this process."""

    client: "JobSubmissionClient"
    address: str
    nodes: int
    """How many are alive."""
    here: bool
    """Whether its only node is this machine, which then sees local paths."""


@dataclass(frozen=True)
class Job:
    """What to run."""

    name: str
    """What it is called; letters, digits, dots, dashes."""
    command: tuple[str, ...]
    """`hbi`'s arguments."""
    environment: Mapping[str, str]
    """Variables that it gets."""
    retries: int
    """How often it is tried again."""


def connect(address: str | None = None) -> Cluster:
    """The cluster behind a job server; ValueError where none answers or its versions are not ours.

    address: `http://host:8265`; otherwise RAY_API_SERVER_ADDRESS, RAY_ADDRESS where it is one, or port 8265 here.
    """
    import requests
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    use_token()
    given = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or ADDRESS
    if not given.startswith(("http://", "https://")):
        raise ValueError(f"--address {given}: give the job server's address, http://HOST:8265")
    try:
        with _without_addresses():
            client = JobSubmissionClient(given)
        # It says what it uploads.
        logging.getLogger("ray.dashboard.modules.dashboard_sdk").setLevel(logging.ERROR)
        versions = client._do_request("GET", "/api/v0/cluster_metadata").json()["data"]
        summary = client._do_request("GET", "/nodes?view=summary").json()["data"]["summary"]
    except AuthenticationError:
        raise ValueError(
            f"--address {given}: the cluster wants a token that is not here: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
        ) from None
    except (ConnectionError, requests.RequestException, RuntimeError, KeyError, ValueError) as error:
        raise ValueError(
            f"--address {given}: no Ray answers there ({type(error).__name__}): start one with "
            "`ray start --head`, or reach a cluster's with `kubectl port-forward service/NAME-head-svc 8265`"
        ) from None
    _same_versions(given, versions["rayVersion"], versions["pythonVersion"])
    alive = [node["raylet"] for node in summary if node["raylet"].get("state") == "ALIVE"]
    # A socket is a file: that of the only node's raylet is here, or it is another machine.
    here = len(alive) == 1 and Path(alive[0]["rayletSocketName"]).is_socket()
    return Cluster(client, given, len(alive), here)


@contextmanager
def _without_addresses() -> Iterator[None]:
    """Inside, no variable overrides the address that is given to Ray."""
    names = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


def _same_versions(address: str, ray_version: str, python_version: str) -> None:
    """ValueError unless Ray is the same, and Python to its minor version."""
    import ray

    ours = platform.python_version()
    if ray_version != ray.__version__ or python_version.split(".")[:2] != ours.split(".")[:2]:
        raise ValueError(
            f"--address {address}: the cluster has Ray {ray_version} on Python {python_version}, and this machine Ray "
            f"{ray.__version__} on Python {ours}: make them the same"
        )


def job_name(command: tuple[str, ...]) -> str:
    """What a command is called that nobody named: the same command, the same name."""
    return f"{command[0]}-{hashlib.sha256(shlex.join(command).encode()).hexdigest()[:6]}"


def environment(extra: tuple[str, ...], here: bool) -> dict[str, str]:
    """The variables that go with a job: credentials and servers. ValueError for one that is not set.

    extra: `NAME` or `NAME=VALUE`. here: whether the job runs on this machine; elsewhere, what names a place on this one
    stays behind.
    """
    found = {
        name: value
        for name, value in os.environ.items()
        if TRAVELS.match(name) and (here or not value.startswith(("/", "~", "file:", "sqlite:")))
    }
    for given in extra:
        name, equals, value = given.partition("=")
        if not re.fullmatch(r"[A-Za-z_]\w*", name) or (not equals and name not in os.environ):
            raise ValueError(
                f"--env {name}: {'is not set here' if not equals else 'is no name of a variable'}: "
                "give a variable that is set, or NAME=VALUE"
            )
        found[name] = value if equals else os.environ[name]
    return dict(sorted(found.items()))


@contextmanager
def packed() -> Iterator[str]:
    """A folder `hbi` with the project's rooms as they are here, and nothing else."""
    with tempfile.TemporaryDirectory(prefix="hbi-submit-") as folder:
        target = Path(folder, "hbi")
        shutil.copytree(ROOT / "hbi", target, ignore=shutil.ignore_patterns("__pycache__", "manifests", ".*"))
        yield str(target)


def start(cluster: Cluster, job: Job) -> str:
    """Starts the next attempt of a job, or finds the one that runs; its submission id.

    ValueError where the name belongs to another command that runs, or is no name.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]{0,60}", job.name):
        raise ValueError(f"--name {job.name}: use letters, digits, dots and dashes, 61 at most")
    attempts = jobs(cluster, job.name)
    command = shlex.join(job.command)
    for known in attempts:
        if not known.status.is_terminal():
            theirs = (known.metadata or {}).get(COMMAND)
            if theirs != command:
                raise ValueError(
                    f"--name {job.name}: is running another command (hbi {theirs}): choose another name, or "
                    f"`hbi submit --stop {job.name}`"
                )
            return str(known.submission_id)
    numbers = [int(str(known.submission_id).rpartition("-")[2]) for known in attempts]
    with packed() as code:
        return cluster.client.submit_job(
            entrypoint=shlex.join(
                ["python", "-m", "hbi.infra.cluster.attempts", str(job.retries), *job.command]
            ),
            submission_id=f"{job.name}-{max(numbers, default=0) + 1}",
            runtime_env={"py_modules": [code], "env_vars": ENDING | dict(job.environment)},
            metadata={NAME: job.name, COMMAND: command},
        )


def jobs(cluster: Cluster, name: str | None = None) -> "list[JobDetails]":
    """The attempts of a name, or of all names, oldest first."""
    found = [
        job
        for job in cluster.client.list_jobs()
        if NAME in (job.metadata or {}) and (name is None or (job.metadata or {})[NAME] == name)
    ]
    return sorted(found, key=lambda job: job.start_time or 0)


def follow(cluster: Cluster, id: str, show: Callable[[str], object]) -> int:
    """Shows a job's log as it grows, until the job ends; its exit status, as a shell would give it."""
    return asyncio.run(_follow(cluster.client, id, show))


async def _follow(client: "JobSubmissionClient", id: str, show: Callable[[str], object]) -> int:
    import aiohttp

    shown = 0
    while True:
        seen = 0
        try:
            async for text in client.tail_job_logs(id):
                fresh = text[max(0, shown - seen) :]
                seen += len(text)
                shown = max(shown, seen)
                if lines := _calm(fresh):
                    show(lines)
        except (RuntimeError, aiohttp.ClientError, OSError):
            pass  # the line dropped: from the beginning again, without what was shown
        job = await asyncio.to_thread(client.get_job_info, id)
        if job.status.is_terminal():
            return _exit_status(job)
        await asyncio.sleep(POLL_SECONDS)


def _calm(text: str) -> str:
    """A log without bars that redraw themselves, and without what Ray says of itself."""
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in text.replace("\r\n", "\n").split("\n")]
    return "".join(f"{line}\n" for line in lines if line and not RAYS_OWN.search(line))


def _exit_status(job: "JobDetails") -> int:
    if job.status == "SUCCEEDED":
        return 0
    if job.status == "STOPPED":
        return 130
    return job.driver_exit_code or 1


def why(cluster: Cluster, id: str) -> str:
    """What the cluster says of a job's end, in one line."""
    lines = (cluster.client.get_job_info(id).message or "").strip().splitlines()
    return lines[0][:200] if lines else ""


def stop(cluster: Cluster, name: str) -> str:
    """Stops the running attempt of a name and waits for its end; its id. ValueError where none runs."""
    running = [job for job in jobs(cluster, name) if not job.status.is_terminal()]
    if not running:
        raise ValueError(
            f"--stop {name}: no job of that name runs on {cluster.address} (`hbi submit --list`)"
        )
    id = str(running[-1].submission_id)
    cluster.client.stop_job(id)
    deadline = time.monotonic() + STOP_SECONDS
    while not cluster.client.get_job_status(id).is_terminal():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{id}: still runs {STOP_SECONDS:.0f} s after it was told to stop")
        time.sleep(POLL_SECONDS / 4)
    return id


def table(cluster: Cluster) -> str:
    """The jobs of a cluster, one a line."""
    rows: list[tuple[Any, ...]] = [("job", "status", "minutes", "command")]
    for job in jobs(cluster):
        end = job.end_time or time.time() * 1000
        minutes = (end - (job.start_time or end)) / 60_000
        command = (job.metadata or {})[COMMAND]
        rows.append((job.submission_id, str(job.status).lower(), f"{minutes:.1f}", f"hbi {command}"))
    if len(rows) == 1:
        return f"{cluster.address}: no jobs of hbi yet"
    widths = [max(len(str(row[i])) for row in rows) for i in range(3)]
    return "\n".join(
        "  ".join([*(f"{v:{w}}" for v, w in zip(row, widths, strict=False)), row[3]]) for row in rows
    )
