"""Chromium on a page of the service, driven as by a person."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select, WebDriverWait

ARGUMENTS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


@contextmanager
def chromium(profile: Path) -> Iterator[Chrome]:
    """Chromium with a fresh profile; skips where it is not installed, but not in CI."""
    found = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    if None in found.values():
        reason = f"needs chromium and chromedriver, found {found}"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    options = ChromeOptions()
    options.binary_location = str(found["chromium"])
    for argument in (*ARGUMENTS, f"--user-data-dir={profile}"):
        options.add_argument(argument)
    driver = Chrome(options, ChromeService(found["chromedriver"]))
    try:
        yield driver
    finally:
        driver.quit()


def until(driver: Chrome, holds: Callable[[], object]) -> None:
    """Wait for the page, whose elements may be replaced meanwhile; fails where it never comes."""
    replaced = [StaleElementReferenceException]
    WebDriverWait(driver, 60, ignored_exceptions=replaced).until(lambda _: holds())


def text(driver: Chrome, name: str) -> str:
    """The text of the element with this id."""
    return driver.find_element(By.ID, name).text


def ask(driver: Chrome, n: str) -> None:
    """Fill in the number of noisy copies and press the button."""
    unfold(driver)
    field = driver.find_element(By.ID, "n")
    field.clear()
    field.send_keys(n)
    driver.find_element(By.ID, "ask").click()


def unfold(driver: Chrome) -> None:
    """Open the advanced fields."""
    driver.execute_script("document.getElementById('advanced').open = true")  # type: ignore[no-untyped-call]


def show(driver: Chrome, view: str) -> None:
    """Go to a view by its link."""
    driver.find_element(By.CSS_SELECTOR, f"nav a[href='#{view}']").click()


def offered(driver: Chrome) -> list[str]:
    """The tasks in the page's selection."""
    options = Select(driver.find_element(By.ID, "task")).options
    return [str(option.get_property("text")) for option in options]
