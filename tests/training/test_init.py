"""A run that begins from another model: its weights, its sizes, its tokenizer, kept in the run's own folder."""

import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from hbi.model.config import ModelConfig
from hbi.model.tokenizer import load_tokenizer, train_tokenizer
from hbi.model.weights import build_model, load_model, load_published, save_model
from hbi.pipelines.sample import ShardIndex
from hbi.training import run
from hbi.training.checkpoint import Checkpoints
from hbi.training.init import with_init
from hbi.training.job import INIT, has_init
from hbi.training.loop import Hooks, Training
from hbi.training.parallel import Process
from hbi.training.settings import TrainConfig
from hbi.training.tokenizers import tokenizer_of, with_tokenizer
from tests.model.test_published import LISTING, rescaled, state_of
from tests.support.training_shards import FRAMES, SIZE, make_shards, tiny_model, tiny_run

ROOT = Path(__file__).resolve().parents[2]


def begun(config: TrainConfig, index: ShardIndex, out: Path) -> Training:
    """The run as `train` sets it up, before its first step."""
    config = with_tokenizer(with_init(config, str(out), None), index, str(out))
    place = Process.current()
    checkpoints = Checkpoints(str(out / "checkpoints"), 1, "val/t2v/R@1", place)
    start = str(out / INIT) if has_init(config) else ""
    quiet = Hooks(log=lambda line: None)
    return Training(config, index, tokenizer_of(config, str(out)), checkpoints, quiet, start)


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A model folder of other depths than the run's, with a tokenizer of its own."""
    tokenizer = train_tokenizer(["a clip of a dog and a cat"] * 3, 280)
    wanted = tiny_model(temporal_layers=2)
    towers = replace(wanted.towers, vocab_size=len(tokenizer))
    save_model(build_model(replace(wanted, towers=towers)), tmp_path / "other", tokenizer)
    return tmp_path / "other"


def test_a_run_begins_with_the_weights_sizes_and_tokenizer_of_a_model_folder(other: Path, tmp_path: Path):
    index = make_shards(tmp_path / "shards", train=[9])
    base = tiny_run()
    config = replace(base, init_from=str(other), model=replace(base.model, checkpointing=True))
    words = load_tokenizer(other).get_vocab()
    weights = load_model(other)
    training = begun(config, index, tmp_path / "a")
    assert training.config.model.temporal_layers == 2 and training.config.model.checkpointing
    assert training.tokenizer.get_vocab() == words
    for name, value in weights.state_dict().items():
        assert torch.equal(training.model.state_dict()[name], value), name
    training.fit()
    moved = training.model.state_dict()["text_weights.entity.0.weight"]
    assert not torch.equal(moved, weights.state_dict()["text_weights.entity.0.weight"])

    shutil.rmtree(other)  # whatever became of it, the run goes on
    assert begun(config, index, tmp_path / "a").progress.step == training.progress.step > 0


