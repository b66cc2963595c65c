"""Evaluation over shards: against one loop over texts, in one process and in two."""

import io
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from hbi.infra.mlflow import registry
from hbi.infra.mlflow import store as stores
from hbi.infra.mlflow.tracker import png
from hbi.model.config import ReconstructionConfig
from hbi.model.hbi import HBI
from hbi.model.levels import LEVELS
from hbi.model.metrics import retrieval_metrics
from hbi.model.tokenizer import tokenize, train_tokenizer
from hbi.model.tokens import Tokens
from hbi.model.weights import load_model, save_model
from hbi.pipelines.sample import Sample, ShardIndex, read_shard
from hbi.serving.package import PACKAGE
from hbi.training.evaluate.encode import SplitEncoder
from hbi.training.evaluate.figures import recall_figure, similarity_figure
from hbi.training.evaluate.retrieval import EvalResult, evaluate, evaluate_named
from hbi.training.evaluate.table import table
from hbi.training.init import ModelSource
from hbi.training.parallel import Process
from hbi.training.settings import EvalProtocol
from tests.model.test_published import LISTING, rescaled, state_of
from tests.support.mlflow_store import fresh_store
from tests.support.ranks import start_ranks
from tests.support.s3 import object_storage
from tests.support.training_shards import make_shards, sample, tiny_model, write_shard


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards (the second test shard with odd clips) and a model folder, `shards` and `model`."""
    folder = tmp_path_factory.mktemp("evaluate")
    make_shards(folder / "shards", train=[6], test=[5, 4, 3], val=[4])
    odd = [
        sample(101, captions=[]),  # no caption
        sample(102, captions=["", "only one that counts"]),
        sample(103, frames=2, captions=["two frames only", "short", "a short clip of two frames"]),
        sample(104),
    ]
    write_shard(folder / "shards" / "test-000001.tar", odd)
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["red green blue grey brighter darker clip turns it is gets"], 300)
    save_model(HBI(tiny_model()), folder / "model", tokenizer)
    return folder


@pytest.fixture
def model(folder: Path) -> HBI:
    return load_model(folder / "model")


@pytest.fixture
def tokenizer(folder: Path) -> Any:
    from hbi.model.tokenizer import load_tokenizer

    return load_tokenizer(folder / "model")


def all_samples(folder: Path, split: str) -> Iterator[Sample]:
    for tar in sorted(folder.glob(f"{split}-*.tar")):
        yield from read_shard(io.BytesIO(tar.read_bytes()))


def measured(
    model: HBI, tokenizer: Any, shards: str | ShardIndex, split: str, protocol: EvalProtocol | None = None
) -> EvalResult:
    index = shards if isinstance(shards, ShardIndex) else ShardIndex.read(shards)
    encoder = SplitEncoder(model, tokenizer, index, Process.current(), protocol or EvalProtocol())
    return evaluate(encoder, split)


@torch.no_grad()
def by_hand(
    model: HBI, tokenizer: Any, samples: list[Sample], paragraph: bool = False, level: str = "entity"
) -> tuple[torch.Tensor, list[int]]:
    """One text at a time, through the model's front door."""
    owners, texts, videos = [], [], []
    for clip in samples:
        written = [caption for caption in clip.captions if caption]
        if not written:
            continue
        written = [" ".join(written)] if paragraph else written
        owners += [len(videos)] * len(written)
        texts += [tokenize(tokenizer, [text], model.config.words) for text in written]
        frames = torch.from_numpy(clip.images())
        video = torch.zeros(1, model.config.frames, *frames.shape[1:], dtype=torch.uint8)
        video[0, : len(frames)] = frames
        mask = torch.zeros(1, model.config.frames, dtype=torch.bool)
        mask[0, : len(frames)] = True
        videos.append((video, mask))
    stacked = [torch.cat(same) for same in zip(*videos, strict=True)]
    scores = torch.cat([model.similarities(*text, *stacked)[level] for text in texts])
    return scores, owners


@pytest.mark.parametrize("paragraph", [False, True])
def test_every_clip_against_every_caption(folder: Path, model: HBI, tokenizer: Any, paragraph: bool) -> None:
    protocol = EvalProtocol(paragraph=paragraph, batch=3)
    model.train()
    found = measured(model, tokenizer, str(folder / "shards"), "test", protocol)
    assert model.training
    expected, owners = by_hand(
        model.eval(), tokenizer, list(all_samples(folder / "shards", "test")), paragraph
    )
    assert found.similarity is not None
    torch.testing.assert_close(found.similarity, expected, rtol=1e-4, atol=1e-5)
    assert found.video_of_text.tolist() == owners
    for name, value in retrieval_metrics(found.similarity, owners).items():
        assert found.metrics[f"test/{name}"] == value
    counts = {name: found.metrics[f"test/{name}"] for name in ("texts", "videos", "uncaptioned", "unread")}
    assert counts == {"texts": len(owners), "videos": 11, "uncaptioned": 1, "unread": 0}
    assert found.ids[:6] == [*(f"clip-{n}" for n in range(6, 11)), "clip-102"]


