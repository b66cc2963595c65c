"""The loop in one process: it learns, goes on where it stopped to the bit, and stops where it must."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hbi.model.hbi import HBI
from hbi.model.weights import load_model
from hbi.training import loop
from hbi.training.checkpoint import Checkpoints, Progress
from hbi.training.job import TrainingAborted
from hbi.training.loop import Hooks, Training
from hbi.training.parallel import Process
from hbi.training.settings import TrainConfig
from hbi.training.throughput import flops_per_clip
from hbi.training.tokenizers import tokenizer_of, with_tokenizer
from hbi.training.worker import run
from tests.support.training_shards import make_shards, sample, tiny_run, write_shard


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    make_shards(tmp_path / "shards", train=[9, 7, 8], val=[4])
    return tmp_path / "shards"


class Killed(Exception):
    pass


def killed_at(step: int) -> Callable[[dict, int], None]:
    def track(metrics: dict, at: int) -> None:
        if at == step:
            raise Killed

    return track


def train(config: TrainConfig, shards: Path, out: Path, **hooks: Any) -> dict[str, float]:
    from hbi.pipelines.sample import ShardIndex

    config = with_tokenizer(config, ShardIndex.read(str(shards)), str(out))
    hooks = {"log": lambda line: None, **hooks}
    return run(config, str(shards), str(out), Process.current(), Hooks(**hooks))


def weights(out: Path) -> dict[str, Tensor]:
    return load_file(out / "model" / "model.safetensors")


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_it_learns_and_says_how_far_it_is(shards: Path, tmp_path: Path) -> None:
    config = tiny_run()
    config = replace(config, optim=replace(config.optim, epochs=10))
    lines: list[str] = []
    losses: dict[int, dict[str, float]] = {}

    def track(metrics: dict, step: int) -> None:
        losses[step] = metrics

    train(config, shards, tmp_path / "out", log=lines.append, track=track)
    tracked = [losses[step]["train/loss"] for step in sorted(losses) if "train/loss" in losses[step]]
    assert len(tracked) == 30 and sum(tracked[-3:]) < 0.7 * sum(tracked[:3])
    assert lines[0].startswith("tiny starts: 24 clips, 30 steps of 8, 1 x cpu in float32")
    assert (
        "step 30/30  epoch 10/10  loss " in lines[-1] and "clips/s" in lines[-1] and "0:00 left" in lines[-1]
    )
    wanted = {"train/contrastive/event", "train/alignment/entity", "lr/new", "lr/backbone", "logit_scale"}
    wanted |= {f"speed/{name}" for name in ("clips_per_second", "data_wait_share", "flop_utilisation")}
    assert wanted <= losses[1].keys()
    assert 0 <= losses[9]["speed/data_wait_share"] <= 1 and 0 < losses[9]["speed/flop_utilisation"] < 1
    load_model(tmp_path / "out" / "model")


@pytest.mark.parametrize("step", [2, 4, 6])
def test_a_broken_off_run_ends_with_the_weights_of_an_unbroken_one(
    shards: Path, tmp_path: Path, step: int
) -> None:
    config = tiny_run()
    config = replace(config, optim=replace(config.optim, ema=0.9, epochs=3))
    train(config, shards, tmp_path / "unbroken")
    with pytest.raises(Killed):
        train(config, shards, tmp_path / "broken", track=killed_at(step))
    lines: list[str] = []
    train(config, shards, tmp_path / "broken", log=lines.append)
    assert ("starts" if step == 2 else "goes on at step 3") in lines[0]
    assert same(weights(tmp_path / "unbroken"), weights(tmp_path / "broken"))


def test_an_evaluated_average_is_what_is_saved_and_the_live_weights_go_on(
    shards: Path, tmp_path: Path
) -> None:
    config = tiny_run()
    config = replace(config, optim=replace(config.optim, ema=0.5))
    seen: list[Tensor] = []

    def evaluate(model: HBI, split: str) -> dict[str, float]:
        seen.append(model.logit_scale.detach().clone())
        return {f"{split}/t2v/R@1": 1.0}

    train(config, shards, tmp_path / "out", evaluate=evaluate)
    last = sorted((tmp_path / "out" / "checkpoints").iterdir())[-1]
    served, rest = load_file(last / "model.safetensors"), load_file(last / "training.safetensors")
    assert torch.equal(served["logit_scale"], seen[1])
    live = {name.removeprefix("live/"): tensor for name, tensor in rest.items() if name.startswith("live/")}
    assert live.keys() == served.keys() and not same(live, served)


def test_the_best_checkpoint_is_kept_and_becomes_the_model(shards: Path, tmp_path: Path) -> None:
    config = tiny_run()
    config = replace(config, optim=replace(config.optim, epochs=4))
    scores, best = iter([5.0, 9.0, 7.0, 1.0]), {}

    def evaluate(model: HBI, split: str) -> dict[str, float]:
        score = next(scores, None)
        if score is None:
            return {f"{split}/t2v/R@1": -1.0}
        if score == 9.0:
            best.update({name: t.clone() for name, t in model.state_dict().items()})
        return {f"{split}/t2v/R@1": score}

    metrics = train(config, shards, tmp_path / "out", evaluate=evaluate)
    assert metrics == {"val/t2v/R@1": -1.0, "test/t2v/R@1": -1.0}
    assert same(weights(tmp_path / "out"), best)
    kept = sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir())
    assert kept == ["epoch-00002-step-00000006", "epoch-00003-step-00000009", "epoch-00004-step-00000012"]


def test_a_loss_that_is_not_finite_stops_with_step_shards_and_checkpoint(
    shards: Path, tmp_path: Path, monkeypatch
) -> None:
    real, steps = loop.backward, iter(range(100))

    def backward(*arguments: Any, **named: Any) -> dict[str, Tensor]:
        losses = real(*arguments, **named)
        return {name: loss * float("nan") for name, loss in losses.items()} if next(steps) == 4 else losses

    monkeypatch.setattr(loop, "backward", backward)
    with pytest.raises(
        TrainingAborted,
        match=r"step 5: loss nan.*in the batch: clips clip-\d+, .*train-00000\d.tar.*step-00000003.*optim.lr",
    ):
        train(tiny_run(), shards, tmp_path / "out")
    latest = max((tmp_path / "out" / "checkpoints").iterdir())
    assert json.loads((latest / "state.json").read_text())["progress"]["step"] == 3
    assert all(bool(tensor.isfinite().all()) for tensor in load_file(latest / "model.safetensors").values())


def test_damage_is_passed_over_up_to_the_limit_and_counted(shards: Path, tmp_path: Path) -> None:
    (shards / "train-000001.tar").unlink()
    metrics: dict[int, dict] = {}

    def track(values: dict, step: int) -> None:
        metrics[step] = values

    config = tiny_run(bad_samples=14)
    train(config, shards, tmp_path / "out", track=track)
    assert metrics[6]["data/unread_samples"] == 14, "seven clips, in each of two epochs"
    with pytest.raises(
        TrainingAborted,
        match=r"more than --set.data.bad-samples 2: train-000001.tar .*FileNotFound.*hbi shard",
    ):
        train(tiny_run(bad_samples=2), shards, tmp_path / "other")


def test_batches_without_captions_are_no_trouble(tmp_path: Path) -> None:
    make_shards(tmp_path / "shards", train=[9])
    write_shard(
        tmp_path / "shards" / "train-000000.tar", [sample(i, captions=[] if i else None) for i in range(9)]
    )
    train(tiny_run(batch=3), tmp_path / "shards", tmp_path / "out")
    assert all(bool(tensor.isfinite().all()) for tensor in weights(tmp_path / "out").values())


def test_another_model_or_other_shards_are_refused_with_what_differs(shards: Path, tmp_path: Path) -> None:
    config, out = tiny_run(), tmp_path / "out"
    train(config, shards, out)
    other = replace(config, model=replace(config.model, temporal_layers=2))
    with pytest.raises(TrainingAborted, match=r"model.temporal_layers 1 there, 2 here.*another --out"):
        train(other, shards, out)
    make_shards(tmp_path / "more", train=[9, 7, 9])
    with pytest.raises(TrainingAborted, match="other shards"):
        train(config, tmp_path / "more", out)
    train(replace(config, model=replace(config.model, checkpointing=True)), shards, out)


def test_a_machine_that_is_about_to_go_gets_a_checkpoint(shards: Path, tmp_path: Path) -> None:
    config = tiny_run()
    config = replace(config, checkpoint=replace(config.checkpoint, every_steps=0, keep=9))
    asked = iter([False, True])
    train(config, shards, tmp_path / "out", preempted=lambda: next(asked, False))
    kept = sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir())
    assert kept[0] == "epoch-00000-step-00000002"


def test_a_limit_of_steps_ends_the_run_inside_an_epoch(shards: Path, tmp_path: Path) -> None:
    config = tiny_run()
    config = replace(config, optim=replace(config.optim, steps=2))
    train(config, shards, tmp_path / "out")
    state = json.loads((next((tmp_path / "out" / "checkpoints").iterdir()) / "state.json").read_text())
    assert state["progress"]["step"] == 2 and state["progress"]["position"]["epoch"] == 0
    assert TrainConfig.from_json(json.dumps(state["config"])).optim.steps == 2


@pytest.mark.parametrize("stem", [0, 16])
def test_flops_are_those_that_torch_counts(shards: Path, stem: int) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from hbi.model.config import ModelConfig, TowerConfig

    config = ModelConfig(towers=TowerConfig(stem=stem))
    model = HBI(config)
    size = config.towers.image_size
    batch = (
        torch.ones(2, config.words, dtype=torch.int64),
        torch.ones(2, config.words, dtype=torch.bool),
        torch.zeros(2, config.frames, size, size, 3, dtype=torch.uint8),
        torch.ones(2, config.frames, dtype=torch.bool),
    )
    # The fused attention of a CPU is not counted by torch.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*batch)
    counted = counter.get_total_flops()
    # The predictors are small beside the towers, and are left out of the estimate.
    assert flops_per_clip(config) / 3 == pytest.approx(counted / 2, rel=0.15)
    assert flops_per_clip(config) / 3 < counted / 2


def test_a_training_needs_no_process_group(shards: Path, tmp_path: Path) -> None:
    from hbi.pipelines.sample import ShardIndex

    index, out = ShardIndex.read(str(shards)), str(tmp_path / "out")
    config = with_tokenizer(tiny_run(), index, out)
    assert not torch.distributed.is_initialized() and "RANK" not in os.environ
    checkpoints = Checkpoints(out, 1, "val/t2v/R@1", Process.current())
    training = Training(config, index, tokenizer_of(config, out), checkpoints, Hooks(log=lambda line: None))
    assert training.fit() == Progress(6, training.progress.position, {})


def tracked_rates(config: TrainConfig, shards: Path, out: Path) -> tuple[dict[int, float], list[str]]:
    """The learning rate of each step of a run, and what it said."""
    rates: dict[int, float] = {}
    lines: list[str] = []

    def track(metrics: dict, step: int) -> None:
        if "lr/new" in metrics:
            rates[step] = metrics["lr/new"]

    train(config, shards, out, track=track, log=lines.append)
    return rates, lines


def test_a_run_resumed_with_another_batch_goes_on_to_an_end_of_its_own(shards: Path, tmp_path: Path) -> None:
    """24 clips: an epoch of three steps of 8 is done; the second has six steps of 4."""
    config = tiny_run()
    first = replace(config, optim=replace(config.optim, epochs=1))
    train(first, shards, tmp_path / "out")
    second = replace(config, data=replace(config.data, batch=4), optim=replace(config.optim, epochs=2))
    rates, lines = tracked_rates(second, shards, tmp_path / "out")
    # Those up to 3 come back with the checkpoint.
    assert sorted(rates) == list(range(1, 10)) and all(rate > 0 for rate in rates.values())
    assert "goes on at step 3" in lines[0] and "9 steps of 4" in lines[0]
    assert "changed since that checkpoint: data.batch 8 -> 4, optim.epochs 1 -> 2; 9 steps in all" in lines[1]
    assert lines[-1].startswith("step 9/9 ")
    assert rates[9] == pytest.approx(3e-3 * loop.schedule(8, 9, 0.1, 0.0))


def test_a_run_that_is_past_its_end_is_refused(shards: Path, tmp_path: Path) -> None:
    config = tiny_run()
    train(config, shards, tmp_path / "out")
    for shorter, said in (
        ({"epochs": 1}, "done 2 epochs, more than --set.optim.epochs 1 asks for"),
        ({"steps": 4}, "done 6 steps, more than --set.optim.steps 4 asks for"),
    ):
        with pytest.raises(TrainingAborted, match=said):
            train(replace(config, optim=replace(config.optim, **shorter)), shards, tmp_path / "out")


def test_few_clips_are_said(shards: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    train(tiny_run(batch=64), shards, tmp_path / "out", log=lines.append)
    assert "fewer than --set.data.batch 64, and each caption is told from 23 others only" in lines[1]


def test_a_clip_that_becomes_no_number_is_named(shards: Path, tmp_path: Path, monkeypatch) -> None:
    real = HBI.encode_video

    def encode_video(self: HBI, video: Tensor, mask: Tensor) -> Tensor:
        frames = real(self, video, mask)
        return torch.cat([frames[:2], frames[2:3] * float("nan"), frames[3:]])

    monkeypatch.setattr(HBI, "encode_video", encode_video)
    with pytest.raises(TrainingAborted, match=r"step 1: .*: clips without finite tokens clip-\d+ \(of train"):
        train(tiny_run(), shards, tmp_path / "out")


def test_a_full_disk_keeps_the_last_checkpoint_and_says_where(
    shards: Path, tmp_path: Path, monkeypatch
) -> None:
    from safetensors import SafetensorError

    from hbi.training import checkpoint

    real, writes = checkpoint.save_file, iter(range(9))

    def save_file(tensors: dict[str, Tensor], path: Path) -> None:
        real(tensors, path)
        if next(writes) == 1:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    kept = tmp_path / "out" / "checkpoints"
    match = r"out/checkpoints/epoch-00001-step-00000003 cannot be written \(.*No space left.*make room there.*step-"
    with pytest.raises(TrainingAborted, match=match):
        train(tiny_run(), shards, tmp_path / "out")
    assert [path.name for path in kept.iterdir()] == ["epoch-00000-step-00000003"]
    monkeypatch.setattr(checkpoint, "save_file", real)
    train(tiny_run(), shards, tmp_path / "out")


def test_what_was_tracked_comes_back_with_the_checkpoint(shards: Path, tmp_path: Path) -> None:
    """A process that dies before it could send: the next one offers the checkpoint's metrics again, and goes on."""
    seen: list[int] = []

    def track(metrics: dict, step: int) -> None:
        if "train/loss" in metrics:
            seen.append(step)

    def dies(metrics: dict, step: int) -> None:
        if step == 5:
            raise Killed

    with pytest.raises(Killed):
        train(tiny_run(), shards, tmp_path / "out", track=dies)
    train(tiny_run(), shards, tmp_path / "out", track=track)
    assert seen == [1, 2, 3, 4, 5, 6]


def test_the_final_scores_have_names_of_their_own_at_the_chosen_step(shards: Path, tmp_path: Path) -> None:
    scores = iter([9.0, 1.0, 8.0, 7.0])
    tracked: dict[tuple[str, int], float] = {}

    def track(metrics: dict, step: int) -> None:
        assert not any((name, step) in tracked for name in metrics), "a second value at the same step"
        tracked.update({(name, step): value for name, value in metrics.items()})

    def evaluate(model: HBI, split: str) -> dict[str, float]:
        return {f"{split}/t2v/R@1": next(scores)}

    train(tiny_run(), shards, tmp_path / "out", track=track, evaluate=evaluate)
    curve = {key: value for key, value in tracked.items() if key[0].endswith("t2v/R@1")}
    assert curve == {
        ("val/t2v/R@1", 3): 9.0,
        ("val/t2v/R@1", 6): 1.0,
        ("final/val/t2v/R@1", 3): 8.0,
        ("final/test/t2v/R@1", 3): 7.0,
    }
