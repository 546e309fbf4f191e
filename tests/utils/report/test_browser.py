"""The dataset page in a browser, at the width of a phone and of a screen, with ordinary and with hostile texts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.utils.report.make_facts import hostile_facts, usual_facts
from utils.report.dataset_facts import DatasetFacts
from utils.report.dataset_page import render

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium or chromedriver is not installed")

HEADINGS = ["Summary", "Buckets", "Images", "Captions", "Exposure", "Duplicates", "Skipped", "Bad files"]
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
FACTS: dict[str, DatasetFacts] = {"usual": usual_facts(), "hostile": hostile_facts()}
PHONE, SCREEN = 360, 1280
SMALLEST_TEXT = """
const hasWords = element => [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
const sizes = [...document.body.querySelectorAll('*')]
    .filter(element => !element.closest('svg') && hasWords(element))
    .map(element => parseFloat(getComputedStyle(element).fontSize));
return Math.min(...sizes);
"""
PAIRS = """
const place = element => { const box = element.getBoundingClientRect(); return [box.left, box.top, box.right, box.bottom]; };
return [...document.querySelectorAll('.pair')].map(pair => ({
    images: [...pair.querySelectorAll('img')].map(place), crop: place(pair.querySelector('.crop')) }));
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One browser for all tests of the file, with logs of its console and its requests."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SE_OFFLINE", "true")  # keeps selenium from downloading a driver
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    paths = {name: folder / f"{name}.html" for name in FACTS}
    for name, path in paths.items():
        path.write_text(render(FACTS[name]), encoding="utf-8")
    return paths


def open_page(browser: Any, path: Path, width: int = SCREEN, scheme: str = "light") -> None:
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    for log in ("browser", "performance"):
        browser.get_log(log)  # reading empties it
    browser.get(path.as_uri())


def requests(browser: Any) -> list[str]:
    """Addresses requested since the page was opened."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]


def is_wider_than_the_window(browser: Any) -> bool:
    return bool(browser.execute_script("return document.documentElement.scrollWidth > innerWidth"))


both = pytest.mark.parametrize("name", FACTS)
widths = pytest.mark.parametrize("width", [PHONE, SCREEN])


def test_requests_of_a_page_are_detected(browser: Any, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text('<img src="http://127.0.0.1:9/a.png"><script>boom()</script><p style="width:2000px">wide')
    open_page(browser, bad)
    assert "http://127.0.0.1:9/a.png" in requests(browser)
    assert any("boom" in entry["message"] for entry in browser.get_log("browser"))
    assert is_wider_than_the_window(browser)


@both
def test_page_requests_nothing_and_logs_no_error(browser: Any, pages: dict[str, Path], name: str) -> None:
    open_page(browser, pages[name])
    browser.execute_script("document.querySelectorAll('details').forEach(part => part.open = true)")
    assert browser.get_log("browser") == []
    asked = requests(browser)
    assert pages[name].as_uri() in asked
    assert {address for address in asked if not address.startswith("data:")} == {pages[name].as_uri()}


@both
@widths
def test_page_fits_the_width_of_the_window(browser: Any, pages: dict[str, Path], name: str, width: int) -> None:
    open_page(browser, pages[name], width)
    assert browser.execute_script("return innerWidth") == width
    assert not is_wider_than_the_window(browser)
    browser.execute_script("document.querySelectorAll('details').forEach(part => part.open = true)")
    assert not is_wider_than_the_window(browser)


@both
def test_every_section_and_image_is_visible(browser: Any, pages: dict[str, Path], name: str) -> None:
    open_page(browser, pages[name])
    seen = "return [...document.querySelectorAll('h2')].filter(one => one.checkVisibility()).map(one => one.innerText)"
    assert browser.execute_script(seen) == HEADINGS
    natural = browser.execute_script("return [...document.images].map(image => image.complete ? image.naturalWidth : 0)")
    assert len(natural) == 2 * len(FACTS[name].thumbnails) and min(natural) > 0


@both
@widths
def test_frame_marks_the_crop(browser: Any, pages: dict[str, Path], name: str, width: int) -> None:
    open_page(browser, pages[name], width)
    pairs = browser.execute_script(PAIRS)
    thumbnails = FACTS[name].thumbnails
    buckets = list(dict.fromkeys(image.bucket for image in thumbnails))
    in_order = sorted(thumbnails, key=lambda image: buckets.index(image.bucket))
    for thumbnail, pair in zip(in_order, pairs, strict=True):
        left, top, right, bottom = pair["images"][0]
        fractions = thumbnail.crop
        wanted = [left + fractions[0] * (right - left), top + fractions[1] * (bottom - top)]
        wanted += [left + fractions[2] * (right - left), top + fractions[3] * (bottom - top)]
        assert pair["crop"] == pytest.approx(wanted, abs=1.5)


@widths
def test_both_images_of_a_pair_have_one_height_and_are_side_by_side(
    browser: Any, pages: dict[str, Path], width: int
) -> None:
    open_page(browser, pages["usual"], width)
    for pair in browser.execute_script(PAIRS):
        (_, top, right, bottom), (left, other_top, end, other_bottom) = pair["images"]
        assert (other_top, other_bottom) == pytest.approx((top, bottom), abs=1.5)
        assert right < left < end <= width and bottom - top > 40


@both
@widths
def test_text_is_large_enough(browser: Any, pages: dict[str, Path], name: str, width: int) -> None:
    open_page(browser, pages[name], width)
    assert browser.execute_script(SMALLEST_TEXT) >= 12


def test_page_follows_the_colour_scheme_of_the_reader(browser: Any, pages: dict[str, Path]) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        open_page(browser, pages["usual"], scheme=scheme)
        grounds.append(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert grounds == ["rgb(255, 255, 255)", "rgb(22, 24, 28)"]


def test_long_caption_unfolds_without_a_script(browser: Any, pages: dict[str, Path]) -> None:
    open_page(browser, pages["usual"])
    part = browser.find_element("css selector", "details.long")
    whole, start = part.find_element("css selector", "div.text"), part.find_element("css selector", "summary span")
    assert start.is_displayed() and not whole.is_displayed()
    part.find_element("css selector", "summary").click()
    assert whole.is_displayed() and not start.is_displayed()
