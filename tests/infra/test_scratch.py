"""Temporary folders: a process's own, gone with whoever comes after a kill, and never taken from the living."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hbi.infra import scratch

CODE = """
import os, sys, tempfile, subprocess
from hbi.infra.scratch import claim_scratch
folder = claim_scratch()
assert claim_scratch() == folder
open(tempfile.mkdtemp(prefix="left") + "/file", "w").close()
subprocess.run([sys.executable, "-c", "import tempfile; tempfile.mkstemp(prefix='childs')"], check=True)
print(folder, flush=True)
sys.stdin.read()
os.kill(os.getpid(), 9)
"""


def start(folder: Path) -> "subprocess.Popen[str]":
    variables = {name: value for name, value in os.environ.items() if name not in ("HBI_SCRATCH", "TMPDIR")}
    return subprocess.Popen(
        [sys.executable, "-c", CODE], env={**variables, "TMPDIR": str(folder)}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip


def test_what_a_killed_process_left_is_removed_and_the_living_keep_theirs(tmp_path: Path, monkeypatch):
    killed, living = start(tmp_path), start(tmp_path)
    assert killed.stdout and living.stdout
    theirs, kept = (Path(process.stdout.readline().strip()) for process in (killed, living))
    names = sorted(path.name[:4] for path in theirs.iterdir())
    assert names == ["chil", "left"]
    killed.communicate()
    monkeypatch.setenv("HBI_SCRATCH", str(tmp_path))
    scratch.sweep_scratch()
    assert not theirs.exists() and len(list(kept.iterdir())) == 2
    living.communicate()
    scratch.sweep_scratch(seconds=5)
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_that_fails_hides_no_error(monkeypatch):
    def lost(*arguments: object) -> None:
        raise ConnectionError("Ray is gone")

    monkeypatch.setattr(scratch, "on_every_node", lost)
    with pytest.raises(ValueError, match="clip 7 is no video"), scratch.scratch_swept():
        raise ValueError("clip 7 is no video")
    with pytest.raises(KeyboardInterrupt), scratch.scratch_swept():
        raise KeyboardInterrupt
    with scratch.scratch_swept():
        pass
