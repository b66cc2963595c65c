"""An explanation as a picture: the frames side by side, and under each how every word met it."""

from pathlib import Path

import numpy as np

from hbi.serving.model import Explanation

KINDS = (".png", ".svg", ".pdf")


def require_picture(out: str) -> None:
    """ValueError for a file that cannot be a picture of ours, before any work is done."""
    if Path(out).suffix.lower() not in KINDS:
        raise ValueError(f"{out}: no kind of picture that is known: name it *{', *'.join(KINDS)}")
    if not Path(out).absolute().parent.is_dir():
        raise ValueError(f"{out}: its folder is not there: make it first")


def draw_explanation(explanation: Explanation, text: str, out: str) -> None:
    """Writes the picture: red where a word and a frame belong together, blue where they are at odds.

    Beside each word and under each frame stands what it adds by itself.
    """
    import matplotlib

    matplotlib.use("agg", force=False)
    from matplotlib.figure import Figure

    words, count = explanation.words, len(explanation.times)
    figure = Figure(figsize=(1.3 * count + 2.2, 1.6 + 0.32 * len(words)), layout="constrained")
    figure.suptitle(text)
    pictures, table = figure.subplots(2, 1, height_ratios=[1.25, 0.3 * len(words)])
    pictures.imshow(np.concatenate(list(explanation.frames), axis=1), aspect="auto")
    pictures.set_axis_off()
    limit = float(np.abs(explanation.interaction).max()) or 1.0
    shown = table.imshow(explanation.interaction, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    table.set_yticks(
        range(len(words)), [_valued(*pair) for pair in zip(words, explanation.word_values, strict=True)]
    )
    stamps = [f"{time:.2f} s" for time in explanation.times]
    table.set_xticks(
        range(count), [_valued(*pair) for pair in zip(stamps, explanation.frame_values, strict=True)]
    )
    figure.colorbar(shown, ax=table, label="interaction", location="bottom", shrink=0.5)
    figure.savefig(out, dpi=120)


def _valued(name: str, value: float) -> str:
    return f"{name}  {value:+.3f}" if value else name
