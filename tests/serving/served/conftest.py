"""One server for all tests in here, and a browser that looks at it."""

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hbi.serving.front import Served, model_of, start
from hbi.serving.settings import ServeSettings
from tests.support.browser import chromium

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


@pytest.fixture(scope="package")
def served(chain: Path, index: str) -> Iterator[Served]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = ServeSettings(port=port, media_root=[str(chain / "corpus")], body_seconds=3.0, replica_cpus=0.2,
                             max_upload_mb=80)  # fmt: skip
    with start(model_of(index), index, settings) as running:
        yield running


@pytest.fixture
def address(served: Served) -> str:
    return served.address


@pytest.fixture(scope="package")
def browser() -> "Iterator[Browser]":
    with chromium() as running:
        yield running


@pytest.fixture
def visit(browser: "Browser", served: Served) -> "Iterator[Callable[..., Page]]":
    """Opens the page at a path; asserts at the end that nothing came from elsewhere and no script failed."""
    asked: list[str] = []
    failed: list[str] = []
    contexts = []

    def open_page(path: str = "/", route: Any = None, **settings: Any) -> "Page":
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 800}} | settings))
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15000)
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: failed.append(str(error)))
        if route is not None:
            page.route(*route)
        page.goto(served.address + path)
        return page

    yield open_page
    for context in contexts:
        context.close()
    elsewhere = [url for url in asked if not url.startswith((served.address, "blob:", "data:"))]
    assert not elsewhere and not failed
