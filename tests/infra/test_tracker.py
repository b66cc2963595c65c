"""Tracking: nothing waits, nothing is lost, whatever the server does."""

import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from hbi.infra.mlflow import store as stores
from hbi.infra.mlflow import tracker as tracking
from hbi.infra.mlflow.lineage import Shards, lineage, origin
from hbi.infra.mlflow.outbox import Outbox
from hbi.infra.mlflow.sending import INTERRUPTED, replay
from hbi.infra.mlflow.store import shown
from hbi.infra.mlflow.tracker import Tracker
from tests.support.mlflow_server import Server
from tests.support.mlflow_store import fresh_store
from tests.support.waiting import wait_for

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "GATHER_SECONDS", 0.05)
    monkeypatch.setattr(tracking, "RETRY_SECONDS", 0.2)


@pytest.fixture
def store(tmp_path: Path) -> str:
    return fresh_store(tmp_path / "store")


def history(uri: str, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in stores.client(uri).get_metric_history(run_id, name)]


def test_a_run_has_all_that_was_said(store: str, tmp_path: Path) -> None:
    note = tmp_path / "note.txt"
    note.write_text("hello")
    with Tracker(store, "tests", "one", tmp_path / "outbox") as tracker:
        tracker.params({"optim.lr": 1e-4, "optim.betas": (0.9, 0.98), "name": "x" * 9000})
        tracker.tags({"commit": "abc", "dirty": False})
        for step in range(5):
            tracker.metrics({"loss": 1.0 / (step + 1), "val/t2v+dsl/R@1": torch.tensor(step)}, step)
        tracker.metrics({"broken": float("nan"), "endless": float("inf")}, 5)
        tracker.figure("val/pair", Figure())
        tracker.table("val-qa", [{"question": "what moves?", "answer": "a ball"}])
        tracker.artifact(note, "notes")
    run = stores.client(store).get_run(tracker.run_id)
    assert run.info.status == "FINISHED" and run.info.run_name == "one"
    assert run.data.params["optim.lr"] == "0.0001" and run.data.params["optim.betas"] == "(0.9, 0.98)"
    assert len(run.data.params["name"]) == 6000
    assert run.data.tags["commit"] == "abc" and run.data.tags["dirty"] == "False"
    assert history(store, tracker.run_id, "loss") == [(step, 1.0 / (step + 1)) for step in range(5)]
    assert [value for _, value in history(store, tracker.run_id, "val/t2v-dsl/R1")] == [0, 1, 2, 3, 4]
    assert run.data.metrics["broken"] != run.data.metrics["broken"]
    assert run.data.metrics["system/system_memory_usage_percentage"] > 0
    (measured,) = history(store, tracker.run_id, "system/cpu_utilization_percentage")
    assert measured[0] == 5  # the step at which the machine was so, and not the first of all in each process
    artifacts = Path(run.info.artifact_uri.removeprefix("file://"))
    assert artifacts.is_relative_to(tmp_path / "store" / "artifacts")
    assert (artifacts / "notes" / "note.txt").read_text() == "hello"
    assert (artifacts / "figures" / "val" / "pair.png").read_bytes().startswith(b"\x89PNG")
    table = {"columns": ["question", "answer"], "data": [["what moves?", "a ball"]]}
    assert json.loads((artifacts / "tables" / "val-qa.json").read_text()) == table
    assert not list((tmp_path / "outbox").iterdir())


