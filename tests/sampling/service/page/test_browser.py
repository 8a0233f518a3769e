"""The page in headless Chromium: each view on both widths and in both colours, by keyboard, with markup in names.

In every test: no error in the console, nothing asked of other hosts, nothing that the policy has to stop.
"""

import base64
import io
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, urlsplit

import httpx
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, Route, expect, sync_playwright

from ditmoe.sampling.service.access import Tokens
from ditmoe.sampling.service.jobs.store import COMPLETED, EXPIRED, JobStore
from ditmoe.sampling.settings.config import SamplerConfig
from ditmoe.sampling.settings.names import sample_steps
from tests.sampling.service.conftest import MARKUP, serving
from tests.sampling.service.page.conftest import CHAINS, SAMPLES, STEPS, write_evaluation
from tests.sampling.small_run import write_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium"),
]

TOKEN = "0123456789abcdef0123"
AUDIT = Path(__file__).with_name("audit.js").read_text(encoding="utf-8")
WIDTHS = (360, 1280)
COLOURS = ("light", "dark")
PATIENCE = 60_000
"""Milliseconds; machines may be busy."""
EVIL_RUN = "<img src=x onerror=alert(1)>"
WATCH = """
window.violations = [];
document.addEventListener('securitypolicyviolation', (event) => {
    violations.push(`${event.violatedDirective} ${event.blockedURI}`);
});
"""


