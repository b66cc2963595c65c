"""The picture of an explanation shows the frames, and every word under each."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hbi.serving.model import Explanation
from hbi.serving.picture import draw_explanation, require_picture


def test_frames_and_extremes_are_in_the_picture(tmp_path: Path) -> None:
    frames = np.zeros((2, 8, 8, 3), np.uint8)
    frames[0, ..., 0], frames[1, ..., 1] = 250, 250
    interaction = np.array([[0.5, -0.5], [0.0, 0.25]], dtype=np.float32)
    values = np.array([0.1, 0.2], dtype=np.float32)
    draw_explanation(
        Explanation(["red", "left"], [0.0, 1.5], interaction, values, values, frames),
        "red left",
        str(tmp_path / "why.png"),
    )
    pixels = np.asarray(Image.open(tmp_path / "why.png").convert("RGB")).reshape(-1, 3)
    shown, counts = np.unique(pixels, axis=0, return_counts=True)
    often = {tuple(colour.tolist()) for colour, count in zip(shown, counts, strict=True) if count > 500}
    assert {(250, 0, 0), (0, 250, 0)} <= often  # the two frames
    assert {(103, 0, 31), (5, 48, 97)} <= often  # the strongest together, the strongest at odds


def test_what_cannot_be_written_is_told_first(tmp_path: Path) -> None:
    require_picture(str(tmp_path / "why.svg"))
    with pytest.raises(ValueError, match=r"why\.txt: no kind of picture that is known: name it \*\.png"):
        require_picture(str(tmp_path / "why.txt"))
    with pytest.raises(ValueError, match="its folder is not there"):
        require_picture(str(tmp_path / "none" / "why.png"))
