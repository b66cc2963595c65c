"""MLflow: where the store is, models in and out of the registry, and the table of runs. No global MLflow state.

Nothing is pickled: a version is safetensors, JSON and source files (`hbi.serving.package`), and loads with
MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false. MLflow is imported inside the functions; it takes a second.
"""

import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from hbi.infra import storage
from hbi.infra.cache import cached, fetch_folder
from hbi.infra.mlflow.runs import compare
from hbi.infra.project import ROOT

if TYPE_CHECKING:
    from mlflow import MlflowClient

MODEL_FILES = ("config.json", "model.safetensors")


@dataclass(frozen=True)
class ModelPackage:
    """What MLflow gets beside the weights, so that a version runs where this project is not installed."""

    script: Path
    """The file that MLflow runs (models from code)."""
    code: tuple[str, ...]
    """Files and folders that the script imports, relative to the project's root."""
    requirements: tuple[str, ...]
    """Packages that it needs; they are pinned to the versions that are installed."""


@dataclass(frozen=True)
class NewVersion:
    """What a new version of a registered model is called, and what it says of itself."""

    name: str = "hbi"
    """The registered model."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Kept as tags of the version."""
    tags: Mapping[str, Any] = field(default_factory=dict)
    """Lineage: commit, data, its digest."""
    alias: str = ""
    """Moves to the version when all of it is there; "" moves none."""


def tracking_uri(uri: str | None = None) -> str:
    """The MLflow store: `uri`, else MLFLOW_TRACKING_URI, else the sqlite file runs/mlflow.db.

    A folder means the sqlite file mlflow.db inside it. The answer is absolute, since Ray's workers stand elsewhere.
    """
    given = uri or os.environ.get("MLFLOW_TRACKING_URI") or "runs"
    if "://" not in given:
        given = f"sqlite:///{Path(given).expanduser().absolute() / 'mlflow.db'}"
    if (file := _sqlite_file(given)) is None:
        return given
    file.parent.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{file}"


def _sqlite_file(uri: str) -> Path | None:
    """The file of a sqlite URI, absolute; None for any other store."""
    prefix = "sqlite:///"
    return Path(uri[len(prefix) :]).expanduser().absolute() if uri.startswith(prefix) else None


def is_server(uri: str) -> bool:
    """Whether the store is reached over HTTP (the server then decides where artifacts go)."""
    return urlsplit(uri).scheme in ("http", "https")


def client(uri: str) -> "MlflowClient":
    """A client of one store, tracking and registry both."""
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def experiment_id(uri: str, name: str) -> str:
    """The experiment of that name, made if need be. Artifacts lie beside a sqlite file, never where we stand."""
    from mlflow.exceptions import MlflowException

    store = client(uri)
    found = store.get_experiment_by_name(name)
    if found is None:
        file = _sqlite_file(uri)
        folder = file.parent / "artifacts" if file else Path("runs/artifacts").absolute()
        location = None if is_server(uri) else (folder / re.sub(r"[^\w.-]", "_", name)).as_uri()
        try:
            return store.create_experiment(name, artifact_location=location)
        except MlflowException:  # someone made it in between
            found = store.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        raise ValueError(
            f"experiment {name!r} of {uri} is deleted: restore it (`mlflow experiments restore`) or name another"
        )
    return found.experiment_id


def mlflow_name(name: str) -> str:
    """Our metric names as MLflow allows them: `val/t2v+dsl/R@1` is `val/t2v-dsl/R1` there."""
    return re.sub(r"[^\w\-. :/]", "_", name.replace("@", "").replace("+", "-"))


# ---------------------------------------------------------------------------------------------- register


def log_and_register(
    model_folder: str | Path,
    run_id: str,
    uri: str,
    package: ModelPackage,
    new: NewVersion = NewVersion(),
) -> str:
    """Packages a model folder, logs it to the run, registers it, and returns the version.

    The run's id becomes a tag of the version, beside those of `new`. The alias moves only when all of that is done, so
    that it never points at half a model.
    """
    folder = _require_model(Path(model_folder))
    store = client(uri)
    run = store.get_run(run_id)
    version_tags = {mlflow_name(key): f"{value:.6g}" for key, value in new.metrics.items()}
    version_tags |= {mlflow_name(key): str(value) for key, value in new.tags.items()} | {"run_id": run_id}
    logged = store.create_logged_model(
        run.info.experiment_id, name=new.name, source_run_id=run_id, model_type="retrieval"
    )
    try:
        with tempfile.TemporaryDirectory() as scratch:
            made = Path(scratch) / "package"
            _save_package(folder, package, made, run_id, logged.model_id)
            store.log_model_artifacts(logged.model_id, str(made))
        store.finalize_logged_model(logged.model_id, "READY")
    except BaseException:
        store.finalize_logged_model(logged.model_id, "FAILED")
        raise
    _make_name(store, new.name)
    # By its place, not as models:/<id>: MLflow would look that up in its global store, and make one where we stand.
    source = logged.artifact_location
    version = store.create_model_version(
        new.name, source, run_id, tags=version_tags, model_id=logged.model_id
    )
    if new.alias:
        store.set_registered_model_alias(new.name, new.alias, version.version)
    return str(version.version)


