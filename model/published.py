"""Published HBI checkpoints: their names and shapes, read into ours."""

import pickle
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from hbi.model.config import AnswerConfig, ModelConfig, TowerConfig
from hbi.model.hbi import HBI
from hbi.model.levels import LEVELS
from hbi.model.predictor import InteractionPredictor

ANSWERS_BIAS = "classifier.2.bias"
"""An entry that only checkpoints of the QA training have: one number an answer."""
PUBLISHED_HEAD = 64
"""Width of an attention head in every CLIP that the published code takes."""

_BLOCK = {
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "ln_2": "layer_norm2",
}
_CLIP = {
    "clip.logit_scale": "logit_scale",
    "clip.token_embedding.weight": "text.embeddings.token_embedding.weight",
    "clip.positional_embedding": "text.embeddings.position_embedding.weight",
    "clip.visual.class_embedding": "video.embeddings.class_embedding",
    "clip.visual.conv1.weight": "video.embeddings.patch_embedding.weight",
    "clip.visual.positional_embedding": "video.embeddings.position_embedding.weight",
}
_NORMS = {
    "clip.ln_final": "text.norm",
    "clip.visual.ln_pre": "video.norm_before",
    "clip.visual.ln_post": "video.norm",
}
_PROJECTIONS = {
    "clip.text_projection": "text.projection.weight",
    "clip.visual.proj": "video.projection.weight",
}
_PREDICTOR = {
    "Q": "query",
    "K": "key",
    "V": "value",
    "cnn1.weight": "rise.weight",
    "cnn1.bias": "rise.bias",
    "cnn2.weight": "fall.weight",
    "cnn2.bias": "fall.bias",
}
_BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_MERGE = {"ctm": {"norm": "norm", "score": "score"}, "block": {"norm1": "attention_norm", "attn.q": "query",
          "attn.kv": "key_value", "attn.proj": "out"}}  # fmt: skip


def _published_entries(config: ModelConfig) -> Iterator[tuple[str, list[str], str]]:
    """(published name, our names, how: "" as it is, "T" transposed, "QKV" cut in three) for every entry that we use."""
    both = ("weight", "bias")
    towers = config.towers
    for name, ours in _CLIP.items():
        yield name, [ours], ""
    for name, ours in _NORMS.items():
        yield from ((f"{name}.{part}", [f"{ours}.{part}"], "") for part in both)
    for name, ours in _PROJECTIONS.items():
        yield name, [ours], "T"
    stacks = [
        ("clip.transformer", "text", towers.text_layers),
        ("clip.visual.transformer", "video", towers.vision_layers),
    ]
    if config.temporal_layers:
        yield "frame_position_embeddings.weight", ["temporal.positions.weight"], ""
        stacks.append(("transformerClip", "temporal", config.temporal_layers))
    for stack, ours, layers in stacks:
        for i in range(layers):
            block, layer = f"{stack}.resblocks.{i}", f"{ours}.layers.{i}"
            for part in both:
                for name, own in _BLOCK.items():
                    yield f"{block}.{name}.{part}", [f"{layer}.{own}.{part}"], ""
                names = [f"{layer}.self_attn.{which}_proj.{part}" for which in "qkv"]
                yield f"{block}.attn.in_proj_{part}", names, "QKV"
    for number, level in enumerate(LEVELS):
        suffix = "" if number == 0 else str(number - 1)
        for side in ("text", "video"):
            for i in (0, 2):
                for part in both:
                    yield f"{side}_weight_fc{suffix}.{i}.{part}", [f"{side}_weights.{level}.{i}.{part}"], ""
        for name, own in _PREDICTOR.items():
            yield f"banzhafmodel{suffix}.{name}", [f"predictors.{level}.{own}"], ""
    if config.answers.head == "published":
        yield from _answer_entries()
    if config.estimator:
        for name, own in _PREDICTOR.items():
            yield f"banzhafteacher.{name}", [f"estimator.{own}"], ""
    for letter, side in (("t", "text"), ("v", "video")):
        for i in (0, 1):
            merge = f"{side}_merges.{i}"
            yield f"{letter}_ctm{i}.conv.conv.weight", [f"{merge}.conv.weight"], ""
            for module, parts in _MERGE.items():
                for name, own in parts.items():
                    for part in both:
                        yield f"{letter}_{module}{i}.{name}.{part}", [f"{merge}.{own}.{part}"], ""


