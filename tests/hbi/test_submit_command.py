"""`hbi submit` as a command line: what it takes for a job, which of its arguments are places, what it prints."""

import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from hbi import cli
from hbi.commands import cluster
from hbi.commands.cluster import CAN_RUN, Submit, places_of
from hbi.infra.cluster.places import Place

MANIFESTS = Path(__file__).resolve().parents[2] / "infra" / "cluster" / "manifests"


@pytest.mark.parametrize("name", CAN_RUN)
def test_every_place_among_the_arguments_of_a_job_is_known(name: str):
    """A new argument that names a file or a folder must be said in CAN_RUN, or the cluster would look in vain."""
    kind, places = CAN_RUN[name]
    assert cli.COMMANDS[name] is kind
    names = {field.name for field in fields(kind)}
    assert places.keys() <= names
    called = {"out", "manifest", "report", "data", "shards", "index", "model", "show", "tracking"}
    assert names & called == places.keys()


def test_places_are_what_the_commands_own_parser_reads(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://m:5000")
    assert list(places_of(["shard", "s3://b/m", "out", "--report", "r.html", "--size", "32"])) == [
        Place("MANIFEST", "s3://b/m", "input"),
        Place("OUT", "out", "output"),
        Place("--report", "r.html", "output"),
    ]
    assert list(places_of(["train", "demo", "--data", "s3://b/s"])) == [
        Place("--data", "s3://b/s", "input", "index.json"),
        Place("--out", "runs/demo", "output", flag="--out"),
        Place("--tracking", "http://m:5000", "tracking", flag="--tracking"),
    ]
    read = list(places_of(["index", "s3://b/model", "s3://b/s", "s3://b/i"]))
    assert [place.kind for place in read] == ["model", "input", "output"]
    read = list(places_of(["index", "models:/hbi@champion", "s3://b/s", "s3://b/i"]))
    assert read[-1] == Place("--tracking", "http://m:5000", "tracking", flag="--tracking")
    assert list(places_of(["index", "--show", "mine"])) == [Place("--show", "mine", "input", "index.json")]


def test_what_is_no_job_is_refused():
    for line, said in {
        "": "nothing to run",
        "-- shad": "shad: runs here only: a job is one of corpus, split, shard",
        "-- demo": "demo: runs here only",
        "--retries -1 -- shard a b": "--retries is -1",
    }.items():
        with pytest.raises(ValueError, match=said):
            cli.read("submit", line.split())
    read = cli.read("submit", shlex.split("--env A=1 --env B --no-wait -- shard a 'b c' --size 32"))
    assert (read.env, read.wait, read.command) == (("A=1", "B"), False, ("shard", "a", "b c", "--size", "32"))
    with pytest.raises(SystemExit):
        list(places_of(["shard", "a", "b", "--nonsense"]))


@pytest.mark.parametrize(
    ("file", "line"),
    {
        "shard.rayjob.yaml": "--name shard --print rayjob --gpus 0 -- shard s3://bucket/manifest.jsonl s3://bucket/shards",
        "train.rayjob.yaml": (
            "--name train --print rayjob -- train msrvtt --data s3://bucket/shards --out s3://bucket/run"
        ),
        "serve.rayservice.yaml": (
            "--name search --print rayservice --gpus 0 -- serve models:/hbi@champion s3://bucket/index"
        ),
        "train.sbatch": "--name train --print slurm -- train msrvtt --data s3://bucket/shards --out s3://bucket/run",
    }.items(),
)
def test_what_is_printed_is_the_file_of_that_name(file: str, line: str, capsys: pytest.CaptureFixture[str]):
    cli.read("submit", line.split()).run()
    assert capsys.readouterr().out == (MANIFESTS / file).read_text()


def test_no_pod_sees_a_local_file():
    for line in ("rayjob -- shard m.jsonl s3://b/o", "rayservice -- serve model s3://b/i"):
        with pytest.raises(ValueError, match="no pod sees this machine's files: give an s3:// path"):
            cli.read("submit", ["--print", *line.split()]).run()
    with pytest.raises(ValueError, match="--print rayjob"):
        cli.read("submit", ["--print", "rayservice", "--", "shard", "s3://b/m", "s3://b/o"]).run()


def test_ctrl_c_leaves_the_job_running_and_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from hbi.infra.cluster import submit

    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(submit, "start", lambda cluster, job: f"{job.name}-1")
    monkeypatch.setattr(submit, "follow", interrupted)
    job = submit.Job("one", ("shard", "a", "b"), {"AWS_SECRET_ACCESS_KEY": "hidden"}, 3)
    there = submit.Cluster(None, "http://h:8265", 2, False)  # pyright: ignore[reportArgumentType]
    with pytest.raises(SystemExit) as ending:
        Submit()._run_job(there, job)
    said = capsys.readouterr().err
    assert ending.value.code == 130 and "one-1 runs on" in said and "`hbi submit --stop one` stops it" in said
    assert "AWS_SECRET_ACCESS_KEY" in said and "hidden" not in said
    assert cluster.Submit is Submit
