"""One result on the page: its video, its explanation, its questions."""

from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

import pytest

from hbi.serving.front import Served
from tests.support.asking import ask
from tests.support.page import TEXT, found, ids, search

if TYPE_CHECKING:
    from playwright.sync_api import Route

pytestmark = [
    pytest.mark.browser,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),
]


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
