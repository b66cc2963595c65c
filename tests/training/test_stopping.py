"""A run that a signal asks to end: real processes, with Ray and without, taken up again and compared to the bit."""

import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from hbi.infra.mlflow.store import client
from hbi.infra.signals import stop_requests
from hbi.pipelines.sample import ShardIndex
from hbi.training.job import TrainingStopped
from hbi.training.loop import Hooks
from hbi.training.parallel import Process
from hbi.training.settings import TrainConfig
from hbi.training.tokenizers import with_tokenizer
from hbi.training.worker import run
from tests.support.mlflow_store import fresh_store
from tests.support.ranks import start_ranks
from tests.support.training_shards import make_shards, tiny_run
from tests.training.test_loop import same, weights

ROOT = Path(__file__).resolve().parents[2]
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}
STEPS = 60
"""Enough that a run is under way for seconds."""


def config_of(workers: int, loaders: int = 0) -> TrainConfig:
    config = tiny_run(workers=loaders)
    return replace(
        config,
        optim=replace(config.optim, epochs=STEPS, steps=STEPS, ema=0.9),
        checkpoint=replace(config.checkpoint, every_steps=0),
        evaluate=replace(config.evaluate, every_epochs=0, final=()),
        workers=replace(config.workers, count=workers, cpus=0.5),
    )


def rank(number: int, shards: str, out: str, world_size: int, loaders: int = 0) -> None:
    """One rank of a run without Ray, which ends at a signal."""
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{out}-meet", rank=number, world_size=world_size)
    config = with_tokenizer(config_of(world_size, loaders), ShardIndex.read(shards), out)
    try:
        with stop_requests() as stop:
            hooks = Hooks(log=lambda line: print(line, flush=True), stop=lambda: bool(stop()))
            run(config, shards, out, Process.current(), hooks)
    except TrainingStopped as stopped:
        print(stopped, flush=True)
        sys.exit(128 + stop())  # with the tidying up of Python, which forgets the semaphores of the loader
    if world_size > 1:
        dist.destroy_process_group()


def run_ranks(shards: Path, out: Path, world_size: int) -> None:
    Path(f"{out}-meet").unlink(missing_ok=True)
    with_tokenizer(config_of(world_size), ShardIndex.read(str(shards)), str(out))
    if world_size == 1:
        rank(0, str(shards), str(out), 1)
    else:
        start_ranks(rank, (str(shards), str(out), world_size), world_size)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopping") / "shards"
    make_shards(folder, train=[170, 140, 180])
    return folder


@pytest.fixture(scope="module")
def unbroken(shards: Path) -> dict[int, Path]:
    """The runs that nobody stops, of one process and of two."""
    outs = {world_size: shards.parent / f"unbroken-{world_size}" for world_size in (1, 2)}
    for world_size, out in outs.items():
        run_ranks(shards, out, world_size)
    return outs


def stopped(command: list[str], number: signal.Signals, group: bool) -> tuple[int, str]:
    """Starts a command, sends it a signal after its fifth step, and gives its status and what it said; every process
    that it had started is gone."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment["PYTHONPATH"] = str(ROOT)
    job = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )
    assert job.stdout is not None
    hang = threading.Timer(240, job.kill)
    hang.start()
    said, started = "", []
    try:
        for line in job.stdout:
            said += line
            if line.startswith("step 5/"):
                started = psutil.Process(job.pid).children(recursive=True)
                (os.killpg if group else os.kill)(job.pid, number)
        status = job.wait()
    finally:
        hang.cancel()
        job.kill()
        job.stdout.close()
    assert status >= 0 and started, said
    _, left = psutil.wait_procs(started, timeout=10)
    assert not [process for process in left if process.status() != psutil.STATUS_ZOMBIE]
    return status, said


def steps_in(out: Path) -> int:
    """Where the latest checkpoint stands."""
    return max(int(path.name.rpartition("-")[2]) for path in (out / "checkpoints").iterdir())


@pytest.mark.parametrize(("number", "group"), [(signal.SIGINT, False), (signal.SIGTERM, True)])
def test_a_command_that_is_asked_to_end_keeps_its_step(
    shards: Path, unbroken: dict[int, Path], tmp_path: Path, number: signal.Signals, group: bool
) -> None:
    out, store = tmp_path / "out", fresh_store(tmp_path / "store")
    config = replace(config_of(2), tracking=replace(tiny_run().tracking, enabled=True, register=False))
    (tmp_path / "config.json").write_text(config.to_json())
    # What `hbi train` does, with a run that is no named one.
    code = (
        "import sys; from pathlib import Path; from hbi import cli; from hbi.training.runs import table\n"
        "from hbi.training.settings import TrainConfig\n"
        "table.RUNS['tiny'] = TrainConfig.from_json(Path(sys.argv.pop(1)).read_text())\n"
        "if __name__ == '__main__': cli.main()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "config.json"), "train", "tiny", "--data"]
    status, said = stopped([*command, str(shards), "--out", str(out), "--tracking", store], number, group)
    assert status == STATUS[number], said
    assert "Traceback" not in said
    step = steps_in(out)
    last = said.splitlines()[-1]
    assert last.startswith(f"hbi train: stopped at step {step}/") and last.endswith("run again to go on")
    assert 5 <= step < STEPS, "it stops where it stands"
    known = client(store)
    (tracked,) = known.search_runs([known.get_experiment_by_name("hbi").experiment_id])  # type: ignore[union-attr]
    assert tracked.info.status == "KILLED" and "run again to go on" in tracked.data.tags["interrupted"]
    # Taken up where it stopped, it is the run that nobody stopped.
    run_ranks(shards, out, 2)
    assert same(weights(out), weights(unbroken[2]))


@pytest.mark.parametrize("number", STATUS)
def test_the_loop_alone_stops_as_well(
    shards: Path, unbroken: dict[int, Path], tmp_path: Path, number: signal.Signals
) -> None:
    """One process without Ray, whose loader has worker processes in the same group."""
    code = (
        "if __name__ == '__main__':\n"  # which its loader's process is not
        "    import sys; from tests.training.test_stopping import rank\n"
        "    rank(0, sys.argv[1], sys.argv[2], 1, loaders=1)"
    )
    (tmp_path / "alone.py").write_text(code)
    out = tmp_path / "out"
    with_tokenizer(config_of(1), ShardIndex.read(str(shards)), str(out))
    status, said = stopped(
        [sys.executable, str(tmp_path / "alone.py"), str(shards), str(out)], number, group=True
    )
    assert status == STATUS[number], said
    step = steps_in(out)
    assert f"stopped at step {step}/" in said.splitlines()[-1]
    run_ranks(shards, out, 1)
    assert same(weights(out), weights(unbroken[1]))


def test_a_second_signal_ends_at_once() -> None:
    code = (
        "import os, signal, time; from hbi.infra.signals import end_on_signal, stop_requests\n"
        "end_on_signal()\n"
        "try:\n"
        "    with stop_requests() as stop:\n"
        "        os.kill(os.getpid(), signal.SIGTERM); assert stop() == signal.SIGTERM\n"
        "        os.kill(os.getpid(), signal.SIGTERM)  # the same one, passed on twice\n"
        "        time.sleep(0.6); print('goes on', flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGTERM); print('never said')\n"
        "except KeyboardInterrupt:\n"
        "    print('ends', flush=True); time.sleep(60)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False
    )
    assert (ended.returncode, ended.stdout) == (143, "goes on\nends\n"), ended.stderr