def test_a_run_begins_with_a_published_checkpoint(other: Path, tmp_path: Path):
    shapes = rescaled(LISTING["shapes"], width=64, patch=SIZE // 2, grid=2, layers=(1, 1, 1), predictor=4)
    state = {name: torch.from_numpy(value) for name, value in state_of(shapes).items()}
    torch.save(state, tmp_path / "published.bin")
    index = make_shards(tmp_path / "shards", train=[9])
    config = replace(
        tiny_run(),
        init_from=str(tmp_path / "published.bin"),
        model=ModelConfig(backbone=str(other), words=12, frames=FRAMES),
    )
    training = begun(config, index, tmp_path / "a")
    published = load_published(state, words=12, frames=FRAMES)
    assert training.config.model == replace(published.config, masking="exact", freeze_patches=False)
    for name, value in published.state_dict().items():
        assert torch.equal(training.model.state_dict()[name], value), name

    with pytest.raises(ValueError, match=r"size 16, but the model takes 32"):
        shapes = rescaled(LISTING["shapes"], width=64, patch=16, grid=2, layers=(1, 1, 1), predictor=4)
        torch.save(
            {name: torch.from_numpy(v) for name, v in state_of(shapes).items()}, tmp_path / "published.bin"
        )
        begun(config, index, tmp_path / "b")


def test_what_is_no_model_is_said_in_one_line(tmp_path: Path):
    index = make_shards(tmp_path / "shards", train=[2])
    with pytest.raises(ValueError, match=r"^[^\n]*nowhere[^\n]*$"):
        begun(replace(tiny_run(), init_from=str(tmp_path / "nowhere")), index, tmp_path / "a")


def test_a_backbone_that_cannot_be_had_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    config = replace(tiny_run(), model=ModelConfig(backbone="somebody/some-clip"))
    with pytest.raises(
        ValueError, match=r"some-clip: not in the cache .*OFFLINE.*--set.model.backbone FOLDER"
    ):
        with_init(config, str(tmp_path), None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"http://127.0.0.1:9 does not give it \(.*refused.*FOLDER"):
        with_init(config, str(tmp_path), None)
    with pytest.raises(ValueError, match="no such folder, and no name of a model"):
        with_init(replace(config, model=ModelConfig(backbone="/no/folder")), str(tmp_path), None)
    assert not list(tmp_path.iterdir())


def test_a_run_that_cannot_begin_says_so_before_ray_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_shards(tmp_path / "shards", train=[2], val=[2])
    monkeypatch.setattr(run, "ray_running", lambda: pytest.fail("Ray starts"))
    config = replace(tiny_run(), model=ModelConfig(backbone="/no/folder"))
    with pytest.raises(ValueError, match="no such folder, and no name of a model"):
        run.train(config, str(tmp_path / "shards"), str(tmp_path / "out"), f"sqlite:///{tmp_path}/mlflow.db")
    assert not (tmp_path / "out").exists()


class Silent(BaseHTTPRequestHandler):
    """A hub that has the backbone, and then sends nothing."""

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.end_headers()

    def do_GET(self) -> None:
        threading.Event().wait(60)

    def log_message(self, *_: object) -> None:
        pass


def test_a_download_that_hangs_has_a_time_limit(tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Silent) as hub:
        hub.daemon_threads = True
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        code = (
            "import sys; from dataclasses import replace; from hbi.training import init\n"
            "from hbi.model.config import ModelConfig; from hbi.training.settings import TrainConfig\n"
            "init.FETCH_SECONDS = 2.0\n"
            "config = TrainConfig(model=ModelConfig(backbone='somebody/some-clip'))\n"
            "try: init.with_init(config, sys.argv[1], None)\n"
            "except ValueError as error: print(error)"
        )
        hub_of = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_OFFLINE": "0"}
        environment = os.environ | hub_of | {"HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
        said = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "out")], env=environment, capture_output=True,
            text=True, timeout=60, check=True,
        )  # fmt: skip
        hub.shutdown()
    assert "some-clip: not there after 0 minutes: run again" in said.stdout and said.stdout.count("\n") == 1


def test_a_backbone_is_fetched_once_with_its_sizes_and_tokenizer(other: Path, tmp_path: Path) -> None:
    """A folder of CLIP's own format; the weights are those that every worker would have made of it."""
    from transformers import CLIPModel

    from hbi.model.backbones.clip import clip_config
    from hbi.model.hbi import HBI

    wanted = tiny_model()
    backbone = tmp_path / "clip"
    CLIPModel(clip_config(replace(wanted.towers, vocab_size=290))).save_pretrained(backbone)
    load_tokenizer(other).save_pretrained(backbone)
    index = make_shards(tmp_path / "shards", train=[9])
    config = replace(tiny_run(), model=replace(wanted, backbone=str(backbone)))
    training = begun(config, index, tmp_path / "a")
    assert training.config.model.towers.vocab_size == 290
    torch.manual_seed(config.seed)
    expected: HBI = build_model(config.model)
    for name, value in expected.state_dict().items():
        assert torch.equal(training.model.state_dict()[name], value), name
    shutil.rmtree(backbone)
    begun(config, index, tmp_path / "a")
    with pytest.raises(ValueError, match="other sizes"):
        begun(replace(config, model=replace(config.model, words=8)), index, tmp_path / "a")
