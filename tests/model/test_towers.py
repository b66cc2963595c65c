"""The towers: the same numbers as transformers' own CLIP, and the temporal transformer that starts from it."""

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import CLIPModel

from hbi.model.backbones.clip import clip_config
from hbi.model.config import ModelConfig, TowerConfig
from hbi.model.hbi import HBI
from hbi.model.weights import build_model, load_model, save_model

TOWERS = TowerConfig(
    image_size=16, patch_size=8, vision_width=48, vision_layers=2, vision_heads=3, vision_mlp=96, text_width=32,
    text_layers=3, text_heads=2, text_mlp=80, vocab_size=50, context=16, dim=32,
)  # fmt: skip


@pytest.fixture(scope="module")
def clip() -> CLIPModel:
    torch.manual_seed(0)
    return CLIPModel(clip_config(TOWERS)).eval()


@pytest.fixture(scope="module")
def folder(clip: CLIPModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    clip.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> HBI:
    """From the checkpoint's folder; the sizes in `towers` are wrong on purpose and must not matter."""
    return build_model(ModelConfig(backbone=str(folder), words=10, temporal_layers=2)).eval()


def test_sizes_come_from_the_checkpoint(model: HBI, folder: Path) -> None:
    assert model.config.towers == TOWERS
    assert model.config.backbone == str(folder)


def test_attention_is_fused(model: HBI) -> None:
    for layers in (model.text.layers, model.video.layers, model.temporal.layers if model.temporal else ()):
        assert {layer.self_attn.config._attn_implementation for layer in layers} == {"sdpa"}


def test_text_tower_is_clip(model: HBI, clip: CLIPModel) -> None:
    ids = torch.randint(1, 50, (3, 10))
    mask = torch.arange(10) < torch.tensor([[10], [6], [2]])
    with torch.no_grad():
        theirs = (
            clip.text_model(ids, attention_mask=mask.long()).last_hidden_state @ clip.text_projection.weight.T
        )
        words, sentence = model.encode_text(ids, mask)
    assert torch.allclose(words[mask], theirs[mask], atol=1e-5)
    assert torch.allclose(sentence, theirs[torch.arange(3), mask.sum(1) - 1], atol=1e-5)


def test_vision_tower_is_clip(model: HBI, clip: CLIPModel) -> None:
    images = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        theirs = clip.visual_projection(clip.vision_model(images).pooler_output)
        assert torch.allclose(model.video(images), theirs, atol=1e-5)
    assert torch.equal(model.logit_scale, clip.logit_scale)


def test_temporal_transformer_starts_from_the_text_tower(model: HBI, clip: CLIPModel) -> None:
    temporal = model.temporal
    assert temporal is not None
    assert torch.equal(temporal.positions.weight, clip.text_model.embeddings.position_embedding.weight)
    for ours, theirs in zip(temporal.layers, clip.text_model.encoder.layers[:2], strict=True):
        for (name, value), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
            assert torch.equal(value, other), name
    with torch.no_grad():  # a copy, not the same weights
        temporal.layers[0].mlp.fc1.weight += 1
    assert not torch.equal(model.text.layers[0].mlp.fc1.weight, temporal.layers[0].mlp.fc1.weight)


def test_more_frames_than_words_of_context_and_another_width() -> None:
    towers = TowerConfig(
        image_size=16, patch_size=8, text_width=64, dim=32, context=12, vision_layers=1, text_layers=1
    )
    model = HBI(ModelConfig(towers=towers, words=12, frames=20, temporal_layers=1))
    frames = model.encode_video(torch.zeros(1, 20, 3, 16, 16), torch.ones(1, 20))
    assert frames.shape == (1, 20, 32) and frames.isfinite().all()


def test_no_temporal_transformer_leaves_frames_apart(clip: CLIPModel) -> None:
    model = HBI(ModelConfig(towers=TOWERS, words=10, temporal_layers=0), clip)
    video = torch.randn(1, 4, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(
            model.encode_video(video, torch.ones(1, 4))[0], model.video(video[0]), atol=1e-6
        )


def test_a_backbone_with_holes(clip: CLIPModel, tmp_path: Path) -> None:
    state = {name: value for name, value in clip.state_dict().items() if "fc1" not in name}
    clip.save_pretrained(tmp_path, state_dict=state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=r"no whole CLIP checkpoint, missing: .*mlp\.fc1\.weight"):
            build_model(ModelConfig(backbone=str(tmp_path), words=10))


def test_a_backbone_that_was_cut_off(clip: CLIPModel, tmp_path: Path) -> None:
    clip.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(
        ValueError, match=rf"backbone {tmp_path}: its weights are damaged \(.*\): fetch or copy"
    ):
        build_model(ModelConfig(backbone=str(tmp_path), words=10))


def test_a_backbone_that_is_not_there(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=r"backbone .*: no CLIP checkpoint there"):
            build_model(ModelConfig(backbone=str(tmp_path / "none")))


def test_a_stem_makes_as_many_patches_by_itself(tmp_path: Path) -> None:
    towers = replace(TOWERS, stem=4)
    model = HBI(ModelConfig(towers=towers, words=10, temporal_layers=0)).eval()
    stem = model.video.embeddings.patch_embedding
    convolutions = [layer for layer in stem if isinstance(layer, torch.nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [4, 8, towers.vision_width]
    images = torch.randn(2, 3, 16, 16)
    patches = images
    for layer in convolutions:  # the definition, by hand
        patches = torch.nn.functional.conv2d(patches, layer.weight, layer.bias, stride=2, padding=1)
        patches = patches if layer is convolutions[-1] else patches.relu()
    assert torch.equal(stem(images), patches) and patches.shape == (2, towers.vision_width, 2, 2)
    save_model(model, tmp_path)
    assert torch.equal(load_model(tmp_path).video(images), model.video(images))


@pytest.mark.parametrize("towers", [{"stem": -1}, {"stem": 4, "patch_size": 12, "image_size": 24}])
def test_a_stem_halves_its_patches_away(towers: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"TowerConfig\.stem is"):
        TowerConfig(**towers)
