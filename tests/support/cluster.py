"""A real Ray cluster of several raylets on one machine, each with a home and a temporary folder of its own.

Where the user is root, each node also has a mount namespace of its own: it sees neither the other nodes' folders nor
this project as the installed package.
"""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.support.s3 import free_port
from tests.support.waiting import wait_for

RAY = str(Path(sys.executable).parent / "ray")
HEALTH = {"RAY_health_check_period_ms": "500", "RAY_health_check_failure_threshold": "4"}
"""A node that is gone is missed after two seconds, and not after fifteen."""


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
    id: str = ""
    """What the cluster calls it."""

    def runs(self, name: str) -> bool:
        """Whether a process of this title runs on it (Ray gives its workers titles)."""
        for process in psutil.process_iter(["cmdline", "environ"]):
            about = process.info
            if name in " ".join(about["cmdline"] or []) and self._holds(about["environ"]):
                return True
        return False

    def _holds(self, environment: dict[str, str] | None) -> bool:
        return (environment or {}).get("HOME", "").startswith(str(self.folder))

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
        command += ["--object-store-memory", str(200 << 20), "--temp-dir", str(folder / "tmp" / "ray")]
        # Nodes of one address must not take each other's ports.
        command += ["--min-worker-port", "0", "--max-worker-port", "0"]
        for agent in ("agent-listen", "agent-grpc"):
            command += [f"--dashboard-{agent}-port", str(free_port())]
        if number:
            command += ["--address", f"127.0.0.1:{self.port}"]
        else:
            command += ["--head", "--port", str(self.port), "--dashboard-port", str(self.dashboard)]
            command += ["--ray-client-server-port", str(free_port())]
        given = ("AWS_", "MLFLOW_", "HBI_", "FSSPEC_", "PYTHONPATH", "RAY_")
        variables = {name: value for name, value in os.environ.items() if not name.startswith(given)}
        variables |= {"HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp"), **self.variables}
        # A job's command is `python`: that of the environment in which Ray is.
        variables["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), variables["PATH"]])
        log = folder / "log"
        with log.open("wb") as said:
            process = subprocess.Popen(
                self._alone([*command, *options], folder),
                cwd=folder,
                env=variables,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
        self.nodes.append(node := Node(process, folder))

        def counted() -> bool:
            assert process.poll() is None, log.read_text()[-2000:]
            return bool(self.alive() - before)

        wait_for(counted, 90, f"node {number} did not join")
        (node.id,) = self.alive() - before
        return node

    def _alone(self, command: list[str], folder: Path) -> list[str]:
        """The command where it sees of the test's folders its own alone, and no installed project."""
        if not self.apart:
            return command
        hidden = Path(sys.prefix).glob("lib/python*/site-packages/__editable__*hbi*")
        own, all_of_them = shlex.quote(str(folder)), shlex.quote(str(self.folder))
        script = [
            "mount --make-rprivate /",
            f"cd {own}",
            f"mount -t tmpfs none {all_of_them} && mkdir {own}",
            f"mount --no-canonicalize --bind . {own}",  # what is under the new mount is reached from here alone
            *(f"mount --bind /dev/null {shlex.quote(str(path))}" for path in hidden),
            f"cd {own} && exec {shlex.join(command)}",
        ]
        return ["unshare", "--mount", "bash", "-ec", "\n".join(script)]

    def alive(self) -> set[str]:
        """The ids of the nodes that the cluster counts."""
        if not self.nodes:
            return set()
        try:
            with urllib.request.urlopen(f"{self.address}/nodes?view=summary", timeout=5) as answer:
                summary = [node["raylet"] for node in json.load(answer)["data"]["summary"]]
        except OSError:
            return set()
        return {raylet["nodeId"] for raylet in summary if raylet.get("state") == "ALIVE"}

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
def ray_cluster(**variables: str) -> Iterator[RayCluster]:
    """A cluster with a head without CPUs for work; gone afterwards. Add nodes to it."""
    given = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    # The names of sockets, which lie there, must be short.
    with tempfile.TemporaryDirectory(prefix="hbi-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        cluster = RayCluster(Path(folder), given | HEALTH | variables, has_namespaces())
        try:
            cluster.add(0)
            yield cluster
        finally:
            cluster.stop()
