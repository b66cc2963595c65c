"""The page in use: what is added and downloaded, keys, phones, proxies, and what goes wrong."""

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from hbi.serving.front import Served
from tests.serving.conftest import CLIPS
from tests.support.asking import ask, form
from tests.support.clips import video
from tests.support.page import TEXT, finished, found, ids, search

if TYPE_CHECKING:
    from playwright.sync_api import Route

pytestmark = [
    pytest.mark.browser,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),
]
EVIL = '<img src=x onerror="window.broken = 1">'


def test_a_video_is_uploaded_found_and_removed_and_its_text_is_never_markup(
    visit, served: Served, tmp_path: Path
) -> None:
    (tmp_path / "mine.mp4").write_bytes(video(4))
    (tmp_path / "text.mp4").write_text("no video")
    page = visit()
    page.click("#open-upload")
    page.set_input_files("#upload input[type=file]", str(tmp_path / "text.mp4"))
    page.click("#upload-form .first")
    page.wait_for_selector("#upload-status.error")
    page.set_input_files("#upload input[type=file]", str(tmp_path / "mine.mp4"))
    page.fill("#upload input[name=id]", EVIL)
    page.fill("#upload input[name=captions]", f"<b>bold</b> {EVIL}")
    page.click("#upload-form .first")
    page.wait_for_selector("#upload", state="hidden")
    finished(page)
    page.wait_for_function("() => document.querySelector('#status').textContent.startsWith('Added as')")
    assert EVIL in page.inner_text("#status") and f"{CLIPS + 1} videos" in page.inner_text("#about")
    page.goto(f"{served.address}/?q=noise")
    finished(page)
    page.click("#next") if EVIL not in ids(page) else None
    page.wait_for_function(
        "id => [...document.querySelectorAll('.card')].some(c => c.dataset.id === id)", arg=EVIL
    )
    page.locator(".card", has_text="<b>bold</b>").click()
    page.wait_for_selector("#map td")
    assert page.inner_text("#detail-title") == EVIL
    assert page.inner_text("#detail-captions li") == f"<b>bold</b> {EVIL}"
    page.wait_for_function(
        "() => document.querySelector('#map img').naturalWidth > 0"
    )  # its id in an address
    page.once("dialog", lambda dialog: dialog.accept())
    page.click("#remove")
    page.wait_for_selector("#detail", state="hidden")
    page.wait_for_function(f"() => document.querySelector('#about').textContent.startsWith('{CLIPS} videos')")
    assert ids(page) and EVIL not in ids(page) and page.evaluate("window.broken") is None


def test_results_can_be_downloaded(visit, served: Served) -> None:
    assert (
        ask(
            served.address, "POST", "/videos", form(("f.mp4", video(3)), id="=formula", captions='a "b", c')
        ).status
        == 201
    )
    try:
        page = visit(f"/?q={TEXT}")
        finished(page)
        page.click("#next")
        page.wait_for_function("() => document.querySelector('#page').textContent === 'Page 2'")
        if "=formula" not in ids(page):
            page.click("#previous")
            page.wait_for_function("() => document.querySelector('#page').textContent === 'Page 1'")
        shown = ids(page)
        with page.expect_download() as saved:
            page.click("#json")
        clips = json.loads(Path(saved.value.path()).read_text())
        assert [clip["id"] for clip in clips] == shown and "=formula" in shown
        with page.expect_download() as saved:
            page.click("#csv")
        rows = list(csv.DictReader(Path(saved.value.path()).read_text().splitlines()))
        assert [row["id"].removeprefix("'") for row in rows] == shown
        row = next(row for row in rows if row["id"] == "'=formula")
        assert json.loads(row["captions"]) == ['a "b", c']
        assert all(float(row["score"]) == clip["score"] for row, clip in zip(rows, clips, strict=True))
    finally:
        assert ask(served.address, "DELETE", "/videos/%3Dformula").status == 200


def test_everything_is_reached_by_keys(visit) -> None:
    page = visit()
    page.wait_for_selector("#examples button")
    assert page.evaluate("document.activeElement.id") == "text"
    page.keyboard.type(TEXT)
    page.keyboard.press("Enter")
    finished(page)
    focused = "document.activeElement.dataset.id"
    page.keyboard.press("ArrowDown")
    assert page.evaluate(focused) == ids(page)[0]
    page.keyboard.press("ArrowRight")
    assert page.evaluate(focused) == ids(page)[1]
    page.keyboard.press("ArrowDown")
    assert page.evaluate(focused) == ids(page)[7]  # a row of six
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    page.wait_for_selector("#map td")
    page.keyboard.press("Escape")
    page.wait_for_selector("#detail", state="hidden")
    assert page.evaluate(focused) == ids(page)[1]
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("document.activeElement.id") == "text"
    page.keyboard.press("Escape")
    assert page.input_value("#text") == ""


