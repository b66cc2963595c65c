"""A real `mlflow server` on loopback, its artifacts proxied, that can be killed and started again."""

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

from tests.support.mlflow_store import fresh_store
from tests.support.waiting import wait_for


class Server:
    """`store` is the sqlite URI behind it, `uri` the server's own, `artifacts` the folder that it serves from."""

    def __init__(self, folder: Path) -> None:
        self.store = fresh_store(folder)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri, self.artifacts = f"http://127.0.0.1:{self.port}", folder / "served"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Does nothing where it runs."""
        if self.process is not None:
            return
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", self.store]
        command += ["--workers", "1", "--artifacts-destination", str(self.artifacts)]
        command += ["--port", str(self.port)]
        # It would start seven more processes.
        env = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        folder = Path(self.store[10:]).parent
        self.process = subprocess.Popen(command, start_new_session=True, cwd=folder, env=env, **quiet)
        wait_for(lambda: urllib.request.urlopen(f"{self.uri}/health", timeout=1).close() is None, 120)

    def kill(self) -> None:
        """At once, with its workers."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None
