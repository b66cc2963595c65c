"""Runs as a plain-text table that fits the terminal."""

import shutil
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from hbi.infra.mlflow.store import client, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

CELL = 24
"""Longest cell; a longer one loses its middle."""


def compare(runs: Sequence[Any], versions: Mapping[str, str], width: int) -> tuple[str, list[str]]:
    """MLflow runs (given newest first) as a table, best first, and what to say below it.

    `versions`: what a run's id registered. Best is the largest text-to-video R@1, on val or on what there is.
    """
    scores = {run.info.run_id: _scores(run) for run in runs}
    metrics = _metric_columns({name for found in scores.values() for name in found})
    best = metrics[0] if metrics and metrics[0].endswith("/R1") else None
    if best:
        runs = sorted(runs, key=lambda run: -scores[run.info.run_id].get(best, -1.0))
    settings = _differing(runs)
    head = ["run", "id", "status", "started", *metrics, "version", *_short_names(settings)]
    rows = [
        [
            run.info.run_name or "",
            run.info.run_id[:8],
            run.info.status.lower(),
            datetime.fromtimestamp(run.info.start_time / 1000).strftime("%m-%d %H:%M"),
            *(f"{found[name]:.4g}" if name in (found := scores[run.info.run_id]) else "" for name in metrics),
            versions.get(run.info.run_id, ""),
            *(run.data.params.get(name, "") for name in settings),
        ]
        for run in runs
    ]
    blocks = []
    while True:  # what does not fit follows below, beside the runs' names: nothing that differs is left out
        text, left = fit(head, rows, width, keep=2)
        blocks.append(text)
        if not left:
            break
        first = len(head) - len(left)
        if first <= 2:  # not even one more column: as wide as it is
            blocks[-1] = fit(head, rows, 10**6, keep=2)[0]
            break
        head, rows = [*head[:2], *head[first:]], [[*row[:2], *row[first:]] for row in rows]
    notes = [f"{len(runs)} runs, best {best} first" if best else f"{len(runs)} runs, newest first"]
    return "\n\n".join(blocks), notes


def _scores(run: Any) -> dict[str, float]:
    """A run's metrics, those of its chosen model (`final/`) in the place of its curve's last points."""
    metrics = run.data.metrics
    final = {
        name.removeprefix("final/"): value for name, value in metrics.items() if name.startswith("final/")
    }
    return {name: value for name, value in metrics.items() if not name.startswith("final/")} | final


def _metric_columns(names: set[str]) -> list[str]:
    """The metrics worth a column, the one that says which run is best first: val before test before others."""
    splits = sorted({name.removesuffix("/t2v/R1") for name in names if name.endswith("/t2v/R1")})
    splits.sort(key=lambda split: ("val", "test").index(split) if split in ("val", "test") else 2)
    wanted = [
        f"{split}/{name}" for split in splits for name in ("t2v/R1", "t2v/R5", "t2v/R10", "t2v/MdR", "v2t/R1")
    ]
    return [name for name in [*wanted, "train/loss"] if name in names]


def _differing(runs: Sequence[Any]) -> list[str]:
    """Settings that not all runs have alike, those with the fewest values first: they are what was varied."""
    names = sorted({name for run in runs for name in run.data.params})
    values = {name: {run.data.params.get(name) for run in runs} for name in names}
    return sorted((name for name in names if len(values[name]) > 1), key=lambda name: len(values[name]))


def _short_names(settings: list[str]) -> list[str]:
    """`lr` for `optim.lr` where no other setting is called so."""
    last = [name.rpartition(".")[2] for name in settings]
    return [short if last.count(short) == 1 else name for short, name in zip(last, settings, strict=True)]


def fit(
    head: Sequence[str], rows: Sequence[Sequence[str]], width: int, keep: int = 1
) -> tuple[str, list[str]]:
    """The table with as many columns, from the left, as fit into `width`, and the names of those that do not.

    The first `keep` columns are there whatever the width. Numbers stand to the right, words to the left.
    """
    columns = [[_short(cell) for cell in column] for column in zip(head, *rows, strict=True)]
    shown: list[list[str]] = []
    used = 0
    for number, column in enumerate(columns):
        wide = max(map(len, column))
        if number >= keep and used + wide > width:
            break
        used += wide + 2
        right = all(_is_number(cell) for cell in column[1:]) and any(column[1:])
        shown.append([cell.rjust(wide) if right else cell.ljust(wide) for cell in column])
    lines = ["  ".join(line).rstrip() for line in zip(*shown, strict=True)]
    return "\n".join(lines), list(head[len(shown) :])


def _short(cell: str) -> str:
    half = (CELL - 1) // 2
    return cell if len(cell) <= CELL else f"{cell[:half]}…{cell[len(cell) - (CELL - 1 - half) :]}"


def _is_number(cell: str) -> bool:
    try:
        float(cell or 0)
    except ValueError:
        return False
    return True


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
