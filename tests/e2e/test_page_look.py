"""How the page looks, on real answers: accessible in each view, and pictures of it for the docs.

`make pictures` runs this file with PAGE_PICTURES naming the folder that gets them.
"""

from __future__ import annotations

import base64
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By

from benchmarks.server import serving
from tests.support.adapting import make_store
from tests.support.browsing import ask, chromium, offered, show, text, until
from tests.support.paths import ROOT

AXE = ROOT / "tests" / "data" / "axe" / "axe.min.js"
SERVER = (sys.executable, "-m", "tests.support.fake_server")
VIEWS = ("try", "tasks", "verify", "status")
WIDE, NARROW = 1180, 360
SHIPPED = {
    ("try", WIDE, "light"): "page.png",
    ("try", WIDE, "dark"): "page-dark.png",
    ("try", NARROW, "light"): "page-narrow.png",
    ("verify", WIDE, "light"): "page-verify.png",
    ("status", WIDE, "light"): "page-status.png",
}
"""Pictures that the docs show; those of tasks would show the references of the fake adaptation."""
RULES = """
const done = arguments[arguments.length - 1];
axe.run(document, {resultTypes: ["violations"]}).then(({violations}) => done(violations.map(
  ({id, nodes}) => [id, ...nodes.map(({target}) => target.join(" "))])));
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    """Chromium on the page of a fresh server, with an answer, its rows, an attack and a task."""
    store = make_store(tmp_path_factory.mktemp("data"))
    profile = tmp_path_factory.mktemp("profile")
    with serving(store.jobs.parent, SERVER) as (url, _), chromium(profile) as driver:
        driver.get(url)
        until(driver, lambda: offered(driver))
        driver.set_script_timeout(120)
        driver.execute_script(AXE.read_text(encoding="utf-8"))
        yield driver


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that gets the pictures."""
    named = os.environ.get("PAGE_PICTURES")
    return Path(named) if named else tmp_path_factory.mktemp("pictures")


def look(driver: Chrome, width: int, scheme: str) -> None:
    """Set the window's width in pixels, and the light or the dark scheme."""
    screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    scheme_feature = {"name": "prefers-color-scheme", "value": scheme}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme_feature]})


def pictured(driver: Chrome, height: int | None = None) -> Image.Image:
    """The whole page, or its first `height` pixels."""
    measure = "return [innerWidth, document.documentElement.scrollHeight]"
    width, whole = driver.execute_script(measure)  # type: ignore[no-untyped-call]
    clip = {"x": 0, "y": 0, "width": width, "height": height or whole, "scale": 1}
    options = {"captureBeyondViewport": True, "clip": clip}
    data = driver.execute_cdp_cmd("Page.captureScreenshot", options)["data"]
    return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")


def example(driver: Chrome, name: str) -> None:
    """Click the example picture of this name."""
    driver.find_element(By.CSS_SELECTOR, f"#examples button[title^='{name}']").click()
    pressed = f"#examples button[title^='{name}'][aria-pressed=true]"
    until(driver, lambda: driver.find_elements(By.CSS_SELECTOR, pressed))


def test_a_question_is_watched_and_answered(browser: Chrome, pictures: Path) -> None:
    """The proven radius climbs with the votes; the whole course is the docs' animation."""
    look(browser, WIDE, "light")
    example(browser, "ship")
    frames = [pictured(browser, 760)]
    ask(browser, "")
    until(browser, lambda: text(browser, "proven"))
    while browser.find_element(By.ID, "watching").is_displayed():
        frames.append(pictured(browser, 760))
    until(browser, lambda: text(browser, "label"))
    assert text(browser, "label") == "ship"
    assert browser.find_elements(By.CSS_SELECTOR, "#gauge .fill")
    assert len(frames) > 1
    frames.append(pictured(browser, 760))
    small = [frame.resize((840, 541), Image.Resampling.LANCZOS) for frame in frames]
    lasts = [900, *[250] * (len(small) - 2), 3000]
    small[0].save(
        pictures / "page.webp", save_all=True, append_images=small[1:], duration=lasts, loop=0
    )


def test_the_networks_rows_are_shown(browser: Chrome) -> None:
    """Six noisy copies appear with what the denoiser makes of them, and the vote of each."""
    browser.find_element(By.ID, "look-inside").click()
    until(browser, lambda: len(browser.find_elements(By.CSS_SELECTOR, "#rows figure")) == 6)
    captions = browser.find_elements(By.CSS_SELECTOR, "#rows figcaption")
    assert all(caption.text.startswith("votes for ") for caption in captions)


