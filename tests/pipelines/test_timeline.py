"""Times as the packets tell them, each rule against a small example worked out by hand."""

import numpy as np
import pytest

from hbi.pipelines.decoding.timeline import believed, between_neighbours, join_pieces, outliers, spread_ties


def test_ties_share_the_gap_that_follows() -> None:
    assert spread_ties(np.array([0.0, 1.0, 1.0, 2.0])) == pytest.approx([0, 1, 1.5, 2])
    # No longer than a frame is usually shown: the picture stands still from 1.5 on.
    assert spread_ties(np.array([0.0, 1.0, 2.0, 2.0, 9.0])) == pytest.approx([0, 1, 2, 2.5, 9])
    assert spread_ties(np.array([0.0, 1.0, 2.0, 2.0])) == pytest.approx([0, 1, 2, 2.5])
    assert spread_ties(np.array([0.0, 1.0])).tolist() == [0.0, 1.0]


def test_pieces_of_a_clock_that_jumps_follow_each_other() -> None:
    frame = np.full(6, 1.0)
    back, count = join_pieces(np.array([5.0, 7, 6, 5, 7, 6]), np.array([4.0, 5, 6, 4, 5, 6]), frame)
    assert (back.tolist(), count) == ([5.0, 7, 6, 8, 10, 9], 1)
    ahead, count = join_pieces(
        np.array([5.0, 6, 7, 500, 501, 502]), np.array([5.0, 6, 7, 500, 501, 502]), frame
    )
    assert (ahead.tolist(), count) == ([5.0, 6, 7, 8, 9, 10], 1)
    # A pause of less than ten seconds is one.
    still, count = join_pieces(np.array([5.0, 6, 7, 16, 17, 18]), np.array([5.0, 6, 7, 16, 17, 18]), frame)
    assert (still.tolist(), count) == ([5.0, 6, 7, 16, 17, 18], 0)


def test_a_picture_of_the_piece_before_is_shown_before_the_next_begins() -> None:
    stamps, decoded = np.array([2.0, 3, 9, 2, 3, 4]), np.array([1.0, 2, 3, 1, 2, 3])
    joined, _ = join_pieces(stamps, decoded, np.full(6, 1.0))
    assert joined.tolist() == [2, 3, 4.5, 5, 6, 7]


@pytest.mark.parametrize(("place", "lie"), [(50, 1e3), (50, 0.0), (0, 1e9), (99, 1e9), (99, 0.0)])
def test_a_time_far_from_its_neighbours_is_put_between_them(place: int, lie: float) -> None:
    stamps = np.arange(100.0)
    stamps[place] = lie
    liars = outliers(stamps)
    assert np.flatnonzero(liars).tolist() == [place]
    mended = between_neighbours(stamps, liars)
    assert np.delete(mended, place) == pytest.approx(np.delete(np.arange(100.0), place))
    assert mended[place] == pytest.approx(place, abs=1.0)


def test_reordered_frames_are_no_liars() -> None:
    stamps = np.arange(120.0).reshape(-1, 4)[:, [0, 3, 1, 2]].ravel()
    assert not outliers(stamps).any()


def test_what_no_video_can_be() -> None:
    assert believed(np.arange(3.0)) and believed(np.array([5.0]))
    assert not believed(np.arange(3000) / 1e4)
    assert not believed(np.array([0.0, 1e7]))
