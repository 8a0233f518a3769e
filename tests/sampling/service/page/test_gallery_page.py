"""The gallery that an evaluation writes, in headless Chromium: on a phone and on a wide screen, light and dark."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from ditmoe.sampling.evaluation.gallery.page import write_gallery
from ditmoe.sampling.evaluation.gallery.real import Compared, Neighbour, RealSide
from ditmoe.sampling.evaluation.gallery.sheets import Sheets
from tests.sampling.service.page.test_browser import AUDIT, CHROMIUM, PATIENCE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium"),
]
NAMES = ("cat", "<b>tench</b>, Tinca tinca, and " + "a_very_long_name_without_a_space" * 3, *map(str, range(2, 7)))
WRONG = """() => {
    const wrong = [];
    const root = document.documentElement;
    if (root.scrollWidth > root.clientWidth) wrong.push(`the page is ${root.scrollWidth} wide`);
    for (const image of document.images) {
        const [width, height] = [image.clientWidth, image.clientHeight];
        if (!image.naturalWidth) wrong.push(`${image.src} does not show`);
        else if (Math.abs(width * image.naturalHeight / (height * image.naturalWidth) - 1) > 0.02)
            wrong.push(`${image.src}: ${image.naturalWidth} x ${image.naturalHeight} at ${width} x ${height}`);
    }
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) {
        const text = texts.currentNode;
        const size = parseFloat(getComputedStyle(text.parentElement).fontSize);
        if (text.textContent.trim() && size < 12) wrong.push(`${size} px: ${text.textContent}`);
    }
    return wrong;
}"""


def write_page(folder: Path, size: int, channels: int) -> Path:
    """A gallery of drawn and real images of noise."""
    random = np.random.default_rng(0)
    sheets = Sheets(NAMES, size, channels)
    images = random.integers(0, 256, (100, size, size, channels), dtype=np.uint8)
    sheets.add(images, np.arange(100) % len(NAMES))
    real = {label: list(images[label : label + 9]) for label in range(len(NAMES) - 1)}
    compared = [
        Compared(label, images[label], tuple(Neighbour(rank, 1.5 + rank, 2.25) for rank in range(3)))
        for label in range(len(NAMES))
    ]
    result: dict[str, Any] = {
        "request": {},
        "network": {
            "name": "classifier",
            "dimension": 64,
            "fingerprint": "f" * 16,
            "settings": {"x" * 60: "y" * 90},
        },
        "real": {"name": "<i>photographs</i>", "fingerprint": "r"},
        "drawn_images": 100,
        "real_images": 300,
        "fid": 12.3,
        "fid_floor": 3.0,
        "fid_ratio": 4.1,
        "fid_floor_images_per_half": 150,
        "kid": 0.01,
        "kid_floor": 0.0,
        "precision": 0.8,
        "precision_floor": 0.9,
        "recall": 0.7,
        "recall_floor": 0.95,
        "warnings": ["<b>few</b> images"],
        "chains": {"sigma": {}, "warnings": ["R̂ <em>is</em> large" + " and so on" * 30]},
        "recogniser": {"accuracy": 0.98, "held_out_accuracy": 0.99, "by_class": [0.5] * len(NAMES)},
    }
    sampler = {"sampler": "heun", "steps": 20, "cfg_scale": 1.5, "seed": 0}
    evaluation = {"id": "step-1-" + "long-" * 30, "which": "ema", "step": 1500, "count": 100, "sampler": sampler}
    folder.mkdir()
    sheet = sheets.sheet(0)
    assert sheet is not None
    sheet.resize((1300, 700)).save(folder / "chains.png")
    metrics = {"evaluation": evaluation, "results": {"classifier": result}}
    pictures = {rank: (images[rank], rank) for rank in range(3)}
    write_gallery(folder, sheets, metrics, "classifier", RealSide(real, compared, pictures, None))
    return folder / "index.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(
            executable_path=CHROMIUM, headless=True, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield made
        made.close()


def opened(browser: Browser, path: Path, width: int, colours: Any, asked: list[str]) -> Page:
    """The page with all its pictures, and details open."""
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=colours)
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda said: asked.append(f"console: {said.text}"))
    page.goto(path.as_uri())
    page.evaluate(
        """() => {
            for (const image of document.images) image.loading = 'eager';
            for (const each of document.querySelectorAll('details')) each.open = true;
            return Promise.all([...document.images].map((image) => image.decode()));
        }"""
    )
    return page


@pytest.mark.parametrize(("size", "channels"), [(8, 1), (64, 3), (256, 3)])
def test_nothing_overflows_or_is_stretched_and_all_can_be_read(
    browser: Browser, tmp_path: Path, size: int, channels: int
) -> None:
    path = write_page(tmp_path / "gallery", size, channels)
    for width in (390, 1400):
        for colours in ("light", "dark"):
            asked: list[str] = []
            page = opened(browser, path, width, colours, asked)
            page.screenshot(path=tmp_path / f"{width}-{colours}.png", full_page=True)
            assert page.evaluate(WRONG) == []
            # A page without scripts has nothing to announce.
            assert [each for each in page.evaluate(AUDIT) if each != "no live region"] == []
            assert all(url.startswith(path.parent.as_uri()) for url in asked), asked
            page.context.close()


def test_the_page_is_read_and_moved_through_by_keyboard(browser: Browser, tmp_path: Path) -> None:
    page = opened(browser, write_page(tmp_path / "gallery", 64, 3), 390, "light", [])
    text = page.inner_text("body")
    assert re.search(r"This is 4\.1 times the floor: as a set, drawn images differ clearly", text)
    assert "<i>photographs</i>" in text and page.locator("i, b").count() == 0
    assert page.locator("section.class").count() == len(NAMES)
    assert all(image.get_attribute("alt") for image in page.locator("img").all())
    reached = []
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.tagName + (document.activeElement.className || '')"))
    assert {"A", "SUMMARY", "DIVscroll"} <= set(reached)
    page.keyboard.press("Home")
    page.locator("nav a", has_text="Nearest real images").focus()
    page.keyboard.press("Enter")
    page.wait_for_url("**/index.html#near")  # of its own accord: the key's event returns before the page has moved
    page.wait_for_function("document.querySelector('#near').getBoundingClientRect().top < innerHeight")
    page.context.close()
