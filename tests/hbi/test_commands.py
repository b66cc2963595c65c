"""The front door: help like a table of contents, one line for a mistake, and Ctrl-C that leaves nothing behind."""

import functools
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from hbi import cli, commands

COMMANDS = ["demo", "corpus", "import-dataset", "split", "shard", "train", "evaluate", "runs", "promote"]
COMMANDS += ["index", "search", "serve"]


def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *args: object
) -> tuple[int, str, str]:
    """A command in this process: its exit status, and what it said."""
    monkeypatch.setattr(sys, "argv", ["hbi", *map(str, args)])
    monkeypatch.setattr(cli, "_end_on_signal", lambda: None)
    monkeypatch.setattr(cli, "_stop_ray", lambda: None)
    status = 0
    try:
        cli.main()
    except SystemExit as ending:
        status = int(ending.code or 0)
    said = capsys.readouterr()
    return status, said.out, said.err


def test_help_lists_every_command_with_its_first_line(capsys, monkeypatch) -> None:
    status, out, _ = run(capsys, monkeypatch, "--help")
    assert status == 0
    listed = [line.split()[0] for line in out.splitlines() if line.startswith("  ")]
    assert listed == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(capsys, monkeypatch, command: str) -> None:
    status, out, _ = run(capsys, monkeypatch, command, "--help")
    assert status == 0
    assert f"Example: hbi {command}" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_example_is_a_command_line_that_is_understood(capsys, monkeypatch, command: str) -> None:
    group = next(group for group in cli.CONTENTS.values() if command in group)
    calls = []
    stub = functools.wraps(group[command])(lambda *given, **named: calls.append((given, named)))
    monkeypatch.setitem(group, command, stub)
    _, example = (group[command].__doc__ or "").split(f"Example: hbi {command}")
    status, _, err = run(capsys, monkeypatch, command, *shlex.split(example.splitlines()[0]))
    assert status == 0 and len(calls) == 1, err


def test_the_flags_of_train_are_those_of_the_named_run(capsys, monkeypatch) -> None:
    _, debug, _ = run(capsys, monkeypatch, "train", "debug", "--help")
    _, demo, _ = run(capsys, monkeypatch, "train", "demo", "--help")
    assert "--set.optim.lr" in debug
    assert "(default: demo)" in demo
    assert "(default: demo)" not in debug


def one_line(err: str) -> str:
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    return lines[0]


def test_bad_input_gets_one_line_that_names_it(capsys, monkeypatch, tmp_path: Path) -> None:
    empty, nameless = tmp_path / "empty.jsonl", tmp_path / "nameless.jsonl"
    empty.write_text("")
    nameless.write_text(json.dumps({"video": "a.mp4"}) + "\n" + json.dumps({"captions": ["no video"]}) + "\n")
    (tmp_path / "folder").mkdir()
    store = str(tmp_path / "store")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        cases = {
            ("shard", tmp_path / "none.jsonl", tmp_path / "o"): "none.jsonl",
            ("shard", nameless, tmp_path / "o"): "nameless.jsonl line 2",
            ("shard", empty, tmp_path / "o"): "empty.jsonl",
            ("corpus", tmp_path / "c", "--clips", 5): "--clips 5",
            ("train", "debug", "--data", tmp_path / "folder", "--out", tmp_path / "r"): "not a shard folder",
            ("train", "nosuchrun", "--data", tmp_path): "nosuchrun",
            ("index", tmp_path / "folder", tmp_path / "folder", tmp_path / "i"): "not a shard folder",
            ("search", tmp_path / "folder", "a word"): "not an index",
            ("serve", "m", "i", "--port", port): f"--port {port}",
        }
        for args, named in cases.items():
            status, _, err = run(capsys, monkeypatch, *args)
            assert status in (1, 2), args
            assert named in one_line(err)
    status, _, err = run(
        capsys, monkeypatch, "serve", "models:/nobody@champion", "i", "--tracking", store, "--port", 0
    )
    assert status == 1
    assert "nobody" in err.splitlines()[-1]


def test_an_unknown_command_is_told_the_nearest(capsys, monkeypatch) -> None:
    status, _, err = run(capsys, monkeypatch, "serch")
    assert status == 2
    assert "'search'" in one_line(err)


def test_ctrl_c_ends_a_command_within_five_seconds_and_leaves_no_process(tmp_path: Path) -> None:
    commands.corpus(str(tmp_path / "corpus"), clips=12)
    row = (tmp_path / "corpus" / "manifest.jsonl").read_text().splitlines()[0]
    manifest = tmp_path / "corpus" / "many.jsonl"
    manifest.write_text("".join(row + "\n" for _ in range(20_000)))
    command = [
        sys.executable,
        "-m",
        "hbi",
        "shard",
        str(manifest),
        str(tmp_path / "out"),
        "--samples-per-shard",
        "4",
    ]
    with subprocess.Popen(
        command, cwd=Path(cli.__file__).parent, stderr=subprocess.PIPE, start_new_session=True
    ) as job:
        try:
            done = tmp_path / "out" / ".done"
            deadline = time.monotonic() + 120
            while not (done.exists() and any(done.iterdir())) and time.monotonic() < deadline:
                time.sleep(0.2)
            assert done.exists(), "no shard was made in two minutes"
            started = psutil.Process(job.pid).children(recursive=True)
            assert started
            job.send_signal(signal.SIGINT)
            clock = time.monotonic()
            _, err = job.communicate(timeout=60)
            assert time.monotonic() - clock < 5 * (3 if os.environ.get("CI") else 1)
            assert job.returncode == 130
            assert b"Traceback" not in err
        finally:
            job.kill()
    _, left = psutil.wait_procs(started, timeout=5)
    assert not [process for process in left if process.status() != psutil.STATUS_ZOMBIE]
