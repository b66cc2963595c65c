"""Each family of backbones against transformers' own model, from random small checkpoints on disk."""

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    MetaClip2Config,
    MetaClip2Model,
    PreTrainedModel,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
)

from hbi.model.config import ModelConfig, TowerConfig
from hbi.model.frames import normalise
from hbi.model.hbi import HBI
from hbi.model.tokenizer import tokenize, train_tokenizer
from hbi.model.weights import build_model, load_model, save_model

CONTEXT, PAD, END = 16, 1, 49
TEXT = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 2,
    "max_position_embeddings": CONTEXT, "pad_token_id": PAD, "bos_token_id": 3, "eos_token_id": END,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8,
}  # fmt: skip
SIDE = 24
FAMILIES = ("clip", "metaclip_2", "siglip", "siglip2")
VIDEO = {"image_size": SIDE}


def made(family: str) -> PreTrainedModel:
    """A small model of transformers with random weights and a scale and bias of its own."""
    torch.manual_seed(0)
    if family == "clip":
        model = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION | VIDEO, projection_dim=24))
    elif family == "metaclip_2":
        model = MetaClip2Model(
            MetaClip2Config(text_config=TEXT, vision_config=VISION | VIDEO, projection_dim=24)
        )
    elif family == "siglip":
        text = TEXT | {"projection_size": 32}
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=VISION | VIDEO))
    else:
        text = TEXT | {"projection_size": 32}
        model = Siglip2Model(Siglip2Config(text_config=text, vision_config=VISION | {"num_patches": 9}))
    for parameter in model.parameters():  # fresh weights are near zero: positions and biases must count
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture(scope="module", params=FAMILIES)
def theirs(request: pytest.FixtureRequest) -> PreTrainedModel:
    return made(request.param)


@pytest.fixture(scope="module")
def folder(theirs: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backbone")
    theirs.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ours(folder: Path) -> HBI:
    return build_model(ModelConfig(backbone=str(folder), words=10, frames=3, temporal_layers=0)).eval()


def sentences() -> tuple[torch.Tensor, torch.Tensor]:
    """Three texts that end where END stands, of ten, six and two tokens; what stands at padding must not matter."""
    mask = torch.arange(10) < torch.tensor([[10], [6], [2]])
    ids = torch.randint(4, 49, (3, 10), generator=torch.Generator().manual_seed(1))
    ids[torch.arange(3), mask.sum(1) - 1] = END
    return ids, mask


def test_text_features_are_the_librarys(theirs: PreTrainedModel, ours: HBI) -> None:
    ids, mask = sentences()
    sigmoid = theirs.config.model_type.startswith("siglip")
    length = CONTEXT if sigmoid else 10
    filled = torch.full((3, length), PAD)
    filled[:, :10] = ids.masked_fill(~mask, PAD)
    with torch.no_grad():
        if sigmoid:  # as it was trained: always of full length, every word sees the padding
            found = theirs.text_model(filled)
            words, pooled = theirs.text_model.head(found.last_hidden_state)[:, :10], found.pooler_output
        else:
            attend = mask.long()
            words = theirs.text_projection(theirs.text_model(filled, attend).last_hidden_state)
            pooled = theirs.get_text_features(filled, attend).pooler_output
        our_words, our_sentence = ours.encode_text(ids, mask)
    assert torch.allclose(our_words[mask], words[mask], atol=1e-5)
    assert torch.allclose(our_sentence, pooled, atol=1e-5)
    assert not torch.allclose(our_sentence[0], our_sentence[1], atol=1e-2)


def test_frame_features_are_the_librarys(theirs: PreTrainedModel, ours: HBI) -> None:
    frames = torch.randint(0, 256, (2, 3, SIDE, SIDE, 3), dtype=torch.uint8)
    towers = ours.config.towers
    images = normalise(frames, towers.image_mean, towers.image_std).flatten(0, 1)
    with torch.no_grad():
        if theirs.config.model_type == "siglip2":
            cut = images.reshape(6, 3, 3, 8, 3, 8).permute(0, 2, 4, 3, 5, 1).reshape(6, 9, 192)
            there, shapes = torch.ones(6, 9, dtype=torch.long), torch.tensor([[3, 3]] * 6)
            pooled = theirs.get_image_features(cut, there, shapes).pooler_output
        else:
            pooled = theirs.get_image_features(images).pooler_output
        tokens = ours.encode_video(frames, torch.ones(2, 3))
    assert torch.allclose(tokens.flatten(0, 1), pooled, atol=1e-5)
    assert ours.encode_video(frames[:0], torch.ones(0, 3)).shape == (0, 3, towers.dim)


def test_scale_and_bias_come_along(theirs: PreTrainedModel, ours: HBI) -> None:
    assert torch.equal(ours.logit_scale, theirs.logit_scale.squeeze())
    if theirs.config.model_type.startswith("siglip"):
        assert ours.logit_bias is not None
        assert torch.equal(ours.logit_bias, theirs.logit_bias.squeeze())
        assert "logit_bias" in dict(ours.backbone_parameters())
    else:
        assert ours.logit_bias is None


def test_padding_says_nothing_but_that_it_is_there(ours: HBI) -> None:
    ids, mask = sentences()
    with torch.no_grad():
        words, sentence = ours.encode_text(ids, mask)
        other_words, other = ours.encode_text(ids.masked_fill(~mask, 7), mask)
    assert torch.equal(words[mask], other_words[mask]) and torch.equal(sentence, other)


def test_a_saved_model_is_the_same_without_its_backbone(ours: HBI, tmp_path: Path) -> None:
    save_model(ours, tmp_path)
    again = load_model(tmp_path)
    frames = torch.randint(0, 256, (2, 3, SIDE, SIDE, 3), dtype=torch.uint8)
    ids, mask = sentences()
    with torch.no_grad():
        for one, two in (
            (ours.encode_text(ids, mask), again.encode_text(ids, mask)),
            (ours.encode_video(frames, torch.ones(2, 3)), again.encode_video(frames, torch.ones(2, 3))),
        ):
            assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_it_trains_with_a_temporal_transformer_and_without_kept_activations(folder: Path) -> None:
    config = ModelConfig(
        backbone=str(folder), words=10, frames=3, temporal_layers=2, checkpointing=True, predictor_width=8
    )
    model = build_model(config)
    frames = torch.randint(0, 256, (3, 3, SIDE, SIDE, 3), dtype=torch.uint8)
    ids, mask = sentences()
    found = model(ids, mask, frames, torch.ones(3, 3))
    sum((level.tokens**2).sum() for side in (found.text, found.video) for level in side.values()).backward()
    for tower in (model.text, model.video, model.temporal):
        assert all(
            value.grad is not None and value.grad.isfinite().all() for value in tower.layers.parameters()
        )


def test_pixels_are_normalised_as_the_checkpoint_says(
    theirs: PreTrainedModel, folder: Path, tmp_path: Path
) -> None:
    usual = build_model(ModelConfig(backbone=str(folder), words=10, temporal_layers=0)).config.towers
    halves = theirs.config.model_type.startswith("siglip")
    assert (usual.image_mean[0], usual.image_std[0]) == ((0.5, 0.5) if halves else (0.48145466, 0.26862954))
    theirs.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]})
    )
    model = build_model(ModelConfig(backbone=str(tmp_path), words=10, temporal_layers=0)).eval()
    assert model.config.towers.image_mean == (0.1, 0.2, 0.3)
    white = torch.full((1, 1, SIDE, SIDE, 3), 255, dtype=torch.uint8)
    by_hand = ((torch.ones(3) - torch.tensor([0.1, 0.2, 0.3])) / torch.tensor([0.4, 0.5, 0.6])).view(3, 1, 1)
    with torch.no_grad():
        floats = by_hand.expand(1, 1, 3, SIDE, SIDE)
        there = torch.ones(1, 1)
        assert torch.allclose(model.encode_video(white, there), model.encode_video(floats, there), atol=1e-5)


