"""The front door: help like a table of contents, one line for a mistake, and Ctrl-C that leaves nothing behind."""

import json
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from hbi import cli
from hbi.commands.corpora import Corpus
from hbi.training.runs.table import RUNS
from tests.support.commands import run

ROOT = Path(__file__).resolve().parents[2]

COMMANDS = list(cli.COMMANDS)


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
def test_every_example_is_a_command_line_that_is_understood(command: str) -> None:
    example = (cli.COMMANDS[command].__doc__ or "").split(f"Example: hbi {command}")[1]
    assert isinstance(cli.read(command, shlex.split(example.splitlines()[0])), cli.COMMANDS[command])


@pytest.mark.parametrize("command", COMMANDS)
def test_arguments_are_shown_by_what_they_are(capsys, monkeypatch, command: str) -> None:
    _, out, _ = run(capsys, monkeypatch, command, "--help")
    usage = out[: out.index("\n\n")]
    assert "STR" not in usage.split("[--")[0], usage


def test_defaults_are_said_once(capsys, monkeypatch) -> None:
    _, out, _ = run(capsys, monkeypatch, "serve", "--help")
    assert out.count("MLFLOW_TRACKING_URI") == 1
    assert out.count("8000") == 2  # in the example, and as the default


def test_the_flags_of_train_are_those_of_the_named_run(capsys, monkeypatch) -> None:
    _, debug, _ = run(capsys, monkeypatch, "train", "debug", "--help")
    _, demo, _ = run(capsys, monkeypatch, "train", "--set.seed", "3", "demo", "--help")
    assert "--set.optim.lr" in debug and all(name in debug for name in RUNS)
    assert "are those of debug" in debug and "are those of demo" in demo
    assert f"(default: {RUNS['demo'].optim.lr})" in demo


@pytest.mark.parametrize(
    "line",
    [
        "demo --data demo",
        "--data demo demo",
        "--set.optim.betas 0.9 0.98 demo --data demo",
        "--set.model.checkpointing demo --data=demo",
        "--set.model.no-checkpointing --set.optim.lr 1e-3 --out debug --data demo demo",
    ],
)
def test_an_option_before_the_name_of_a_run_changes_nothing(line: str) -> None:
    read = cli.read("train", line.split())
    assert (read.name, read.data, read.set.name) == ("demo", "demo", "demo")
    assert read.set.workers == RUNS["demo"].workers


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    command = f"{shlex.quote(sys.executable)} -c 'from hbi.cli import main; main()' --help | head -1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("hbi: ") and not done.stderr


def test_a_wrong_argument_is_told_before_anything_heavy_is_imported() -> None:
    code = (
        "import sys; from hbi.cli import main; sys.argv = ['hbi', 'serve', 'm', 'i', '--nonsense']\n"
        "try: main()\nexcept SystemExit as e: print(e.code)\n"
        "print({'ray', 'mlflow', 'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split("\n")[-3:-1] == ["2", "set()"]
    assert "--nonsense" in done.stderr


def test_shells_complete_every_command(capsys, monkeypatch) -> None:
    status, out, _ = run(capsys, monkeypatch, "--tyro-print-completion", "bash")
    assert status == 0 and all(command in out for command in COMMANDS)


def test_the_version_is_told(capsys, monkeypatch) -> None:
    status, out, _ = run(capsys, monkeypatch, "--version")
    assert status == 0 and out.split()[0] == "hbi"


def one_line(err: str) -> str:
    """The one line of the mistake, after whatever was said of progress."""
    lines = [line for line in err.splitlines() if line.strip()]
    assert [line for line in lines if line.startswith("hbi")] == lines[-1:] and len(lines) <= 2, err
    return lines[-1]


def test_bad_input_gets_one_line_that_names_it(capsys, monkeypatch, tmp_path: Path) -> None:
    empty, nameless = tmp_path / "empty.jsonl", tmp_path / "nameless.jsonl"
    empty.write_text("")
    nameless.write_text(json.dumps({"captions": ["no video"]}) + "\n")
    (tmp_path / "folder").mkdir()
    store = str(tmp_path / "store")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        cases = {
            ("shard", tmp_path / "none.jsonl", tmp_path / "o"): "none.jsonl",
            ("shard", nameless, tmp_path / "o"): "nameless.jsonl",
            ("shard", empty, tmp_path / "o"): "empty.jsonl",
            ("corpus", tmp_path / "c", "--clips", 5): "--clips 5",
            ("shard", "m", "o", "--frames", 0): "--frames 0: must be at least 1",
            ("shard", "m", "o", "--jpeg-quality", 101): "--jpeg-quality 101: must be between 1 and 100",
            (
                "split",
                "m",
                "o",
                "--seconds",
                0.5,
            ): "--min-seconds 1: must be above 0 and at most --seconds (0.5)",
            ("train", "debug", "--data", tmp_path / "folder", "--out", tmp_path / "r"): "not a shard folder",
            ("train", "nosuchrun", "--data", tmp_path): "nosuchrun",
            ("index", tmp_path / "folder", tmp_path / "folder", tmp_path / "i"): "not a shard folder",
            ("search", tmp_path / "folder", "a word"): "not an index",
            ("serve", "m", "i", "--port", port): f"--port {port}",
            ("serve", "m", tmp_path / "folder", "--port", 0): "not an index",
        }
        for args, named in cases.items():
            status, _, err = run(capsys, monkeypatch, *args)
            assert status == 2, args
            assert named in one_line(err)
    status, _, err = run(capsys, monkeypatch, "serve", "m", "i", "--host", "0.0.0.0")
    assert status == 2 and "set a key in HBI_API_KEY" in " ".join(err.split())
    status, _, err = run(
        capsys, monkeypatch, "index", "models:/nobody@champion", "s", "i", "--tracking", store
    )
    assert status == 2
    assert "s: not a shard folder" in err.splitlines()[-1]


def test_an_unknown_command_is_told_the_nearest(capsys, monkeypatch) -> None:
    status, _, err = run(capsys, monkeypatch, "serch")
    assert status == 2
    assert "'search'" in one_line(err)


def test_ctrl_c_ends_a_command_and_leaves_no_process(tmp_path: Path) -> None:
    Corpus(str(tmp_path / "corpus"), clips=12).run()
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
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, start_new_session=True) as job:
        try:
            done = tmp_path / "out" / ".done"
            deadline = time.monotonic() + 120
            while not (done.exists() and any(done.iterdir())) and time.monotonic() < deadline:
                time.sleep(0.2)
            assert done.exists(), "no shard was made in two minutes"
            started = psutil.Process(job.pid).children(recursive=True)
            assert started
            job.send_signal(signal.SIGINT)
            _, err = job.communicate(timeout=60)
            assert job.returncode == 130
            assert b"Traceback" not in err
        finally:
            job.kill()
    _, left = psutil.wait_procs(started, timeout=5)
    assert not [process for process in left if process.status() != psutil.STATUS_ZOMBIE]