def test_nothing_is_written_where_we_stand(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    with Tracker(store, "tests", "one", tmp_path / "outbox") as tracker:
        tracker.metrics({"loss": 1.0}, 0)
        tracker.figure("f", b"\x89PNG")
    assert not list(here.iterdir())


def test_the_caller_never_waits(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that takes half a second for each request costs the caller nothing."""
    send = tracking.send
    monkeypatch.setattr(tracking, "send", lambda *args: (time.sleep(0.5), send(*args)))
    with Tracker(store, "tests", "one", tmp_path / "outbox") as tracker:
        seconds = []
        for step in range(2000):
            start = time.perf_counter()
            tracker.metrics({"loss": 0.5, "rate": 1.0}, step)
            seconds.append(time.perf_counter() - start)
    assert sorted(seconds)[len(seconds) // 2] < 1e-4
    assert len(history(store, tracker.run_id, "loss")) == 2000


def test_a_disabled_tracker_does_nothing(tmp_path: Path) -> None:
    with Tracker("", "tests", "one", tmp_path / "outbox") as tracker:
        tracker.metrics({"loss": 1.0}, 0)
        tracker.params({"a": 1})
    assert not (tmp_path / "outbox").exists() and tracker.close() == 0


@pytest.mark.parametrize(("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_how_a_run_ends(store: str, tmp_path: Path, error: type[BaseException], status: str) -> None:
    with pytest.raises(error), Tracker(store, "tests", "one", tmp_path / "outbox") as tracker:
        raise error
    assert stores.client(store).get_run(tracker.run_id).info.status == status


def test_a_resumed_run_goes_on_and_says_what_changed(store: str, tmp_path: Path) -> None:
    with Tracker(store, "tests", "one", tmp_path / "outbox") as first:
        first.params({"lr": 1, "name": "a"})
        first.metrics({"loss": 1.0}, 0)
    with Tracker(store, "tests", "one", tmp_path / "outbox", run_id=first.run_id) as second:
        second.params({"lr": 2, "name": "a", "new": 3})
        second.metrics({"loss": 0.5}, 1)
    run = stores.client(store).get_run(first.run_id)
    assert second.run_id == first.run_id and run.info.status == "FINISHED"
    assert run.data.params == {"lr": "1", "name": "a", "new": "3"} and run.data.tags["resumed/lr"] == "2"
    assert "resumed/name" not in run.data.tags
    assert history(store, first.run_id, "loss") == [(0, 1.0), (1, 0.5)]


def test_a_run_that_goes_on_is_running_whatever_is_sent_late(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*arguments: Any) -> None:
        raise OSError("the server is away")

    with monkeypatch.context() as outage:
        outage.setattr(tracking, "send", away)
        with pytest.raises(KeyboardInterrupt), Tracker(store, "tests", "one", tmp_path / "outbox") as first:
            first.tags({INTERRUPTED: "stopped at step 1: run again to go on"})
            raise KeyboardInterrupt
    assert first.unsent == 2
    with Tracker(store, "tests", "one", tmp_path / "outbox", run_id=first.run_id) as second:
        second.metrics({"loss": 1.0}, 1)
        wait_for(lambda: history(store, first.run_id, "loss") == [(1, 1.0)], 30)
        wait_for(lambda: second.outbox.waiting == 0, 30)
        run = stores.client(store).get_run(first.run_id)
        assert run.info.status == "RUNNING" and INTERRUPTED not in run.data.tags
    assert stores.client(store).get_run(first.run_id).info.status == "FINISHED"
    with (
        pytest.raises(KeyboardInterrupt),
        Tracker(store, "tests", "one", tmp_path / "outbox", first.run_id) as third,
    ):
        third.tags({INTERRUPTED: "stopped at step 2"})  # sent at once with its beginning
        raise KeyboardInterrupt
    run = stores.client(store).get_run(first.run_id)
    assert (run.info.status, run.data.tags[INTERRUPTED]) == ("KILLED", "stopped at step 2")


def test_a_step_is_written_once_whatever_is_sent_again(store: str, tmp_path: Path) -> None:
    with Tracker(store, "tests", "one", tmp_path / "outbox") as first:
        for step in (1, 2, 3, 5):
            first.metrics({"loss": float(step)}, step)
    with Tracker(store, "tests", "one", tmp_path / "outbox", run_id=first.run_id) as second:
        for step in (3, 4, 5, 6):  # from a checkpoint at step 2: the same steps once more, by another clock
            second.metrics({"loss": 10.0 * step}, step)
    expected = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0), (5, 5.0), (6, 60.0)]
    assert sorted(history(store, first.run_id, "loss")) == expected


def test_a_resumed_run_sends_again_what_failed(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    with Tracker(store, "tests", "one", tmp_path / "outbox") as first:
        first.metrics({"loss": 1.0}, 1)
    log_batch, outages = MlflowClient.log_batch, [True, True]

    def go_away(*args: Any, **kwargs: Any) -> None:
        if "metrics" in kwargs and outages:
            outages.pop()
            raise ConnectionError("the server is away")
        log_batch(*args, **kwargs)

    monkeypatch.setattr(MlflowClient, "log_batch", go_away)
    with Tracker(store, "tests", "one", tmp_path / "outbox", run_id=first.run_id) as second:
        second.metrics({"loss": 2.0}, 2)
        wait_for(lambda: history(store, first.run_id, "loss") == [(1, 1.0), (2, 2.0)], 30)
    assert not outages


def test_the_shards_are_an_input_of_the_run(store: str, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "index.json").write_text("{}")
    with Tracker(store, "tests", "one", tmp_path / "outbox") as tracker:
        tracker.tags(origin("what it is", "hbi train tiny", "hbi train tiny --data a/b"))
        tracker.dataset(Shards.of(str(tmp_path / "shards"), {"train": 3, "val": 1}))
    run = stores.client(store).get_run(tracker.run_id)
    (given,) = run.inputs.dataset_inputs
    assert (given.dataset.name, given.dataset.source_type) == ("shards", "local")
    assert json.loads(given.dataset.profile) == {"num_rows": 4, "train": 3, "val": 1}
    assert {tag.key: tag.value for tag in given.tags} == {"mlflow.data.context": "training"}
    assert run.data.tags["mlflow.note.content"] == "what it is\n\n`hbi train tiny --data a/b`"
    assert run.data.tags["mlflow.source.name"] == "hbi train tiny" and run.data.tags["mlflow.user"]


def test_a_run_that_is_gone_from_the_store_goes_on_anew(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Tracker(store, "tests", "one", tmp_path / "outbox", run_id="0" * 32) as tracker:
        tracker.metrics({"loss": 1.0}, 0)
    assert tracker.run_id != "0" * 32
    assert stores.client(store).get_run(tracker.run_id).data.tags["resumes"] == "0" * 32
    assert "going on in a new run" in capsys.readouterr().err


def test_what_cannot_be_a_number_is_left_out_and_said(store: str, tmp_path: Path) -> None:
    lines: list[str] = []
    with Tracker(store, "tests", "one", tmp_path / "outbox", say=lines.append) as tracker:
        tracker.metrics({"loss": "high", "rate": 2.0}, 3)
        tracker.metrics({"loss": 1.0}, 4)
        tracker.artifact(tmp_path / "absent")
    assert history(store, tracker.run_id, "loss") == [(4, 1.0)]
    assert history(store, tracker.run_id, "rate") == [(3, 2.0)]
    said = "\n".join(lines)
    assert "left out loss of step 3" in said and "was gone before it could be sent" in said


def test_an_artifact_that_fails_does_not_hold_up_metrics(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError("bucket is closed")

    monkeypatch.setattr(MlflowClient, "log_artifact", refuse)
    with Tracker(store, "tests", "one", tmp_path / "outbox") as tracker:
        tracker.figure("pair", b"\x89PNG")
        tracker.metrics({"loss": 1.0}, 0)
    assert history(store, tracker.run_id, "loss") == [(0, 1.0)] and tracker.unsent == 0
    assert "could not be sent (bucket is closed): given up after 3 tries" in capsys.readouterr().err
    assert not list((tmp_path / "outbox").iterdir())


# ------------------------------------------------------------------------------------------------- spool


def test_an_outbox_keeps_order_and_forgets_what_was_sent(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "run.jsonl")
    outbox.write({"n": n} for n in range(450))
    got = [event["n"] for batch in outbox.batches() for event in batch]
    assert got == list(range(450)) and outbox.waiting == 0 and outbox.path.stat().st_size == 0
    outbox.close()
    assert not outbox.path.exists()


def test_an_outbox_outlives_its_process_and_half_a_line(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "run.jsonl")
    outbox.write({"n": n} for n in range(300))
    batches = outbox.batches()
    assert len(next(batches)) == 200  # handed out, but nobody said that it was sent
    with outbox.path.open("ab") as stream:
        stream.write(b'{"n": 30')
    again = Outbox(tmp_path / "run.jsonl")
    again.write([{"n": 300}])
    assert [event["n"] for batch in again.batches() for event in batch] == list(range(301))


# ------------------------------------------------------------------------------------------------ server


def test_a_server_that_dies_delays_nothing_and_loses_nothing(
    mlflow_server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = mlflow_server
    tracker = Tracker(server.uri, "tests", "one", tmp_path / "outbox")
    outbox = tracker.outbox
    tracker.params({"lr": 1})
    tracker.metrics({"loss": 0.0}, 0)
    wait_for(lambda: history(server.store, tracker.run_id, "loss") == [(0, 0.0)], 30)
    server.kill()
    slowest = 0.0
    for step in range(1, 101):  # the server is away
        start = time.perf_counter()
        tracker.metrics({"loss": float(step)}, step)
        slowest = max(slowest, time.perf_counter() - start)
        time.sleep(0.01)
    tracker.figure("while-away", b"\x89PNG")
    wait_for(lambda: outbox.waiting >= 101, 30)
    assert slowest < 0.5  # a busy machine may pause us, a dead server may not
    assert "is away" in capsys.readouterr().err
    server.start()  # and back
    wait_for(lambda: outbox.waiting == 0, 60)
    tracker.metrics({"loss": 101.0}, 101)
    server.kill()
    left = tracker.close(timeout=20)
    said = capsys.readouterr().err
    if left:  # the last lines were still on their way
        assert f"{left} records of run {tracker.run_id} are not sent" in said and str(outbox.path) in said
    # A process that resumes the run while the server is still away does not mind, and its lines follow in order.
    with Tracker(server.uri, "tests", "one", tmp_path / "outbox", run_id=tracker.run_id) as resumed:
        resumed.metrics({"loss": 102.0}, 102)
    assert resumed.run_id == tracker.run_id and resumed.unsent > 0
    assert f"python -m hbi.infra.mlflow.tracker {outbox.path}" in capsys.readouterr().err
    assert replay(outbox.path, server.store) == resumed.unsent  # any way to the store will do
    assert history(server.store, tracker.run_id, "loss") == [(step, float(step)) for step in range(103)]
    assert stores.client(server.store).get_run(tracker.run_id).info.status == "FINISHED"
    assert list(server.artifacts.rglob("while-away.png"))
    assert not list((tmp_path / "outbox").iterdir())


def test_a_new_run_needs_its_server(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"tracking store http://\*\*\*@127.0.0.1:9 does not answer \(\[Errno \d+\] [\w ]+\): start",
    ):
        Tracker("http://me:secret@127.0.0.1:9", "tests", "one", tmp_path / "outbox")


def test_a_server_that_hangs_does_not_hold_up_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stores, "ALIVE_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, never answers
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        tracker = Tracker(uri, "tests", "one", tmp_path / "outbox", run_id="1" * 32)
        tracker.metrics({"loss": 1.0}, 0)
        start = time.monotonic()
        assert tracker.close(timeout=5) >= 2
        assert time.monotonic() - start < 5
    assert "are not sent" in capsys.readouterr().err


def test_passwords_are_not_shown() -> None:
    assert shown("https://me:secret@host:1/x") == "https://***@host:1/x"
    assert shown("sqlite:////a/b.db") == "sqlite:////a/b.db"


def test_replay_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such outbox"):
        replay(tmp_path / "no.jsonl", "http://127.0.0.1:9")
    Outbox(tmp_path / "run.jsonl").write([{"kind": "tags", "values": {}}])
    with pytest.raises(ValueError, match=r"does not take .*run\.jsonl .*it stays as it is"):
        replay(tmp_path / "run.jsonl", "http://127.0.0.1:9")
    assert (tmp_path / "run.jsonl").stat().st_size > 0


def test_lineage_names_commit_and_data(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text("{}")
    found = lineage(str(tmp_path))
    assert found["data_sha256"] == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    assert found["dirty"] in ("true", "false", "unknown") and found["commit"]
