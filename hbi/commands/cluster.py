"""The same commands, on a Ray cluster."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import OmitArgPrefixes, Suppress, UseAppendAction, arg

from hbi.commands.corpora import Corpus, Shard, Split
from hbi.commands.search import BuildIndex, Serve
from hbi.commands.training import Evaluate, Train
from hbi.infra.cluster.kuberay import ClusterSettings
from hbi.infra.cluster.places import Place

if TYPE_CHECKING:
    from hbi.infra.cluster.submit import Cluster, Job

CAN_RUN: Mapping[str, tuple[type, Mapping[str, str]]] = {
    "corpus": (Corpus, {"out": "output"}),
    "split": (Split, {"manifest": "input", "out": "output"}),
    "shard": (Shard, {"manifest": "input", "out": "output", "report": "output"}),
    "train": (Train, {"data": "input", "out": "output", "tracking": "tracking"}),
    "evaluate": (Evaluate, {"model": "model", "shards": "input", "tracking": "tracking"}),
    "index": (
        BuildIndex,
        {"model": "model", "shards": "input", "index": "output", "show": "input", "tracking": "tracking"},
    ),
    "serve": (Serve, {"model": "model", "index": "input", "tracking": "tracking"}),
}
"""What may be a job, and which of its arguments are places that the cluster must see."""
HOLDS: Mapping[str, str] = dict.fromkeys(("data", "shards", "index", "show"), "index.json")
"""What lies in a folder of input."""
Name = Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")]


@dataclass(frozen=True)
class Submit:
    """Run a command as a job on a Ray cluster: followed here, tried again where that may help.

    The same command again attaches to the job that runs, or starts the next attempt of one that has ended. Ctrl-C
    leaves the job running. The exit status is the job's. Credentials in the environment go along (AWS_*, MLFLOW_*,
    FSSPEC_S3, HF_*, HBI_*).

    Example: hbi submit --address http://head:8265 -- shard s3://bucket/manifest.jsonl s3://bucket/shards
    """

    address: Annotated[str | None, arg(metavar="URL", help_behavior_hint="")] = None
    """The cluster's job server (default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, else http://127.0.0.1:8265)."""
    name: Name = None
    """What the job is called (default: made of the command)."""
    retries: int = 3
    """How often it is tried again when something fails that may pass; a mistake of yours is not."""
    wait: bool = True
    """Follow the job to its end."""
    env: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="NAME[=VALUE]")] = ()
    """A variable that goes along too; several times."""
    print: Annotated[Literal["rayjob", "rayservice", "slurm"] | None, arg(help_behavior_hint="")] = None
    """Write the manifest for KubeRay, or the batch script for Slurm, instead of sending the job."""
    stop: Name = None
    """Stop the job of this name."""
    list: bool = False
    """Show the cluster's jobs."""
    cluster: OmitArgPrefixes[ClusterSettings] = field(default_factory=ClusterSettings)
    """For --print."""
    command: Suppress[tuple[str, ...]] = ()
    """The command and its arguments, after `--`."""

    @classmethod
    def read(cls, args: Sequence[str]) -> "Submit":
        """A command line whose end, after `--`, is another command's. ValueError where that may be no job."""
        args = [*args]
        split = args.index("--") if "--" in args else len(args)
        own, command = args[:split], tuple(args[split + 1 :])
        read = replace(tyro.cli(cls, args=own, prog="hbi submit"), command=command)
        if read.stop is None and not read.list:
            if not command:
                raise ValueError("nothing to run: write a command after --, as in `hbi submit -- shard ...`")
            if command[0] not in CAN_RUN:
                raise ValueError(f"{command[0]}: runs here only: a job is one of {', '.join(CAN_RUN)}")
            if read.retries < 0:
                raise ValueError(f"--retries is {read.retries}, must be at least 0")
        return read

    def run(self) -> None:
        if self.stop is not None or self.list:
            self._look()
            return
        places = list(places_of(self.command))
        if self.print:
            self._print(places)
            return
        from hbi.infra.cluster import submit
        from hbi.infra.cluster.places import made_absolute, require_visible

        cluster = submit.connect(self.address)
        require_visible(places, cluster.here)
        command = tuple(made_absolute(self.command, places))
        variables = submit.environment(self.env, cluster.here)
        name = self.name or submit.job_name(command)
        self._run_job(cluster, submit.Job(name, command, variables, self.retries))

    def _run_job(self, cluster: "Cluster", job: "Job") -> None:
        """Starts the job, or finds it, and follows it. SystemExit with its status unless that is 0."""
        from hbi.infra.cluster import submit

        id = submit.start(cluster, job)
        _say(f"{id} on {cluster.address}, with {', '.join(job.environment) or 'no variables'}")
        hint = f"`hbi submit --stop {job.name}` stops it, the same command again follows it"
        if not self.wait:
            _say(hint)
            return
        try:
            status = submit.follow(cluster, id, lambda lines: print_lines(lines))
        except KeyboardInterrupt:
            _say(f"{id} runs on: {hint}")
            raise SystemExit(130) from None
        if status:
            _say(f"{id}: {submit.why(cluster, id)}")
            raise SystemExit(status)

    def _look(self) -> None:
        from hbi.infra.cluster import submit

        cluster = submit.connect(self.address)
        print_lines(
            (submit.table(cluster) if self.stop is None else f"{submit.stop(cluster, self.stop)}: stopped")
            + "\n"
        )

    def _print(self, places: Sequence[Place]) -> None:
        """The manifest, on standard output. ValueError for a place that no cluster sees."""
        from hbi.infra.cluster import kuberay, slurm
        from hbi.infra.cluster.submit import job_name

        name = self.name or job_name(self.command)
        if self.print == "slurm":  # whose nodes share folders, as a rule; the job looks whether they do
            print_lines(slurm.sbatch(self.command, name, self.retries, self.cluster))
            return
        for place in places:
            if place.local and place.kind != "tracking":  # the Secret may name a server
                raise ValueError(
                    f"{place.name} {place.path}: no pod sees this machine's files: give an s3:// path"
                )
        if self.print == "rayjob":
            print_lines(kuberay.rayjob(self.command, name, self.retries, self.cluster))
            return
        if self.command[0] != "serve":
            raise ValueError(f"--print rayservice: {self.command[0]} ends: --print rayjob")
        given = {place.name.lower(): place.path for place in places if place.kind != "tracking"}
        if "index" not in given:  # given alone, it names its model
            given = {"index": given["model"]}
        print_lines(kuberay.rayservice(given, name, self.cluster))