def _save_package(
    model_folder: Path, package: ModelPackage, target: Path, run_id: str, model_id: str
) -> None:
    """Writes the MLflow model: weights, code, requirements, signature."""
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings(), _no_progress_bar():
        # MLflow warns of its own type hints on import, and wants to run an example that would only guess the signature.
        warnings.simplefilter("ignore")
        from mlflow import pyfunc
        from mlflow.models import Model, ModelSignature
        from mlflow.types.schema import Array, ColSpec, DataType, Schema

        vector = Array(DataType.double)
        outputs = {"tokens": Array(vector), "weights": vector, "embedding": vector}
        pyfunc.save_model(
            path=str(target),
            mlflow_model=Model(run_id=run_id, model_id=model_id),
            python_model=str(package.script),
            artifacts={"model": str(model_folder)},
            code_paths=[_copy_code(package, Path(scratch))],
            signature=ModelSignature(
                inputs=Schema([ColSpec("string", column, required=False) for column in ("text", "video")]),
                outputs=Schema([ColSpec(kind, column) for column, kind in outputs.items()]),
            ),
            pip_requirements=[
                f"{name}=={metadata.version(name).split('+')[0]}" for name in package.requirements
            ],
        )


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """MLflow shows a bar for the copying of four local files, and can be told not to by the environment only."""
    name = "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _copy_code(package: ModelPackage, scratch: Path) -> str:
    """The code of a package as one folder `hbi`."""
    for name in package.code:
        source, target = ROOT / name, scratch / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    return str(scratch / "hbi")


