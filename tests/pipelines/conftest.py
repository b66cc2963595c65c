"""A decoder for the tests that make shards without Ray."""

from collections.abc import Iterator

import pytest

from hbi.pipelines.decoding.decoder import Decoder
from hbi.pipelines.sharding import shards
from tests.support.sharding import SETTINGS


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    with shards.decoder(SETTINGS) as running:
        yield running
