"""The index of shards, as the commands make it and search it."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from hbi.commands.search import BuildIndex, Search
from hbi.model.frames import from_jpegs
from hbi.model.weights import load_model
from hbi.pipelines.decoding.decoder import Decoder
from hbi.pipelines.sharding.settings import ShardSettings
from hbi.serving.encode import encode_video
from hbi.serving.engine import Engine
from hbi.serving.front import model_of, store_of
from hbi.serving.index.build import show
from hbi.serving.index.table import ClipTable
from hbi.serving.questions import Page
from hbi.serving.settings import IndexSettings
from tests.serving.conftest import CLIPS, make_model
from tests.support.clips import video

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
TEXT = "the red square moves left"


def test_the_index_holds_every_clip_with_its_times_and_captions(chain: Path) -> None:
    snapshot = ClipTable.open(str(chain / "index")).snapshot()
    clips = snapshot.clips(list(snapshot.all_rows()))
    rows = [json.loads(line) for line in (chain / "corpus" / "manifest.jsonl").read_text().splitlines()]
    assert {clip.id: clip.captions for clip in clips} == {row["id"]: row["captions"] for row in rows}
    assert all(len(clip.timestamps) == 4 and clip.start == 0.0 < clip.end for clip in clips)
    assert all(len(snapshot.thumbnails(clip.id)) == 4 for clip in clips[:3])
    assert f"clips     {CLIPS} (" in show(str(chain / "index"))


def test_an_index_that_broke_off_does_only_what_is_missing(chain: Path, tmp_path: Path) -> None:
    index = str(shutil.copytree(chain / "index", tmp_path / "index"))
    table = ClipTable.open(index)
    gone = next(iter(sorted(table.parts())))
    lost = [c.id for c in table.snapshot().clips(list(table.snapshot().all_rows())) if c.part == gone]
    table.remove(lost)
    about = json.loads((tmp_path / "index" / "index.json").read_text())
    (tmp_path / "index" / "index.json").write_text(json.dumps(about | {"complete": False}))
    kept = {id: row for id, *_ in table.snapshot().ids() for row in [table.snapshot().row(id)]}
    BuildIndex(str(chain / "model"), str(chain / "shards"), index).run()
    again = ClipTable.open(index).snapshot()
    assert again.rows == CLIPS
    assert all(again.row(id) == row for id, row in kept.items()), "what was there was made again"
    version = again.version
    BuildIndex(str(chain / "model"), str(chain / "shards"), index).run()
    assert ClipTable.open(index).snapshot().version == version


def test_other_shards_need_add_and_their_ids_stay_apart(chain: Path, tmp_path: Path) -> None:
    from hbi.commands.corpora import Shard

    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "clip-000000.mp4").write_bytes(video(3))
    (tmp_path / "manifest.jsonl").write_text(json.dumps({"video": "more/clip-000000.mp4"}))  # its id is taken
    Shard(str(tmp_path / "manifest.jsonl"), str(tmp_path / "shards"), ShardSettings(frames=4, size=32)).run()
    index = str(shutil.copytree(chain / "index", tmp_path / "index"))
    with pytest.raises(ValueError, match="already the index of other shards: --add merges these into it"):
        BuildIndex(str(chain / "model"), str(tmp_path / "shards"), index).run()
    BuildIndex(str(chain / "model"), str(tmp_path / "shards"), index, IndexSettings(add=True)).run()
    snapshot = ClipTable.open(index).snapshot()
    assert snapshot.rows == CLIPS + 1
    assert snapshot.clip("clip-000000#2").video.endswith("more/clip-000000.mp4")
    assert snapshot.clip("clip-000000").video.endswith("corpus/videos/clip-000000.mp4")


def test_another_model_is_refused_to_index_and_to_answer(chain: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", 1)
    with pytest.raises(ValueError, match="made by another model"):
        BuildIndex(other, str(chain / "shards"), str(chain / "index")).run()
    with pytest.raises(ValueError, match=r"not the model that made .*leave MODEL out to use the index's own"):
        model_of(str(chain / "index"), other)
    same = str(shutil.copytree(chain / "model", tmp_path / "same"))
    assert model_of(str(chain / "index"), same).folder == same


def test_a_store_that_is_gone_is_said_and_not_made(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    gone = f"sqlite:///{tmp_path}/gone/mlflow.db"
    with pytest.raises(ValueError, match="no such MLflow store: say where it is with --tracking"):
        store_of(None, gone)
    assert not (tmp_path / "gone").exists()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert store_of(None, gone) == "http://127.0.0.1:5000"
    assert store_of("http://127.0.0.1:5001", gone) == "http://127.0.0.1:5001"


def test_shards_of_another_size_are_refused(chain: Path, tmp_path: Path) -> None:
    from hbi.commands.corpora import Shard

    Shard(
        str(chain / "corpus" / "manifest.jsonl"), str(tmp_path / "shards"), ShardSettings(frames=4, size=48)
    ).run()
    with pytest.raises(ValueError, match=r"size 48, but the model takes 32"):
        BuildIndex(str(chain / "model"), str(tmp_path / "shards"), str(tmp_path / "index")).run()
    assert not (tmp_path / "index").exists()


def test_a_served_video_has_the_tokens_of_a_sharded_one(chain: Path) -> None:
    table = ClipTable.open(str(chain / "index"))
    snapshot = table.snapshot()
    model = load_model(str(chain / "model")).eval()
    with Decoder.of_settings(table.metadata.shards) as decoder:
        for clip in snapshot.clips(list(snapshot.all_rows())[:4]):
            decoded = decoder.decode(Path(clip.video).read_bytes())
            tokens, _ = encode_video(model, from_jpegs(decoded.jpegs)[None])
            _, kept, _ = snapshot.tokens([snapshot.row(clip.id)])
            assert decoded.timestamps == clip.timestamps
            # Batches of another size round differently in the last bit of float16.
            torch.testing.assert_close(tokens.tokens[0], torch.from_numpy(kept[0].copy()), atol=1e-3, rtol=0)


def test_the_command_line_finds_what_the_engine_finds(
    chain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Search(str(chain / "index"), TEXT, 3).run()
    engine = Engine(str(chain / "model"), "", str(chain / "index"))
    expected = [found["id"] for found in engine.find(engine.encode([TEXT])[0], Page(3))["results"]]
    assert [line.split()[2] for line in capsys.readouterr().out.splitlines()] == expected
    with pytest.raises(ValueError, match="the sentence: is empty"):
        Search(str(chain / "index"), "  \n").run()
