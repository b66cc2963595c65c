"""Models out of the registry, by whatever name: pinned to a version, then a folder on this machine."""

import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from hbi.infra import storage
from hbi.infra.cache import cached, fetch_folder
from hbi.infra.mlflow.store import client, first_line, no_progress_bar, require_alive, shown, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

MODEL_FILES = ("config.json", "model.safetensors")


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
            return str(require_model(Path(storage.absolute(model))))
        return str(require_model(fetch_folder(model), model))
    uri = tracking_uri(uri)
    version = _version(model, uri)
    package = _package_folder(version, uri)
    return str(require_model(_model_inside(package, model), model))


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
        require_alive(uri)
        return (
            store.get_model_version_by_alias(name, alias) if alias else store.get_model_version(name, number)
        )
    except OSError as error:
        raise ValueError(f"{model}: {shown(uri)} does not answer ({first_line(error)})") from None
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise ValueError(f"{model}: {shown(uri)} does not answer ({first_line(error)})") from None
        raise ValueError(f"{model}: not registered in {shown(uri)}; {registered(store, name)}") from None


def registered(store: "MlflowClient", name: str) -> str:
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
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as scratch, no_progress_bar():
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


def require_model(folder: Path, name: str | None = None) -> Path:
    """The folder itself if it holds a model; ValueError otherwise."""
    missing = [file for file in MODEL_FILES if not (folder / file).is_file()]
    if missing:
        raise ValueError(
            f"{name or folder}: not a model folder (no {', no '.join(missing)}): "
            "give a folder that training wrote, or models:/name@alias"
        )
    return folder
