"""The registry: in, out, by whatever name; and what someone who has nothing but MLflow can do with a version."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hbi.infra.cache import cached
from hbi.infra.mlflow import registry
from hbi.infra.mlflow import store as stores
from hbi.infra.mlflow.registry import NewVersion, log_and_register, promote
from hbi.infra.mlflow.resolve import pin_model, resolve_model
from hbi.infra.mlflow.runs import fit, runs_table
from hbi.infra.mlflow.store import tracking_uri
from hbi.model.hbi import HBI
from hbi.model.tokenizer import load_tokenizer, tokenize, train_tokenizer
from hbi.model.weights import load_model, save_model
from hbi.serving.package import PACKAGE
from tests.support.mlflow_server import Server
from tests.support.mlflow_store import fresh_store
from tests.support.training_shards import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    torch.manual_seed(0)
    save_model(HBI(tiny_model()), folder, train_tokenizer(["a red square moves left"], 300))
    return folder


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> tuple[str, list[str]]:
    """A store with two runs, each with a registered version; the first is champion."""
    uri = fresh_store(tmp_path_factory.mktemp("filled"))
    store = stores.client(uri)
    runs = []
    for number, (lr, recall) in enumerate(((1e-4, 20.0), (1e-3, 30.5))):
        run = store.create_run(stores.experiment_id(uri, "exp"), run_name=f"run-{number}").info.run_id
        store.log_metric(run, stores.mlflow_name("val/t2v/R@1"), recall)
        store.log_metric(run, stores.mlflow_name("final/val/t2v/R@1"), recall, step=7)
        store.log_param(run, "optim.lr", lr)
        store.log_param(run, "optim.epochs", 5)
        metrics, tags = {"val/t2v/R@1": recall}, {"commit": f"abc{number}", "data_sha256": "d1"}
        new = NewVersion(metrics=metrics, tags=tags, alias="" if number else "champion")
        version = log_and_register(model_folder, run, uri, PACKAGE, new)
        assert version == str(number + 1)
        store.set_terminated(run)
        runs.append(run)
    return uri, runs


def test_a_version_holds_an_example_that_it_takes(
    filled: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    version = stores.client(filled[0]).get_model_version("hbi", "1")
    # MLflow leaves a loaded package's code first on the path: processes started later would find it, and not the whole.
    monkeypatch.setattr(sys, "path", list(sys.path))
    model = mlflow.pyfunc.load_model(str(version.source))
    assert model.input_example is not None
    assert model.input_example.to_dict("list") == {"text": ["a red square moves left"]}
    assert len(model.predict(model.input_example)) == 1


def test_a_new_store_keeps_everything_beside_itself(tmp_path: Path) -> None:
    """The experiment too that MLflow makes with every store."""
    found = stores.client(tracking_uri(str(tmp_path))).search_experiments()
    assert {experiment.name: experiment.artifact_location for experiment in found} == {
        "Default": (tmp_path / "artifacts" / "0").as_uri()
    }


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """A clip of ten frames that get brighter."""
    import av

    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for level in range(10):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 20 * level, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


# ------------------------------------------------------------------------------------------------- where


def test_where_the_store_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri() == f"sqlite:///{tmp_path}/runs/mlflow.db" and (tmp_path / "runs").is_dir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert tracking_uri() == "http://host:5000"
    assert tracking_uri("sqlite:///here/x.db") == f"sqlite:///{tmp_path}/here/x.db"
    assert tracking_uri("else/where") == f"sqlite:///{tmp_path}/else/where/mlflow.db"


def test_artifacts_lie_beside_the_store(tmp_path: Path) -> None:
    uri = fresh_store(tmp_path / "store")
    store = stores.client(uri)
    first = stores.experiment_id(uri, "a/b c")
    assert stores.experiment_id(uri, "a/b c") == first
    assert (
        store.get_experiment(first).artifact_location == (tmp_path / "store" / "artifacts" / "a_b_c").as_uri()
    )
    store.delete_experiment(first)
    with pytest.raises(ValueError, match=r"experiment 'a/b c' .* is deleted"):
        stores.experiment_id(uri, "a/b c")


def test_names_that_mlflow_takes() -> None:
    assert stores.mlflow_name("val/t2v+dsl/R@1") == "val/t2v-dsl/R1"
    assert stores.mlflow_name("loss (l1)") == "loss _l1_"


# ----------------------------------------------------------------------------------------- in and out


def test_a_version_has_metrics_and_lineage(filled: tuple[str, list[str]]) -> None:
    uri, runs = filled
    version = stores.client(uri).get_model_version_by_alias("hbi", "champion")
    assert "Scores: val/t2v/R1 20.0." in version.description and runs[0][:8] in version.description
    found = stores.client(uri).search_logged_models([stores.experiment_id(uri, "exp")])
    (logged,) = [model for model in found if model.source_run_id == runs[0]]
    assert {metric.key: metric.value for metric in logged.metrics} == {"final/val/t2v/R1": 20.0}
    run = stores.client(uri).get_run(runs[0])
    assert [output.model_id for output in run.outputs.model_outputs] == [logged.model_id]
    (point,) = stores.client(uri).get_metric_history(
        runs[0], "final/val/t2v/R1"
    )  # that of the run, not one more
    assert (point.step, logged.metrics[0].step) == (7, 7)
    assert version.run_id == runs[0] and version.tags == {
        "val/t2v/R1": "20",
        "commit": "abc0",
        "data_sha256": "d1",
        "run_id": runs[0],
    }


@pytest.mark.parametrize("name", ["models:/hbi@champion", "models:/hbi/2"])
def test_a_name_becomes_a_folder(filled: tuple[str, list[str]], model_folder: Path, name: str) -> None:
    folder = Path(resolve_model(name, filled[0]))
    assert folder != model_folder
    weights = load_model(model_folder).state_dict()
    for key, value in load_model(folder).state_dict().items():
        assert torch.equal(value, weights[key])
    load_tokenizer(folder)


def test_pinning(filled: tuple[str, list[str]], model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pin_model("models:/hbi@champion", filled[0]) == "models:/hbi/1"
    assert pin_model("models:/hbi/2", filled[0]) == "models:/hbi/2"
    monkeypatch.chdir(model_folder.parent)
    assert pin_model("model") == str(model_folder)
    assert resolve_model("model") == str(model_folder)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("models:/none@champion", "not registered in .*; it has hbi"),
        ("models:/hbi@best", r"hbi has versions 1, 2 and aliases @champion \(1\)"),
        ("models:/hbi/9", r"hbi has versions 1, 2"),
        ("models:/hbi", "write models:/name@alias or models:/name/3"),
        ("/no/such/folder", "not a model folder"),
    ],
)
def test_what_is_not_there_is_named(filled: tuple[str, list[str]], name: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as refusal:
        resolve_model(name, filled[0])
    assert name in str(refusal.value) and "\n" not in str(refusal.value)


def test_an_empty_store_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing is registered there"):
        resolve_model("models:/hbi@champion", fresh_store(tmp_path))


def test_half_a_model_is_not_registered(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = fresh_store(tmp_path)
    run = stores.client(uri).create_run(stores.experiment_id(uri, "exp")).info.run_id
    with pytest.raises(ValueError, match=r"not a model folder \(no config\.json, no model\.safetensors\)"):
        log_and_register(tmp_path, run, uri, PACKAGE)

    def full_disk(*args: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(registry, "_save_package", full_disk)
    with pytest.raises(OSError, match="No space"):
        log_and_register(model_folder, run, uri, PACKAGE, NewVersion(alias="champion"))
    assert not stores.client(uri).search_registered_models()


def test_a_remote_package_is_fetched_once(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HBI_CACHE", str(tmp_path / "cache"))
    fetched = []

    def fetch(folder: Path) -> None:
        fetched.append(folder)
        (folder / "file").write_text("content")

    first, second = cached("key", fetch), cached("key", fetch)
    assert first == second and (first / "file").read_text() == "content" and len(fetched) == 1

    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise ConnectionError("cut")

    with pytest.raises(ConnectionError):
        cached("other", fail)
    kept = [path.name for path in (tmp_path / "cache" / "models").iterdir() if path.suffix != ".lock"]
    assert kept == [first.name]


def test_a_version_of_a_server_over_http(
    mlflow_server: Server, tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its artifacts are proxied: they go and come through the server. The alias is registered, pinned and fetched."""
    monkeypatch.setenv("HBI_CACHE", str(tmp_path / "cache"))
    uri = mlflow_server.uri
    run = stores.client(uri).create_run(stores.experiment_id(uri, "over-http")).info.run_id
    version = log_and_register(
        model_folder, run, uri, PACKAGE, NewVersion(name="over-http", alias="champion")
    )
    assert list(mlflow_server.artifacts.rglob("model.safetensors"))
    name = "models:/over-http@champion"
    assert pin_model(name, uri) == f"models:/over-http/{version}"
    folder = Path(resolve_model(name, uri))
    assert folder.is_relative_to(tmp_path / "cache")
    weights = load_model(model_folder).state_dict()
    loaded = load_model(folder).state_dict()
    assert loaded.keys() == weights.keys() and all(torch.equal(loaded[key], weights[key]) for key in weights)
    load_tokenizer(folder)
    before = sorted(path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*"))
    assert Path(resolve_model(f"models:/over-http/{version}", uri)) == folder
    assert sorted(path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")) == before


# --------------------------------------------------------------------------------------------- elsewhere

ALONE = """
import json, sys
import mlflow, pandas
mlflow.set_tracking_uri(sys.argv[1])
loaded = mlflow.pyfunc.load_model("models:/hbi@champion")
rows = pandas.DataFrame([{"text": "a red square"}, {"video": sys.argv[2]}, {"text": "moves left"}])
found = loaded.predict(rows)
texts = loaded.predict(pandas.DataFrame({"text": ["a red square"]}))
import hbi.model.hbi
print(json.dumps({"code": hbi.model.hbi.__file__, "rows": found.to_dict("records"), "texts": texts.to_dict("records")}))
try:
    loaded.predict(pandas.DataFrame([{"text": "a", "video": "b"}]))
except ValueError as error:
    print(error)
"""


def test_a_version_runs_where_only_mlflow_is(
    filled: tuple[str, list[str]], tmp_path: Path, video: Path
) -> None:
    """In another process and folder, with no way to this project's code, and unpickling forbidden."""
    (tmp_path / "empty").mkdir()
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
    done = subprocess.run(
        [sys.executable, "-P", "-c", ALONE, filled[0], str(video)],
        cwd=tmp_path / "empty", env=env, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer, refusal = done.stdout.splitlines()[-2:]
    assert refusal == "row 0: fill either `text` or `video` (a path), and leave the other empty"
    said = json.loads(answer)
    assert Path(said["code"]).is_relative_to(Path(filled[0].removeprefix("sqlite:///")).parent / "artifacts")
    assert not list((tmp_path / "empty").iterdir())
    first, clip, _ = said["rows"]
    assert first == said["texts"][0]
    folder = resolve_model("models:/hbi@champion", filled[0])
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    ids, mask = tokenize(tokenizer, ["a red square"], model.config.words)
    with torch.no_grad():
        tokens = model.text_levels(model.encode_text(ids, mask)[0], mask)["entity"]
    words = torch.nn.functional.normalize(tokens.tokens[0], dim=-1)[mask[0]]
    torch.testing.assert_close(torch.tensor(first["tokens"]), words, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        torch.tensor(first["weights"]), tokens.weights()[0][mask[0]], rtol=1e-4, atol=1e-5
    )
    assert np.shape(clip["tokens"]) == (model.config.frames, model.config.towers.dim)
    assert sum(clip["weights"]) == pytest.approx(1, abs=1e-5)
    expected = np.array(clip["weights"]) @ np.array(clip["tokens"])
    assert clip["embedding"] == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_version_holds_no_pickle_and_only_what_it_needs(filled: tuple[str, list[str]]) -> None:
    package = Path(resolve_model("models:/hbi@champion", filled[0])).parent.parent
    files = {str(path.relative_to(package)) for path in package.rglob("*") if path.is_file()}
    assert not {name for name in files if name.endswith((".pkl", ".pt", ".pyc"))}
    assert {"pyfunc.py", "code/hbi/model/hbi.py", "code/hbi/pipelines/decoding/clip.py"} <= files
    assert not {
        name for name in files if name.startswith(("code/hbi/training", "code/hbi/infra/s", "code/tests"))
    }
    required = (package / "requirements.txt").read_text().split()
    assert all("==" in line and "+" not in line for line in required)


# ------------------------------------------------------------------------------------------ runs, promote


def test_runs_best_first_with_what_differs(filled: tuple[str, list[str]]) -> None:
    uri, runs = filled
    lines = runs_table("exp", uri, width=200).splitlines()
    head, best, other = lines[:3]
    assert best.split()[:2] == ["run-1", runs[1][:8]] and other.split()[:2] == ["run-0", runs[0][:8]]
    assert "val/t2v/R1" in head and "30.5" in best and "20" in other
    assert "lr" in head.split() and "epochs" not in head and "0.001" in best
    assert "hbi/1 @champion" in other and "hbi/2" in best
    assert "2 runs, best val/t2v/R1 first" in lines[-1]
    assert runs_table(None, uri, width=200).splitlines()[:3] == lines[:3]
    narrow = runs_table("exp", uri, width=40).splitlines()
    assert max(map(len, narrow)) <= 42
    shown = {word for line in narrow for word in line.split()}
    assert {"val/t2v/R1", "lr", "0.001", "status", "version"} <= shown, "columns that do not fit follow below"
    with pytest.raises(ValueError, match=r"--experiment 'none': .* has Default, exp"):
        runs_table("none", uri)


def test_no_runs(tmp_path: Path) -> None:
    assert "no runs in" in runs_table(None, fresh_store(tmp_path))


def test_promote_moves_the_alias(filled: tuple[str, list[str]]) -> None:
    uri, runs = filled
    try:
        assert promote(runs[1][:12], "champion", uri) == "2"
        assert pin_model("models:/hbi@champion", uri) == "models:/hbi/2"
    finally:
        assert promote(runs[0], "champion", uri) == "1"
    with pytest.raises(ValueError, match=r"run 'f00': registered no version of hbi; hbi has versions 1, 2"):
        promote("f00", "champion", uri)
    for alias in ("latest", "v3", "a b", ""):
        with pytest.raises(ValueError, match="--alias"):
            promote(runs[0], alias, uri)


def test_a_table_fits() -> None:
    text, left = fit(["name", "value", "word"], [["a" * 40, "1.5", "x"], ["b", "", "yy"]], width=34)
    assert text.splitlines() == [f"name{' ' * 22}value", f"{'a' * 11}…{'a' * 12}    1.5", "b"]
    assert left == ["word"]


def test_an_alias_moves_only_to_a_better_model(tmp_path: Path, model_folder: Path) -> None:
    uri = fresh_store(tmp_path)
    store = stores.client(uri)

    def register(recall: float | None, metric: str = "val/t2v/R@1") -> str:
        """Registers a model of so much recall; which version is champion after it."""
        run = store.create_run(stores.experiment_id(uri, "exp")).info.run_id
        metrics = {} if recall is None else {"val/t2v/R@1": recall}
        new = NewVersion(metrics=metrics, alias="champion", alias_metric=metric)
        log_and_register(model_folder, run, uri, PACKAGE, new)
        return store.get_model_version_by_alias("hbi", "champion").version

    assert [str(register(recall)) for recall in (None, 20.0, 19.0, 20.0, 20.5)] == ["1", "2", "2", "2", "5"]
    assert str(register(1.0, metric="")) == "6"