def test_a_slower_earlier_answer_never_overwrites_a_newer_one(visit, served: Served) -> None:
    held: list[Any] = []

    def slow_first(route: "Route") -> None:
        if "blue" in (route.request.post_data or ""):
            held.append(route)  # answered below, after the newer one
        else:
            route.continue_()

    page = visit(route=("**/search", slow_first))
    page.fill("#text", "the blue star grows")
    page.press("#text", "Enter")
    page.wait_for_selector("#results.waiting", state="attached")
    assert page.inner_text("#status") == "Searching …"
    search(page)
    expected = ids(page)
    assert expected == [clip["id"] for clip in found(served, text=TEXT)]
    held[0].continue_()
    page.wait_for_timeout(500)
    assert ids(page) == expected and page.input_value("#text") == TEXT


def test_what_goes_wrong_is_said_and_the_next_search_works(visit) -> None:
    answers = iter([{"status": 503, "json": {"detail": "too many requests wait already"}}, None])

    def fail_twice(route: "Route") -> None:
        answer = next(answers, {})
        if answer is None:
            route.abort()
        elif answer:
            route.fulfill(**answer)
        else:
            route.continue_()

    page = visit(route=("**/search", fail_twice))
    for says in ("too many requests wait already", "The server does not answer"):
        page.fill("#text", TEXT)
        page.press("#text", "Enter")
        page.wait_for_function(
            "text => document.querySelector('#status.error')?.textContent.includes(text)", arg=says
        )
        assert not ids(page)
    search(page)
    assert not page.locator("#status.error").count()
    search(page, "red square " * 100)
    page.wait_for_function(
        "() => document.querySelector('#status').textContent.includes('its end was left out')"
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_of_it_without_sideways_scrolling(visit, scheme: str) -> None:
    page = visit(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    widths = "[document.documentElement.scrollWidth, innerWidth]"
    page.wait_for_selector("#examples button")
    assert page.evaluate(widths) == [390, 390]
    search(page)
    assert page.evaluate(widths) == [390, 390]
    page.click(".card >> nth=0")
    page.wait_for_selector("#map td")
    assert page.evaluate(widths) == [390, 390]
    inside = page.evaluate("(d => [d.scrollWidth, d.clientWidth])(document.querySelector('#detail'))")
    assert inside[0] == inside[1]
    paper, ink = page.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        ".map(colour => colour.match(/[0-9]+/g).map(Number).reduce((a, b) => a + b))"
    )
    assert (paper > ink) == (scheme == "light")


def test_the_page_works_behind_a_path_prefix(visit, served: Served) -> None:
    prefix = "/some/prefix"

    def strip(route: "Route") -> None:  # what a proxy does
        route.continue_(url=route.request.url.replace(prefix, "", 1))

    page = visit(f"{prefix}/", route=(f"{served.address}{prefix}/**", strip))
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    search(page)
    page.wait_for_function("() => document.querySelector('.card img').naturalWidth > 0")
    page.click(".card >> nth=0")
    page.wait_for_selector("#map td")
    page.click("button.play")
    page.wait_for_function("() => document.querySelector('video').currentTime > 0")
    assert asked and all(url.startswith(f"{served.address}{prefix}/") for url in asked)


def test_a_key_is_asked_for_and_opens_the_videos_too(visit, served: Served) -> None:
    """The server of these tests has no key: its refusals are made here, as `hbi.serving.auth` makes them.

    Two are on their way at once, and that of the examples comes last: both go on with the one key that is given.
    """
    held: list[Route] = []

    def guard(route: "Route") -> None:
        path = urlsplit(route.request.url).path
        if (
            path not in ("/search", "/examples")
            or route.request.headers.get("authorization") == "Bearer open sesame"
        ):
            route.continue_()
            return
        held.append(route)
        if path == "/search":
            for refused in reversed(held):
                refused.fulfill(status=401, json={"detail": "send the server's key"})

    page = visit(f"/?q={TEXT}", route=("**/*", guard))
    page.wait_for_selector("#key[open]")
    page.fill("#key input", "open sesame")
    page.press("#key input", "Enter")
    finished(page)
    assert len(held) == 2 and not page.is_visible("#key")
