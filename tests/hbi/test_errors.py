"""An error as one line, and whose mistake it is."""

import json
import subprocess
import sys

import pytest

from hbi import cli
from hbi.infra import signals
from hbi.infra.cluster.attempts import MISTAKE
from hbi.infra.project import ROOT
from hbi.pipelines.sample import ShardIndex


def caught(function, *arguments) -> Exception:
    try:
        function(*arguments)
    except Exception as error:
        return error
    raise AssertionError("it raised nothing")


def test_what_we_say_of_a_cause_stands():
    def ours() -> None:
        try:
            raise OSError("the specified bucket does not exist")
        except OSError as error:
            raise ValueError("s3://none/out: no such bucket: make it") from error

    assert cli.one_line(caught(ours)) == "s3://none/out: no such bucket: make it"


def test_what_ray_wraps_comes_out_of_its_wrapping(ray_session: None):
    import ray

    @ray.remote
    def fails() -> None:
        raise ValueError("frames is 0,\nmust be at least 1")

    error = caught(ray.get, fails.remote())
    assert cli.one_line(error) == "frames is 0, must be at least 1" and cli.is_mistake(error)


def test_only_what_we_refused_is_the_users_mistake(tmp_path):
    assert cli.is_mistake(caught(ShardIndex.read, str(tmp_path)))
    assert not cli.is_mistake(caught(json.loads, "{"))
    assert not cli.is_mistake(OSError("cut off"))


def test_a_mistake_has_an_exit_status_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path):
    for name in ("end_on_signal", "stop_ray"):
        monkeypatch.setattr(cli, name, lambda: None)
    assert cli._main(["evaluate", "model", str(tmp_path / "none")], debug=False) == MISTAKE


def test_an_interrupted_job_has_tidied_up_before_ray_ends_it():
    from ray.dashboard.modules.job.job_supervisor import JobSupervisor

    assert signals.END_SECONDS < JobSupervisor.DEFAULT_RAY_JOB_STOP_WAIT_TIME_S


def test_a_python_without_our_packages_is_named():
    """A job's `python` may be another one than Ray's; trying again does not help."""
    command = [sys.executable, "-S", "-m", "hbi", "--help"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == MISTAKE
    assert ended.stderr == f"hbi: {sys.executable} has no tyro: install there what constraints.txt pins\n"
