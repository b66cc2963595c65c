"""`run.shard` on Ray: the bytes of the plain loop, whatever is killed, and nothing left behind."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

import psutil
import pytest

from hbi.pipelines.sample import ShardIndex, ShardInfo, read_shard
from hbi.pipelines.sharding import run, shards
from hbi.pipelines.sharding.records import ClipStats, ShardManifest
from hbi.pipelines.sharding.settings import ShardSettings
from hbi.pipelines.sharding.shards import ShardError
from hbi.pipelines.sharding.summary import Summary, kind_of
from tests.support.clips import write_clips, write_manifest
from tests.support.s3 import Fault, object_storage
from tests.support.sharding import SETTINGS, everything, lines, make, samples

# Ray Data warns of its own settings when it sends them to its workers.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
LONG = 1200
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`in/manifest.jsonl`, and `out` made by the plain loop without Ray."""
    folder = tmp_path_factory.mktemp("reference")
    manifest = write_clips(folder / "in", 60)
    with shards.decoder(SETTINGS) as decoder:
        make(manifest, str(folder / "out"), decoder)
    return folder


@pytest.fixture(scope="module")
def long_reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, of so many clips that a run can be caught half-way."""
    folder = tmp_path_factory.mktemp("long_reference")
    manifest = write_clips(folder / "in", LONG)
    with shards.decoder(SETTINGS) as decoder:
        make(manifest, str(folder / "out"), decoder)
    return folder


def left_by(out: Path) -> dict[str, bytes]:
    """Everything but the lock."""
    return {name: content for name, content in everything(out).items() if name != ".plan/lock"}


def test_ray_makes_the_bytes_of_the_plain_loop(ray_session: None, reference: Path, tmp_path: Path):
    manifest, out = str(reference / "in" / "manifest.jsonl"), tmp_path / "out"
    summary = run.shard(manifest, str(out), SETTINGS, report=str(tmp_path / "page" / "report.html"))
    assert left_by(out) == left_by(reference / "out")
    assert (summary.rows, summary.samples, summary.kept) == (60, 60, 0)
    assert summary.clip_seconds == pytest.approx(60 * 1.4) and summary.clips_per_second > 0
    assert summary.bytes == sum(path.stat().st_size for path in out.glob("*.tar"))
    assert "noise number 0" in (tmp_path / "page" / "report.html").read_text()

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.tar*")}
    (out / "train-000001.tar").unlink()
    summary = run.shard(manifest, str(out), SETTINGS)
    after = {path: path.stat().st_mtime_ns for path in out.rglob("*.tar*")}
    changed = {path.name for path in before if before[path] != after[path]}
    assert changed == {"train-000001.tar", "train-000001.tar.json"} and summary.kept == 54
    assert left_by(out) == left_by(reference / "out")


def test_the_records_of_many_shards_are_read_by_tasks_and_their_index_lies_in_parts(
    ray_session: None, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    manifest, out = str(reference / "in" / "manifest.jsonl"), tmp_path / "out"
    shutil.copytree(reference / "out", out)
    monkeypatch.setattr(run, "MANY", 5)
    few = ShardIndex.read(str(out))
    (out / "train-000001.tar").unlink()
    for kept in (54, 60):
        summary = run.shard(manifest, str(out), SETTINGS, report=str(tmp_path / "report.html"))
        assert (summary.rows, summary.samples, summary.kept) == (60, 60, kept)
        assert summary.clip_seconds == pytest.approx(60 * 1.4)
        index = json.loads((out / "index.json").read_text())
        assert [part["name"] for part in index["parts"]] == ["index/test-000.json", "index/train-000.json"]
        assert (index["samples"], sum(part["shards"] for part in index["parts"])) == (60, len(few.shards))
        assert replace(ShardIndex.read(str(out)), folder=few.folder) == replace(few, folder=few.folder)
    assert "noise number 0" in (tmp_path / "report.html").read_text()
    others = {"index.json", "index/test-000.json", "index/train-000.json"}
    found, wanted = left_by(out), left_by(reference / "out")
    assert {name: found[name] for name in found.keys() - others} == {
        name: wanted[name] for name in wanted.keys() - others
    }


def test_the_summary_counts_by_reason(ray_session: None, tmp_path: Path):
    write_clips(tmp_path, 0)
    rows = [{"video": f"missing {i}.mp4"} for i in range(3)] + [
        {"video": "0.mp4", "start": 100.0 + i} for i in range(2)
    ]
    rows += [{"video": "1.mp4"}]
    summary = run.shard(write_manifest(tmp_path / "m.jsonl", rows), str(tmp_path / "out"), SETTINGS)
    assert summary.failures[("read", "no such file")] == 3
    assert sorted(summary.failures.values()) == [2, 3]
    text = str(summary)
    assert "1 samples and 5 failures of 6 rows" in text and "3  read: no such file" in text, text
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["samples"] + index["failures"] == index["manifest"]["rows"] == 6


def test_the_summary_counts_what_is_cut_short_and_without_a_caption():
    clip = ClipStats(2.0, 25.0, 320, 240, 3, "pyav", captions=1)
    clips = [clip, replace(clip, truncated=True), replace(clip, words=0, captions=0)]
    summary = Summary("out")
    summary.add(ShardManifest(ShardInfo("train-000000.tar", "train", 3, 1, ""), 3, [], clips))
    text = str(summary)
    assert "captions  none for 1 samples" in text and "cut short 1 samples" in text, text


def test_reasons_are_grouped_without_their_particulars():
    assert kind_of("s3://b/k.mp4: storage kept failing, 6 tries") == kind_of(
        "s3://b/l.mp4: storage kept failing, 5 tries"
    )
    assert kind_of("short 0.25 s") == kind_of("short 3 s") != kind_of("long 3 s")


def test_two_runs_into_one_folder_are_refused(tmp_path: Path):
    manifest, out = write_clips(tmp_path / "in", 2), str(tmp_path / "out")
    with run._alone(out), pytest.raises(ValueError, match="another run is writing there"):
        run.shard(manifest, out, SETTINGS)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is not a folder"):
        run.shard(manifest, str(tmp_path / "file"), SETTINGS)


def test_what_storage_refuses_is_one_line(tmp_path: Path):
    manifest = write_clips(tmp_path / "in", 2)
    with object_storage(tmp_path / "s3") as remote, pytest.MonkeyPatch.context() as patch:
        remote.use(patch)
        with pytest.raises(ValueError, match=r"^s3://no-bucket/out: [^\n]*bucket"):
            run.shard(manifest, "s3://no-bucket/out", SETTINGS)
        with pytest.raises(ValueError, match=r"^s3://corpus/none\.jsonl: no such manifest[^\n]*$"):
            run.shard(remote.uri("none.jsonl"), str(tmp_path / "out"), SETTINGS)
        remote.faults[:] = [Fault("503", "plan.json", "HEAD", 1000)]
        with pytest.raises(ShardError, match=r"^s3://corpus/out: [^\n]*storage kept failing"):
            run.shard(manifest, remote.uri("out"), SETTINGS)


def test_a_full_disk_ends_the_run_with_one_line(ray_session: None, tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=150k", "none", str(out)], capture_output=True
    ).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        with pytest.raises(ShardError, match=r"^no space left for [^\n]*run again[^\n]*$"):
            run.shard(write_clips(tmp_path / "in", 60), str(out), SETTINGS)
        assert not (out / "index.json").exists()
        # Only whole shards: what another task was writing lies in .staging until the next run.
        units = json.loads((out / ".plan" / "plan.json").read_bytes())["units"]
        rows = {name: count for name, _, count, *_ in units}
        for tar in out.glob("*.tar"):
            with tar.open("rb") as stream:
                assert sum(1 for _ in read_shard(stream)) == rows[tar.name]
    finally:
        subprocess.run(["umount", "-l", str(out)], check=True)


def test_good_and_hostile_clips_in_one_run(ray_session: None, media: Path, tmp_path: Path):
    """Every file ends as a sample or as a failure with a reason; nothing hostile harms a good neighbour."""
    read = [
        [json.loads(line) for line in (media / name).read_text().splitlines()]
        for name in ("manifest.jsonl", "hostile.jsonl")
    ]
    good, hostile = ([{"video": str(media / row["video"]), "id": row["id"]} for row in rows] for rows in read)
    mixed = [row for pair in zip_longest(good, hostile) for row in pair if row]
    settings = ShardSettings(frames=4, size=32, samples_per_shard=16, clip_timeout=40)
    summary = run.shard(write_manifest(tmp_path / "m.jsonl", mixed), str(tmp_path / "out"), settings)
    found = {sample.id: sample for sample in samples(tmp_path / "out")}
    failures = {row["id"]: row for row in lines(tmp_path / "out")}
    assert len(found) + len(failures) == len(mixed) == summary.rows and not found.keys() & failures.keys()
    assert not [failures[row["id"]] for row in good if row["id"] in failures]
    for row in read[0]:
        assert (
            len(found[row["id"]].frames) == min(4, row["frames"]) == len(set(found[row["id"]].timestamps))
        ), row["id"]
    assert all(len(row["reason"]) > 10 and "\n" not in row["reason"] for row in failures.values())
    assert {row["stage"] for row in failures.values()} == {"decode"} and len(failures) >= 10


# --- Runs of their own, with a Ray of their own ---------------------------------------------------------------------


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """`run.shard` in a process of its own, as `hbi shard` calls it, from another folder; ended with the test."""
    code = (
        # As `hbi` does: a shell without job control has what it starts behind an & ignore Ctrl-C.
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from hbi.pipelines.sharding import run\n"
        "from hbi.pipelines.sharding.settings import ShardSettings\n"
        "try: print(run.shard(sys.argv[1], sys.argv[2], ShardSettings(frames=3, size=32, samples_per_shard=6)))\n"
        "except KeyboardInterrupt: sys.exit(130)"
    )
    started: list[subprocess.Popen[str]] = []

    def begin(manifest: str, out: Path | str, **environment: str) -> "subprocess.Popen[str]":
        job = subprocess.Popen(
            [sys.executable, "-c", code, manifest, str(out)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        started.append(job)
        return job

    yield begin
    for job in started:
        if job.poll() is None:
            job.kill()
            job.communicate()


def family(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    """The run and all that it started, Ray included."""
    driver = psutil.Process(process.pid)
    return [driver, *driver.children(recursive=True)]


def name_of(process: psutil.Process) -> str:
    try:
        return process.cmdline()[0]
    except (psutil.Error, IndexError):
        return ""


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.02)


def gone(processes: list[psutil.Process]) -> Callable[[], bool]:
    return lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)


def finished(out: Path) -> int:
    """How many shards have a record; beside those lie marks of what was begun."""
    return sum(b'"begun"' not in path.read_bytes() for path in out.glob(".done/*.json"))


def test_killed_anywhere_it_ends_with_the_same_bytes(long_reference: Path, start: Start, tmp_path: Path):
    manifest, out = str(long_reference / "in" / "manifest.jsonl"), tmp_path / "out"

    driver = start(manifest, out)
    wait_for(lambda: finished(out) >= 2, 90, "two shards")
    # Two of Ray's agents notice only after a minute that theirs was killed; they hold nothing of ours.
    everyone = [process for process in family(driver) if "Agent" not in name_of(process)]
    driver.kill()
    driver.communicate()
    wait_for(gone(everyone), 30, "workers and decoders to end with their driver")
    done = {
        path: path.stat().st_mtime_ns
        for path in out.glob("*.tar")
        if (out / ".done" / f"{path.name}.json").exists()
    }
    assert not (out / "index.json").exists() and 2 <= len(done) < LONG // SETTINGS.samples_per_shard

    driver = start(manifest, out)
    workers: list[psutil.Process] = []

    def busy() -> bool:
        workers[:] = [process for process in family(driver) if name_of(process).startswith("ray::Map")]
        return bool(workers)

    wait_for(busy, 90, "a worker at work")
    everyone = family(driver)
    for worker in workers:
        worker.kill()
    output, errors = driver.communicate(timeout=120)
    assert driver.returncode == 0, errors
    assert f"{LONG:,} samples and 0 failures of {LONG:,} rows" in output and "Traceback" not in errors, errors
    assert {path: path.stat().st_mtime_ns for path in done} == done, "finished shards were made again"
    assert left_by(out) == left_by(long_reference / "out")
    wait_for(gone(everyone), 10, "the end of what the run started")


def test_an_interrupted_run_is_gone_in_five_seconds(long_reference: Path, start: Start, tmp_path: Path):
    manifest, out = str(long_reference / "in" / "manifest.jsonl"), tmp_path / "out"
    driver = start(manifest, out)
    wait_for(lambda: finished(out) >= 1, 90, "a shard")
    everyone = family(driver)
    # Five seconds on a machine that has time for us; as much more as others keep its cores busy.
    seconds = 5 * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    begin = time.monotonic()
    os.killpg(driver.pid, signal.SIGINT)  # as a terminal does: the whole group
    _, errors = driver.communicate(timeout=120)
    wait_for(gone(everyone), seconds, "the end of what the run started")
    assert time.monotonic() - begin < seconds and driver.returncode == 130, errors
    assert "Traceback" not in errors, errors
    assert not (out / ".staging").exists()


def test_from_storage_to_storage_with_faults(reference: Path, start: Start, tmp_path: Path):
    with object_storage(tmp_path / "s3") as remote:
        for path in (reference / "in").iterdir():
            remote.put(path.name, path.read_bytes())
        remote.faults[:] = [
            *(Fault("503", f"/{seed}.mp4", times=2) for seed in range(3)),
            Fault("cut", "/3.mp4", times=2),
            Fault("short", "/4.mp4"),
            Fault("503", "/out/", "PUT", 3),
        ]
        driver = start(remote.uri("manifest.jsonl"), remote.uri("out"), **remote.environment())
        output, errors = driver.communicate(timeout=120)
        assert driver.returncode == 0 and "60 samples and 0 failures of 60 rows" in output, errors
        # Nothing but our own progress is said: no advice of Ray's, no log level of its.
        said = [line for line in errors.replace("\r", "\n").splitlines() if line.strip()]
        assert all(line.startswith(("plan:", "shard:")) for line in said), errors
        assert all(fault.times == 0 for fault in remote.faults)
        ours = {path.name: path.read_bytes() for path in remote.path("out").glob("*.tar")}
    theirs = {path.name: path.read_bytes() for path in (reference / "out").glob("*.tar")}
    assert ours.keys() == theirs.keys()
    for name, tar in ours.items():
        pairs = zip(read_shard(io.BytesIO(tar)), read_shard(io.BytesIO(theirs[name])), strict=True)
        assert all((a.key, a.id, a.frames) == (b.key, b.id, b.frames) for a, b in pairs)
