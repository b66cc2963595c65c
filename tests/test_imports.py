"""Imports run down the floors alone, without circles; heavy libraries stay where they belong; files fit in a head."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BELOW = {
    "model": (),
    "infra": (),
    "pipelines": ("infra", "model"),
    "training": ("pipelines", "infra", "model"),
    "serving": ("pipelines", "infra", "model"),
    "hbi": ("training", "serving", "pipelines", "infra", "model"),
    "benchmarks": ("hbi", "training", "serving", "pipelines", "infra", "model"),
}
"""What a room may import, beside itself. Infra knows no mathematics: it needs none."""
ONLY_IN = {
    "ray": (
        "infra/ray_runtime.py",
        "infra/nodes.py",
        "infra/cluster/",
        "pipelines/sharding/",
        "serving/",
        "training/run.py",
        "training/worker.py",
        "training/checkpoint.py",
    ),
    "mlflow": ("infra/mlflow/", "serving/pyfunc.py"),
    "fsspec": ("infra/storage.py",),
    "decord": ("pipelines/decoding/",),
    "lancedb": ("serving/index/",),
    "av": ("pipelines/decoding/", "pipelines/corpus/"),
}
WITHOUT_THE_MODEL = (
    "training/run.py",
    "training/job.py",
    "training/data/loader.py",
    "serving/front.py",
    "serving/app.py",
    "serving/deploy.py",
    "serving/index/build.py",
    "serving/index/embed.py",
)
"""What commands, controllers, loaders and writers import: it takes the model's seconds and memory where it is used."""
FILES = {
    path.relative_to(ROOT): path
    for room in BELOW
    for path in sorted((ROOT / room).rglob("*.py"))
    if not any(parent.is_symlink() for parent in path.parents)
}
TESTS = [path.relative_to(ROOT) for path in sorted((ROOT / "tests").rglob("*.py"))]


def dotted(file: Path) -> str:
    """The name that a file is imported by."""
    name = ".".join(file.with_suffix("").parts).removesuffix(".__init__")
    return name if file.parts[0] in ("hbi", "benchmarks") else f"hbi.{name}"


MODULES = {dotted(file): file for file in FILES}


def imports_of(tree: ast.AST) -> set[str]:
    """Every module that a tree imports, at whatever depth, through a string too, as dotted names."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.ImportFrom) and node.level:
            found.add("." * node.level)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in MODULES:
            found.add(node.value)
    return found


def room_of(module: str) -> str | None:
    """The room that a dotted name of ours lies in; None for other people's."""
    first, _, rest = module.partition(".")
    if first == "benchmarks":
        return first
    if first != "hbi":
        return None
    return room if (room := rest.split(".")[0]) in BELOW else "hbi"


def ours(file: Path) -> set[str]:
    """The modules of ours that a file imports, and not the names inside them."""
    return imports_of(ast.parse(FILES[file].read_text())) & MODULES.keys()


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_run_down_the_floors(file: Path) -> None:
    room = file.parts[0]
    allowed = {room, *BELOW[room]}
    wrong = {module for module in ours(file) if module != "hbi" and room_of(module) not in allowed}
    assert not wrong, f"{room} may import {BELOW[room] or 'none of ours'}, not {sorted(wrong)}"
    assert not {name for name in imports_of(ast.parse(FILES[file].read_text())) if name.startswith(".")}, (
        "imports are written whole, as hbi.model.banzhaf"
    )


def test_no_circles_between_files() -> None:
    graph = {dotted(file): ours(file) - {dotted(file), "hbi"} for file in FILES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as circle:
        pytest.fail(" -> ".join(circle.args[1]))


@pytest.mark.parametrize("file", WITHOUT_THE_MODEL)
def test_what_does_without_the_model_does_not_import_it(file: str) -> None:
    ways, seen = [(file,)], set[str]()
    while ways:
        way = ways.pop()
        tree = ast.parse(FILES[Path(way[-1])].read_text())
        first = imports_of(
            ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
        )
        assert "hbi.model.hbi" not in first, f"{' -> '.join(way)} imports the model"
        new = {str(MODULES[module]) for module in first & MODULES.keys()} - seen
        seen |= new
        ways += [(*way, module) for module in new]


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_stays_where_it_belongs(library: str) -> None:
    users = {
        str(file)
        for file, path in FILES.items()
        if file.parts[0] not in ("benchmarks", "hbi")
        and any(name.split(".")[0] == library for name in imports_of(ast.parse(path.read_text())))
    }
    wrong = {user for user in users if not user.startswith(ONLY_IN[library])}
    assert not wrong, f"{library} is imported in {sorted(wrong)}; it belongs in {ONLY_IN[library]}"
    assert users, f"nothing imports {library}: the rule guards an empty room"


@pytest.mark.parametrize("file", [*FILES, *TESTS], ids=str)
def test_a_file_and_its_functions_fit_in_a_head(file: Path) -> None:
    text = (ROOT / file).read_text()
    assert len(text.splitlines()) <= 400
    functions = [
        node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    long = {node.name for node in functions if (node.end_lineno or 0) - node.lineno >= 60}
    assert not long, f"more than 60 lines: {sorted(long)}"
