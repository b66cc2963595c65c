"""Agreement with the published code: the arrays that it computed come out of our model, and its checkpoints load."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from hbi.model.config import LossSettings
from hbi.model.hbi import HBI, Encoded
from hbi.model.levels import LEVELS
from hbi.model.losses import hbi_loss, published_loss
from hbi.model.published import _published_entries
from hbi.model.similarity import pair_similarity
from hbi.model.weights import load_estimator, load_model, load_published, save_model

DATA = Path(__file__).parents[1] / "data"
LISTING = json.loads((DATA / "published.json").read_text())
STUDENTS = dict(zip(LEVELS, ("banzhafmodel", "banzhafmodel0", "banzhafmodel1"), strict=True))


def formula_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """An entry of the state dict, from its name and shape alone."""
    x = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()))).standard_normal(shape)
    x = np.asarray(x, dtype=np.float32)
    last = name.split(".")[-1]
    if name.endswith("logit_scale"):
        return np.asarray(np.log(1 / 0.07), dtype=np.float32)
    if last == "weight" and len(shape) == 1:
        return (1 + 0.1 * x).astype(np.float32)
    if last == "running_var":
        return (1 + 0.1 * np.abs(x)).astype(np.float32)
    if last in ("bias", "in_proj_bias", "running_mean"):
        return (0.02 * x).astype(np.float32)
    if "embedding" in name:
        return (0.1 * x).astype(np.float32)
    fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else shape[0]
    return (x / np.sqrt(fan_in)).astype(np.float32)


def state_of(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    return {
        name: formula_weight(name, tuple(shape))
        for name, shape in shapes.items()
        if "num_batches_tracked" not in name
    }


def rescaled(
    shapes: dict[str, list[int]],
    *,
    width: int,
    patch: int,
    grid: int,
    layers: tuple[int, int, int],
    predictor: int,
) -> dict[str, list[int]]:
    """The listing of another checkpoint: other sizes of the vision tower, depths, context, vocabulary, predictor."""
    prefixes = (
        "clip.visual.transformer.resblocks.",
        "clip.transformer.resblocks.",
        "transformerClip.resblocks.",
    )
    result: dict[str, list[int]] = {}
    for name, shape in shapes.items():
        if name.startswith("clip.visual."):
            shape = [{128: width, 512: 4 * width, 384: 3 * width}.get(size, size) for size in shape]
            if name.endswith("visual.proj"):
                shape = [width, 512]
            if name.endswith("conv1.weight"):
                shape = [width, 3, patch, patch]
            if name.endswith("visual.positional_embedding"):
                shape = [grid * grid + 1, width]
        if name.startswith("banzhaf"):
            shape = [predictor if size == 64 else size for size in shape]
        if name.endswith(("clip.positional_embedding", "frame_position_embeddings.weight")):
            shape = [40, 512]
        if name.endswith("token_embedding.weight"):
            shape = [700, 512]
        for prefix, count in zip(prefixes, layers, strict=True):
            if name.startswith(prefix + "0."):
                for i in range(count):
                    result[prefix + str(i) + name[len(prefix) + 1 :]] = shape
        if not name.startswith(prefixes):
            result[name] = shape
    return result


@pytest.fixture(scope="module")
def arrays() -> dict[str, torch.Tensor]:
    with np.load(DATA / "published.npz") as stored:
        arrays = {
            name: torch.from_numpy(
                stored[name].astype(np.int64) if stored[name].dtype == np.int16 else stored[name]
            )
            for name in stored
        }
    generator = np.random.default_rng(0)
    ids = generator.integers(1, 598, (6, 12))
    video = generator.standard_normal((6, 12, 3, 64, 64)).astype(np.float32)
    lengths = arrays["text_mask"].sum(1).numpy()
    ids[:, 0] = 598
    ids[np.arange(6), lengths - 1] = 599
    arrays["input_ids"] = torch.from_numpy(ids) * arrays["text_mask"]
    arrays["video"] = torch.from_numpy(video) * arrays["video_mask"][:, :, None, None, None]
    return arrays


@pytest.fixture(scope="module")
def state() -> dict[str, np.ndarray]:
    return state_of(LISTING["shapes"])


@pytest.fixture(scope="module")
def model(state: dict[str, np.ndarray]) -> HBI:
    return load_published(state)


@pytest.fixture(scope="module")
def encoded(model: HBI, arrays: dict[str, torch.Tensor]) -> Encoded:
    return model(*(arrays[name] for name in ("input_ids", "text_mask", "video", "video_mask")))


def close(ours: torch.Tensor, theirs: torch.Tensor, bound: float = 1e-5) -> None:
    error = ((ours.detach() - theirs).norm() / theirs.norm()).item()
    assert error < bound, f"relative error {error:.1e}"


def test_features(model: HBI, arrays: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        words, sentence = model.encode_text(arrays["input_ids"], arrays["text_mask"])
        frames = model.encode_video(arrays["video"], arrays["video_mask"])
    close(words, arrays["text_feat"])
    close(sentence, arrays["cls"])
    close(frames, arrays["video_feat"])


@pytest.mark.parametrize("side", ["text", "video"])
def test_clusters_are_identical(side: str, model: HBI, arrays: dict[str, torch.Tensor]) -> None:
    tokens, mask = arrays[f"{side}_feat"], arrays[f"{side}_mask"].bool()
    merges = model.text_merges if side == "text" else model.video_merges
    for i, merge in enumerate(merges):
        tokens, mask, cluster = merge(tokens, mask, published=True)
        assert torch.equal(cluster, arrays[f"cluster_{side[0]}{i}"])


def test_similarities(model: HBI, arrays: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        ours = model.similarities(*(arrays[n] for n in ("input_ids", "text_mask", "video", "video_mask")))
    for level in LEVELS:
        close(ours[level], arrays[f"{level}_sim"])
    close(ours["entity"], arrays["similarity_eval"])


@pytest.mark.parametrize("level", LEVELS)
def test_interactions(level: str, encoded: Encoded, arrays: dict[str, torch.Tensor]) -> None:
    close(pair_similarity(encoded.text[level], encoded.video[level]), arrays[f"{level}_token_sim"])
    close(encoded.predicted[level], arrays[f"student_{STUDENTS[level]}"])
    close(encoded.estimated[level], arrays[f"teacher_{level}"])


def test_loss_and_gradients(model: HBI, encoded: Encoded, arrays: dict[str, torch.Tensor]) -> None:
    losses = published_loss(encoded, LossSettings(interaction=1.0, distillation=2.0, objective="published"))
    close(losses["loss"], arrays["loss"])
    for level in ("action", "event"):
        close(losses[f"contrastive/{level}"] + losses[f"alignment/{level}"], arrays[f"loss_{level}"])
    # The same through the front door, and cut in two shares as two ranks would.
    settings = LossSettings(interaction=1.0, distillation=2.0, objective="published")
    assert hbi_loss(encoded, encoded, 0, settings, 6)["loss"].item() == losses["loss"].item()
    halves = [rows_of(encoded, slice(0, 2)), rows_of(encoded, slice(2, 6))]
    shares = [
        hbi_loss(half, encoded, first, settings, 6)["loss"]
        for half, first in zip(halves, (0, 2), strict=True)
    ]
    assert sum(shares).item() == pytest.approx(losses["loss"].item(), rel=1e-6)

    model.zero_grad()
    losses["loss"].backward()
    parameters = dict(model.named_parameters())
    for name, ours, _ in _published_entries(model.config):
        norm = LISTING["grad_norm"].get(name)
        gradients = [parameters[own].grad for own in ours]
        if norm is None:
            assert gradients == [None]
            continue
        ours_norm = torch.cat([part.flatten() for part in gradients if part is not None]).norm().item()
        # Softmaxes forget a constant: such a bias has no gradient but rounding.
        assert ours_norm == pytest.approx(norm, rel=1e-4, abs=1e-7), name


def rows_of(encoded: Encoded, rows: slice) -> Encoded:
    def cut(tokens):
        return type(tokens)(*(part[rows] for part in tokens))

    return encoded._replace(
        text={level: cut(tokens) for level, tokens in encoded.text.items()},
        video={level: cut(tokens) for level, tokens in encoded.video.items()},
        predicted={level: part[rows] for level, part in encoded.predicted.items()},
    )


def test_published_loss_needs_an_estimator(encoded: Encoded) -> None:
    with pytest.raises(ValueError, match="has no estimator"):
        published_loss(
            encoded._replace(estimated={}),
            LossSettings(interaction=1.0, distillation=2.0, objective="published"),
        )


def test_a_file_with_a_wrapper_s_prefix_in_half_precision(
    tmp_path: Path, state: dict[str, np.ndarray]
) -> None:
    entries = {f"module.{name}": torch.from_numpy(value).half() for name, value in state.items()}
    entries["module.banzhafmodel.bn.num_batches_tracked"] = torch.tensor(0)
    torch.save(entries, tmp_path / "pytorch_model.bin.4")
    model = load_published(tmp_path / "pytorch_model.bin.4")
    ours = model.text.embeddings.token_embedding.weight
    assert ours.dtype == torch.float32
    assert torch.allclose(ours, torch.from_numpy(state["clip.token_embedding.weight"]), atol=1e-3)


def test_strict(state: dict[str, np.ndarray]) -> None:
    broken = dict(state)
    del broken["t_block1.attn.kv.bias"], broken["transformerClip.resblocks.1.ln_2.bias"]
    broken["lstm_visual.weight_ih_l0"] = np.zeros((4, 4), dtype=np.float32)
    broken["text_weight_fc.2.bias"] = np.zeros(3, dtype=np.float32)
    with pytest.raises(ValueError) as error:
        load_published(broken)
    message = str(error.value)
    assert "missing: t_block1.attn.kv.bias, transformerClip.resblocks.1.ln_2.bias" in message
    assert "left over: lstm_visual.weight_ih_l0" in message
    assert "text_weight_fc.2.bias is (3,), not (1,)" in message
    assert "\n" not in message


@pytest.mark.parametrize("content", [{"clip.logit_scale": np.float32(1)}, {}])
def test_no_checkpoint_of_ours(content: dict) -> None:
    with pytest.raises(ValueError, match=r"missing: .*clip\.visual\.conv1\.weight"):
        load_published(content)


def test_a_file_that_holds_code_is_not_run(tmp_path: Path) -> None:
    torch.save({"model": pytest.approx}, tmp_path / "evil.pt")
    (tmp_path / "short.pt").write_bytes((tmp_path / "evil.pt").read_bytes()[:100])
    with pytest.raises(ValueError, match=r"evil\.pt cannot be read: it holds more than arrays"):
        load_published(tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"short\.pt cannot be read: it is damaged"):
        load_published(str(tmp_path / "short.pt"))
    with pytest.raises(ValueError, match="no such file"):
        load_published(tmp_path / "none.pt")


def test_another_size_without_an_estimator() -> None:
    shapes = rescaled(LISTING["shapes"], width=192, patch=16, grid=3, layers=(3, 1, 4), predictor=32)
    shapes = {name: shape for name, shape in shapes.items() if not name.startswith("banzhafteacher")}
    model = load_published(state_of(shapes), word_ratios=(0.5, 0.5))
    towers = model.config.towers
    assert (towers.image_size, towers.patch_size, towers.vision_width, towers.vision_heads) == (
        48,
        16,
        192,
        3,
    )
    assert (towers.vision_layers, towers.text_layers, model.config.temporal_layers) == (3, 1, 4)
    assert (towers.context, towers.vocab_size, towers.text_heads, towers.dim) == (40, 700, 8, 512)
    assert model.config.predictor_width == 32 and model.estimator is None
    ids, mask = torch.randint(1, 700, (2, 20)), torch.ones(2, 20, dtype=torch.bool)
    with torch.no_grad():
        similarities = model.similarities(ids, mask, torch.randn(2, 5, 3, 48, 48), torch.ones(2, 5))
    assert all(similarity.isfinite().all() for similarity in similarities.values())


def qa_shapes(answers: int) -> dict[str, list[int]]:
    """What a checkpoint of the published QA training holds beside that of the retrieval training."""
    shapes: dict[str, list[int]] = {}
    for suffix in ("", "0", "1"):
        for side in "tv":
            shapes[f"{side}_weight{suffix}.0.weight"] = [512, 512]
            shapes[f"{side}_weight{suffix}.0.bias"] = [512]
            shapes[f"{side}_weight{suffix}.2.weight"] = [1, 512]
            shapes[f"{side}_weight{suffix}.2.bias"] = [1]
            shapes[f"{side}_proj{suffix}.weight"] = [2048, 512]
            shapes[f"{side}_proj{suffix}.bias"] = [2048]
        shapes[f"classifier{suffix}.0.weight"] = [8192, 4096]
        shapes[f"classifier{suffix}.0.bias"] = [8192]
        shapes[f"classifier{suffix}.2.weight"] = [answers, 8192]
        shapes[f"classifier{suffix}.2.bias"] = [answers]
    return shapes


def published_answers(
    state: dict[str, np.ndarray], words: torch.Tensor, frames: torch.Tensor, suffix: str, masks: tuple
) -> torch.Tensor:
    """One level of the published head, from its description: padding in the weights' softmax, not in the sum."""

    def layer(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ torch.from_numpy(state[f"{name}.weight"]).T + torch.from_numpy(state[f"{name}.bias"])

    pooled = []
    for side, tokens, mask in (("v", frames, masks[1]), ("t", words, masks[0])):
        hidden = layer(f"{side}_weight{suffix}.0", tokens).relu()
        weights = layer(f"{side}_weight{suffix}.2", hidden)[:, :, 0].softmax(-1)
        mean = torch.einsum("atc,at->ac", tokens * mask[:, :, None], weights)
        pooled.append(layer(f"{side}_proj{suffix}", mean))
    hidden = layer(f"classifier{suffix}.0", torch.cat(pooled, 1)).relu()
    return layer(f"classifier{suffix}.2", hidden)


def test_a_checkpoint_of_the_qa_training(
    state: dict[str, np.ndarray], arrays: dict[str, torch.Tensor]
) -> None:
    whole = {**state, **state_of(qa_shapes(11))}
    model = load_published(whole)
    config = model.config
    assert (config.answers.head, config.answers.vocabulary) == ("published", 11)
    assert (config.words, config.word_ratios, config.frame_ratios) == (32, (0.25, 0.125), (0.25, 0.25))
    classifiers = sum(p.numel() for n, p in model.named_parameters() if "classifiers" in n)
    assert classifiers == 3 * (4096 * 8192 + 8192 + 8192 * 11 + 11)
    mask, video_mask = arrays["text_mask"][:2].bool(), arrays["video_mask"][:2].bool()
    with torch.no_grad():
        ids, frames = arrays["input_ids"][:2], model.encode_video(arrays["video"][:2], video_mask)
        found = model.answer_logits(ids, mask, frames, video_mask)
        text = model.text_levels(model.encode_text(ids, mask)[0], mask)
        video = model.video_levels(frames, video_mask)
    expected = torch.zeros(2, 11)
    for level, suffix, share in zip(LEVELS, ("", "0", "1"), (0.4, 0.4, 0.2), strict=True):
        masks = (mask, video_mask) if level == "entity" else (torch.ones(2, 1), torch.ones(2, 1))
        words, clips = text[level].tokens, video[level].tokens
        expected += share * published_answers(whole, words, clips, suffix, masks)
    close(found, expected)
    del whole["classifier0.2.bias"]
    with pytest.raises(ValueError, match=r"missing: classifier0\.2\.bias"):
        load_published(whole)


def test_without_a_temporal_transformer(
    state: dict[str, np.ndarray], arrays: dict[str, torch.Tensor]
) -> None:
    bare = {
        name: value for name, value in state.items() if not name.startswith(("transformerClip", "frame_pos"))
    }
    model = load_published(bare)
    assert model.temporal is None
    with torch.no_grad():
        frames = model.encode_video(arrays["video"][:1, :2], arrays["video_mask"][:1, :2])
    assert frames.shape == (1, 2, 512)


def test_round_trip_through_our_own_format(tmp_path: Path, model: HBI) -> None:
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert again.config == model.config
    for (name, value), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


def test_an_estimator_on_its_own(state: dict[str, np.ndarray], arrays: dict[str, torch.Tensor]) -> None:
    alone = {
        name.removeprefix("banzhafteacher."): v
        for name, v in state.items()
        if name.startswith("banzhafteacher")
    }
    estimator = load_estimator(alone)
    with torch.no_grad():
        close(estimator(arrays["action_token_sim"]), arrays["teacher_action"])
    with pytest.raises(ValueError, match=r"missing: cnn1\.weight"):
        load_estimator({"Q": alone["Q"]})