def _answer_entries() -> Iterator[tuple[str, list[str], str]]:
    """Those of the head for questions, in the form of `_published_entries`."""
    for number, level in enumerate(LEVELS):
        suffix = "" if number == 0 else str(number - 1)
        for part in ("weight", "bias"):
            for letter, side in (("t", "text"), ("v", "video")):
                yield f"{letter}_proj{suffix}.{part}", [f"answerer.{side}_maps.{level}.{part}"], ""
                for i in (0, 2):
                    ours = f"answerer.{side}_weights.{level}.{i}.{part}"
                    yield f"{letter}_weight{suffix}.{i}.{part}", [ours], ""
            for i in (0, 2):
                ours = f"answerer.classifiers.{level}.{i}.{part}"
                yield f"classifier{suffix}.{i}.{part}", [ours], ""


def _read_state(source: str | Path | Mapping[str, Any]) -> tuple[dict[str, Tensor], str]:
    """A checkpoint's entries as tensors, without the prefix of a data-parallel wrapper, and what to call it."""
    what, entries = "the state dict", source
    if isinstance(source, str | Path):
        what = str(source)
        try:
            if what.endswith(".safetensors"):
                entries = load(Path(source).read_bytes())
            else:
                entries = torch.load(source, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise ValueError(f"{what}: no such file") from None
        except (pickle.UnpicklingError, RuntimeError, EOFError, SafetensorError) as error:
            reason = (
                "it holds more than arrays"
                if "Unsupported" in str(error)
                else "it is damaged, or no checkpoint"
            )
            raise ValueError(f"{what} cannot be read: {reason}") from error
    if not isinstance(entries, Mapping):
        raise ValueError(f"{what} holds no state dict but a {type(entries).__name__}")
    for wrapper in ("state_dict", "model_state_dict", "model"):
        if isinstance(inner := entries.get(wrapper), Mapping):
            entries = inner
    prefix = "module."
    state = {}
    for name, value in entries.items():
        if not isinstance(value, Tensor | np.ndarray | np.generic | float | int):
            raise ValueError(f"{what}: entry {name} is a {type(value).__name__}, not an array")
        state[name.removeprefix(prefix)] = torch.as_tensor(
            np.array(value) if not isinstance(value, Tensor) else value
        )
    return state, what


def load_strictly(model: HBI, state: Mapping[str, Tensor], source: str) -> None:
    """All the weights of a model; ValueError lists what is missing, left over or of another shape."""
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in state.items()}
    problems = _differences(expected, given)
    if problems:
        raise ValueError(f"{source}: {problems}")
    model.load_state_dict(dict(state))


def _differences(expected: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]]) -> str:
    missing = sorted(set(expected) - set(given))
    left_over = sorted(set(given) - set(expected))
    shapes = [
        f"{name} is {given[name]}, not {expected[name]}"
        for name in sorted(set(given) & set(expected))
        if given[name] != expected[name]
    ]
    parts = (("missing", missing), ("left over", left_over), ("of another shape", shapes))
    return "; ".join(f"{what}: {', '.join(names)}" for what, names in parts if names)


def _count(state: Mapping[str, Tensor], stack: str) -> int:
    return len({name[len(stack) :].split(".")[0] for name in state if name.startswith(stack)})


