"""The installed package: one name, `hbi`, beside whatever a user's own files are called."""

import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.mlflow_store import fresh_store

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("hbi", "model", "infra", "pipelines", "training", "serving")


@dataclass(frozen=True)
class Installed:
    """An environment that has hbi as `pip install .` leaves it, and a folder of a user's own files."""

    wheel: Path
    bin: Path
    folder: Path
    store: str

    def run(self, *command: str) -> str:
        """What a command says, run from the user's folder. The project's checkout is nowhere on its path."""
        done = subprocess.run(
            [self.bin / command[0], *command[1:]], cwd=self.folder, env=self.environment(), text=True,
            capture_output=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def environment(self) -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
            "MLFLOW_TRACKING_URI": self.store,
            "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
            # What MLflow starts (uvicorn) is a command of the packages that hbi depends on.
            "PATH": f"{self.bin}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        }


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    base = tmp_path_factory.mktemp("package")
    source = base / "source"
    for room in ROOMS:
        # Links stay links, as in a clone; what an earlier build left behind stays out.
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / room, source / room, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    offline = ["--no-deps", "--no-index"]
    subprocess.run(
        [*pip, "wheel", *offline, "--no-build-isolation", "-w", str(base), str(source)], check=True
    )
    (wheel,) = base.glob("*.whl")
    venv.create(base / "venv", with_pip=False, symlinks=True)
    python = base / "venv" / "bin" / "python"
    subprocess.run(
        [*pip, "--python", str(python), "install", "--ignore-installed", *offline, str(wheel)], check=True
    )
    (packages,) = (base / "venv").glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_paths()["purelib"])  # what hbi depends on

    folder = base / "folder"
    folder.mkdir()
    for room in ("model", "training", "pipelines"):
        (folder / f"{room}.py").write_text("MINE = True\n")
    for room in ("infra", "serving"):
        (folder / room).mkdir()
        (folder / room / "__init__.py").write_text("MINE = True\n")
    return Installed(wheel, base / "venv" / "bin", folder, fresh_store(base / "store"))


REGISTER = """
import sys
import model
from hbi.infra.mlflow import registry, store
from hbi.model.config import ModelConfig, TowerConfig
from hbi.model.hbi import HBI
from hbi.model.tokenizer import train_tokenizer
from hbi.model.weights import save_model
from hbi.serving.package import PACKAGE

towers = TowerConfig(image_size=32, patch_size=16, vision_width=32, vision_layers=1, vision_heads=2,
                     text_width=32, text_layers=1, text_heads=2, vocab_size=300, dim=32)
save_model(HBI(ModelConfig(towers=towers, frames=4, temporal_layers=1, predictor_width=8)), "made",
           train_tokenizer(["a red square moves left"], 300))
uri = store.tracking_uri(sys.argv[1])
run = store.client(uri).create_run(store.experiment_id(uri, "exp")).info.run_id
registry.log_and_register("made", run, uri, PACKAGE, registry.NewVersion(alias="champion"))
assert model.MINE
"""


@pytest.fixture(scope="module")
def registered(installed: Installed) -> Installed:
    """The same, with a model in the registry that the installed package put there."""
    installed.run("python", "-c", REGISTER, installed.store)
    return installed


def test_the_wheel_holds_one_name_and_every_file_that_the_code_reads(installed: Installed) -> None:
    names = set(zipfile.ZipFile(installed.wheel).namelist())
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"hbi"}
    beside_the_code = {
        str(path.relative_to(ROOT)) if room == "hbi" else f"hbi/{path.relative_to(ROOT)}"
        for room in ROOMS
        for path in (ROOT / room).rglob("*")
        if path.suffix in (".py", ".html", ".js", ".css")
    }
    assert {
        "hbi/model/banzhaf.py",
        "hbi/serving/page/index.html",
        "hbi/commands/corpora.py",
    } <= beside_the_code
    assert beside_the_code <= names


def test_commands_work_beside_a_users_own_files(installed: Installed) -> None:
    help_text = installed.run("hbi", "--help")
    assert "hbi COMMAND --help" in help_text
    assert installed.run("python", "-m", "hbi", "--help") == help_text
    assert installed.run("hbi", "--version").startswith("hbi ")


@pytest.mark.parametrize(
    "order", ["import hbi, hbi.model.banzhaf, model", "import model, hbi.model.banzhaf, hbi"]
)
def test_a_users_own_modules_stay_theirs_in_either_order(installed: Installed, order: str) -> None:
    code = f"{order}; import training, infra; print(model.MINE, training.MINE, infra.MINE, hbi.__file__)"
    said = installed.run("python", "-c", code).split()
    assert said[:3] == ["True"] * 3
    assert Path(said[3]).is_relative_to(installed.bin.parent)


@pytest.mark.parametrize("order", ["import hbi.model.hbi, mlflow", "import mlflow, model"])
def test_a_registered_model_loads_beside_a_users_own_files(registered: Installed, order: str) -> None:
    code = (
        f"{order}\nimport model, pandas\n"
        "loaded = mlflow.pyfunc.load_model('models:/hbi@champion')\n"
        "rows = loaded.predict(pandas.DataFrame({'text': ['a red square']}))\n"
        "print(model.MINE, len(rows), len(rows['embedding'][0]))"
    )
    assert registered.run("python", "-c", code).split()[-3:] == ["True", "1", "32"]


def test_a_package_holds_what_is_written_down(registered: Installed) -> None:
    (package,) = Path(registered.store.removeprefix("sqlite:///")).parent.glob("artifacts/**/pyfunc.py")
    files = {str(path.relative_to(package.parent)) for path in package.parent.rglob("*.py")}
    assert {"pyfunc.py", "code/hbi/model/hbi.py"} <= files
    assert all(file == "pyfunc.py" or file.startswith("code/hbi/") for file in files)
    assert not [file for file in files if file.startswith(("code/hbi/training", "code/hbi/commands"))]


def test_mlflow_serves_a_registered_model(registered: Installed) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        "mlflow",
        "models",
        "serve",
        "-m",
        "models:/hbi@champion",
        "--env-manager",
        "local",
        "-p",
        str(port),
    ]
    server = subprocess.Popen(
        [registered.bin / "python", "-m", *command], cwd=registered.folder, env=registered.environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    body = json.dumps({"dataframe_records": [{"text": "a red square"}]}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations", body, {"Content-Type": "application/json"}
    )
    try:
        for _ in range(240):
            assert server.poll() is None, "mlflow models serve ended"
            try:
                with urllib.request.urlopen(request, timeout=30) as answer:
                    (row,) = json.load(answer)["predictions"]
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)
        else:
            pytest.fail("mlflow models serve did not answer")
        assert len(row["embedding"]) == 32
    finally:
        os.killpg(server.pid, 15)
        server.wait(timeout=30)
