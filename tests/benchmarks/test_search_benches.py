"""The benchmarks of search and serving on a tiny size."""

import json
from pathlib import Path

import pytest

from benchmarks import search, serving
from tests.serving.conftest import chain as chain


def test_search(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        search, "replica_mb", lambda folder: 0.0
    )  # a process of its own: not for its number here
    monkeypatch.setattr(search.table_module, "SCANNED_BYTES", 10**6)  # the bench changes it
    search.main(sizes=(300,), queries=2, dim=64, frames=6, ann=True)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]["300"]
    assert all(m[kind]["recall@10"] == 1.0 for m in (found, found["ann"]) for kind in search.DISTANCES)
    assert found["add_ms"] > 0 and found["delete_ms"] > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_serving(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    serving.main(index=str(chain / "index"), clients=(2,), seconds=0.5)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert found["clients_2"]["failed"] == 0
    assert 0 < found["bare_loop"]["p50_ms"] <= found["bare_loop"]["p99_ms"]
