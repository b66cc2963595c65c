"""What goes with a job, what is refused before anything is sent, and how a command is tried again."""

import io
import os
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from hbi.infra.cluster import attempts, submit
from hbi.infra.cluster.places import Place, made_absolute, require_visible
from tests.support.s3 import Fault, free_port, object_storage

ROOT = Path(__file__).resolve().parents[2]


def test_the_project_travels_alone_and_is_small():
    with submit.packed() as folder:
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in files:
                archive.write(file)
        assert len(content.getvalue()) < 2**20
        assert {path.suffix for path in files} <= {".py", ".html", ".js", ".css", ".svg", ".yaml", ""}
        # It runs by itself, where nothing else of the project is.
        code = "import hbi.infra.cluster.submit as s; from hbi.infra.project import ROOT; print(s.__file__, ROOT)"
        variables = {**os.environ, "PYTHONPATH": str(Path(folder).parent)}
        ran = subprocess.run(
            [sys.executable, "-c", code], cwd="/", env=variables, capture_output=True, text=True
        )
        assert ran.stdout.split() == [f"{folder}/infra/cluster/submit.py", str(Path(folder).parent)], (
            ran.stderr
        )
    assert not Path(folder).exists()


def test_credentials_travel_and_this_machines_places_do_not(monkeypatch: pytest.MonkeyPatch):
    for name in list(os.environ):
        if submit.TRAVELS.match(name):
            monkeypatch.delenv(name)
    given = {
        "AWS_ACCESS_KEY_ID": "k",
        "MLFLOW_TRACKING_URI": "http://m:5000",
        "HF_TOKEN": "t",
        "HBI_CACHE": "/home/me/cache",
        "AWS_CONFIG_FILE": "~/.aws/config",
        "SHELL_SECRET": "s",
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert list(submit.environment((), here=False)) == [
        "AWS_ACCESS_KEY_ID",
        "HF_TOKEN",
        "MLFLOW_TRACKING_URI",
    ]
    assert submit.environment((), here=True)["HBI_CACHE"] == "/home/me/cache"
    more = submit.environment(("SHELL_SECRET", "X=1=2", "HBI_CACHE=/cache"), here=False)
    assert (more["SHELL_SECRET"], more["X"], more["HBI_CACHE"]) == ("s", "1=2", "/cache")
    with pytest.raises(ValueError, match=r"^--env NOT_SET: is not set here: give a variable that is set"):
        submit.environment(("NOT_SET",), here=False)
    with pytest.raises(ValueError, match=r"^--env 9X: is no name"):
        submit.environment(("9X=1",), here=False)


def test_the_same_command_has_the_same_name():
    assert (
        submit.job_name(("shard", "a", "b"))
        == submit.job_name(("shard", "a", "b"))
        != submit.job_name(("shard", "a b"))
    )
    assert submit.job_name(("shard",)).startswith("shard-")


def test_an_address_where_no_ray_answers_is_one_line():
    with pytest.raises(ValueError, match=r"^--address http://127.0.0.1:1: no Ray answers there [^\n]*$"):
        submit.connect("http://127.0.0.1:1")
    with pytest.raises(ValueError, match=r"^--address ray://head:10001: give the job server's address"):
        submit.connect("ray://head:10001")


def test_versions_that_differ_are_refused():
    import ray

    python = "{}.{}.{}".format(*sys.version_info[:3])
    submit._same_versions("http://h:8265", ray.__version__, python)
    submit._same_versions("http://h:8265", ray.__version__, python.rpartition(".")[0] + ".99")
    with pytest.raises(
        ValueError, match=r"^--address http://h:8265: the cluster has Ray 2\.9\.0 on Python 3[^\n]*$"
    ):
        submit._same_versions("http://h:8265", "2.9.0", python)
    with pytest.raises(ValueError, match=r"on Python 3\.8\.1, and this machine"):
        submit._same_versions("http://h:8265", ray.__version__, "3.8.1")


def test_bars_that_redraw_themselves_come_as_their_last_state():
    log = (
        "Running entrypoint for job a-1: python\nshard:  0%|\rshard: 50%|\rshard: 100%|\n\nout: 60 samples\n"
    )
    log = "2026-01-01 10:00:00,000\tINFO job_manager.py:581 -- Runtime env is setting up.\n" + log
    assert submit._calm(log) == "shard: 100%|\nout: 60 samples\n"


# ------------------------------------------------------------------------------------------------ places

OUT = Place("--out", "runs/debug", "output", flag="--out")


@pytest.mark.parametrize(
    ("place", "mend"),
    [
        (
            Place("MANIFEST", "m.jsonl", "input"),
            "MANIFEST m.jsonl: the cluster does not see .*: give an s3:// path",
        ),
        (OUT, "--out runs/debug: the cluster does not see this machine's files: give an s3:// path"),
        (Place("MODEL", "/models/one", "model"), "give a models:/ name or an s3:// folder"),
        (Place("--tracking", "sqlite:////x/mlflow.db", "tracking"), "start `mlflow server`"),
    ],
)
def test_local_places_are_refused_unless_the_cluster_is_this_machine(place: Place, mend: str):
    with pytest.raises(ValueError, match=mend):
        require_visible([place], here=False)
    require_visible([place], here=True)


def test_what_storage_lacks_or_refuses_is_said_before_anything_is_sent(tmp_path: Path):
    with object_storage(tmp_path / "s3") as remote, pytest.MonkeyPatch.context() as patch:
        remote.use(patch)
        remote.put("shards/index.json", b"{}")
        shards = Place("SHARDS", remote.uri("shards"), "input", holds="index.json")
        require_visible([shards, Place("OUT", remote.uri("new/folder"), "output")], here=False)
        with pytest.raises(ValueError, match=r"^MANIFEST s3://corpus/none: s3://corpus/none is not there"):
            require_visible([Place("MANIFEST", remote.uri("none"), "input")], here=False)
        with pytest.raises(ValueError, match=r"^OUT s3://no-bucket/x: there is no such bucket"):
            require_visible([Place("OUT", "s3://no-bucket/x", "output")], here=False)
        remote.faults[:] = [Fault("503", "", method, 1000) for method in ("GET", "HEAD")]
        require_visible([shards], here=False)  # an outage is the job's to wait for
        remote.faults.clear()
        patch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        from hbi.infra import storage

        storage._s3.cache_clear()
        with pytest.raises(
            ValueError, match=r"^SHARDS s3://corpus/shards: refused \([^\n]*AWS_SECRET_ACCESS_KEY$"
        ):
            require_visible([shards], here=False)


def test_an_mlflow_server_that_is_down_is_said():
    down = Place("--tracking", f"http://127.0.0.1:{free_port()}", "tracking")
    with pytest.raises(ValueError, match=r"^--tracking http://[^\n]*the MLflow server does not answer"):
        require_visible([down], here=False)
    require_visible([Place("--tracking", "http://mlflow.invalid:5000", "tracking")], here=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        require_visible(
            [Place("--tracking", f"http://127.0.0.1:{server.getsockname()[1]}", "tracking")], here=False
        )


def test_on_this_machine_places_are_sent_as_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    command = ["shard", "m.jsonl", "s3://b/out", "--report=r.html", "--size", "32"]
    places = [
        Place("MANIFEST", "m.jsonl", "input"),
        Place("OUT", "s3://b/out", "output"),
        Place("--report", "r.html", "output"),
        OUT,
    ]
    assert made_absolute(command, places) == [
        "shard", f"{tmp_path}/m.jsonl", "s3://b/out", f"--report={tmp_path}/r.html", "--size", "32",
        "--out", f"{tmp_path}/runs/debug",
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------- attempts


@pytest.mark.parametrize(
    ("statuses", "made"), [([0], 1), ([2], 1), ([130], 1), ([1, 0], 2), ([1, 1, 1, 1], 3), ([-9, 2], 2)]
)
def test_what_may_pass_is_tried_again_and_a_mistake_is_not(
    statuses: list[int], made: int, monkeypatch: pytest.MonkeyPatch
):
    ran: list[list[str]] = []

    def run(command: list[str], check: bool) -> "subprocess.CompletedProcess[bytes]":
        ran.append(command)
        return subprocess.CompletedProcess(command, statuses[len(ran) - 1])

    monkeypatch.setattr(attempts.subprocess, "run", run)
    monkeypatch.setattr(attempts, "WAIT_SECONDS", 0.0)
    monkeypatch.setattr(sys, "argv", ["attempts", "2", "shard", "a"])
    with pytest.raises(SystemExit) as ending:
        attempts.main()
    assert ending.value.code == statuses[made - 1] and len(ran) == made
    assert ran[0][1:] == ["-m", "hbi", "shard", "a"]
