"""The front door: finds the command, turns an error into one line, and ends what was started."""

import difflib
import io
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from importlib import metadata
from typing import Annotated, Any, Union

import tyro
from tyro.conf import subcommand

from hbi.commands import cluster, corpora, demo, heads, search, training
from hbi.infra.cluster.attempts import MISTAKE
from hbi.infra.project import ROOT
from hbi.infra.signals import end_on_signal, stop_ray

CONTENTS: dict[str, dict[str, type]] = {
    "Start here": {"demo": demo.Demo},
    "Corpora": {
        "corpus": corpora.Corpus,
        "import-dataset": corpora.ImportDataset,
        "split": corpora.Split,
        "shard": corpora.Shard,
        "inspect": corpora.Inspect,
    },
    "Training": {
        "train": training.Train,
        "evaluate": training.Evaluate,
        "runs": training.Runs,
        "promote": training.Promote,
    },
    "Search": {"index": search.BuildIndex, "search": search.Search, "serve": search.Serve},
    "What a model says of a video": {
        "answer": heads.Answer,
        "caption": heads.Caption,
        "classify": heads.Classify,
        "explain": heads.Explain,
    },
    "On a cluster": {"submit": cluster.Submit},
}
COMMANDS = {name: command for group in CONTENTS.values() for name, command in group.items()}
COMPLETION = "--tyro-print-completion"


def main() -> None:
    """Runs one command; exits with 0 on success only, 1 on an error, 2 on a mistake of the user's."""
    for stream in (sys.stdout, sys.stderr):  # file names that are not UTF-8 are printed as they are
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape")
    try:
        status = _main([arg for arg in sys.argv[1:] if arg != "--debug"], debug="--debug" in sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output has seen enough, as in `hbi --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    if status:
        sys.exit(status)


def _main(args: Sequence[str], debug: bool) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(contents())
        return 0
    if args[0] == "--version":
        print(f"hbi {metadata.version('hbi')}")
        return 0
    if args[0] == COMPLETION:
        tyro.cli(_every_command(), prog="hbi", args=args)
    name, *rest = args
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f": did you mean {near[0]!r}?" if near else ""
        print(f"hbi: no command {name!r}{hint} (hbi --help)", file=sys.stderr)
        return 2
    end_on_signal()
    try:
        read(name, rest).run()
        return 0
    except KeyboardInterrupt as end:
        print(f"hbi {name}: {end or 'interrupted'}", file=sys.stderr)
        return 128 + getattr(end, "number", signal.SIGINT)
    except SystemExit as ending:
        return ending.code if isinstance(ending.code, int) else 0 if ending.code is None else 1
    except BrokenPipeError:
        raise
    except Exception as error:
        if debug:
            raise
        print(f"hbi {name}: {one_line(error)}", file=sys.stderr)
        return MISTAKE if is_mistake(error) else 1
    finally:
        stop_ray()


def read(name: str, args: Sequence[str]) -> Any:
    """The command as its arguments describe it. SystemExit where they cannot be read."""
    command: Any = COMMANDS[name]
    return (
        command.read(args) if hasattr(command, "read") else tyro.cli(command, args=args, prog=f"hbi {name}")
    )


def _every_command() -> Any:
    """All commands as one type, for a shell's completion."""
    return Union[tuple(Annotated[command, subcommand(name)] for name, command in COMMANDS.items())]  # noqa: UP007


def contents() -> str:
    """`hbi --help`: every command with its first line, by the job it belongs to."""
    lines = ["hbi: video-language representation learning with Hierarchical Banzhaf Interaction"]
    for title, group in CONTENTS.items():
        lines += ["", title]
        lines += [f"  {name:15} {(command.__doc__ or '').splitlines()[0]}" for name, command in group.items()]
    return "\n".join(
        [*lines, "", "`hbi COMMAND --help` has the flags and an example; --debug shows tracebacks."]
    )


def unwrapped(error: BaseException) -> BaseException:
    """A worker's error without Ray's own around it."""
    while type(error).__module__.startswith("ray."):
        cause = getattr(error, "cause", None) or error.__cause__
        if not isinstance(cause, BaseException):
            break
        error = cause
    return error


def is_mistake(error: BaseException) -> bool:
    """Whether the user has something to mend: a value that we refused. A library's may have other reasons."""
    error = unwrapped(error)
    if not isinstance(error, ValueError):
        return False
    frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    return not frames or frames[-1].startswith(str(ROOT / "hbi"))


def one_line(error: BaseException) -> str:
    """What went wrong, in one line: what Ray wraps comes out of its wrapping, and what we say of a cause stands."""
    error = unwrapped(error)
    text = " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
    if isinstance(error, ValueError) or (isinstance(error, OSError) and text):
        return text
    return f"{type(error).__name__}: {text} (--debug shows where)"
