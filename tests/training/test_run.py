"""A run on Ray Train: workers and drivers may be killed, and the weights at the end are the same to the bit."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from hbi.pipelines.sample import ShardIndex
from hbi.training.loop import Hooks
from hbi.training.parallel import Process
from hbi.training.run import TrainResult, train
from hbi.training.runs.table import RUNS, description
from hbi.training.settings import TrainConfig, WorkerSettings
from hbi.training.tokenizers import with_tokenizer
from hbi.training.worker import run
from tests.support.ranks import start_ranks
from tests.support.training_shards import make_shards, tiny_run

STEPS_KEPT = 3
# Ray warns of itself when its settings travel to the trainer.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray", "ignore::FutureWarning:ray")


def config_of(epochs: int = 8) -> TrainConfig:
    config = tiny_run()
    return replace(
        config,
        workers=WorkerSettings(count=2, cpus=0.5),
        loss=replace(config.loss, teacher=1.0),
        optim=replace(config.optim, epochs=epochs, ema=0.9),
        checkpoint=replace(config.checkpoint, every_steps=STEPS_KEPT),
    )


def weights(out: Path) -> dict[str, Tensor]:
    return load_file(out / "model" / "model.safetensors")


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def rank_without_ray(rank: int, folder: str, out: str, epochs: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}-meet", rank=rank, world_size=2)
    config = with_tokenizer(config_of(epochs), ShardIndex.read(f"{folder}/shards"), out)
    run(config, f"{folder}/shards", out, Process.current(), Hooks(log=lambda line: None))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards, and in `unbroken` a run of two processes that nothing disturbed, without Ray."""
    folder = tmp_path_factory.mktemp("run")
    index = make_shards(folder / "shards", train=[17, 14, 18], val=[4])
    with_tokenizer(config_of(), index, str(folder / "unbroken"))  # so that the ranks find it
    start_ranks(rank_without_ray, (str(folder), str(folder / "unbroken"), 8), 2)
    return folder


def steps_of(lines: list[str]) -> list[int]:
    return [int(line.split()[1].split("/")[0]) for line in lines if line.startswith("step ")]


def resumed_at(lines: list[str]) -> list[int]:
    return [int(line.split("goes on at step ")[1].split()[0]) for line in lines if "goes on at step" in line]


def kill_a_worker() -> None:
    """Kills one training worker of the Ray that this process started."""
    for process in psutil.Process().children(recursive=True):
        if "RayTrainWorker" in " ".join(process.cmdline()):
            process.send_signal(signal.SIGKILL)
            return
    raise AssertionError("no training worker runs")


def test_a_killed_worker_costs_the_steps_since_the_last_checkpoint_and_nothing_else(
    unbroken: Path, ray_session
) -> None:
    lines: list[str] = []

    def say(line: str) -> None:
        again = any(known.startswith("step 11/") for known in lines)
        lines.append(line)
        if line.startswith("step 11/") and not again:
            kill_a_worker()

    result = train(config_of(), str(unbroken / "shards"), str(unbroken / "killed"), log=say)
    assert result == TrainResult(str(unbroken / "killed" / "model"), result.metrics, None, None)
    assert result.metrics["val/videos"] == 4
    (again,) = resumed_at(lines)
    before = steps_of(lines)[: lines.index(next(line for line in lines if "goes on" in line)) - 1]
    assert again >= max(before) - STEPS_KEPT and again >= 9
    assert same(weights(unbroken / "unbroken"), weights(unbroken / "killed"))
    # A run that is over is not run again.
    assert train(config_of(), str(unbroken / "shards"), str(unbroken / "killed"), log=lines.append) == result
    assert "this run is finished" in lines[-1]


DRIVER = """
import sys
from pathlib import Path
from hbi.training.run import train
from hbi.training.settings import TrainConfig

if __name__ == "__main__":
    config = TrainConfig.from_json(Path(sys.argv[1]).read_text())
    train(config, sys.argv[2], sys.argv[3])
"""


