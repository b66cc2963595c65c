"""A checkpoint is whole or absent, local or remote, and holds everything that a run is."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hbi.infra import storage
from hbi.model.hbi import HBI
from hbi.model.weights import load_model
from hbi.pipelines.sample import ShardIndex
from hbi.training.checkpoint import (
    Checkpoints,
    Progress,
    State,
    check_checkpoint,
    read_progress,
    write_checkpoint,
)
from hbi.training.data.order import LoaderState
from hbi.training.job import fetched
from hbi.training.loop import Hooks
from hbi.training.optim import EMA, make_optimizer
from hbi.training.parallel import Process
from hbi.training.settings import OptimSettings
from hbi.training.tokenizers import with_tokenizer
from hbi.training.worker import run
from tests.support.s3 import ObjectStorage
from tests.support.training_shards import make_shards, tiny_model, tiny_run

HERE = Process(0, 1, torch.device("cpu"))


def state_of(seed: int) -> State:
    torch.manual_seed(seed)
    model = HBI(tiny_model())
    return State(model, make_optimizer(model, OptimSettings()), EMA(model, 0.9), HERE)


def learn(state: State) -> torch.Tensor:
    """A step with some randomness in it; what the generator gives next."""
    for parameter in state.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    state.optimizer.step()
    assert state.ema is not None
    state.ema.update(state.model, 3)
    return torch.randn(3)


def write(state: State, folder: Path, progress: Progress) -> None:
    write_checkpoint(folder, state, progress, None, tiny_run(), {"data": "digest"})


def test_everything_comes_back(tmp_path: Path) -> None:
    state, progress = state_of(0), Progress(7, LoaderState(2, ((2, 8, 3), (3, 8, 1))), {"val/t2v/R@1": 4.5})
    learn(state)
    write(state, tmp_path, progress)
    expected = learn(state)
    other = state_of(1)
    learn(other)
    other.restore(tmp_path)
    assert read_progress(tmp_path) == progress
    assert torch.equal(learn(other), expected), "the random state"
    assert state.ema is not None and other.ema is not None
    for name, tensor in state.model.state_dict().items():
        assert torch.equal(other.model.state_dict()[name], tensor), name
        assert torch.equal(other.ema.weights[name], state.ema.weights[name]), name
    assert torch.equal(other.optimizer.state_dict()["state"][5]["exp_avg_sq"],
                       state.optimizer.state_dict()["state"][5]["exp_avg_sq"])  # fmt: skip


def test_a_checkpoint_is_a_model_that_can_be_loaded_and_no_pickle(tmp_path: Path) -> None:
    state = state_of(0)
    learn(state)
    write(state, tmp_path, Progress())
    served = load_model(tmp_path).state_dict()
    assert state.ema is not None
    assert all(torch.equal(served[name], tensor) for name, tensor in state.ema.weights.items())
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}


def put(checkpoints: Checkpoints, step: int, score: float | None = None) -> None:
    metrics = None if score is None else {"val/t2v/R@1": score}
    progress = Progress(step, LoaderState(step // 10), metrics)

    def write(folder: Path) -> None:
        (folder / "state.json").write_text(json.dumps({"progress": progress.to_dict()}))
        (folder / "model.safetensors").write_text(str(step))

    checkpoints.save(write, progress)


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_the_best_and_the_latest_are_kept(tmp_path: Path, kind: str, request: pytest.FixtureRequest) -> None:
    folder = str(tmp_path / "kept") if kind == "local" else request.getfixturevalue("remote").uri("kept")
    checkpoints = Checkpoints(folder, 2, "val/t2v/R@1", HERE)
    assert checkpoints.latest() is None and checkpoints.best() is None
    for step, score in (
        (5, None),
        (10, 3.0),
        (15, None),
        (20, 8.0),
        (25, None),
        (30, 8.0),
        (35, None),
        (40, 1.0),
    ):
        put(checkpoints, step, score)
        latest = checkpoints.latest()
        assert latest is not None
        with fetched(latest) as local:
            assert (local / "model.safetensors").read_text() == str(step)
    left = [
        path.rsplit("/", 2)[1] for path in storage.list_files(folder, True) if path.endswith("state.json")
    ]
    assert left == ["epoch-00002-step-00000020", "epoch-00003-step-00000030", "epoch-00004-step-00000040"]
    best = checkpoints.best()
    assert best is not None and best.endswith("step-00000030"), "the later of two equals"


def test_a_process_that_dies_while_it_writes_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch
) -> None:
    checkpoints = Checkpoints(str(tmp_path), 5, "val/t2v/R@1", HERE)
    put(checkpoints, 10)
    whole = checkpoints.latest()
    real, puts = storage.put_file, []

    def put_file(*arguments, **settings) -> None:
        if len(puts) == 1:
            raise KeyboardInterrupt
        puts.append(real(*arguments, **settings))

    monkeypatch.setattr(storage, "put_file", put_file)
    with pytest.raises(KeyboardInterrupt):
        put(checkpoints, 20)
    monkeypatch.setattr(storage, "put_file", real)
    assert (tmp_path / "epoch-00002-step-00000020" / "model.safetensors").exists()
    assert checkpoints.latest() == whole
    put(checkpoints, 30)
    assert sorted(path.name[-2:] for path in tmp_path.iterdir()) == ["10", "30"], (
        "what was left half is removed"
    )


def test_differences_are_named(tmp_path: Path) -> None:
    write(state_of(0), tmp_path, Progress())
    config = tiny_run()
    check_checkpoint(tmp_path, "there", config, "digest")
    check_checkpoint(tmp_path, "there", replace(config, optim=replace(config.optim, lr=1.0)), "digest")
    with pytest.raises(
        ValueError, match=r"there holds another run \(model.words 12 there, 10 here; seed 42 there, 1 here\)"
    ):
        check_checkpoint(
            tmp_path, "there", replace(config, seed=1, model=replace(config.model, words=10)), "digest"
        )
    with pytest.raises(ValueError, match="other shards"):
        check_checkpoint(tmp_path, "there", config, "another")


def test_a_run_reads_shards_from_object_storage_and_keeps_everything_there(
    remote: ObjectStorage, tmp_path: Path
) -> None:
    make_shards(remote.path("shards"), train=[9, 7, 8])
    data, out = remote.uri("shards"), remote.uri("out")
    config = tiny_run(cache=str(tmp_path / "cache"), shuffle_window=1)
    config = with_tokenizer(config, ShardIndex.read(data), out)
    remote.requests.clear()
    run(config, data, out, HERE, Hooks(log=lambda line: None))
    lines: list[str] = []
    longer = replace(config, optim=replace(config.optim, epochs=3))
    run(longer, data, out, HERE, Hooks(log=lines.append))
    assert "goes on at step 6 from s3://corpus/out/checkpoints/epoch-00002" in lines[0]
    local = make_shards(tmp_path / "shards", train=[9, 7, 8])
    here = str(tmp_path / "out")
    for epochs in (2, 3):
        again = replace(config, optim=replace(config.optim, epochs=epochs))
        run(
            with_tokenizer(again, local, here),
            str(tmp_path / "shards"),
            here,
            HERE,
            Hooks(log=lambda line: None),
        )
    remotely = load_file(remote.path("out") / "model" / "model.safetensors")
    assert all(
        torch.equal(remotely[name], t) for name, t in load_file(f"{here}/model/model.safetensors").items()
    )
    assert len(list((tmp_path / "cache").rglob("*.tar"))) == 3
