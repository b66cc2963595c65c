"""One job at a time on an output in object storage, and no waiting for ever for one that was killed."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hbi.infra import claim, storage
from hbi.infra.claim import claimed
from tests.support.s3 import ObjectStorage, object_storage


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[ObjectStorage]:
    with object_storage(tmp_path / "s3") as running, pytest.MonkeyPatch.context() as patch:
        running.use(patch)
        patch.setattr(claim, "BEAT_SECONDS", 0.3)
        yield running


def test_the_second_of_two_is_refused_and_nothing_is_left(remote: ObjectStorage):
    place = remote.uri("out/writing")
    with claimed(place, "s3://corpus/out"):
        with pytest.raises(ValueError, match=r"^s3://corpus/out: another run is writing there: [^\n]*$"):
            claimed(place, "s3://corpus/out").__enter__()
        assert storage.exists(place)
    assert not storage.exists(place)
    with claimed(place, "s3://corpus/out"):
        pass


def test_of_two_that_begin_in_the_same_moment_one_is_refused(
    remote: ObjectStorage, monkeypatch: pytest.MonkeyPatch
):
    place, begin, end = remote.uri("out/writing"), threading.Barrier(2), threading.Barrier(2)
    seen = claim._wait_for_its_end

    def see(place: str, what: str) -> None:
        seen(place, what)
        begin.wait(10)  # both saw that nobody writes

    monkeypatch.setattr(claim, "_wait_for_its_end", see)
    monkeypatch.setattr(claim, "BEAT_SECONDS", 4.0)  # whatever else this machine does
    ended: list[str] = []

    def run() -> None:
        try:
            with claimed(place, "s3://corpus/out"):
                end.wait(10)
            ended.append("done")
        except ValueError as error:
            end.wait(10)
            ended.append(str(error))

    both = [threading.Thread(target=run) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join(20)
    assert sorted(ended) == [
        "done",
        "s3://corpus/out: another run is writing there: wait, or choose another folder",
    ]
    assert not storage.exists(place)


def test_what_a_killed_one_left_is_taken_over(remote: ObjectStorage):
    place = remote.uri("out/writing")
    storage.write_bytes(place, b"somebody 7")
    with claimed(place, "s3://corpus/out"):
        assert not storage.read_bytes(place).startswith(b"somebody")