def published_config(state: Mapping[str, Any], **settings: Any) -> ModelConfig:
    """The sizes of a published checkpoint, from its shapes; heads are 64 wide, as in the published code.

    ValueError names the entries that are missing.
    """
    needed = ("clip.visual.conv1.weight", "clip.visual.positional_embedding", "clip.text_projection")
    needed += ("clip.positional_embedding", "clip.token_embedding.weight", "banzhafmodel.cnn1.weight")
    if missing := [name for name in needed if name not in state]:
        raise ValueError(f"no published HBI checkpoint: missing: {', '.join(missing)}")
    shapes = {name: tuple(state[name].shape) for name in needed}
    vision_width, _, patch, _ = shapes["clip.visual.conv1.weight"]
    grid = round((shapes["clip.visual.positional_embedding"][0] - 1) ** 0.5)
    text_width, dim = shapes["clip.text_projection"]
    context = shapes["clip.positional_embedding"][0]
    towers = TowerConfig(
        image_size=grid * patch,
        patch_size=patch,
        vision_width=vision_width,
        vision_layers=_count(state, "clip.visual.transformer.resblocks."),
        vision_heads=max(vision_width // PUBLISHED_HEAD, 1),
        text_width=text_width,
        text_layers=_count(state, "clip.transformer.resblocks."),
        text_heads=max(text_width // PUBLISHED_HEAD, 1),
        vocab_size=shapes["clip.token_embedding.weight"][0],
        context=context,
        dim=dim,
    )
    config = ModelConfig(
        towers=towers,
        words=min(24, context),
        frames=min(12, context),
        temporal_layers=_count(state, "transformerClip.resblocks."),
        predictor_width=shapes["banzhafmodel.cnn1.weight"][0],
        estimator=any(name.startswith("banzhafteacher.") for name in state),
        freeze_patches=True,
        masking="published",
    )
    if ANSWERS_BIAS in state:
        answers = AnswerConfig("published", len(state[ANSWERS_BIAS]))
        words = min(32, context)
        config = replace(
            config, answers=answers, words=words, word_ratios=(0.25, 0.125), frame_ratios=(0.25, 0.25)
        )
    return replace(config, **settings)


def load_published(source: str | Path | Mapping[str, Any], **settings: Any) -> HBI:
    """A published HBI checkpoint (its file, or its state dict of tensors or arrays) as a model, in eval mode.

    One of the QA training brings its head for questions; its answers lie in a file of their own
    (`train_ans2label.json`, a dict of numbers by answer): set `vocabulary` from it, in the order of the numbers.

    Sizes come from the shapes; what no shape tells (`words`, `frames`, `word_ratios`, `frame_ratios`, `masking`) has
    the published defaults and may be given as fields of `ModelConfig`. Strict: ValueError lists what is missing or left
    over.
    """
    state, what = _read_state(source)
    config = published_config(state, **settings)
    model = HBI(config)
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    entries = list(_published_entries(config))
    expected: dict[str, tuple[int, ...]] = {}
    for name, ours, how in entries:
        shape = own[ours[0]]
        expected[name] = shape[::-1] if how == "T" else (3 * shape[0], *shape[1:]) if how == "QKV" else shape
    # The published predictors declare a batch norm that they never use.
    unused = {
        f"{predictor}.bn.{part}"
        for predictor in ("banzhafmodel", "banzhafmodel0", "banzhafmodel1", "banzhafteacher")
        for part in _BATCH_NORM
    }
    given = {name: tuple(value.shape) for name, value in state.items() if name not in unused}
    if problems := _differences(expected, given):
        raise ValueError(f"{what} is no published HBI checkpoint of these sizes: {problems}")
    mapped: dict[str, Tensor] = {}
    for name, ours, how in entries:
        value = state[name].float()
        parts = value.chunk(3) if how == "QKV" else [value.T if how == "T" else value]
        mapped.update(zip(ours, parts, strict=True))
    load_strictly(model, mapped, what)
    return model.eval()


def load_estimator(source: str | Path | Mapping[str, Any]) -> InteractionPredictor:
    """A published estimator on its own (the file that its pretraining saves), frozen.

    ValueError, in one line, for a file that is none, and lists what is missing, left over or of another shape.
    """
    state, what = _read_state(source)
    state = {name.removeprefix("banzhafteacher."): value.float() for name, value in state.items()}
    mapped = {
        _PREDICTOR.get(name, name): value for name, value in state.items() if not name.startswith("bn.")
    }
    if "rise.weight" not in mapped:
        raise ValueError(f"{what} is no published estimator: missing: cnn1.weight")
    estimator = InteractionPredictor(len(mapped["rise.weight"]))
    expected = {name: tuple(value.shape) for name, value in estimator.state_dict().items()}
    if problems := _differences(expected, {name: tuple(value.shape) for name, value in mapped.items()}):
        raise ValueError(f"{what} is no published estimator: {problems}")
    estimator.load_state_dict(mapped)
    return estimator.requires_grad_(False).eval()
