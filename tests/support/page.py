"""The page of results, as its tests look at it."""

from typing import TYPE_CHECKING, Any

from hbi.serving.front import Served
from tests.support.asking import ask

if TYPE_CHECKING:
    from playwright.sync_api import Page

TEXT = "the red square moves left"


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