@pytest.mark.parametrize("kind", ["random", "attack"])
def test_a_change_inside_the_radius_keeps_the_label(browser: Chrome, kind: str) -> None:
    """A change is at most as long as the slider says, and the page compares it to the radius."""
    browser.find_element(By.CSS_SELECTOR, f"input[value={kind}]").click()
    assert "(inside the radius)" in text(browser, "epsilon-value")
    limit = float(text(browser, "epsilon-value").split()[0])
    browser.find_element(By.ID, "push-button").click()
    until(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#pushed .verdict"))
    verdict = browser.find_element(By.CSS_SELECTOR, "#pushed .verdict").text
    assert verdict.startswith(("Inside the radius: still ship", "No answer this time."))
    caption = browser.find_elements(By.CSS_SELECTOR, "#pushed figcaption")[1].text
    length = float(caption.removeprefix("changed by ").split()[0])
    assert 0.5 * limit < length <= limit
    assert text(browser, "push-problem") == ""


def test_an_answer_is_taken_away(browser: Chrome) -> None:
    """The commands ask the same question; without a clipboard they are shown."""
    blocked = "navigator.clipboard.writeText = () => Promise.reject(new Error('blocked'))"
    browser.execute_script(blocked)  # type: ignore[no-untyped-call]
    for button, begins in (("copy-curl", "curl -s -F image=@ship.png "), ("copy-python", "from ")):
        browser.find_element(By.ID, button).click()
        until(browser, lambda words=begins: text(browser, "copied").startswith(words))
        assert "anytime" in text(browser, "copied")


def test_a_certificate_is_verified(browser: Chrome, tmp_path: Path) -> None:
    """A certificate of this service passes each check that is made; a changed one does not."""
    show(browser, "verify")
    url = browser.current_url.partition("#")[0]
    image = (ROOT / "docs" / "ship.png").read_bytes()
    answer = httpx.post(f"{url}predict", files={"image": image}, timeout=600).json()
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps(answer["certificate"]))
    answer["certificate"]["document"]["result"]["radius"] = 9.0
    bad.write_text(json.dumps(answer["certificate"]))
    for file, words in ((good, "The certificate holds"), (bad, "The certificate does not hold")):
        browser.find_element(By.ID, "certificate-file").send_keys(str(file))
        until(browser, lambda words=words: text(browser, "checked").startswith(words))
    assert "failed document" in text(browser, "checked")


def test_the_status_is_shown(browser: Chrome) -> None:
    """Workers, speed and tasks are those of the service."""
    show(browser, "status")
    until(browser, lambda: text(browser, "health").startswith("Ready"))
    until(browser, lambda: text(browser, "served"))
    numbers = text(browser, "numbers").splitlines()
    assert numbers[numbers.index("Workers") + 1] == "1"
    assert int(numbers[numbers.index("Rows a second") + 1].replace(",", "")) > 0
    served = text(browser, "served").split()
    assert (served[0], served[1], served[-1]) == ("default", "10", "ready")


def test_a_task_is_pictured(browser: Chrome) -> None:
    """A finished task's card opens with its pictures, settings and commands."""
    show(browser, "tasks")
    browser.find_element(By.ID, "entry").send_keys("cat, dog, frog, ship,")
    browser.find_element(By.ID, "make").click()
    cards = (By.CSS_SELECTOR, ".task[open]")
    until(browser, lambda: browser.find_elements(*cards))
    until(browser, lambda: browser.find_element(By.CLASS_NAME, "use").is_displayed())


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [WIDE, NARROW])
@pytest.mark.parametrize("view", VIEWS)
def test_each_view_is_accessible(
    browser: Chrome, pictures: Path, view: str, width: int, scheme: str
) -> None:
    """axe finds no violation, and nothing is wider than the window."""
    look(browser, width, scheme)
    show(browser, view)
    until(browser, browser.find_element(By.ID, f"{view}-title").is_displayed)
    assert browser.execute_async_script(RULES) == []  # type: ignore[no-untyped-call]
    fits = "return document.documentElement.scrollWidth <= innerWidth"
    assert browser.execute_script(fits)  # type: ignore[no-untyped-call]
    if name := SHIPPED.get((view, width, scheme)):
        pictured(browser).quantize(256).save(pictures / name, optimize=True)


def test_the_browser_does_not_complain(browser: Chrome) -> None:
    """The page's policy allows all that the page does."""
    assert [entry["message"] for entry in browser.get_log("browser")] == []
