"""Serve is taken down by whoever started it, and by nobody who came to one that ran; a Ray that runs is reached."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hbi.serving.front import _serve_runs, _take_down

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


def test_serve_goes_with_the_one_who_started_it_and_stays_for_others(ray_session: None):
    from ray import serve

    @serve.deployment(ray_actor_options={"num_cpus": 0}, graceful_shutdown_wait_loop_s=0.1)
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


def test_a_ray_that_asks_for_a_token_gets_the_one_that_lies_here(ray_session: None):
    import ray

    code = "from hbi.infra.ray_runtime import ray_running\nwith ray_running(): import ray; print(len(ray.nodes()))"
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    theirs = own | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=theirs, cwd=Path.cwd(), capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("1\n", "")
