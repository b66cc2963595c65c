"""Groups, learning rates and the running average against what their formulas say."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hbi.model.config import LossSettings
from hbi.model.hbi import HBI
from hbi.training.checks import check_cluster, check_splits
from hbi.training.optim import EMA, make_optimizer, schedule, set_learning_rate
from hbi.training.runs.table import RUNS
from hbi.training.settings import CheckpointSettings, OptimSettings, TrainConfig
from tests.support.training_shards import make_shards, tiny_model, tiny_run


def test_every_trained_weight_is_in_one_group_with_its_rate_and_decay() -> None:
    model = HBI(tiny_model(freeze_patches=True))
    optimizer = make_optimizer(model, OptimSettings(lr=1e-3, backbone_lr=1e-5, weight_decay=0.3))
    found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(found)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert id(parameter) not in found
            continue
        group = found[id(parameter)]
        clip = name.startswith(("text.", "video.", "logit_scale"))
        assert group["peak"] == (1e-5 if clip else 1e-3), name
        assert group["weight_decay"] == (0.3 if parameter.ndim >= 2 else 0.0), name
    set_learning_rate(optimizer, 0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {5e-4, 5e-6}


def test_the_schedule_rises_falls_and_does_not_depend_on_epochs() -> None:
    shares = [schedule(step, 100, warmup=0.1, floor=0.0) for step in range(100)]
    assert shares[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert shares[10] == pytest.approx(1.0) and max(shares) == pytest.approx(1.0)
    assert all(later < earlier for earlier, later in itertools.pairwise(shares[10:]))
    assert shares[55] == pytest.approx((1 + math.cos(math.pi * 0.5)) / 2)
    assert schedule(100, 100, 0.1, 0.0) == schedule(150, 100, 0.1, 0.0) == pytest.approx(0.0, abs=1e-12)
    assert schedule(100, 100, 0.1, 0.2) == pytest.approx(0.2)
    assert schedule(0, 100, 0.0, 0.0) == 1.0


def test_the_average_follows_its_formula_and_swaps_back() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    average = EMA(model, 0.9)
    expected = model.weight.detach().clone()
    for step in range(40):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3))
        average.update(model, step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    torch.testing.assert_close(average.weights["weight"], expected)
    live = model.weight.detach().clone()
    with average.swapped(model):
        torch.testing.assert_close(model.weight.detach(), expected)
    assert torch.equal(model.weight.detach(), live)


def test_a_teacher_needs_an_average() -> None:
    with pytest.raises(
        ValueError, match=r"--set.loss.teacher 1.0: must be 0 without an average of the weights"
    ):
        TrainConfig(loss=LossSettings(teacher=1.0))
    TrainConfig(loss=LossSettings(teacher=1.0), optim=OptimSettings(ema=0.9))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"warmup": 1.0}, "--set.optim.warmup 1.0: must be at least 0 and below 1"),
        ({"epochs": 0}, "--set.optim.epochs 0: must be 1 or more"),
        ({"ema": 1.5}, "--set.optim.ema 1.5"),
    ],
)
def test_settings_out_of_range_are_named(change: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TrainConfig(optim=replace(OptimSettings(), **change))


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        ("t2v/R1", r"--set.checkpoint.metric t2v/R1: must be t2v, v2t or v2t-single"),
        ("t2v+dsl/R@1", r"t2v\+dsl/R@1: must be measured: add --set.evaluate.dsl"),
        ("v2t-single+dsl/R@1", "must be t2v"),
    ],
)
def test_a_metric_that_nothing_measures_is_refused(metric: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TrainConfig(checkpoint=CheckpointSettings(metric=metric))
    TrainConfig(checkpoint=CheckpointSettings(metric="v2t/R@10"))


def test_splits_and_workers_that_are_not_there(tmp_path: Path, ray_session: None) -> None:
    index, config = make_shards(tmp_path, train=[2], val=[1]), tiny_run()
    assert check_splits(config, index) == []
    valid = replace(config, evaluate=replace(config.evaluate, select="valid"))
    with pytest.raises(
        ValueError, match=r"--set.evaluate.select valid: .* has the splits train, val: choose"
    ):
        check_splits(valid, index)
    final = replace(config, evaluate=replace(config.evaluate, final=("val", "tset")))
    with pytest.raises(ValueError, match=r"--set.evaluate.final tset: .* train, val"):
        check_splits(final, index)
    (line,) = check_splits(config, make_shards(tmp_path / "bare", train=[2]))
    assert "the latest is taken" in line
    check_cluster(config)
    with pytest.raises(
        ValueError, match=r"msrvtt, 2 workers \(.*gpus 0 trains on CPUs\): asks for 2 GPUs, .* has 0"
    ):
        check_cluster(RUNS["msrvtt"])
