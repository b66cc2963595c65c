"""From shards to answers over HTTP: the index of a model, the served endpoints, and one way of reading a video."""

import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hbi.commands.corpora import Corpus, Shard
from hbi.commands.search import BuildIndex
from hbi.model.config import ModelConfig, TowerConfig
from hbi.model.frames import from_jpegs
from hbi.model.tokenizer import load_tokenizer, train_tokenizer
from hbi.model.weights import build_model, load_model, save_model
from hbi.pipelines.decoding.decoder import Decoder
from hbi.pipelines.sample import ShardIndex
from hbi.serving.index.build import index_shards
from hbi.serving.index.table import Maker, TokenIndex, encode_query, encode_video

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


def ask(address: str, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        address + path, data, {"Content-Type": "application/json"}, method=method
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            content = answer.read()
            status = answer.status
    except urllib.error.HTTPError as error:
        with error:
            content, status = error.read(), error.code
    return status, json.loads(content) if content[:1] in b'{["' else content.decode()


@pytest.fixture(scope="module")
def chain(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made corpus, its shards, a model with random weights, and the index of the one by the other."""
    folder = tmp_path_factory.mktemp("chain")
    Corpus(str(folder / "corpus"), clips=16).run()
    Shard(str(folder / "corpus" / "manifest.jsonl"), str(folder / "shards"), frames=4, size=32).run()
    towers = TowerConfig(
        image_size=32, patch_size=16, vision_width=32, vision_layers=1, vision_heads=2,
        text_width=32, text_layers=1, text_heads=2, vocab_size=300, context=32, dim=32,
    )  # fmt: skip
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["the red square moves left then the blue star grows"] * 4, 300)
    model = build_model(ModelConfig(towers=towers, words=20, frames=4, temporal_layers=1))
    save_model(model, str(folder / "model"), tokenizer)
    maker = Maker(str(folder / "model"), "", ShardIndex.read(str(folder / "shards")).settings)
    *_, last = index_shards(str(folder / "model"), maker, str(folder / "shards"), str(folder / "index"))
    assert last == (16, 16)
    return folder


@pytest.fixture(scope="module")
def address(chain: Path) -> Iterator[str]:
    from hbi.serving import app as serve

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    yield serve.start(str(chain / "model"), str(chain / "index"), port=port)
    serve.stop()


def test_the_index_holds_every_clip_with_its_times(chain: Path) -> None:
    index = TokenIndex.open(str(chain / "index"))
    assert sorted(v.id for v in index.videos) == [f"clip-{i:06d}" for i in range(16)]
    assert all(len(v.timestamps) == 4 and v.start == 0.0 < v.end for v in index.videos)


def test_shards_of_another_size_are_refused(chain: Path, tmp_path: Path) -> None:
    Shard(str(chain / "corpus" / "manifest.jsonl"), str(tmp_path / "shards"), frames=4, size=48).run()
    with pytest.raises(
        ValueError, match=r"size 48, but the model takes 32: .*hbi shard --frames 4 --size 32"
    ):
        BuildIndex(str(chain / "model"), str(tmp_path / "shards"), str(tmp_path / "index")).run()
    assert not (tmp_path / "index").exists()


def test_a_served_video_has_the_tokens_of_a_sharded_one(chain: Path) -> None:
    index = TokenIndex.open(str(chain / "index"))
    model = load_model(str(chain / "model")).eval()
    with Decoder.of_settings(index.maker.shards) as decoder:
        for i, video in enumerate(index.videos[:4]):
            clip = decoder.decode(Path(video.video).read_bytes())
            served = encode_video(model, from_jpegs(clip.jpegs)[None])
            assert clip.timestamps == video.timestamps
            # Batches of another size round differently in the last bit of float16.
            torch.testing.assert_close(served.tokens[0], index.tokens.tokens[i], atol=1e-3, rtol=0)


def test_search_over_http_is_the_search_of_the_index(chain: Path, address: str) -> None:
    text = "the red square moves left"
    status, answer = ask(address, "POST", "/search", {"text": text, "k": 5})
    index = TokenIndex.open(str(chain / "index"))
    query, _ = encode_query(
        load_model(str(chain / "model")).eval(), load_tokenizer(str(chain / "model")), text
    )
    assert status == 200
    assert [r["id"] for r in answer["results"]] == [v.id for _, v in index.search(query, 5)]
    assert set(answer["results"][0]) == {"id", "score", "video", "start", "end"}


def test_explain_health_and_page(address: str) -> None:
    status, why = ask(address, "POST", "/explain", {"text": "the red square", "id": "clip-000003"})
    assert status == 200
    assert len(why["interaction"]) == len(why["words"])
    assert {len(row) for row in why["interaction"]} == {len(why["times"])} == {4}
    assert ask(address, "GET", "/health")[1]["videos"] == 16
    status, page = ask(address, "GET", "/")
    assert status == 200
    assert "<title>" in page


def test_videos_are_added_found_and_removed(chain: Path, address: str) -> None:
    video = str(chain / "corpus" / "videos" / "clip-000000.mp4")
    assert ask(address, "POST", "/videos", {"video": video, "id": "a new/one"})[0] == 201
    _, answer = ask(address, "POST", "/search", {"text": "red", "k": 17})
    scores = {r["id"]: r["score"] for r in answer["results"]}
    assert scores["a new/one"] == pytest.approx(scores["clip-000000"], abs=1e-3)
    assert ask(address, "DELETE", "/videos/a%20new/one")[0] == 200
    assert ask(address, "DELETE", "/videos/a%20new/one")[0] == 404
    assert ask(address, "GET", "/health")[1]["videos"] == 16


def test_bad_requests_are_told_why(chain: Path, address: str) -> None:
    assert ask(address, "POST", "/search", {"text": "", "k": 5})[0] == 422
    assert ask(address, "POST", "/search", {"text": "x", "k": 0})[0] == 422
    assert ask(address, "POST", "/explain", {"text": "x", "id": "nobody"}) == (
        404,
        {"detail": "no video 'nobody' in the index"},
    )
    status, answer = ask(address, "POST", "/videos", {"video": str(chain / "corpus" / "manifest.jsonl")})
    assert status == 422
    assert "manifest.jsonl" in answer["detail"]
