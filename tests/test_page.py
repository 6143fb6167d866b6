"""The page, driven as a person would in a real browser against a real server."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select, WebDriverWait

from tests.processes import serving

SHIP = Path(__file__).parents[1] / "docs" / "ship.png"
ARGUMENTS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    """Chromium on the page of a fresh server; skipped where there is none, but not in CI."""
    found = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    if None in found.values():
        reason = f"needs chromium and chromedriver, found {found}"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    options = ChromeOptions()
    options.binary_location = str(found["chromium"])
    for argument in (*ARGUMENTS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(argument)
    with serving(tmp_path_factory.mktemp("data")) as (url, _):
        driver = Chrome(options, ChromeService(found["chromedriver"]))
        try:
            driver.get(url)
            until(driver, lambda: Select(driver.find_element(By.ID, "task")).options)
            driver.find_element(By.ID, "image").send_keys(str(SHIP))
            yield driver
        finally:
            driver.quit()


def until(driver: Chrome, holds: Callable[[], object]) -> None:
    """Wait for the page; fails where it never comes."""
    WebDriverWait(driver, 60).until(lambda _: holds())


def text(driver: Chrome, name: str) -> str:
    return driver.find_element(By.ID, name).text


def ask(driver: Chrome, n: str) -> None:
    """Fill in the number of noisy copies and press the button."""
    field = driver.find_element(By.ID, "n")
    field.clear()
    field.send_keys(n)
    driver.find_element(By.ID, "ask").click()


def test_a_picture_gets_a_certified_label(browser: Chrome) -> None:
    """The label, the radius in words and all votes are shown once the answer is there."""
    ask(browser, "200")
    until(browser, lambda: text(browser, "label"))
    assert text(browser, "label") == "ship"
    assert text(browser, "statement").startswith("Certified: no change shorter than 0.")
    votes = browser.find_elements(By.CSS_SELECTOR, "#votes td:last-child")
    assert sum(int(vote.text) for vote in votes) == 200
    assert text(browser, "problem") == ""


def test_a_refusal_is_told_in_words(browser: Chrome) -> None:
    """What the service refuses is shown with its reason, and the form can be used again."""
    ask(browser, "9")
    until(browser, lambda: text(browser, "problem"))
    assert "the smallest n that works is 10" in text(browser, "problem")
    assert browser.find_element(By.ID, "ask").is_enabled()


def test_a_long_question_can_be_cancelled(browser: Chrome) -> None:
    """Cancel appears while a question runs, ends it, and frees the form."""
    ask(browser, "90000")
    cancel = browser.find_element(By.ID, "cancel")
    until(browser, cancel.is_displayed)
    cancel.click()
    until(browser, browser.find_element(By.ID, "ask").is_enabled)
    assert text(browser, "label") == ""


def test_nothing_is_fetched_from_elsewhere(browser: Chrome) -> None:
    """The page needs the service and nothing else, and runs without a complaint of the browser."""
    fetched = browser.execute_script(
        "return performance.getEntriesByType('resource').map(entry => entry.name)"
    )
    here = browser.current_url
    assert [address for address in fetched if not address.startswith((here, "data:"))] == []
    complaints = [entry["message"] for entry in browser.get_log("browser")]
    assert [message for message in complaints if "422" not in message] == []
