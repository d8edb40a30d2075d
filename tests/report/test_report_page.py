"""The report in a real browser: drawn, silent, readable by mouse and by keyboard, light and dark, wide and narrow."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from standins.fake_job import call

from dilap.cli import report

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytest.importorskip("vl_convert", reason="vl-convert-python is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")


@pytest.fixture
def html(evaluated: Path, tmp_path: Path) -> Path:
    out = tmp_path / "report.html"
    assert call(report.main, evaluated, "-o", out) == 0
    return out


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


def shown(browser: Any, html: Path, **options: Any) -> tuple[Any, list[str]]:
    """The page with every figure drawn, and what it complained of."""
    page, said = browser.new_context(**options).new_page(), []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda one: said.append(one.url) if one.url.startswith("http") else None)
    page.goto(html.as_uri(), timeout=120_000)
    last = page.locator(".plot").count() - 1  # no wait_for_function: the page forbids to evaluate text
    page.locator(".plot[data-drawn] svg.marks").nth(last).wait_for(timeout=120_000)
    return page, said


def test_every_figure_is_drawn_without_a_word(browser: Any, html: Path) -> None:
    page, said = shown(browser, html)
    assert page.locator(".plot svg.marks").count() == 10
    assert said == []


def test_hovering_shows_the_numbers(browser: Any, html: Path) -> None:
    page, _ = shown(browser, html)
    page.locator("#plot-tradeoff-kl .mark-symbol.role-mark path").first.hover(force=True)
    page.wait_for_selector("#vg-tooltip-element.visible")
    assert "Latency (ms)" in page.inner_text("#vg-tooltip-element")


def test_arrow_keys_read_the_points(browser: Any, html: Path) -> None:
    page, _ = shown(browser, html)
    page.locator("#plot-tradeoff-kl").press("ArrowRight")
    first = page.inner_text("#plot-tradeoff-kl + .reader")
    page.locator("#plot-tradeoff-kl").press("ArrowRight")
    assert first.startswith("Run: dense")
    assert page.inner_text("#plot-tradeoff-kl + .reader").startswith("Run: seventy")


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_wider_than_the_screen(browser: Any, html: Path, width: int) -> None:
    page, _ = shown(browser, html, viewport={"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") == width


@pytest.mark.parametrize("width", [390, 1400])
def test_nothing_has_to_be_scrolled_to_sideways(browser: Any, html: Path, width: int) -> None:
    page, _ = shown(browser, html, viewport={"width": width, "height": 800})
    page.evaluate("document.querySelectorAll('main > section > details').forEach(one => one.open = true)")
    assert (
        page.evaluate(
            "[...document.querySelectorAll('nav ul, .scroll, caption, figcaption, pre, h1, h2, td, th')]"
            ".filter(one => one.scrollWidth > one.clientWidth + 1 && one.clientWidth).map(one => one.outerHTML)"
        )
        == []
    )


def test_a_row_on_a_phone_names_its_numbers(browser: Any, html: Path) -> None:
    page, _ = shown(browser, html, viewport={"width": 390, "height": 800})
    label = "getComputedStyle(document.querySelector('#summary ~ .scroll td'), '::before').content"
    assert page.evaluate(label) == '"Method"'


def test_dark_pages_have_dark_figures(browser: Any, html: Path) -> None:
    page, _ = shown(browser, html, color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
    assert set(page.evaluate("[...document.querySelectorAll('.plot')].map(one => one.dataset.drawn)")) == {"dark"}


def test_figures_follow_a_change_of_colours(browser: Any, html: Path) -> None:
    page, said = shown(browser, html, color_scheme="light")
    page.emulate_media(color_scheme="dark")
    page.locator(".plot[data-drawn=dark]").nth(9).wait_for(timeout=120_000)
    assert said == []


def test_paper_is_light_and_shows_the_data(browser: Any, html: Path) -> None:
    page, _ = shown(browser, html)
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("document.querySelectorAll('main > section > details:not([open])').length") == 0
    assert page.pdf()[:4] == b"%PDF"


def test_every_figure_and_table_has_a_name(browser: Any, html: Path) -> None:
    page, _ = shown(browser, html)
    unnamed = "table:not(:has(caption)), .plot:not([aria-label])"
    assert page.locator(unnamed).count() == 0
