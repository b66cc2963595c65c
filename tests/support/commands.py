"""A command as its user calls it, in the process of the test."""

import sys

import pytest

from hbi import cli


def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *args: object
) -> tuple[int, str, str]:
    """Its exit status, and what it said. The session's Ray and signals stay as they are."""
    monkeypatch.setattr(sys, "argv", ["hbi", *map(str, args)])
    monkeypatch.setattr(cli, "end_on_signal", lambda: None)
    monkeypatch.setattr(cli, "stop_ray", lambda: None)
    status = 0
    try:
        cli.main()
    except SystemExit as ending:
        status = int(ending.code or 0)
    said = capsys.readouterr()
    return status, said.out, said.err