def test_rates_mix_the_levels(folder: Path, model: HBI, tokenizer: Any) -> None:
    samples = list(all_samples(folder / "shards", "val"))
    protocol = EvalProtocol(level_weights=(0.5, 0.3, 0.2))
    found = measured(model, tokenizer, str(folder / "shards"), "val", protocol)
    levels = [by_hand(model, tokenizer, samples, level=level)[0] for level in LEVELS]
    expected = sum(weight * scores for weight, scores in zip(protocol.level_weights, levels, strict=True))
    assert found.similarity is not None
    torch.testing.assert_close(found.similarity, expected, rtol=1e-4, atol=1e-5)


def test_corrections_are_named(folder: Path, model: HBI, tokenizer: Any) -> None:
    protocol = EvalProtocol(dsl=True, qbnorm=4)
    found = measured(model, tokenizer, str(folder / "shards"), "test", protocol).metrics
    plain = measured(model, tokenizer, str(folder / "shards"), "test").metrics
    for way in ("t2v", "v2t"):
        for kind in ("", "+dsl", "+qbnorm"):
            assert 0 <= found[f"test/{way}{kind}/R@1"] <= 100
    assert found.items() >= plain.items()
    assert not any("+" in name for name in plain)
    shown = table(found, "test")
    assert "test: 11 clips, 22 texts" in shown and "v2t+qbnorm" in shown and "1 clips were left out" in shown


def test_reranking_orders_the_best_by_rebuilt_pairs(folder: Path, model: HBI, tokenizer: Any) -> None:
    torch.manual_seed(0)
    rebuilding = HBI(replace(model.config, reconstruction=ReconstructionConfig("similarity"))).eval()
    rebuilding.load_state_dict(model.state_dict())
    protocol = EvalProtocol(rerank=3)
    encoder = SplitEncoder(
        rebuilding,
        tokenizer,
        ShardIndex.read(str(folder / "shards")),
        Process.current(torch.device("cpu")),
        protocol,
    )
    found = evaluate(encoder, "test")
    clips, scores = encoder.encode("test"), found.similarity
    assert scores is not None
    hits = 0
    for row, owner in enumerate(clips.video_of_text.tolist()):
        best = scores[row].argsort(descending=True)[:3].tolist()
        words = Tokens(*(part[row : row + 1] for part in clips.text["entity"]))
        again = [
            rebuilding.rerank(words, Tokens(*(part[c : c + 1] for part in clips.video["entity"]))).item()
            for c in best
        ]
        hits += best[int(np.argmax(again))] == owner
    assert found.metrics["test/t2v+rerank/R@1"] == pytest.approx(100 * hits / len(scores))
    assert found.metrics["test/t2v+rerank/R@50"] == 100.0
    assert not any("v2t+rerank" in name for name in found.metrics)
    with pytest.raises(ValueError, match="reconstructs nothing to rerank by"):
        measured(model, tokenizer, str(folder / "shards"), "test", protocol)


def rank_work(rank: int, world: int, folder: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    from hbi.model.tokenizer import load_tokenizer

    model, tokenizer = load_model(f"{folder}/model"), load_tokenizer(f"{folder}/model")
    results = {}
    for split in ("test", "val", "few"):  # `few` has fewer clips than ranks
        protocol = EvalProtocol(batch=2, dsl=True, qbnorm=2)
        found = measured(model, tokenizer, f"{folder}/shards", split, protocol)
        assert (found.similarity is not None) == (rank == 0)
        scores = {} if found.similarity is None else {"similarity": found.similarity}
        results[split] = {"metrics": found.metrics, "ids": found.ids, "of": found.video_of_text, **scores}
    torch.save(results, f"{folder}/rank-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks_find_what_one_finds(folder: Path, tmp_path: Path, model: HBI, tokenizer: Any) -> None:
    (tmp_path / "model").symlink_to(folder / "model")
    make_shards(tmp_path / "shards", train=[4], test=[5, 2], val=[3], few=[1])
    start_ranks(rank_work, (2, str(tmp_path)), 2)
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]
    for split in ("test", "val", "few"):
        protocol = EvalProtocol(dsl=True, qbnorm=2)
        alone = measured(model, tokenizer, str(tmp_path / "shards"), split, protocol)
        assert alone.similarity is not None
        torch.testing.assert_close(ranks[0][split]["similarity"], alone.similarity, rtol=1e-4, atol=1e-5)
        for rank in ranks:
            assert rank[split]["ids"] == alone.ids
            assert rank[split]["of"].tolist() == alone.video_of_text.tolist()
            assert rank[split]["metrics"] == ranks[0][split]["metrics"]
        assert ranks[0][split]["metrics"].keys() == alone.metrics.keys()


def test_what_cannot_be_read_is_counted_or_refused(tmp_path: Path, model: HBI, tokenizer: Any) -> None:
    index = make_shards(tmp_path, val=[4, 3, 2])
    whole = (tmp_path / "val-000001.tar").read_bytes()
    (tmp_path / "val-000001.tar").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "val-000002.tar").unlink()
    found = measured(model, tokenizer, index, "val").metrics
    assert found["val/unread"] + found["val/videos"] == 9 and 3 <= found["val/unread"] <= 5
    with pytest.raises(ValueError, match=r"clips of val cannot be read \(val-000001\.tar"):
        evaluate(SplitEncoder(model, tokenizer, index, Process.current()), "val", strict=True)


