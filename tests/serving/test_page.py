"""The page as a person uses it: a real browser, and the real server behind it."""

import csv
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import pytest

from hbi.serving.front import Served
from tests.serving.conftest import CLIPS
from tests.support.asking import ask, form
from tests.support.browser import chromium
from tests.support.clips import video

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Route

pytestmark = [
    pytest.mark.browser,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),
]
TEXT = "the red square moves left"
EVIL = '<img src=x onerror="window.broken = 1">'


@pytest.fixture(scope="module")
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


def search(page: "Page", text: str = TEXT) -> None:
    page.fill("#text", text)
    page.press("#text", "Enter")
    finished(page)


def finished(page: "Page") -> None:
    page.wait_for_selector("#results:not(.waiting) .card")


def ids(page: "Page") -> list[str]:
    return page.eval_on_selector_all(".card", "cards => cards.map(card => card.dataset.id)")


def found(served: Served, **asked: Any) -> list[dict[str, Any]]:
    return ask(served.address, "POST", "/search", {"k": 12} | asked).json["results"]


# --- Searching ------------------------------------------------------------------------------------------------------


def test_the_start_has_examples_the_model_and_the_number_of_videos(visit, served: Served) -> None:
    page = visit()
    page.wait_for_selector("#examples button")
    model = ask(served.address, "GET", "/health").json["model"].split("/")[-1]
    assert re.fullmatch(rf"{CLIPS} videos, model .*{re.escape(model)}", page.inner_text("#about"))
    assert not page.is_visible("#pages") and not page.is_visible("#downloads")
    captions = {caption for clip in found(served, text="x", k=CLIPS) for caption in clip["captions"]}
    examples = page.locator("#examples button").all_inner_texts()
    assert len(examples) == 4 and set(examples) <= captions
    page.click("#examples button >> nth=1")
    finished(page)
    assert page.input_value("#text") == examples[1]
    assert not page.is_visible("#start")


def test_results_are_the_servers_with_captions_labels_and_moment(visit, served: Served) -> None:
    page = visit()
    search(page)
    expected = found(served, text=TEXT)
    assert ids(page) == [clip["id"] for clip in expected]
    card = page.locator(".card").first
    shown = card.inner_text()
    for part in (expected[0]["captions"][0], expected[0]["id"], f"{expected[0]['score']:.3f}",
                 f"split {expected[0]['split']}"):  # fmt: skip
        assert part in shown
    assert card.locator(".moment").inner_text() == "{:.1f} s – {:.1f} s".format(*expected[0]["moment"])
    page.wait_for_function("() => document.querySelector('.card img').naturalWidth > 0")
    assert f"1 to 12 of {CLIPS} videos" in page.inner_text("#status")


def test_paging_reload_and_back_keep_the_question(visit, served: Served) -> None:
    page = visit()
    search(page)
    first = ids(page)
    page.click("#next")
    page.wait_for_url("**page=2**")
    finished(page)
    page.wait_for_function(f"() => document.querySelectorAll('.card').length === {CLIPS - 12}")
    second = ids(page)
    assert [*first, *second] == [clip["id"] for clip in found(served, text=TEXT, k=CLIPS)]
    assert page.is_disabled("#next") and page.inner_text("#page") == "Page 2"
    page.reload()
    finished(page)
    assert ids(page) == second and page.input_value("#text") == TEXT
    page.go_back()
    page.wait_for_function("() => document.querySelector('#page').textContent === 'Page 1'")
    assert ids(page) == first
    page.go_back()
    page.wait_for_selector("#examples button")
    assert page.input_value("#text") == "" and not ids(page)


def test_filters_by_split_and_by_any_label(visit, served: Served) -> None:
    page = visit(f"/?q={TEXT}")
    finished(page)
    splits = ask(served.address, "GET", "/health").json["splits"]
    page.select_option("#split", "test")
    page.wait_for_function(f"() => document.querySelectorAll('.card').length === {min(12, splits['test'])}")
    assert set(ids(page)) == {clip["id"] for clip in found(served, text=TEXT, filter={"split": "test"})}
    assert parse_qs(urlsplit(page.url).query) == {"q": [TEXT], "split": ["test"]}
    page.select_option("#split", "")
    page.fill("#label", "split=val")
    page.press("#label", "Enter")
    page.wait_for_function(f"() => document.querySelectorAll('.card').length === {splits['val']}")
    page.fill("#label", "split=nothing of the kind")
    page.press("#label", "Enter")
    page.wait_for_function(
        "() => document.querySelector('#status').textContent.startsWith('No videos match')"
    )
    page.fill("#label", "no sign of equality")
    page.press("#label", "Enter")
    page.wait_for_selector("#status.error")
    assert "key=value" in page.inner_text("#status")


