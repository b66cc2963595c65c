"""The benches of the model run and print one JSON line each; time and memory are measured as they say."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import checkpointing, evaluation, interaction, report, similarity
from benchmarks.report import Measured, measure


def hold(device: str, mebibytes: int, fail: str = "") -> Callable[[], int]:
    """Work that holds so much memory for a moment."""

    def run() -> int:
        if fail:
            raise RuntimeError(fail)
        return int(torch.ones(mebibytes * 2**18, device=device)[-1].item())

    return run


def test_peak_memory_is_that_of_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_limit_memory", lambda: None)  # not for the process of the tests
    measured = report._measure(hold, "cpu", 0, {"mebibytes": 200})
    assert measured.result == 1 and measured.peak_mib == pytest.approx(200, abs=40)
    assert measured.seconds is not None and measured.seconds > 0


def test_memory_that_is_not_there_is_an_error_of_the_work() -> None:
    """In a process of its own, as the benches run."""
    measured = measure(hold, repeats=0, mebibytes=10**7)
    assert measured == Measured(None, None, error="not enough memory")
    assert measured.plain() == {"seconds": None, "peak_mib": None, "error": "not enough memory"}
    assert str(measured) == "failed: not enough memory"


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The work itself, here and now: a process for each would be slow."""

    def run(
        prepare: Callable[..., Callable[[], Any]], *, device: str, repeats: int, **arguments: Any
    ) -> Measured:
        return Measured(0.5, 10.0, prepare(device=device, **arguments)())

    for bench in (checkpointing, interaction, similarity):
        monkeypatch.setattr(bench, "measure", run)


def last_line(capsys: pytest.CaptureFixture[str]) -> dict:
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["commit"] and line["machine"]["cores"] and line["machine"]["torch_threads"]
    return line["results"]


def test_interaction(in_process: None, capsys: pytest.CaptureFixture[str]) -> None:
    interaction.main(sizes=((24, 12),), batches=(4,), draws=(50, 200), predictor_steps=2, device="cpu")
    results = last_line(capsys)
    assert results["exact_against_enumeration_7x7"] < 1e-6
    rows = results["24x12_batch_4"]
    assert rows["exact"]["largest_error"] * 1000 < rows["sampled_200"]["largest_error"]
    assert rows["times_faster"] == 1.0 and rows["times_closer"] > 1000
    assert results["predictor_24x12"]["relative_error"] > 0


def test_similarity(in_process: None, capsys: pytest.CaptureFixture[str]) -> None:
    similarity.Bench(batches=(20,), dim=16, chunks=(6,), device="cpu").run()
    results = last_line(capsys)
    assert results["batch_20_chunk_6"]["loss"] == pytest.approx(results["batch_20_whole"]["loss"], rel=1e-5)


def test_evaluation(capsys: pytest.CaptureFixture[str]) -> None:
    evaluation.Bench(sizes=((9, 7),), dim=16, chunk=4).run()
    results = last_line(capsys)
    assert results["9 x 7"]["largest_error"] < 1e-6 and results["9 x 7"]["seconds"] >= 0


def test_checkpointing(in_process: None, capsys: pytest.CaptureFixture[str]) -> None:
    checkpointing.main(batch=2, frames=4, small=True, device="cpu")
    results = last_line(capsys)
    assert results["recomputed"]["loss"] == pytest.approx(results["kept"]["loss"], rel=1e-6)
    assert results["memory_share"] == 1.0
