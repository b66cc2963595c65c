"""The moment that frames name, and its overlap with the right one."""

import pytest
import torch

from hbi.model.moments import moment, temporal_iou


def test_a_moment_is_the_run_of_frames_that_adds_up_to_the_most() -> None:
    times = [0.0, 1.0, 2.0, 3.0]
    assert moment(torch.tensor([0.0, 3.0, 2.0, 0.0]), times, 4.0) == (1.0, 3.0)
    assert moment(torch.tensor([0.0, 0.0, 0.0, 1.0]), times, 4.5) == (3.0, 4.5)
    assert moment(torch.tensor([5.0, 4.0, 5.0, 0.0]), times, 4.0) == (0.0, 3.0)
    assert moment(torch.tensor([2.0, 1.0, 9.0]), times[:2], 2.0) == (0.0, 1.0), (
        "a padded frame is not looked at"
    )


@pytest.mark.parametrize(
    ("one", "other", "overlap"),
    [
        ((0.0, 2.0), (1.0, 3.0), 1 / 3),
        ((1.0, 2.0), (1.0, 2.0), 1.0),
        ((0.0, 1.0), (2.0, 3.0), 0.0),
        ((0.0, 4.0), (1.0, 2.0), 0.25),
        ((1.0, 1.0), (1.0, 1.0), 0.0),
    ],
)
def test_temporal_overlap(one: tuple[float, float], other: tuple[float, float], overlap: float) -> None:
    assert temporal_iou(one, other) == pytest.approx(overlap)
    assert temporal_iou(other, one) == pytest.approx(overlap)
