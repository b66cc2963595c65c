"""The front door: finds the command, turns an error into one line, and ends what was started."""

import difflib
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import tyro

from hbi import commands
from hbi.demo import demo

END_SECONDS = 3.5
"""How long an interrupted command may tidy up before what it started is ended for it."""


def _fill_types(name: str, args: list[str]) -> None:
    """Gives the flags that come in groups their types, and `--set` the defaults of the run that is named.

    They stand in rooms that are not imported before a command is chosen, so the signatures above cannot hold them.
    """
    if name == "shard":
        from hbi.pipelines.sharding.filters import FilterSettings

        commands.shard.__annotations__["filters"] = FilterSettings
        commands.shard.__defaults__ = (*(commands.shard.__defaults__ or ())[:-1], FilterSettings())
    if name == "train":
        from hbi.training.settings import RUNS, TrainConfig

        run = args[0] if args and not args[0].startswith("-") else "debug"
        if run not in RUNS:
            raise ValueError(f"{run}: no such run: choose one of {', '.join(RUNS)}")
        commands.train.__annotations__["set"] = TrainConfig
        commands.train.__defaults__ = (*(commands.train.__defaults__ or ())[:-1], RUNS[run])


CONTENTS: dict[str, dict[str, Callable[..., None]]] = {
    "Start here": {"demo": demo},
    "Corpora": {
        "corpus": commands.corpus,
        "import-dataset": commands.import_dataset,
        "split": commands.split,
        "shard": commands.shard,
    },
    "Training": {
        "train": commands.train,
        "evaluate": commands.evaluate,
        "runs": commands.runs,
        "promote": commands.promote,
    },
    "Search": {"index": commands.index, "search": commands.search, "serve": commands.serve},
}


def main() -> None:
    """Runs one command; exits with 0 on success only, 1 on an error, 2 on a command line that cannot be read."""
    args = [arg for arg in sys.argv[1:] if arg != "--debug"]
    debug = len(args) < len(sys.argv) - 1
    known = {name: command for group in CONTENTS.values() for name, command in group.items()}
    if not args or args[0] in ("-h", "--help", "help"):
        print(contents())
        return
    name, *rest = args
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        print(
            f"hbi: no command {name!r}{f': did you mean {near[0]!r}?' if near else ''} (hbi --help)",
            file=sys.stderr,
        )
        sys.exit(2)
    _end_on_signal()
    status = 1
    try:
        _fill_types(name, rest)
        tyro.cli(known[name], args=rest, prog=f"hbi {name}")
        status = 0
    except KeyboardInterrupt:
        print(f"hbi {name}: interrupted", file=sys.stderr)
        status = 130
    except SystemExit as ending:
        status = ending.code if isinstance(ending.code, int) else 0 if ending.code is None else 1
    except Exception as error:
        if debug:
            raise
        print(f"hbi {name}: {one_line(error)}", file=sys.stderr)
    finally:
        _stop_ray()
    if status:
        sys.exit(status)


def contents() -> str:
    """`hbi --help`: every command with its first line, by the job it belongs to."""
    lines = ["hbi: video-language representation learning with Hierarchical Banzhaf Interaction"]
    for title, group in CONTENTS.items():
        lines += ["", title]
        lines += [f"  {name:15} {(command.__doc__ or '').splitlines()[0]}" for name, command in group.items()]
    return "\n".join(
        [*lines, "", "`hbi COMMAND --help` has the flags and an example; --debug shows tracebacks."]
    )


def one_line(error: BaseException) -> str:
    """What went wrong, in one line. Ray wraps a worker's error: the innermost one is the user's."""
    while (cause := getattr(error, "cause", None) or error.__cause__) is not None and isinstance(
        cause, BaseException
    ):
        error = cause
    text = " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
    if isinstance(error, ValueError) or (isinstance(error, OSError) and text):
        return text
    return f"{type(error).__name__}: {text} (--debug shows where)"


def _end_on_signal() -> None:
    """Ctrl-C and SIGTERM raise KeyboardInterrupt once; a moment later whatever is left of the command is ended."""

    def end(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        started = _descendants()
        timer = threading.Timer(END_SECONDS, lambda: (_kill(started | _descendants()), os._exit(130)))
        timer.daemon = True
        timer.start()
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, end)
    signal.signal(signal.SIGTERM, end)


def _descendants() -> set[Any]:
    import psutil

    return set(psutil.Process().children(recursive=True))


def _kill(processes: set[Any]) -> None:
    import psutil

    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def _stop_ray() -> None:
    """Stops a Ray that this command started (a cluster that it joined stays up)."""
    if (ray := sys.modules.get("ray")) is not None and ray.is_initialized():
        ray.shutdown()