@dataclass
class Site:
    """A service, and what its page must not have done when a test ends."""

    browser: Browser
    client: httpx.Client
    allowed: list[str] = field(default_factory=list)
    """Patterns of console messages that a test has caused itself."""

    @property
    def address(self) -> str:
        return str(self.client.base_url).rstrip("/")

    @contextmanager
    def page(self, width: int = 1280, colours: str = "light", **more: Any) -> Iterator[Page]:
        """A page of a fresh browser profile."""
        context = self.browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=colours, has_touch=width < 500, **more
        )
        context.add_init_script(WATCH)
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        problems: list[str] = []
        page.on("console", lambda said: problems.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: (problems.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda asked: None if self._own(asked.url) else problems.append(f"asks {asked.url}"))
        try:
            yield page
            problems += page.evaluate("window.violations")
        finally:
            context.close()
        left = [each for each in problems if not any(re.search(known, each) for known in self.allowed)]
        assert not left, left

    def _own(self, url: str) -> bool:
        parts = urlsplit(url)
        return parts.scheme == "blob" or f"{parts.scheme}://{parts.netloc}" == self.address

    def go(self, page: Page, view: str, title: str | re.Pattern[str]) -> None:
        """Open a view, and wait until it is there."""
        page.goto("about:blank")
        page.goto(f"{self.address}/#/{view}")
        expect(page.get_by_role("heading", level=1)).to_have_text(title, timeout=PATIENCE)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(
            executable_path=CHROMIUM, headless=True, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield made
        made.close()


@pytest.fixture(scope="module")
def folder(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of which one has markup for its name, and jobs that are done."""
    place = tmp_path_factory.mktemp("browser")
    shutil.copytree(trained, place / "runs")
    write_run(place / "runs" / EVIL_RUN)
    run = place / "runs" / "digits"
    for seed, sampler in ((1, "euler"), (1, "heun"), (2, "heun")):
        write_evaluation(
            run, f"job-{sampler}-{seed}", {"sampler": sampler, "steps": 4, "seed": seed}, 5.0 + seed, 4.0
        )
    store = JobStore(place / "state")
    for seed, sampler in ((1, "euler"), (1, "heun"), (2, "heun")):
        asked = {"kind": "evaluate", "model": "digits", "step": 3, "weights": "ema", "count": 40, "seed": seed}
        asked |= {"sampler": sampler, "steps": 4, "labels": "balanced", "cfg_scale": 1.0}
        request = json.dumps(asked)
        job = store.add(key=None, user="a", kind="evaluate", request=request, weights="w", total=40)
        assert store.take("evaluate") is not None
        store.set(job.id, folder=str(run / "evaluations" / f"job-{sampler}-{seed}"))
        store.end(job.id, COMPLETED)
    old = {
        "kind": "draw",
        "model": "digits",
        "step": 3,
        "weights": "ema",
        "count": 9,
        "seed": 99,
        "sampler": "kar2",
    }
    job = store.add(key=None, user="a", kind="draw", request=json.dumps({**old, "steps": 2}), weights="w", total=9)
    store.set(job.id, state=EXPIRED, done=9, completed=1.8e9)
    store.close()
    return place


@pytest.fixture(scope="module")
def shared(browser: Browser, folder: Path) -> Iterator[Site]:
    with serving(folder / "runs", state=folder / "state") as client:
        yield Site(browser, client)


@pytest.fixture
def site(shared: Site) -> Iterator[Site]:
    yield shared
    shared.allowed.clear()


def pixels(image: Locator) -> np.ndarray:  # type: ignore[type-arg]
    """What a picture shows, grey: [H, W]."""
    values = image.evaluate(
        """async (image) => {
            await image.decode();
            const canvas = document.createElement('canvas');
            [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
            const context = canvas.getContext('2d', { colorSpace: 'srgb' });
            context.drawImage(image, 0, 0);
            const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
            return [canvas.height, canvas.width, ...data];
        }"""
    )
    return np.array(values[2:], dtype=np.uint8).reshape(values[0], values[1], 4)[:, :, 0]


def drawn(client: httpx.Client, **asked: Any) -> list[np.ndarray]:  # type: ignore[type-arg]
    """What the API draws."""
    reply = client.post("/v1/images/generations", json=asked)
    assert reply.status_code == 200, reply.text
    return [np.array(Image.open(io.BytesIO(base64.b64decode(each["b64_json"])))) for each in reply.json()["data"]]


def jobs_of(client: httpx.Client, **wanted: Any) -> list[str]:
    """Jobs whose requests are such."""
    data = client.get("/v1/jobs?limit=200").json()["data"]
    return [job["id"] for job in data if all(job["request"].get(key) == value for key, value in wanted.items())]


def wait_for(page: Page, condition: Callable[[], bool]) -> None:
    for _ in range(PATIENCE // 100):
        if condition():
            return
        page.wait_for_timeout(100)
    raise AssertionError("it never came to that")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("colours", COLOURS)
def test_every_view_can_be_read_by_all(site: Site, width: int, colours: str) -> None:
    [heun] = jobs_of(site.client, sampler="heun", seed=2)
    views = {
        "jobs": "Jobs",
        f"jobs/{heun}": re.compile("Evaluation "),
        "playground?model=digits&seed=1&sampler=euler&steps=2&n=4&with=heun&with_steps=2": "Playground",
        "gallery": "Gallery",
        "gallery?run=digits&evaluation=euler-10-0&class=0": "Gallery",
        "runs": "Runs",
        "runs/digits": "digits",
        "runs/digits/evaluations/chains": re.compile("dlg:euler"),
        "compare": "Compare",
        "jobs/": "Jobs",
    }
    with site.page(width, colours, reduced_motion="reduce") as page:
        for view, title in views.items():
            site.go(page, view, title)
            if view.startswith("playground"):
                expect(page.locator(".results figure")).to_have_count(4)
            page.wait_for_load_state("networkidle")
            for each in page.locator("main summary").all():
                each.click()
            page.wait_for_timeout(100)
            problems = page.evaluate(AUDIT)
            assert not problems, (view, problems)
            moving = page.evaluate(
                "[...document.querySelectorAll('*')].filter((each) => parseFloat(getComputedStyle(each)"
                ".transitionDuration) > 0 || getComputedStyle(each).animationName !== 'none').length"
            )
            assert moving == 0, view
            ground = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
            assert (sum(ground) < 150) == (colours == "dark"), ground


def test_an_address_without_a_view_says_so(site: Site) -> None:
    with site.page() as page:
        for view in ("nowhere", "jobs/a/b", "%E0%A4%A", "runs/digits/evaluations"):
            site.go(page, view, "There is no such view")
        page.get_by_role("link", name="To the jobs").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("Jobs")


def test_the_audit_finds_what_is_wrong(site: Site) -> None:
    """Otherwise the test above says nothing."""
    with site.page(360) as page:
        site.go(page, "jobs", "Jobs")
        page.evaluate(
            """() => {
                const add = (tag, attributes, text) => {
                    const element = document.createElement(tag);
                    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
                    element.textContent = text || '';
                    document.querySelector('main > .view').append(element);
                    return element;
                };
                add('input', {});
                add('button', {});
                add('h4', {}, 'deep');
                add('p', { id: 'main' }, 'twice');
                add('p', {}, 'faint').style.color = '#bbb';
                add('div', {}, 'wide').style.width = '500px';
                add('button', {}, 'x').style.cssText = 'min-height: 0; height: 10px; padding: 0';
                const image = add('img', { src: 'page/icon.svg', alt: 'flat' });
                image.style.cssText = 'width: 100px; height: 20px';
                return image.decode();
            }"""
        )
        found = " ".join(page.evaluate(AUDIT))
        wanted = (
            "no label",
            "no name",
            "headings",
            "id main twice",
            "contrast 1.",
            "wider",
            "small to hit",
            "100,20",
        )
        for each in wanted:
            assert each in found, (each, found)


def test_the_playground_by_keyboard_alone(site: Site) -> None:
    """Two samplers of one seed, with the bits of the API; and the address has all of it."""

    def outlined() -> bool:
        return bool(page.evaluate("getComputedStyle(document.activeElement).outlineStyle !== 'none'"))

    def tab_to(label: str) -> None:
        for _ in range(60):
            page.keyboard.press("Tab")
            name = page.evaluate(
                "(document.activeElement.labels?.[0] || document.activeElement).textContent.trim()"
                " || document.activeElement.getAttribute('aria-label')"
            )
            assert outlined(), f"{name} shows no focus"
            if name == label:
                return
        raise AssertionError(f"no way to {label}")

    with site.page() as page:
        site.go(page, "playground", "Playground")
        page.keyboard.press("Tab")
        expect(page.locator("#skip")).to_be_focused()
        page.keyboard.press("Enter")
        expect(page.locator("#main")).to_be_focused()
        tab_to("Run")
        page.keyboard.type("digits")
        tab_to("Class")
        page.keyboard.type("5")
        for label, value in (("Seed", "11"), ("Images", "3")):
            tab_to(label)
            page.keyboard.press("Control+A")
            page.keyboard.type(value)
        tab_to("Sampler")
        page.keyboard.type("heun")
        for label, value in (("Steps", "3"), ("Guidance", "1.5")):
            tab_to(label)
            page.keyboard.press("Control+A")
            page.keyboard.type(value)
        tab_to("Compare with a second sampler")
        page.keyboard.press("Space")
        tab_to("Second sampler")
        page.keyboard.type("euler")
        tab_to("Its steps")
        page.keyboard.press("Control+A")
        page.keyboard.type("4")
        page.keyboard.press("Enter")
        expect(page.locator(".results figure")).to_have_count(3)
        expect(page.locator("#said")).to_have_text("3 images drawn")
        asked = {"model": "digits", "class": 5, "seed": 11, "n": 3, "cfg_scale": 1.5}
        heun = drawn(site.client, **asked, sampler="heun", steps=3)
        euler = drawn(site.client, **asked, sampler="euler", steps=4)
        assert any((a != b).any() for a, b in zip(heun, euler, strict=True))

        def compare(shown: Page) -> None:
            for number, (first, second) in enumerate(zip(heun, euler, strict=True)):
                images = shown.locator(".results figure").nth(number).locator("img")
                expect(images).to_have_count(2)
                assert np.array_equal(pixels(images.nth(0)), first)
                assert np.array_equal(pixels(images.nth(1)), second)

        compare(page)
        expect(page.locator(".results figcaption").first).to_contain_text("seed 11 · image 0")
        address = page.url
    for name, value in {"model": "digits", "class": "5", "seed": "11", "sampler": "heun", "with": "euler"}.items():
        assert f"{name}={value}" in address
    with site.page() as page:
        page.goto(address)
        expect(page.locator(".results figure")).to_have_count(3)
        compare(page)


def test_steps_without_blocks_and_an_interval_of_guidance_in_the_playground(site: Site) -> None:
    """By keyboard on a phone: beside the same sampler with all blocks, and the address has all of it."""
    asked = {"model": "digits", "class": 3, "seed": 7, "n": 2, "sampler": "euler", "steps": 9, "cfg_scale": 2.0}
    paced = {"cache_interval": 3, "cache_order": 0, "cfg_sigma_min": 0.2, "cfg_sigma_max": 4.0}
    cheap = drawn(site.client, **asked, **paced)
    full = drawn(site.client, **asked, **{**paced, "cache_interval": 1})
    plain = drawn(site.client, **asked)
    for other in (full, plain):
        assert any((a != b).any() for a, b in zip(cheap, other, strict=True))

    def compare(shown: Page) -> None:
        told = shown.locator(".told li")
        of_cheap = "euler, 9 steps, own, blocks at every 3 steps, order 0, guidance 2 at 0.2 < σ ≤ 4: 9 eval"
        expect(told.nth(0)).to_contain_text(of_cheap)
        expect(told.nth(0)).to_contain_text(re.compile(r"in \d+ passes through the network and \d+ extrapolated"))
        expect(told.nth(1)).to_contain_text("euler, 9 steps, own, guidance 2 at 0.2 < σ ≤ 4: 9 evaluations, in")
        expect(told.nth(1)).not_to_contain_text("extrapolated")
        for number, pair in enumerate(zip(cheap, full, strict=True)):
            images = shown.locator(".results figure").nth(number).locator("img")
            expect(images).to_have_count(2)
            for place, known in enumerate(pair):
                assert np.array_equal(pixels(images.nth(place)), known)

    with site.page(360, "dark") as page:
        address = "&".join(f"{name}={value:g}" for name, value in asked.items() if not isinstance(value, str))
        site.go(page, f"playground?model=digits&{address}&with=euler&with_steps=9", "Playground")
        page.get_by_label("Sampler", exact=True).select_option("euler")
        page.get_by_text("More settings").press("Enter")
        for label, value in (
            ("Blocks at every N-th step", "3"),
            ("Order of the extrapolation", "0"),
            ("Guidance above σ", "0.2"),
            ("Guidance up to σ", "4"),
        ):
            control = page.get_by_label(label, exact=True)
            control.focus()
            page.keyboard.press("Control+A")
            page.keyboard.type(value)
        page.keyboard.press("Enter")
        compare(page)
        problems = page.evaluate(AUDIT)
        assert not problems, problems
        address = page.url
    for name, each in paced.items():
        assert f"{name}={each:g}" in address
    with site.page() as page:
        page.goto(address)
        compare(page)
        expect(page.get_by_label("Guidance up to σ", exact=True)).to_be_visible()


def test_a_sampler_that_has_no_steps_refuses_the_cache(site: Site) -> None:
    site.allowed += ["status of 400"]
    with site.page() as page:
        site.go(page, "playground?model=digits&cache_interval=2", "Playground")
        page.get_by_label("Sampler", exact=True).select_option("rk45")
        page.get_by_role("button", name="Draw").click()
        expect(page.get_by_role("alert")).to_contain_text("cache_interval with sampler = rk45: each image")


def test_a_job_with_fewer_blocks_leads_to_the_same_image(site: Site) -> None:
    with site.page() as page:
        site.go(page, "jobs", "Jobs")
        page.get_by_text("New job").click()
        form = page.get_by_role("form", name="New job")
        for label, value in (("Images", "3"), ("Steps", "8"), ("Seed", "83"), ("Guidance", "2")):
            form.get_by_label(label, exact=True).fill(value)
        form.get_by_label("Run").select_option("digits")
        form.get_by_label("Sampler").select_option("heun")
        form.get_by_text("More settings").click()
        form.get_by_label("Blocks at every N-th step").fill("4")
        form.get_by_label("Guidance up to σ").fill("6")
        form.get_by_role("button", name="Give the job").click()
        wait_for(page, lambda: len(jobs_of(site.client, seed=83)) == 1)
        [job_id] = jobs_of(site.client, seed=83, cache_interval=4, cfg_sigma_max=6, cache_order=1, cfg_sigma_min=0)
        site.go(page, f"jobs/{job_id}", re.compile("Draw "))
        expect(page.locator("main .badge")).to_have_text("completed")
        first = pixels(page.locator("main .tile img").first)
        page.locator("main .tile a").first.click()
        expect(page.locator(".told")).to_contain_text("blocks at every 4 steps, order 1, guidance 2 at 0 < σ ≤ 6")
        assert np.array_equal(pixels(page.locator(".results img").first), first)


def test_images_of_a_class_that_was_named_are_drawn_again_of_it(site: Site) -> None:
    asked = {"model": "digits", "class": MARKUP, "sampler": "euler", "steps": 4, "seed": 84}
    job_id = site.client.post("/v1/jobs", json={"kind": "draw", "count": 2, **asked}).json()["id"]
    with site.page() as page:
        site.go(page, f"jobs/{job_id}", re.compile("Draw "))
        expect(page.locator("main .badge")).to_have_text("completed")
        page.locator("main .tile a").nth(1).click()
        expect(page.locator(".results figcaption")).to_contain_text("seed 84 · image 1")
        expect(page.locator(".results figcaption span").first).to_have_text(MARKUP)
        [known] = drawn(site.client, **asked, first=1)
        assert np.array_equal(pixels(page.locator(".results img")), known)


SETTINGS: dict[str, dict[str, Any]] = {
    "sampler": {"sampler": "ddim"},
    "steps": {"steps": 3},
    "schedule": {"sampler": "heun", "schedule": "own"},
    "ddim_eta": {"sampler": "ddim", "ddim_eta": 0.5},
    "churn": {"sampler": "kar2", "churn": 7.5},
    "churn_min": {"sampler": "kar2", "churn_min": 0.25},
    "churn_max": {"sampler": "kar2", "churn_max": 3.5},
    "churn_noise": {"sampler": "kar2", "churn_noise": 1.0625},
    "tolerance": {"sampler": "rk45", "tolerance": 0.01},
    "corrector_steps": {"sampler": "reverse-diffusion", "corrector_steps": 2},
    "corrector_snr": {"sampler": "euler-maruyama", "corrector_steps": 1, "corrector_snr": 0.25},
    "diffusion_form": {"sampler": "sit-sde", "diffusion_form": "decreasing"},
    "diffusion_norm": {"sampler": "sit-sde", "diffusion_norm": 0.5},
    "last_step": {"sampler": "sit-sde", "last_step": "tweedie"},
    "last_step_size": {"sampler": "sit-sde", "last_step_size": 0.125},
    "tweedie": {"sampler": "heun", "tweedie": True},
    "cfg_scale": {"cfg_scale": 3.25},
    "cfg_channels": {"cfg_scale": 2.0, "cfg_channels": 1},
    "cfg_sigma_min": {"cfg_scale": 2.0, "cfg_sigma_min": 0.25},
    "cfg_sigma_max": {"cfg_scale": 2.0, "cfg_sigma_max": 4.0},
    "cache_interval": {"cache_interval": 2},
    "cache_order": {"cache_interval": 3, "cache_order": 0},
    "ddpm_timestep": {"sampler": "heun", "ddpm_timestep": "nearest"},
    "dlg": {"sampler": "dlg:euler", "dlg": {"samples_per_chain": 3, "skip": 2}},
    "precision": {"precision": "bf16"},
    "seed": {"seed": 12345},
}
"""Each setting of a sampler at another value than its default, with what it needs."""


@pytest.mark.parametrize(
    "name", sorted(set(SamplerConfig.model_fields) - {"compile"})
)  # which the service refuses
def test_a_link_to_the_playground_has_every_setting(site: Site, name: str) -> None:
    """As an evaluation stores it and as a job has it; the page asks for what the address says."""
    config = SamplerConfig.model_validate({"sampler": "euler", "steps": 4, "seed": 8} | SETTINGS[name])
    assert getattr(config, name) != SamplerConfig.model_fields[name].default
    asked_of_job = {"model": "digits", "kind": "draw", "count": 1, "class": 3, **config.model_dump(mode="json")}
    with site.page() as page:
        site.go(page, "jobs", "Jobs")
        for settings in (config.plain(), asked_of_job):
            link = page.evaluate(
                """async (settings) => {
                    const { playgroundLink } = await import('/page/pictures.js');
                    const { settings: usual } = await (await fetch('v1/samplers')).json();
                    return playgroundLink(usual, 'digits', 3, 'weights', settings, 3, 5);
                }""",
                settings,
            )
            page.goto("about:blank")
            with page.expect_request("**/v1/images/generations") as asked:
                page.goto(f"{site.address}/{link}")
            expect(page.locator(".results img")).to_have_count(1)
            body = asked.value.post_data_json
            rest = {"model": "digits", "step": 3, "weights": "weights", "class": 3, "first": 5, "n": 1}
            assert {key: body.pop(key) for key in rest} == rest
            assert SamplerConfig.model_validate(body) == config
            shown, given = (dict(parse_qsl(address.partition("?")[2])) for address in (page.url, link))
            assert shown == given and len(given) > 5, "the page says the same of itself"


def test_a_sampler_comes_with_its_steps(site: Site) -> None:
    """As the API takes them where none are given; a number that was typed, or is in the address, stays."""
    with site.page() as page:
        site.go(page, "playground?model=digits&with=heun&with_steps=2", "Playground")
        steps, others = page.get_by_label("Steps", exact=True), page.get_by_label("Its steps")
        sampler, second = (page.get_by_label(label, exact=True) for label in ("Sampler", "Second sampler"))
        for name in ("kar2", "dpm-solver++", "euler-maruyama"):
            sampler.select_option(name)
            expect(steps).to_have_value(str(sample_steps(name)))
        assert f"steps={sample_steps('euler-maruyama')}&" in page.url
        second.select_option("kar2")
        expect(others).to_have_value("2")
        steps.fill("4")
        sampler.select_option("dpm-solver++")
        expect(steps).to_have_value("4")
        page.get_by_label("Images").fill("2")
        page.get_by_role("button", name="Draw").click()
        images = page.locator(".results img")
        expect(images).to_have_count(4)
        asked = {"model": "digits", "seed": 0, "n": 2, "cfg_scale": 1.5, "sampler": "dpm-solver++", "steps": 4}
        for number, known in enumerate(drawn(site.client, **asked)):
            assert np.array_equal(pixels(images.nth(2 * number)), known)


def test_settings_without_a_field_are_told_at_the_one_for_others(site: Site) -> None:
    site.allowed += ["status of 400"]
    with site.page() as page:
        site.go(page, "playground?model=digits", "Playground")
        page.get_by_text("More settings").click()
        other = page.get_by_label("Other settings")
        for wrong in ("{", "[]", '{"churn": -1}', '{"chrun": 1}'):
            other.fill(wrong)
            page.get_by_role("button", name="Draw").click()
            expect(other).to_have_attribute("aria-invalid", "true")
        other.fill('{"churn": 5, "churn_max": 60}')
        page.get_by_label("Sampler", exact=True).select_option("kar2")
        page.get_by_label("Steps", exact=True).fill("4")
        page.get_by_label("Images").fill("2")
        page.get_by_role("button", name="Draw").click()
        images = page.locator(".results img")
        expect(images).to_have_count(2)
        asked = {"model": "digits", "seed": 0, "n": 2, "cfg_scale": 1.5, "sampler": "kar2", "steps": 4}
        for number, known in enumerate(drawn(site.client, **asked, churn=5.0, churn_max=60.0)):
            assert np.array_equal(pixels(images.nth(number)), known)


def test_what_is_wrong_is_told_at_its_field(site: Site) -> None:
    site.allowed += ["status of 400"]
    with site.page() as page:
        site.go(page, "playground?model=digits", "Playground")
        page.get_by_label("Steps", exact=True).fill("900000")
        page.get_by_role("button", name="Draw").click()
        steps = page.get_by_label("Steps", exact=True)
        expect(steps).to_have_attribute("aria-invalid", "true")
        expect(steps).to_be_focused()
        described = (steps.get_attribute("aria-describedby") or "").split()[0]
        expect(page.locator(f"#{described}")).to_contain_text("passes through the network")
        expect(page.locator(".results")).to_have_text("No images were drawn.")


def test_chains_are_drawn_in_the_playground(site: Site) -> None:
    """With settings as JSON, of which what is no JSON is told at the field; and the gallery leads to them."""
    with site.page() as page:
        site.go(page, "playground?model=digits", "Playground")
        settings = page.get_by_label("Settings of the chains")
        expect(settings).to_be_hidden()
        page.get_by_label("Sampler", exact=True).select_option("dlg:euler")
        expect(settings).to_be_visible()
        for wrong in ("{", "[]", "7"):
            settings.fill(wrong)
            page.get_by_role("button", name="Draw").click()
            expect(settings).to_have_attribute("aria-invalid", "true")
        dlg = {"samples_per_chain": 3, "skip": 2}
        settings.fill(json.dumps(dlg))
        page.get_by_label("Images").fill("5")
        page.get_by_label("Steps", exact=True).fill("2")
        page.get_by_role("button", name="Draw").click()
        images = page.locator(".results img")
        expect(images).to_have_count(5)
        asked = {"model": "digits", "seed": 0, "n": 5, "cfg_scale": 1.5, "sampler": "dlg:euler", "steps": 2}
        for number, known in enumerate(drawn(site.client, **asked, dlg=dlg)):
            assert np.array_equal(pixels(images.nth(number)), known)
        address = page.url
    with site.page() as page:
        page.goto(address)
        expect(page.locator(".results img")).to_have_count(5)
        site.go(page, "gallery?run=digits&evaluation=chains&class=2", "Gallery")
        page.locator(".tile a").nth(1).click()
        expect(page.locator(".results figcaption")).to_contain_text("seed 0 · image 9")


def test_an_expired_job_says_so(site: Site) -> None:
    [job_id] = jobs_of(site.client, seed=99)
    with site.page() as page:
        site.go(page, f"jobs/{job_id}", re.compile("Draw "))
        expect(page.locator(".badge")).to_have_text("expired")
        expect(page.get_by_text("what it made is removed")).to_be_visible()


def test_a_job_is_given_and_its_progress_and_images_come_by_themselves(site: Site) -> None:
    with site.page() as page:
        site.go(page, "jobs", "Jobs")
        page.get_by_text("New job").click()
        form = page.get_by_role("form", name="New job")
        form.get_by_label("Run").select_option("digits")
        form.get_by_label("Images").fill("100000")
        form.get_by_label("Sampler").select_option("euler")
        form.get_by_label("Steps").fill("20")
        form.get_by_label("Seed").fill("21")
        form.get_by_role("button", name="Give the job").click()
        wait_for(page, lambda: len(jobs_of(site.client, seed=21)) == 1)
        [job_id] = jobs_of(site.client, seed=21)
        line = page.locator(".job", has_text="seed 21")
        expect(line.locator(".badge")).to_have_text("in progress")
        line.get_by_role("link").click()
        expect(page.get_by_role("heading", level=1)).to_be_focused()
        page.evaluate(
            """() => {
                window.seen = [];
                window.shown = document.querySelector('main');
                const note = () => seen.push(document.querySelector('main progress')?.value ?? -1);
                const all = { subtree: true, childList: true, attributes: true };
                new MutationObserver(note).observe(document.querySelector('main'), all);
            }"""
        )
        expect(page.locator("main [data-mode]")).to_have_attribute("data-mode", "live")
        expect(page.locator("main .tile").first).to_be_visible()
        wait_for(page, lambda: len(set(page.evaluate("seen"))) > 3)
        seen = page.evaluate("seen")
        assert seen == sorted(seen) and all(done % 64 == 0 for done in seen), (
            "it grew while the page was looked at"
        )
        assert page.evaluate("shown === document.querySelector('main')")
        [alone] = drawn(site.client, model="digits", sampler="euler", steps=20, seed=21, first=2)
        assert np.array_equal(pixels(page.locator("main .tile img").nth(2)), alone)
        page.get_by_role("button", name="More images").click()
        expect(page.locator("main .tile")).to_have_count(48)
        page.get_by_role("button", name="Cancel").click()
        expect(page.locator("main .badge")).to_have_text("cancelled")
        expect(page.get_by_role("button", name="Cancel")).to_be_hidden()
        expect(page.locator("#said")).to_have_text(re.compile(r"cancelled, \d+ of 100000 images"))
        page.get_by_text(re.compile(r"^\d+ files$")).click()
        with page.expect_download() as download:
            page.get_by_role("button", name="chunks/00001.npz").click()
        with np.load(download.value.path()) as chunk:
            assert chunk["first"] == 64
    assert site.client.get(f"/v1/jobs/{job_id}").json()["status"] == "cancelled"


def test_without_the_stream_a_job_is_asked_for(site: Site) -> None:
    site.allowed += ["ERR_FAILED"]
    body = {"kind": "draw", "model": "digits", "count": 100_000, "sampler": "euler", "steps": 20, "seed": 31}
    job_id = site.client.post("/v1/jobs", json=body).json()["id"]
    with site.page() as page:
        page.route("**/events", lambda route: route.abort())
        site.go(page, f"jobs/{job_id}", re.compile("Draw "))
        expect(page.locator("main [data-mode]")).to_have_attribute("data-mode", "polling")
        expect(page.get_by_text("asked every two seconds")).to_be_visible()
        expect(page.locator("main .tile")).to_have_count(24)
        site.client.post(f"/v1/jobs/{job_id}/cancel", json={})
        expect(page.locator("main .badge")).to_have_text("cancelled")


def test_a_stream_that_breaks_is_connected_again(site: Site) -> None:
    body = {"kind": "draw", "model": "digits", "count": 128, "sampler": "euler", "steps": 60, "seed": 61}
    job = site.client.post("/v1/jobs", json=body).json()
    asked: list[str] = []

    def break_once(route: Route) -> None:
        asked.append(route.request.url)
        if len(asked) > 1:
            route.continue_()
        else:
            started = {**job, "status": "in_progress", "started_at": job["created_at"]}
            route.fulfill(content_type="text/event-stream", body=f"data: {json.dumps(started)}\n\n")

    with site.page() as page:
        page.route("**/events", break_once)
        site.go(page, f"jobs/{job['id']}", re.compile("Draw "))
        expect(page.locator("main .badge")).to_have_text("completed")
        assert len(asked) == 2


def test_when_the_service_is_away_the_page_waits_for_it(site: Site) -> None:
    site.allowed += ["ERR_CONNECTION_REFUSED"]
    with site.page() as page:
        site.go(page, "jobs", "Jobs")
        expect(page.locator(".job").first).to_be_visible()
        before = page.locator(".job").count()
        page.route("**/v1/jobs?*", lambda route: route.abort("connectionrefused"))
        expect(page.get_by_text("The service does not answer")).to_be_visible()
        page.unroute("**/v1/jobs?*")
        expect(page.get_by_text("The service does not answer")).to_be_hidden()
        assert page.locator(".job").count() == before


def test_markup_in_names_is_text(site: Site) -> None:
    """Of a class, a run, a set of images, and warnings."""
    [heun] = jobs_of(site.client, sampler="heun", seed=2)
    views = {
        "playground?model=digits": ("Playground", MARKUP),
        "gallery?run=digits&evaluation=euler-10-0": ("Gallery", MARKUP),
        "runs": ("Runs", EVIL_RUN),
        f"runs/{quote(EVIL_RUN, safe='')}": (EVIL_RUN, EVIL_RUN),
        "runs/digits/evaluations/chains": (re.compile("dlg:euler"), "R̂ <em>is</em> large"),
        "runs/digits/evaluations/heun-10": (re.compile("heun"), "<b>few</b> images"),
        f"jobs/{heun}": (re.compile("Evaluation "), "<i>digits</i>"),
        f"playground?model={quote(EVIL_RUN, safe='')}&seed=1&sampler=euler&steps=1": ("Playground", EVIL_RUN),
    }
    with site.page() as page:
        for view, (title, text) in views.items():
            site.go(page, view, title)
            wait_for(page, lambda text=text: text in (page.locator("main").text_content() or ""))  # type: ignore[misc]
            odd = page.locator("main script, main i, main em, main img[src='x'], main caption b, main .warning b")
            assert odd.count() == 0, view
        expect(page.locator(".results figure").first).to_be_visible()


def test_the_token_is_asked_for_and_kept_in_the_tab(browser: Browser, folder: Path) -> None:
    with serving(folder / "runs", tokens=Tokens({TOKEN: ""}), loopback=False) as client:
        site = Site(browser, client, ["status of 401"])
        with site.page(360) as page:
            site.go(page, "gallery?run=digits&evaluation=euler-10-0", "Token")
            page.get_by_label("Token of the service").fill("wrong")
            page.keyboard.press("Enter")
            expect(page.get_by_role("alert")).to_have_text("That is not the service's token.")
            assert not page.evaluate(AUDIT)
            page.get_by_label("Token of the service").fill(TOKEN)
            page.keyboard.press("Enter")
            expect(page.get_by_role("heading", level=1)).to_have_text("Gallery")
            expect(page.locator(".tile img").first).to_be_visible()
            assert page.evaluate("Object.values(sessionStorage)") == [TOKEN]
            assert page.evaluate("Object.values(localStorage)") == [] and TOKEN not in page.url
            page.reload()
            expect(page.get_by_role("heading", level=1)).to_have_text("Gallery")
            page.get_by_role("button", name="Sign out").click()
            expect(page.get_by_role("heading", level=1)).to_have_text("Token")
            assert page.evaluate("Object.values(sessionStorage)") == []
        with site.page() as page:
            site.go(page, "jobs", "Token")


def test_the_gallery_shows_classes_and_seeds_and_leads_to_the_playground(site: Site) -> None:
    """Image i of the evaluations is a plain of grey i."""
    with site.page() as page:
        site.go(page, "gallery?run=digits&evaluation=euler-10-1", "Gallery")
        first = page.locator(".class-row").nth(3)
        first.scroll_into_view_if_needed()
        expect(first.locator("figcaption").nth(1)).to_have_text("seed 1image 13")
        page.get_by_label("Class").select_option("3")
        expect(page.locator(".tile")).to_have_count(4)
        assert [int(pixels(each)[0, 0]) for each in page.locator(".tile img").all()] == [3, 13, 23, 33]
        page.get_by_role("button", name="Next class").click()
        expect(page.locator(".tile img").first).to_have_attribute("alt", "class 4, image 4")
        page.locator(".tile a").nth(1).click()
        expect(page.get_by_role("heading", level=1)).to_have_text("Playground")
        expect(page.locator(".results figcaption").first).to_contain_text("seed 1 · image 14")
        asked = {"model": "digits", "step": 3, "seed": 1, "first": 14, "class": 4}
        again = drawn(site.client, **asked, sampler="euler", schedule="karras", steps=10)
        assert np.array_equal(pixels(page.locator(".results img")), again[0])


def test_of_images_that_are_not_kept_the_gallery_shows_the_sheets(site: Site, folder: Path) -> None:
    gone = write_evaluation(
        folder / "runs" / "other", "heun-gone", {"sampler": "heun", "steps": 4}, 2.0, 7.0, step=0
    )
    shutil.rmtree(gone / "chunks")
    (gone / "gallery").mkdir()
    Image.new("L", (40, 20), 7).save(gone / "gallery" / "class-00003.png")
    with site.page() as page:
        site.go(page, "runs/other/evaluations/heun-gone", re.compile("heun"))
        page.get_by_role("link", name="Pictures of the first ones").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("Gallery")
        expect(page.locator(".sheet h2")).to_have_text("3")
        assert (pixels(page.locator(".sheet img")) == 7).all()


def test_fid_against_nfe_and_step(site: Site) -> None:
    """Points at the means of the seeds, with whiskers from the least to the most, and a table of the same."""
    with site.page() as page:
        site.go(page, "runs/digits", "digits")
        chart = page.locator("figure.chart", has=page.locator("figcaption", has_text="FID against NFE"))
        chart.locator("summary", has_text="As a table").click()
        expect(chart.locator("tbody tr").first).to_be_visible()
        rows = [row.inner_text().split("\t") for row in chart.locator("tbody tr").all()]
        euler = {row[1]: row[2:] for row in rows if row[0] == "euler, step 3"}
        assert euler["5"] == ["4.5", "4 to 5"] and euler["10"] == ["2.25", "2 to 2.5"]
        assert euler["20"] == ["1.5", "1.25 to 1.75"]
        button = chart.get_by_role("button", name="euler, step 3", exact=True)
        colour = re.search(r"\bc\d", button.get_attribute("class") or "")
        assert colour is not None
        points = chart.locator(f"circle.point.{colour[0]}")
        expect(points).to_have_count(4)
        expect(chart.locator(f"path.whisker.{colour[0]}")).to_have_count(4)
        heights = [float(each.get_attribute("cy") or "") for each in points.all()]
        places = [float(each.get_attribute("cx") or "") for each in points.all()]
        assert heights == sorted(heights) and places == sorted(places), "fewer evaluations, higher FID"
        points.nth(2).hover(force=True)
        expect(chart.locator(".tooltip")).to_contain_text("2.25 (2 to 2.5)")
        button.click()
        expect(points).to_have_count(0)
        of_steps = page.locator("figure.chart", has=page.locator("figcaption", has_text="FID against step"))
        of_steps.locator("summary", has_text="As a table").click()
        expect(of_steps.locator("tbody tr").first).to_be_visible()
        told = [row.inner_text().split("\t") for row in of_steps.locator("tbody tr").all()]
        assert {row[1] for row in told if row[0].startswith("euler")} == {"0", "3"}
        page.get_by_label("Figure").select_option("kid")
        kid = page.locator("figure.chart", has=page.locator("figcaption", has_text="KID against NFE"))
        expect(kid.locator("path.whisker").first).to_be_attached()


def test_a_run_shows_its_newest_preview_when_it_comes(site: Site, folder: Path) -> None:
    run = folder / "runs" / "digits"
    with site.page() as page:
        page.clock.install()
        site.go(page, "runs", "Runs")
        card = page.locator(".cards .card", has=page.get_by_role("link", name="digits", exact=True))
        expect(card.locator("img")).to_have_attribute("alt", re.compile("step 40"))
        site.go(page, "runs/digits", "digits")
        expect(page.locator(".preview img")).to_have_attribute("alt", re.compile("step 40"))
        assert (pixels(page.locator(".preview img")) == 40).all()
        page.get_by_label("Step of the preview").press("ArrowLeft")
        expect(page.locator(".preview img")).to_have_attribute("alt", re.compile("step 10"))
        page.get_by_label("Step of the preview").press("ArrowRight")
        Image.new("L", (40, 20), 50).save(run / "samples" / "preview-step-00000050.png")
        with (run / "stats.jsonl").open("a") as records:
            records.write(json.dumps({"step": 50, "loss": 0.015}) + "\n")
        write_evaluation(run, "euler-40-0", {"sampler": "euler", "steps": 40}, 1.2, 40.0)
        page.clock.fast_forward(11_000)
        expect(page.locator(".preview img")).to_have_attribute("alt", re.compile("step 50"))
        assert (pixels(page.locator(".preview img")) == 50).all()
        expect(page.get_by_text("Step 50, loss 0.015")).to_be_visible()
        page.get_by_text("Load of the experts").click()
        expect(page.locator("td", has_text="60.0%")).to_be_visible()
        expect(page.get_by_role("link", name="euler, 40 steps, karras")).to_be_visible()
        site.go(page, "runs", "Runs")
        expect(card.locator("img")).to_have_attribute("alt", re.compile("step 50"))
        Image.new("L", (40, 20), 60).save(run / "samples" / "preview-step-00000060.png")
        page.clock.fast_forward(11_000)
        expect(card.locator("img")).to_have_attribute("alt", re.compile("step 60"))


def test_chains_show_their_traces(site: Site) -> None:
    with site.page() as page:
        site.go(page, "runs/digits/evaluations/chains", re.compile("dlg:euler"))
        trace = page.locator("figure.chart", has=page.locator("figcaption", has_text="Noise level σ along"))
        expect(trace.locator("polyline.curve")).to_have_count(CHAINS)
        points = trace.locator("polyline.curve").first.get_attribute("points") or ""
        assert len(points.split()) == SAMPLES * STEPS
        denoised = page.locator("figure.chart", has=page.locator("figcaption", has_text="that were denoised"))
        expect(denoised.locator("circle.point")).to_have_count(CHAINS * SAMPLES)
        correlation = page.locator("figure.chart", has=page.locator("figcaption", has_text="of log σ"))
        expect(correlation.locator("polygon.band")).to_have_count(1)
        expect(page.locator("figure.chart rect.column")).to_have_count(3)
        expect(page.get_by_text("12.5 independent of 20").first).to_be_visible()
        strip = page.locator(".strips tbody tr").nth(2)
        expect(strip.locator("img")).to_have_count(SAMPLES)
        assert [int(pixels(each)[0, 0]) for each in strip.locator("img").all()] == [8, 9, 10, 11]


def test_two_jobs_are_compared(site: Site) -> None:
    [euler] = jobs_of(site.client, sampler="euler", seed=1, steps=4)
    [heun] = jobs_of(site.client, sampler="heun", seed=1, steps=4)
    [other] = jobs_of(site.client, sampler="heun", seed=2, steps=4)
    with site.page() as page:
        site.go(page, "jobs", "Jobs")
        for job_id in (heun, other):
            page.get_by_label(f"Compare evaluate {job_id.removeprefix('job-')[:8]}").check()
        expect(page.get_by_label(f"Compare evaluate {euler.removeprefix('job-')[:8]}")).to_be_disabled()
        page.get_by_role("link", name="Compare the two").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("Compare")
        fid = page.locator("tr", has=page.locator("th", has_text=re.compile("^FID$")))
        expect(fid).to_contain_text("+1")
        expect(fid).to_contain_text("A is better")
        expect(page.locator("tr", has=page.locator("th", has_text=re.compile("^seed$")))).to_have_text("seed12")
        expect(page.get_by_text("Their seeds are 1 and 2")).to_be_visible()
        page.get_by_label("Job B").select_option(euler)
        expect(page.locator(".pairs figure")).to_have_count(12)
        images = page.locator(".pairs figure").nth(5).locator("img")
        assert [int(pixels(each)[0, 0]) for each in images.all()] == [5, 5]
        expect(page.locator("tr", has=page.locator("th", has_text=re.compile("^sampler$")))).to_contain_text(
            "heun"
        )


def test_jobs_under_way_are_compared_as_they_go(site: Site) -> None:
    asked = {"kind": "draw", "model": "digits", "seed": 51, "sampler": "euler"}
    endless, short = (
        site.client.post("/v1/jobs", json={**asked, **more}).json()["id"]
        for more in ({"count": 100_000, "steps": 20}, {"count": 64, "steps": 2})
    )
    while site.client.get(f"/v1/jobs/{endless}").json()["progress"]["done"] < 64:
        time.sleep(0.1)
    with site.page() as page:
        # A job's later images may be there before its first: then the page looks again.
        site.allowed += ["status of 404"]
        looks: list[Route] = []
        first_image = f"**/v1/jobs/{endless}/images/0"
        page.route(first_image, lambda route: (looks.append(route), route.fulfill(status=404, json={})))
        site.go(page, f"compare?a={endless}&b={short}", "Compare")
        expect(page.get_by_text("The first images are still being drawn.")).to_be_visible()
        assert looks
        page.unroute(first_image)
        expect(page.locator(".badge")).to_have_text(["in progress", "completed"])
        expect(page.locator(".pairs figure")).to_have_count(12)
        [first] = drawn(site.client, model="digits", sampler="euler", steps=20, seed=51, first=3)
        assert np.array_equal(pixels(page.locator(".pairs figure").nth(3).locator("img").first), first)
        site.client.post(f"/v1/jobs/{endless}/cancel", json={})
        expect(page.locator(".badge")).to_have_text(["cancelled", "completed"])
        expect(page.locator(".pairs figure")).to_have_count(12)


def test_the_colours_are_chosen_and_kept(site: Site) -> None:
    def ground() -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    with site.page(colours="light") as page:
        site.go(page, "jobs", "Jobs")
        light, button = ground(), page.locator("#theme")
        button.click()
        assert ground() == light
        button.click()
        dark = ground()
        assert dark != light
        expect(button).to_have_accessible_name("Colours: dark")
        page.reload()
        expect(page.get_by_role("heading", level=1)).to_have_text("Jobs")
        assert ground() == dark
        page.locator("#theme").click()
        assert ground() == light
