"""Models into MLflow's registry.

Nothing is pickled: a version is safetensors, JSON and source files (`hbi.serving.package`), and loads with
MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false.
"""

import re
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hbi.infra.mlflow.resolve import registered, require_model
from hbi.infra.mlflow.store import client, mlflow_name, no_progress_bar, quiet, tracking_uri
from hbi.infra.project import ROOT

if TYPE_CHECKING:
    from mlflow import MlflowClient


SHOWN = ("t2v/R1", "v2t/R1")
"""The scores that stand in a version's row of the registry; all of them are metrics of its logged model."""
PYFUNC = "mlflow.pyfunc"
KEPT_TAGS = ("commit", "data", "data_sha256")


@dataclass(frozen=True)
class ModelPackage:
    """What MLflow gets beside the weights, so that a version runs where this project is not installed."""

    script: Path
    """The file that MLflow runs (models from code)."""
    code: tuple[str, ...]
    """Files and folders that the script imports, relative to the project's root."""
    requirements: tuple[str, ...]
    """Packages that it needs; they are pinned to the versions that are installed."""
    example: Mapping[str, Sequence[Any]]
    """Columns of a table that the script takes; MLflow shows it with the model."""


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
    alias_metric: str = ""
    """One of `metrics`, of which the version must have more than the alias's holder for the alias to move; "": it moves
    anyway, as it does where the holder does not say."""


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
    folder = require_model(Path(model_folder))
    store = client(uri)
    run = store.get_run(run_id)
    scores = {mlflow_name(key): value for key, value in new.metrics.items()}
    judged = (*SHOWN, mlflow_name(new.alias_metric)) if new.alias_metric else SHOWN
    version_tags = {key: f"{value:.6g}" for key, value in scores.items() if key.endswith(judged)}
    version_tags |= {mlflow_name(key): str(value) for key, value in new.tags.items() if key in KEPT_TAGS}
    logged = store.create_logged_model(
        run.info.experiment_id,
        name=new.name,
        source_run_id=run_id,
        model_type="retrieval",
        params=run.data.params,
    )
    try:
        with tempfile.TemporaryDirectory() as scratch:
            made = Path(scratch) / "package"
            _save_package(folder, package, made, run_id, logged.model_id)
            store.log_model_artifacts(logged.model_id, str(made))
        store.finalize_logged_model(logged.model_id, "READY")
        _link(store, run, logged.model_id, scores)
    except BaseException:
        store.finalize_logged_model(logged.model_id, "FAILED")
        raise
    _make_name(store, new.name)
    # By its place, not as models:/<id>: MLflow would look that up in its global store, and make one where we stand.
    source = logged.artifact_location
    with quiet("mlflow.store.model_registry.abstract_store"):  # says that it waits for what is there
        version = store.create_model_version(
            new.name,
            source,
            run_id,
            tags=version_tags | {"run_id": run_id},
            description=_description(run, scores, new.tags),
            model_id=logged.model_id,
        )
    if new.alias and not better_holder(uri, new):
        store.set_registered_model_alias(new.name, new.alias, version.version)
    return str(version.version)


def better_holder(uri: str, new: NewVersion) -> str:
    """The version that holds `new.alias` and has no less of `new.alias_metric` than the new one; "" where none does."""
    from mlflow.exceptions import MlflowException

    if not new.alias_metric:
        return ""
    try:
        holder = client(uri).get_model_version_by_alias(new.name, new.alias)
    except MlflowException:
        return ""
    held = holder.tags.get(mlflow_name(new.alias_metric))
    # As it is kept: what a tag rounds must not make a model better than itself.
    mine = f"{new.metrics[new.alias_metric]:.6g}" if new.alias_metric in new.metrics else None
    if held is None or mine is None or float(mine) > float(held):
        return ""
    return str(holder.version)


def _link(store: "MlflowClient", run: Any, model_id: str, scores: Mapping[str, float]) -> None:
    """The model as an output of the run, and the scores as its metrics, on the data that the run reads.

    They are the run's own final metrics, point for point: MLflow keeps one of two that are the same, and a run that
    has not got them yet, for its server was away, has them from here.
    """
    from mlflow.entities import LoggedModelOutput

    run_id = run.info.run_id
    data = run.inputs.dataset_inputs[0].dataset if run.inputs.dataset_inputs else None
    step = 0
    for key, value in scores.items():
        name = f"final/{key}"
        point = next(iter(store.get_metric_history(run_id, name)), None)
        step = point.step if point else step
        store.log_metric(
            run_id,
            name,
            point.value if point else value,
            timestamp=point.timestamp if point else None,
            step=step,
            dataset_name=data.name if data else None,
            dataset_digest=data.digest if data else None,
            model_id=model_id,
        )
    store.log_outputs(run_id, [LoggedModelOutput(model_id, step)])


def _description(run: Any, scores: Mapping[str, float], tags: Mapping[str, Any]) -> str:
    """What a version says of itself in the registry: where it comes from, and how good it is."""
    shown = ", ".join(f"{key} {value:.1f}" for key, value in scores.items() if key.endswith(SHOWN))
    made = run.data.tags.get("command", run.info.run_name)
    lines = [f"Made by `{made}` (run {run.info.run_id[:8]})."]
    if shown:
        lines.append(f"Scores: {shown}.")
    if "data" in tags:
        lines.append(f"Data: {tags['data']}.")
    return "\n\n".join(lines)


def _save_package(
    model_folder: Path, package: ModelPackage, target: Path, run_id: str, model_id: str
) -> None:
    """Writes the MLflow model: weights, code, requirements, signature."""
    with (
        tempfile.TemporaryDirectory() as scratch,
        warnings.catch_warnings(),
        no_progress_bar(),
        quiet(PYFUNC),
    ):
        warnings.simplefilter("ignore")  # MLflow warns of its own type hints on import
        import pandas
        from mlflow import pyfunc
        from mlflow.models import Model, ModelSignature
        from mlflow.types.schema import Array, ColSpec, DataType, Schema

        vector = Array(DataType.double)
        asked = {"text": "string", "video": "string", "question": "string", "answers": Array(DataType.string)}
        outputs = {"tokens": Array(vector), "weights": vector, "embedding": vector}
        outputs |= {"caption": "string", "answer": "string", "probability": "double"}
        pyfunc.save_model(
            path=str(target),
            mlflow_model=Model(run_id=run_id, model_id=model_id),
            python_model=str(package.script),
            artifacts={"model": str(model_folder)},
            code_paths=[_copy_code(package, Path(scratch))],
            signature=ModelSignature(
                inputs=Schema([ColSpec(kind, name, required=False) for name, kind in asked.items()]),
                outputs=Schema([ColSpec(kind, name, required=False) for name, kind in outputs.items()]),
            ),
            input_example=pandas.DataFrame(package.example),
            pip_requirements=[
                f"{name}=={metadata.version(name).split('+')[0]}" for name in package.requirements
            ],
        )


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
            f"run {run_id!r}: registered no version of {name}; {registered(store, name)} (`hbi runs`)"
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