def _make_name(store: "MlflowClient", name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        store.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


# ----------------------------------------------------------------------------------------------- resolve


def pin_model(model: str, uri: str | None = None) -> str:
    """The same model by a name that does not move: `models:/hbi@champion` becomes `models:/hbi/3`."""
    if not model.startswith("models:/"):
        return storage.absolute(model)
    version = _version(model, tracking_uri(uri))
    return f"models:/{version.name}/{version.version}"


def resolve_model(model: str, uri: str | None = None) -> str:
    """A local folder for `load_model`: of a folder (local or s3://), models:/name@alias or models:/name/3.

    What is remote is fetched once and kept under HBI_CACHE (default ~/.cache/hbi). ValueError names what is missing.
    """
    if not model.startswith("models:/"):
        if not storage.is_remote(model):
            return str(_require_model(Path(storage.absolute(model))))
        return str(_require_model(fetch_folder(model), model))
    uri = tracking_uri(uri)
    version = _version(model, uri)
    package = _package_folder(version, uri)
    return str(_require_model(_model_inside(package, model), model))


def _version(model: str, uri: str) -> Any:
    """The registered version behind `models:/name@alias` or `models:/name/3`; ValueError says what there is instead."""
    from mlflow.exceptions import MlflowException

    match = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", model)
    if match is None:
        raise ValueError(
            f"{model}: not the name of a registered model: write models:/name@alias or models:/name/3"
        )
    name, alias, number = match.groups()
    store = client(uri)
    try:
        return (
            store.get_model_version_by_alias(name, alias) if alias else store.get_model_version(name, number)
        )
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise ValueError(f"{model}: {uri} does not answer ({_first_line(error)})") from None
        raise ValueError(f"{model}: not registered in {uri}; {_registered(store, name)}") from None


def _registered(store: "MlflowClient", name: str) -> str:
    """What is registered, in half a sentence."""
    models = {model.name: model for model in store.search_registered_models()}
    if not models:
        return "nothing is registered there: train with tracking, or give the store (--tracking, MLFLOW_TRACKING_URI)"
    if name not in models:
        return f"it has {', '.join(sorted(models))}"
    versions = sorted(int(v.version) for v in store.search_model_versions(f"name='{name}'"))
    aliases = ", ".join(f"@{alias} ({number})" for alias, number in sorted(models[name].aliases.items()))
    return f"{name} has versions {', '.join(map(str, versions)) or 'none'} and aliases {aliases or 'none'}"


def _package_folder(version: Any, uri: str) -> Path:
    """The packaged model on this machine: the store's own folder where it is local, else a copy in the cache."""
    from mlflow.artifacts import download_artifacts

    source = client(uri).get_model_version_download_uri(version.name, version.version)
    if source.startswith("models:/"):
        source = client(uri).get_logged_model(source.removeprefix("models:/")).artifact_location
    if urlsplit(source).scheme in ("", "file"):
        return Path(download_artifacts(artifact_uri=source, tracking_uri=uri))

    def fetch(folder: Path) -> None:
        # Where MLflow puts the files below the folder that it is given depends on the kind of store.
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as scratch, _no_progress_bar():
            made = Path(download_artifacts(artifact_uri=source, dst_path=scratch, tracking_uri=uri))
            for path in made.iterdir():
                path.rename(folder / path.name)

    return cached(f"package {uri} {source}", fetch)


def _model_inside(package: Path, model: str) -> Path:
    """The model folder inside an MLflow model."""
    from mlflow.models import Model

    try:
        return package / Model.load(str(package)).flavors["python_function"]["artifacts"]["model"]["path"]
    except (KeyError, OSError):
        raise ValueError(
            f"{model}: registered, but not by this project (no packaged model folder in it)"
        ) from None


def _require_model(folder: Path, name: str | None = None) -> Path:
    """The folder itself if it holds a model; ValueError otherwise."""
    missing = [file for file in MODEL_FILES if not (folder / file).is_file()]
    if missing:
        raise ValueError(
            f"{name or folder}: not a model folder (no {', no '.join(missing)}): "
            "give a folder that training wrote, or models:/name@alias"
        )
    return folder


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


# ------------------------------------------------------------------------------------------ runs, promote


def promote(run_id: str, alias: str = "champion", uri: str | None = None, name: str = "hbi") -> str:
    """Moves the alias to the latest version that a run registered; the id may be cut short. Returns the version."""
    store = client(tracking_uri(uri))
    versions = [
        v
        for v in store.search_model_versions(f"name='{name}'")
        if run_id and (v.run_id or "").startswith(run_id)
    ]
    runs = {v.run_id for v in versions}
    if not versions:
        raise ValueError(
            f"run {run_id!r}: registered no version of {name}; {_registered(store, name)} (`hbi runs`)"
        )
    if len(runs) > 1:
        raise ValueError(f"run {run_id!r}: short for {', '.join(sorted(map(str, runs)))}: give more of it")
    version = max(versions, key=lambda v: int(v.version))
    if not re.fullmatch(r"[\w-]+", alias) or re.fullmatch(r"[vV]\d+", alias) or alias == "latest":
        raise ValueError(
            f"--alias {alias!r}: use letters, digits, - and _, and neither `latest` nor v1, v2, ..."
        )
    store.set_registered_model_alias(name, alias, version.version)
    return str(version.version)


def runs_table(experiment: str | None = None, uri: str | None = None, width: int | None = None) -> str:
    """The runs of an experiment (default: of all) as text, best first: metrics, and the settings that differ.

    The best is judged by text-to-video R@1 on val, or on what there is; runs without it come last, newest first.
    """
    uri = tracking_uri(uri)
    store = client(uri)
    known = {found.name: found.experiment_id for found in store.search_experiments()}
    if experiment is not None and experiment not in known:
        raise ValueError(f"--experiment {experiment!r}: {uri} has {', '.join(sorted(known)) or 'none'}")
    runs = _all_runs(store, [known[experiment]] if experiment else list(known.values()))
    if not runs:
        return f"no runs in {uri}: `hbi train RUN --data SHARDS` makes one"
    text, notes = compare(
        runs, _versions_of_runs(store), width or shutil.get_terminal_size((120, 24)).columns
    )
    return "\n".join([text, "", *notes])


def _all_runs(store: "MlflowClient", experiments: list[str]) -> list[Any]:
    """Every active run, newest first."""
    runs: list[Any] = []
    token = None
    while True:
        page = store.search_runs(experiments, order_by=["attributes.start_time DESC"], page_token=token)
        runs += page
        token = page.token
        if not token:
            return runs


def _versions_of_runs(store: "MlflowClient") -> dict[str, str]:
    """`hbi/3 @champion` for each run that registered a model."""
    aliases: dict[tuple[str, str], list[str]] = {}
    for model in store.search_registered_models():
        for alias, number in model.aliases.items():
            aliases.setdefault((model.name, str(number)), []).append(f"@{alias}")
    found: dict[str, str] = {}
    for version in sorted(store.search_model_versions(), key=lambda version: int(version.version)):
        marks = aliases.get((version.name, str(version.version)), [])
        found[version.run_id or ""] = " ".join([f"{version.name}/{version.version}", *sorted(marks)])
    return found
