"""Configurations: checked when made, the same after JSON, and after the command line that MLflow shows."""

import json
import shlex
from dataclasses import replace

import pytest

from hbi.commands.training import Train
from hbi.model.config import LossSettings, ModelConfig, TowerConfig
from hbi.model.hbi import HBI
from hbi.training.command import command_line
from hbi.training.runs.table import RUNS
from tests.support.training_shards import tiny_model


def test_contrasts_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="must be softmax in the published objective"):
        LossSettings(contrast="sigmoid", objective="published")
    with pytest.raises(ValueError, match="CLIP's towers have no bias: take SigLIP's, or softmax"):
        HBI(tiny_model()).learn_bias()


def test_round_trip_through_json() -> None:
    config = ModelConfig(
        backbone="some/clip",
        towers=TowerConfig(dim=64, activation="gelu"),
        word_ratios=(0.5, 0.5),
        masking="published",
    )
    again = ModelConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and hash(again) == hash(config)
    assert ModelConfig.from_dict({}) == ModelConfig()


def test_unknown_fields_are_named() -> None:
    with pytest.raises(ValueError, match="ModelConfig has no field depth, width"):
        ModelConfig.from_dict({"width": 1, "depth": 2})
    with pytest.raises(ValueError, match="TowerConfig has no field size"):
        ModelConfig.from_dict({"towers": {"size": 1}})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"words": 1}, r"ModelConfig\.words is 1, must lie between 2"),
        ({"words": 78}, r"ModelConfig\.words is 78, .*context \(77\)"),
        ({"frames": 0}, r"ModelConfig\.frames is 0, must be at least 1"),
        ({"temporal_layers": -1}, r"ModelConfig\.temporal_layers is -1"),
        ({"word_ratios": (0.0, 0.5)}, r"ModelConfig\.word_ratios is"),
        ({"frame_ratios": (0.5, 1.5)}, r"ModelConfig\.frame_ratios is"),
    ],
)
def test_model_fields_are_checked(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"patch_size": 15}, r"TowerConfig\.patch_size is 15, must divide image_size \(64\)"),
        ({"vision_heads": 3}, r"TowerConfig\.vision_heads is 3, must divide vision_width"),
        ({"text_heads": 5}, r"TowerConfig\.text_heads is 5, must divide text_width"),
        ({"text_layers": 0}, r"TowerConfig\.text_layers is 0, must be at least 1"),
    ],
)
def test_tower_fields_are_checked(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TowerConfig(**values)


def test_the_command_of_a_run_makes_that_run() -> None:
    usual = RUNS["demo"]
    config = replace(
        usual,
        task=("retrieval", "qa"),
        model=replace(
            usual.model,
            backbone="a folder/it's",
            word_ratios=(0.5, 0.25),
            answers=replace(usual.model.answers, head="open"),
        ),
        loss=replace(usual.loss, chunk=64),
        optim=replace(usual.optim, lr=3e-5),
        evaluate=replace(usual.evaluate, final=()),
        compute=replace(usual.compute, bf16=True),
        tracking=replace(usual.tracking, register=False, alias=""),
    )
    first, second, *words = shlex.split(command_line(config, "my data", "/out"))
    assert (first, second) == ("hbi", "train")
    read = Train.read(words)
    assert (read.set, read.data, read.out) == (config, "my data", "/out")
    assert command_line(usual, "shards", "/out") == "hbi train demo --data shards --out /out"