def test_a_killed_driver_is_taken_up_by_the_next(unbroken: Path, ray_session) -> None:
    root = Path(__file__).resolve().parents[2]
    out = unbroken / "driver"
    (unbroken / "driver.py").write_text(DRIVER)
    (unbroken / "config.json").write_text(config_of().to_json())
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {"PYTHONPATH": str(root)}
    command = [
        sys.executable,
        *(str(unbroken / name) for name in ("driver.py", "config.json", "shards")),
        str(out),
    ]
    driver = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    assert driver.stdout is not None
    lines = []
    for line in driver.stdout:
        lines.append(line)
        if line.startswith("step 8/"):
            break
    children = psutil.Process(driver.pid).children(recursive=True)
    driver.kill()
    driver.wait()
    driver.stdout.close()
    _, left = psutil.wait_procs(children, timeout=30)
    for process in left:  # Ray's own reaper is slow on a busy machine; they are this test's processes
        process.kill()
    assert steps_of(lines)[-1] == 8
    train(config_of(), str(unbroken / "shards"), str(out), log=lines.append)
    (again,) = resumed_at(lines)
    assert again >= 6
    assert same(weights(unbroken / "unbroken"), weights(out))


def test_what_cannot_go_on_says_why_in_one_line_and_is_not_tried_again(
    unbroken: Path, ray_session, tmp_path: Path
) -> None:
    config = config_of()
    config = replace(
        config, workers=replace(config.workers, count=1), data=replace(config.data, bad_samples=0)
    )
    make_shards(tmp_path / "shards", train=[9, 9])
    (tmp_path / "shards" / "train-000001.tar").unlink()
    lines: list[str] = []
    with pytest.raises(ValueError, match=r"samples could not be read.*train-000001.tar.*hbi shard") as caught:
        train(config, str(tmp_path / "shards"), str(tmp_path / "out"), log=lines.append)
    assert "\n" not in str(caught.value)
    assert sum("starts" in line for line in lines) == 1


def test_another_number_of_workers_goes_on_inside_the_epoch(unbroken: Path, tmp_path: Path) -> None:
    """Two processes did the first steps of an epoch; one does the rest, and each clip is seen once."""
    out = tmp_path / "out"
    index = ShardIndex.read(str(unbroken / "shards"))
    config = with_tokenizer(config_of(1), index, str(out))
    start_ranks(ranks_until_killed, (str(unbroken), str(out)), 2)
    state = json.loads((next((out / "checkpoints").iterdir()) / "state.json").read_text())
    assert state["progress"]["position"] == {"epoch": 0, "done": [[2, 8, 3]]}
    clips: dict[int, float] = {}

    def track(metrics: dict, step: int) -> None:
        assert step not in clips
        clips[step] = metrics["data/clips"]

    run(
        config,
        str(unbroken / "shards"),
        str(out),
        Process.current(),
        Hooks(log=lambda line: None, track=track),
    )
    # What the killed ranks had tracked is offered again, with their steps; the others hold what was left.
    assert sum(clips.values()) == 49 and sorted(clips) == list(range(1, 8))
    assert sum(count for step, count in clips.items() if step <= 3) == 3 * 7


def ranks_until_killed(rank: int, folder: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}-meet", rank=rank, world_size=2)
    config = with_tokenizer(config_of(1), ShardIndex.read(f"{folder}/shards"), out)
    config = replace(config, optim=replace(config.optim, steps=3))
    run(config, f"{folder}/shards", out, Process.current(), Hooks(log=lambda line: None))
    dist.destroy_process_group()


@pytest.mark.parametrize("name", RUNS)
def test_named_runs_are_whole_and_say_how_to_start_them(name: str) -> None:
    config = RUNS[name]
    assert TrainConfig.from_json(config.to_json()) == config
    said = description(name)
    assert f"train {name}" in said or "Command: as `" in said
    assert "score" in said.lower() or "Expected: " in said, "a score, or that none is known"


def test_flags_reach_every_field() -> None:
    import tyro

    config = tyro.cli(
        TrainConfig, default=RUNS["demo"], args=["--optim.lr", "0.5", "--model.towers.dim", "64"]
    )
    assert config.optim.lr == 0.5 and config.model.towers.dim == 64 and config.data == RUNS["demo"].data


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        if not any(thread.name == "lines" for thread in set(threading.enumerate()) - before):
            return
        time.sleep(0.05)
    raise AssertionError("the listener lives on")