def test_a_video_as_the_question_and_more_like_this(visit, chain: Path, served: Served) -> None:
    page = visit()
    page.set_input_files("#example", str(chain / "corpus" / "videos" / "clip-000005.mp4"))
    finished(page)
    assert ids(page)[0] == "clip-000005" and "like clip-000005.mp4" in page.inner_text("#status")
    page.click(".card >> nth=0")
    page.wait_for_selector("#detail[open]")
    assert not page.is_visible("#why")  # no words, no explanation
    page.click("#like")
    page.wait_for_url("**like=clip-000005**")
    page.wait_for_function("() => !document.querySelector('.card[data-id=\"clip-000005\"]')")
    finished(page)
    first = ids(page)
    assert first == [clip["id"] for clip in found(served, like="clip-000005")]
    page.click("#next")
    page.wait_for_function("() => document.querySelector('#page').textContent === 'Page 2'")
    assert len({*first, *ids(page)}) == CLIPS - 1


# --- One result -----------------------------------------------------------------------------------------------------


def test_an_explanation_opens_at_its_result_beside_the_video(visit, served: Served) -> None:
    page = visit()
    search(page, "the red unknownword moves")
    chosen = ids(page)[2]
    page.click(".card >> nth=2")
    page.wait_for_selector("#map td")
    why = ask(served.address, "POST", "/explain", {"text": "the red unknownword moves", "id": chosen}).json
    assert page.inner_text("#detail-title") == chosen
    rows = page.locator("#map tbody th .word").all_inner_texts()
    assert rows == why["words"] and rows.count("unknownword") == 1 and rows[0] == "[start]"
    cells = page.eval_on_selector_all(
        "#map tbody tr", "rows => rows.map(r => [...r.cells].slice(1).map(c => c.textContent))"
    )
    expected = [[f"{100 * value:.1f}".replace("-0.0", "0.0") for value in row] for row in why["interaction"]]
    assert len(cells) == len(rows) and all(
        float(cell) == pytest.approx(float(wanted), abs=0.11) for row, wants in zip(cells, expected, strict=True)
        for cell, wanted in zip(row, wants, strict=True))  # fmt: skip
    page.wait_for_function(
        "() => [...document.querySelectorAll('#map img')].every(image => image.naturalWidth > 0)"
    )
    assert page.locator("#map img").count() == len(why["times"])
    # What is seen before it plays is the frame that it will play from.
    moment = found(served, text="the red unknownword moves")[2]["moment"]
    first = why["times"].index(moment[0])
    assert page.get_attribute("video", "poster") == f"frames/{chosen}/{first}.jpg"
    watch, reason = page.locator(".watch").bounding_box(), page.locator("#why").bounding_box()
    assert (
        watch and reason and abs(watch["y"] - reason["y"]) < 2 and watch["x"] + watch["width"] <= reason["x"]
    )


def test_values_of_words_and_frames_are_bars_where_the_server_gives_them(visit) -> None:
    def with_values(route: "Route") -> None:
        answer = route.fetch()
        why = answer.json()
        why["word_values"] = [0.3 if i == 1 else -0.1 for i in range(len(why["words"]))]
        why["frame_values"] = [0.2 - 0.1 * i for i in range(len(why["times"]))]
        route.fulfill(response=answer, json=why)

    page = visit(route=("**/explain", with_values))
    search(page)
    page.click(".card >> nth=0")
    page.wait_for_selector("#map td")
    words = page.eval_on_selector_all(
        ".bar-across span", "bars => bars.map(b => [b.className, Math.round(parseFloat(b.style.width))])"
    )
    assert words[:2] == [["adds", 100], ["takes", 33]] and len(words) == 5  # the marks have none
    frames = page.eval_on_selector_all(
        ".bar-up span", "bars => bars.map(b => [b.className, Math.round(parseFloat(b.style.height))])"
    )
    assert frames == [["adds", 100], ["adds", 50], ["adds", 0], ["takes", 50]]
    assert page.is_visible("#values-said")


