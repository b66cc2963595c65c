"""A real Ray cluster of several raylets on one machine, each with a home and a temporary folder of its own.

Where the user is root, each node also has a mount namespace of its own: it sees neither the other nodes' folders nor
the test's, nor this project, as the installed package or by the path.
"""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.support.s3 import free_port

ROOT = Path(__file__).resolve().parents[2]
RAY = str(Path(sys.executable).parent / "ray")
TOKEN = "0" * 64


def has_namespaces() -> bool:
    """Whether nodes can have mount namespaces of their own here."""
    return (
        os.geteuid() == 0
        and not subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode
    )


@dataclass
class Node:
    """One raylet and what it started."""

    process: "subprocess.Popen[bytes]"
    folder: Path

    def kill(self) -> None:
        """As when a machine is taken away: SIGKILL to the raylet and all that it runs."""
        found = [psutil.Process(self.process.pid)]
        with contextlib.suppress(psutil.NoSuchProcess):
            found += found[0].children(recursive=True)
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()


@dataclass
class RayCluster:
    """A head, and nodes that come and go."""

    folder: Path
    """Under it, each node's own; the nodes see nothing else of it."""
    variables: dict[str, str]
    """What every process gets."""
    apart: bool
    """Whether nodes have namespaces."""
    port: int = field(default_factory=free_port)
    dashboard: int = field(default_factory=free_port)
    nodes: list[Node] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.dashboard}"

    def add(self, cpus: int, *options: str) -> Node:
        """A node with so many CPUs; the first is the head. Returns once the cluster counts it."""
        number, before = len(self.nodes), self.alive()
        folder = self.folder / f"node{number}"
        (folder / "home").mkdir(parents=True)
        (folder / "tmp").mkdir()
        command = [RAY, "start", "--block", "--num-cpus", str(cpus), "--node-ip-address", "127.0.0.1"]
        command += ["--object-store-memory", str(200 << 20), *options]
        if number:
            command += ["--address", f"127.0.0.1:{self.port}"]
        else:
            command += ["--head", "--port", str(self.port), "--dashboard-port", str(self.dashboard)]
            command += [
                "--dashboard-agent-listen-port",
                str(free_port()),
                "--ray-client-server-port",
                str(free_port()),
            ]
            command += ["--temp-dir", str(folder / "tmp" / "ray")]
        variables = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("AWS_", "MLFLOW_", "HBI_", "FSSPEC_", "PYTHONPATH", "RAY_"))
        }
        variables |= {"HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp"), **self.variables}
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                self._alone(command, folder),
                cwd=folder,
                env=variables,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        node = Node(process, folder)
        self.nodes.append(node)
        deadline = time.monotonic() + 90
        while self.alive() <= before:
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[
                -2000:
            ]
            time.sleep(0.2)
        return node

    def _alone(self, command: list[str], folder: Path) -> list[str]:
        """The command where it sees of the test's folders its own alone, and no installed project."""
        if not self.apart:
            return command
        hidden = [str(path) for path in Path(sys.prefix).glob("lib/python*/site-packages/__editable__*hbi*")]
        keep = shlex.quote(str(folder))
        script = [
            "mount --make-rprivate /",
            "mkdir -p /run/kept && mount -t tmpfs none /run/kept && mkdir /run/kept/it",
            f"mount --bind {keep} /run/kept/it",
            f"mount -t tmpfs none {shlex.quote(str(self.folder))} && mkdir -p {keep}",
            f"mount --bind /run/kept/it {keep}",
            *(f"mount --bind /dev/null {shlex.quote(path)}" for path in hidden),
            f"cd {keep} && exec {shlex.join(command)}",
        ]
        return ["unshare", "--mount", "bash", "-ec", "\n".join(script)]

    def alive(self) -> int:
        """How many nodes the cluster counts."""
        if not self.nodes:
            return 0
        request = urllib.request.Request(
            f"{self.address}/nodes?view=summary", headers={"Authorization": f"Bearer {TOKEN}"}
        )
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                summary = json.load(answer)["data"]["summary"]
        except OSError:
            return 0
        return sum(node["raylet"].get("state") == "ALIVE" for node in summary)

    def stop(self) -> None:
        """Ends every node, the head last, and whatever they left running."""
        for node in reversed(self.nodes):
            with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                node.kill()
        for process in psutil.process_iter(["environ"]):
            home = (process.info["environ"] or {}).get("HOME", "")
            if home.startswith(str(self.folder)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)


@contextmanager
def ray_cluster(folder: Path, **variables: str) -> Iterator[RayCluster]:
    """A cluster with a head without CPUs for work; gone afterwards. Add nodes to it."""
    folder.mkdir(parents=True, exist_ok=True)
    given = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0", **variables}
    cluster = RayCluster(folder, given, has_namespaces())
    try:
        cluster.add(0)
        yield cluster
    finally:
        cluster.stop()
