"""Serve is taken down by whoever started it, and by nobody who came to one that ran."""

import pytest

from hbi.serving.front import _serve_runs, _take_down

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


def test_serve_goes_with_the_one_who_started_it_and_stays_for_others(ray_session: None):
    from ray import serve

    @serve.deployment(ray_actor_options={"num_cpus": 0})
    class Nothing:
        pass

    assert not _serve_runs()
    serve.start(proxy_location="Disabled")
    try:
        for name in ("ours", "theirs"):
            serve.run(Nothing.bind(), name=name, route_prefix=None)
        _take_down("ours", mine=True)  # another has come to use it
        assert set(serve.status().applications) == {"theirs"}
        _take_down("theirs", mine=False)
        assert _serve_runs() and not serve.status().applications
        _take_down("ours", mine=True)
        assert not _serve_runs()
    finally:
        serve.shutdown()
