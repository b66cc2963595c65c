"""Saving and loading: the same model back, and a damaged one refused."""

import json
import pickletools
from pathlib import Path

import pytest
import torch

from hbi.model.config import ModelConfig, TowerConfig
from hbi.model.folder import digest_of
from hbi.model.hbi import HBI
from hbi.model.tokenizer import load_tokenizer, tokenize, train_tokenizer
from hbi.model.weights import load_model, save_model

TOWERS = TowerConfig(
    image_size=16, patch_size=8, vision_width=16, vision_layers=1, vision_heads=2, text_width=16, text_layers=1,
    text_heads=2, vocab_size=300, context=16, dim=16,
)  # fmt: skip


@pytest.fixture
def saved(tmp_path: Path) -> tuple[HBI, Path]:
    torch.manual_seed(0)
    model = HBI(ModelConfig(towers=TOWERS, words=8, frames=4, temporal_layers=1))
    save_model(model, tmp_path / "model", train_tokenizer(["a red ball"] * 3, 260))
    return model, tmp_path / "model"


def test_the_same_model_comes_back(saved: tuple[HBI, Path]) -> None:
    model, folder = saved
    again = load_model(folder)
    assert again.config == model.config and not again.training
    ids, mask = tokenize(load_tokenizer(folder), ["a red ball", "a ball"], 8)
    video, video_mask = torch.randn(2, 4, 3, 16, 16), torch.ones(2, 4, dtype=torch.bool)
    with torch.no_grad():
        ours = model.eval().similarities(ids, mask, video, video_mask)
        theirs = again.similarities(ids, mask, video, video_mask)
    assert all(torch.equal(ours[level], theirs[level]) for level in ours)


def test_nothing_is_pickled(saved: tuple[HBI, Path]) -> None:
    for path in saved[1].iterdir():
        assert path.suffix in (".json", ".safetensors", ".txt"), path
        with pytest.raises(Exception):  # noqa: B017
            list(pickletools.genops(path.read_bytes()))


def test_saved_twice_the_second_stands(saved: tuple[HBI, Path]) -> None:
    model, folder = saved
    with torch.no_grad():
        model.logit_scale.fill_(1.5)
    save_model(model, folder)
    assert load_model(folder).logit_scale.item() == 1.5


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("how", ["cut", "changed", "removed"])
def test_damage_is_refused(name: str, how: str, saved: tuple[HBI, Path]) -> None:
    path = saved[1] / name
    content = bytearray(path.read_bytes())
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "changed":
        content[-20] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()
    expected = f"has no {name}" if how == "removed" else f"{name} was cut short or changed since it was saved"
    with pytest.raises(ValueError, match=expected) as error:
        load_model(saved[1])
    assert "\n" not in str(error.value)


def test_a_changed_description_is_refused(saved: tuple[HBI, Path]) -> None:
    path = saved[1] / "config.json"
    text = path.read_text()
    described = json.loads(text)
    for change, expected in (
        ({"model": {**described["model"], "words": 7}}, "it was changed since it was saved"),
        ({"sha256": {}}, "it was changed since it was saved"),
        ({"format": 7}, "format is 7, this version reads 1"),
    ):
        path.write_text(json.dumps({**described, **change}))
        with pytest.raises(ValueError, match=expected) as error:
            load_model(saved[1])
        assert "\n" not in str(error.value)
    for broken in ("{", "[]", "{}", text[: len(text) // 2], text.replace('"format"', '"Format"')):
        path.write_text(broken)
        with pytest.raises(ValueError, match=r"config\.json does not describe a model"):
            load_model(saved[1])


def test_weights_of_another_model_are_refused(saved: tuple[HBI, Path]) -> None:
    """A description that is whole, but not of these weights (another version of the code, say)."""
    path = saved[1] / "config.json"
    described = json.loads(path.read_text())
    described["model"]["temporal_layers"] = 3
    path.write_text(json.dumps({**described, "digest": digest_of(described)}))
    with pytest.raises(ValueError, match=r"missing: temporal\.layers\.1") as error:
        load_model(saved[1])
    assert "\n" not in str(error.value)


def test_an_empty_folder_and_an_interrupted_save(
    saved: tuple[HBI, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"is no saved model: it has no config\.json"):
        load_model(tmp_path)
    tokenizer = load_tokenizer(saved[1])

    def fail(folder: str) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(tokenizer, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        save_model(*saved, tokenizer)
    with pytest.raises(ValueError, match="is no saved model"):
        load_model(saved[1])
