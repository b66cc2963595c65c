"""Searching on the page as a person does: a real browser, and the real server behind it."""

import re
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from hbi.serving.front import Served
from tests.serving.conftest import CLIPS
from tests.support.asking import ask
from tests.support.page import TEXT, finished, found, ids, search

pytestmark = [
    pytest.mark.browser,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),
]


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
