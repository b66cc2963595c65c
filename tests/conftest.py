"""What the tests share: one Ray for the whole session, and the folder of real clips where there is one."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.support.mlflow_server import Server

# Before any of ours is imported: child processes and Ray workers inherit it, and nothing may look for a network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where tests run in several processes, a file stays in one, and so do those that serve one corpus."""
    served = {item.path for item in items if "chain" in getattr(item, "fixturenames", ())}
    for item in items:
        item.add_marker(pytest.mark.xdist_group("served" if item.path in served else str(item.path)))


@pytest.fixture(scope="session")
def media() -> Path:
    """The folder of real clips (HBI_MEDIA, or a checkout's neighbour), with its manifest."""
    folder = Path(os.environ.get("HBI_MEDIA", ROOT.parent / "shared" / "media"))
    if not (folder / "manifest.jsonl").exists():
        pytest.skip(f"needs real clips: set HBI_MEDIA to a folder with manifest.jsonl (looked in {folder})")
    return folder


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One Ray of two CPUs for the session, in each process of tests; importable working directory, no dashboard."""
    import ray

    # Without an empty entry, which would stand for whatever folder a process is in.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def _mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Server]":
    from tests.support.mlflow_server import Server

    server = Server(tmp_path_factory.mktemp("mlflow-server"))
    yield server
    server.kill()


@pytest.fixture
def mlflow_server(_mlflow_server: "Server") -> "Server":
    """One `mlflow server` for the session, up at the start of each test that asks for it."""
    _mlflow_server.start()
    return _mlflow_server