def test_padding_is_the_tokenizers(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["a red ball", "a blue box"], 300)
    siglip = SiglipConfig(
        text_config=TEXT | {"vocab_size": 300, "projection_size": 32}, vision_config=VISION | VIDEO
    )
    SiglipModel(siglip).save_pretrained(tmp_path)
    tokenizer.add_special_tokens({"pad_token": "!"})
    tokenizer.save_pretrained(tmp_path)
    model = build_model(ModelConfig(backbone=str(tmp_path), words=10, temporal_layers=0))
    assert model.config.towers.pad_id == tokenizer.pad_token_id != PAD
    ids, mask = tokenize(tokenizer, ["a red ball"], 10)
    with torch.no_grad():
        _, sentence = model.eval().encode_text(ids, mask)
        full = torch.full((1, CONTEXT), tokenizer.pad_token_id)
        full[0, : mask.sum()] = ids[mask]
        again, _ = model.encode_text(full, torch.ones(1, CONTEXT))
    assert torch.allclose(sentence, again[:, -1], atol=1e-6)


def test_what_is_no_backbone_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="it is a bert, must be one of clip, metaclip_2, siglip, siglip2"):
        build_model(ModelConfig(backbone=str(tmp_path)))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    with pytest.raises(ValueError, match="its weights are not there") as error:
        build_model(ModelConfig(backbone=str(tmp_path)))
    assert "\n" not in str(error.value)


def test_sizes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"vision_width is 64, must be dim \(32\): siglip projects no frame"):
        TowerConfig(family="siglip", vision_width=64, dim=32)
    with pytest.raises(ValueError, match="patch_size is 128, must be at most image_size"):
        TowerConfig(family="siglip", patch_size=128)
    with pytest.raises(ValueError, match=r"image_std are .* above 0"):
        TowerConfig(image_std=(0.5, 0.0, 0.5))


def test_a_picture_that_patches_do_not_fill_loses_its_rest() -> None:
    towers = TowerConfig(
        family="siglip", image_size=20, patch_size=8, vision_width=32, vision_heads=2, vision_layers=1, dim=32
    )
    model = HBI(ModelConfig(towers=towers, temporal_layers=0)).eval()
    frames = torch.randint(0, 256, (1, 1, 20, 20, 3), dtype=torch.uint8)
    other = frames.clone()
    other[:, :, 16:] = 0
    other[:, :, :, 16:] = 0
    with torch.no_grad():
        same = torch.equal(
            model.encode_video(frames, torch.ones(1, 1)), model.encode_video(other, torch.ones(1, 1))
        )
    assert same
