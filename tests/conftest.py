"""What the tests share: one Ray for the whole session, and the folder of real clips where there is one."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.support.mlflow_server import Server
    from tests.support.s3 import ObjectStorage

# Before any of ours is imported: child processes and Ray workers inherit it, and nothing may look for a network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# How often Ray Train looks whether a worker is done or gone: its 2 s are long for a run of seconds.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")

ROOT = Path(__file__).resolve().parent.parent
LONGEST = (
    "tests/serving",
    "tests/pipelines/test_sharding_run.py",
    "tests/training/test_run.py",
    "tests/training/test_stopping.py",
    "tests/hbi/test_package.py",
    "tests/training/test_contrast.py",
    "tests/training/test_checkpoint.py",
)
"""What takes longest, the longest first: where it is begun last, one process ends long after the other."""


def pytest_configure() -> None:
    """SIGTERM ends the tests as Ctrl-C does: what they have started is stopped."""
    signal.signal(signal.SIGTERM, lambda *_: pytest.exit("terminated", returncode=143))


def unit_of(test: str) -> str:
    """What one process of tests does as a whole: a file, or all of serving, which shares a corpus and a server."""
    file = test.partition("::")[0]
    return "tests/serving" if file.startswith("tests/serving/") else file


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    assert all((ROOT / unit).exists() for unit in LONGEST)
    order = {unit: number for number, unit in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(unit_of(item.nodeid), len(order)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Units to processes, in the order of the tests. (xdist's own groups have no effect in pytest 9.2.)"""
    from xdist.scheduler.loadscope import LoadScopeScheduling

    class Units(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return unit_of(nodeid)

    config.option.loadscopereorder = False
    return Units(config, log)


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
    handler = signal.getsignal(signal.SIGTERM)
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    signal.signal(signal.SIGTERM, handler)  # Ray's own would only fail the test that runs
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[ObjectStorage]":
    """One object storage for a file of tests, named by the environment."""
    from tests.support.s3 import object_storage

    with object_storage(tmp_path_factory.mktemp("s3")) as running, pytest.MonkeyPatch.context() as patch:
        running.use(patch)
        yield running


@pytest.fixture
def remote(s3_server: "ObjectStorage") -> "ObjectStorage":
    """The file's object storage, without the faults and requests of the test before."""
    s3_server.faults.clear()
    s3_server.requests.clear()
    return s3_server


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
