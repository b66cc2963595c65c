"""Imports run one way: each room imports only what stands below it, and heavy things only where they belong."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("model", "infra", "pipelines", "training")
MAY_IMPORT = {
    "model": (),
    # The decoder is a leaf (it imports model.frames alone): serving and the model package read videos through it.
    "infra": ("model", "pipelines.decode", "pipelines.child"),
    "pipelines": ("model", "infra"),
    "training": ("model", "infra", "pipelines.sample"),
}
ONLY_IN = {
    "ray": ("infra", "pipelines", "training/run.py", "training/checkpoint.py"),
    "mlflow": ("infra/registry.py", "infra/package.py", "training/tracking.py"),
    "s3fs": ("infra/storage.py",),
    "decord": ("pipelines/decode.py", "pipelines/child.py"),
    "av": ("pipelines/container.py", "pipelines/decode.py", "pipelines/child.py", "pipelines/corpus.py"),
}
FILES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, at whatever depth, as dotted names."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def within(module: str, names: tuple[str, ...]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    if path.relative_to(ROOT).parts[:2] == ("infra", "bench"):
        return  # a benchmark measures any room from outside
    ours = {module for module in imports_of(path) if module.split(".")[0] in (*ROOMS, "hbi", "demo")}
    wrong = {module for module in ours if not within(module, (room, *MAY_IMPORT[room]))}
    assert not wrong, f"{room} may import {MAY_IMPORT[room] or 'none of ours'}, not {sorted(wrong)}"


@pytest.mark.parametrize("package", ONLY_IN)
def test_a_library_stays_where_it_belongs(package: str) -> None:
    users = {
        str(path.relative_to(ROOT))
        for path in FILES
        if "bench" not in path.parts and any(within(module, (package,)) for module in imports_of(path))
    }
    wrong = {user for user in users if not user.startswith(ONLY_IN[package])}
    assert not wrong, f"{package} is imported in {sorted(wrong)}; it belongs in {ONLY_IN[package]}"