def test_a_clip_plays_from_its_start_to_its_end_with_controls_under_the_picture(
    visit, served: Served, chain: Path
) -> None:
    source = str(chain / "corpus" / "videos" / "clip-000003.mp4")
    whole = ask(served.address, "GET", "/videos/clip-000003").json
    start, end = whole["end"] * 0.4, whole["end"] * 0.7
    made = {"video": source, "id": "a part", "start": start, "end": end}
    assert ask(served.address, "POST", "/videos", made).status == 201
    try:
        page = visit("/?video=a part")
        page.wait_for_selector("#detail[open] video")
        picture, controls = page.locator("video").bounding_box(), page.locator(".controls").bounding_box()
        assert picture and controls and picture["y"] + picture["height"] <= controls["y"]
        page.evaluate("""() => { window.times = []; const v = document.querySelector('video');
            v.addEventListener('playing', () => times.push(v.currentTime)); }""")
        page.click("button.play")
        page.wait_for_function("() => window.times.length > 0")
        page.wait_for_function("() => document.querySelector('video').paused")
        assert page.evaluate("times[0]") == pytest.approx(start, abs=0.15)
        assert page.evaluate("document.querySelector('video').currentTime") == pytest.approx(end, abs=0.05)
        page.click("button.play")  # from the start again
        page.wait_for_function(f"() => document.querySelector('video').currentTime < {end - 0.05}")
        page.keyboard.press("Escape")
        page.wait_for_selector("#detail", state="hidden")
        page.wait_for_url(lambda url: "video=" not in url)  # Back is not done when the dialog closes
    finally:
        assert ask(served.address, "DELETE", "/videos/a%20part").status == 200


def test_a_frame_of_the_explanation_plays_from_its_time(visit, served: Served) -> None:
    page = visit()
    search(page)
    page.click(".card >> nth=0")
    page.wait_for_selector("#map td")
    time = ask(served.address, "POST", "/explain", {"text": TEXT, "id": ids(page)[0]}).json["times"][2]
    page.evaluate("""() => { window.times = []; const v = document.querySelector('video');
        v.addEventListener('playing', () => times.push(v.currentTime)); }""")
    page.click("#map thead button >> nth=2")
    page.wait_for_function("() => window.times.length > 0")
    assert page.evaluate("times[0]") == pytest.approx(time, abs=0.15)


def test_a_source_that_is_gone_is_said(visit, chain: Path) -> None:
    source = chain / "corpus" / "videos" / "clip-000007.mp4"
    kept = source.read_bytes()
    source.unlink()
    try:
        page = visit("/?video=clip-000007")
        page.click("button.play")
        page.wait_for_selector(".missing")
        assert "the source video is not there any more" in page.inner_text(".missing")
    finally:
        source.write_bytes(kept)


def test_the_url_of_a_result_opens_it_and_back_closes_it(visit) -> None:
    page = visit()
    search(page)
    chosen = ids(page)[1]
    page.click(".card >> nth=1")
    page.wait_for_selector("#map td")
    address = page.url
    assert parse_qs(urlsplit(address).query)["video"] == [chosen]
    page.go_back()
    page.wait_for_selector("#detail", state="hidden")
    assert ids(page)[1] == chosen and parse_qs(urlsplit(page.url).query) == {"q": [TEXT]}
    page.goto(address)
    page.wait_for_selector("#map td")
    assert page.inner_text("#detail-title") == chosen


def test_a_video_is_asked_and_captioned_where_the_model_has_the_heads(visit, served: Served) -> None:
    page = visit("/?video=clip-000002")
    page.fill("#question input", "the red star")
    page.press("#question input", "Enter")
    page.wait_for_selector("#answers li, #told-status.error")
    assert page.inner_text("#told-status") == ""
    question = {"id": "clip-000002", "question": "the red star"}
    ranked = ask(served.address, "POST", "/answer", question).json["answers"]
    expected = [f"{each['answer']} {100 * each['score']:.0f} %" for each in ranked]
    assert [" ".join(line.split()) for line in page.locator("#answers li").all_inner_texts()] == expected
    page.fill("#question input", "what " * 200)
    page.press("#question input", "Enter")
    page.wait_for_selector("#told-status.error")
    assert "the model reads 20" in page.inner_text("#told-status") and not page.locator("#answers li").count()
    page.click("#caption")
    page.wait_for_function("() => document.querySelector('#written').textContent")
    written = ask(served.address, "POST", "/caption", {"id": "clip-000002"}).json["caption"]
    assert page.inner_text("#written").removeprefix("Written by the model: ").strip() == (
        written or "The model wrote nothing."
    )

    def without(route: "Route") -> None:
        answer = route.fetch()
        route.fulfill(response=answer, json=answer.json() | {"heads": []})

    page = visit("/?video=clip-000002", route=("**/health", without))
    page.wait_for_selector("#like")
    assert not page.is_visible("#question") and not page.is_visible("#caption")


# --- Adding and downloading -----------------------------------------------------------------------------------------


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


# --- Keyboard, states, sizes ----------------------------------------------------------------------------------------


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