def test_a_broken_picture_and_too_many_frames(tmp_path: Path, model: HBI, tokenizer: Any) -> None:
    index = make_shards(tmp_path, val=[4])
    broken = replace(sample(1), frames=[b"no picture"] * 4)
    cut = replace(sample(3), frames=sample(3).frames[:2])  # what a tar cut between two pictures leaves
    write_shard(tmp_path / "val-000000.tar", [sample(0), broken, sample(2, frames=6), cut])
    found = measured(model, tokenizer, index, "val").metrics
    assert found["val/videos"] == 1 and found["val/unread"] == 3


def test_refusals(tmp_path: Path, folder: Path, model: HBI, tokenizer: Any) -> None:
    index = make_shards(tmp_path / "bare", val=[1])
    write_shard(tmp_path / "bare" / "val-000000.tar", [sample(0, captions=[" "])])
    with pytest.raises(ValueError, match="no clip of split 'val' has a caption"):
        measured(model, tokenizer, index, "val")
    with pytest.raises(ValueError, match="no samples in split 'test'"):
        measured(model, tokenizer, index, "test")
    with pytest.raises(ValueError, match="made with frames 3"):
        measured(model, tokenizer, make_shards(tmp_path / "three", frames=3, val=[1]), "val")
    for wrong in ({"level_weights": (0.0, 0.0, 0.0)}, {"batch": 0}, {"qbnorm": -1}, {"rerank": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            EvalProtocol(**wrong)


def test_the_command_takes_a_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluate_named(ModelSource(str(folder / "model")), str(folder / "shards"), "val", device="cpu")
    assert found["val/videos"] == 4 and 0 <= found["val/t2v/R@1"] <= 100
    with pytest.raises(ValueError, match="not a model folder"):
        evaluate_named(ModelSource(str(folder)), str(folder / "shards"), "val")
    with pytest.raises(ValueError, match="not a shard folder"):
        evaluate_named(ModelSource(str(folder / "model")), str(folder), "val")
    assert "Traceback" not in capsys.readouterr().err


def test_the_command_takes_a_published_checkpoint(folder: Path, tmp_path: Path) -> None:
    sizes = rescaled(LISTING["shapes"], width=32, patch=8, grid=2, layers=(1, 1, 1), predictor=4)
    state = {name: torch.from_numpy(value) for name, value in state_of(sizes).items()}
    torch.save(state, tmp_path / "published.bin")
    command = partial(evaluate_named, shards=str(folder / "shards"), split="val", device="cpu")
    published = ModelSource(str(tmp_path / "published.bin"), tokenizer=str(folder / "model"), words=12)
    found = command(published)
    assert found["val/videos"] == 4 and found["val/unread"] == 0
    with pytest.raises(
        ValueError, match=r"name a folder with CLIP's tokenizer\.json \(hbi evaluate --tokenizer"
    ):
        command(replace(published, tokenizer=None))
    (tmp_path / "other.bin").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match=r"other\.bin cannot be read"):
        evaluate_named(ModelSource(str(tmp_path / "other.bin")), str(folder / "shards"), "val")


def test_the_command_takes_a_registered_model_and_s3(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = fresh_store(tmp_path / "store")
    run = stores.client(uri).create_run(stores.experiment_id(uri, "exp")).info.run_id
    registry.log_and_register(folder / "model", run, uri, PACKAGE, registry.NewVersion(alias="champion"))
    plain = evaluate_named(ModelSource(str(folder / "model")), str(folder / "shards"), "val", device="cpu")
    assert (
        evaluate_named(ModelSource("models:/hbi@champion", uri), str(folder / "shards"), "val", device="cpu")
        == plain
    )
    monkeypatch.setenv("HBI_CACHE", str(tmp_path / "cache"))
    with object_storage(tmp_path / "s3") as remote:
        for name, value in remote.environment().items():
            monkeypatch.setenv(name, value)
        for room in ("model", "shards"):
            for file in (folder / room).iterdir():
                remote.put(f"{room}/{file.name}", file.read_bytes())
        for _ in range(2):  # fetched, then from the cache
            assert (
                evaluate_named(ModelSource(remote.uri("model")), remote.uri("shards"), "val", device="cpu")
                == plain
            )
        weights = [
            request
            for request in remote.requests
            if request[0] == "GET" and "model.safetensors" in request[1]
        ]
        assert len(weights) == 1


def test_pictures(folder: Path, model: HBI, tokenizer: Any) -> None:
    found = measured(model, tokenizer, ShardIndex.read(str(folder / "shards")), "test")
    for figure in (similarity_figure(found, "test"), recall_figure(found, "test")):
        assert png(figure).startswith(b"\x89PNG\r\n")