def places_of(command: Sequence[str]) -> Iterator[Place]:
    """The places among a command's arguments, read by its own parser. SystemExit where that cannot read them."""
    kind, places = CAN_RUN[command[0]]
    reader: Any = kind
    read = (
        reader.read(command[1:])
        if hasattr(kind, "read")
        else tyro.cli(reader, args=command[1:], prog=f"hbi {command[0]}")
    )
    flags = {given.split("=")[0] for given in command if given.startswith("--")}
    for name, role in places.items():
        value, flag = getattr(read, name), ""
        if not value:
            value, flag = _default(read, name), f"--{name}"
        if value is None:
            continue
        called = f"--{name}" if flag or f"--{name}" in flags else name.upper()
        holds = HOLDS.get(name, "") if role == "input" else ""
        yield Place(called, value, role, holds, flag)  # pyright: ignore[reportArgumentType]


def _default(read: Any, name: str) -> str | None:
    """Where a command puts or looks for something that was not given; None where it needs none."""
    if name == "out":
        return f"runs/{read.name}"
    if name != "tracking":
        return None
    used = read.set.tracking.enabled if isinstance(read, Train) else read.model.startswith("models:/")
    if not used:
        return None
    from hbi.infra.mlflow.store import tracking_uri

    return tracking_uri()


def print_lines(lines: str) -> None:
    """To standard output, at once."""
    sys.stdout.write(lines)
    sys.stdout.flush()


def _say(line: str) -> None:
    """Of the job, not by it."""
    sys.stderr.write(f"hbi submit: {line}\n")
    sys.stderr.flush()
