"""The page and /docs of a service with API keys, in a real browser against a real server."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By

from benchmarks.server import serving
from tests.support.browsing import ask, chromium, offered, text, until
from tests.support.paths import ROOT

SHIP = ROOT / "docs" / "ship.png"
SERVER = (sys.executable, "-m", "tests.support.fake_server")
KEY = "key-of-ann"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Chrome, str]]:
    """Chromium, and the address of a server that wants a key."""
    data, profile = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("profile")
    keys = {"VOUCHSAFE_API_KEYS": f"ann:{KEY}"}
    with serving(data, SERVER, variables=keys) as (url, _), chromium(profile) as driver:
        yield driver, url


def enter(driver: Chrome, key: str) -> None:
    """Type a key and press the button."""
    driver.find_element(By.ID, "key").clear()
    driver.find_element(By.ID, "key").send_keys(key)
    driver.find_element(By.ID, "use-key").click()


def test_the_page_asks_for_a_key_and_uses_it(browser: tuple[Chrome, str]) -> None:
    """The page loads without a key, refuses a wrong one in words, and certifies with a right one,
    which stays in this tab's session, out of the address, until it is forgotten."""
    driver, url = browser
    driver.get(url)
    until(driver, driver.find_element(By.ID, "access").is_displayed)
    assert text(driver, "access-note").startswith("This service answers those who have a key.")
    assert not driver.find_element(By.ID, "forget").is_displayed()
    enter(driver, "wrong")
    until(driver, lambda: text(driver, "access-note") == "The service does not know this key.")
    driver.find_element(By.ID, "image").send_keys(str(SHIP))
    assert offered(driver) == []
    enter(driver, KEY)
    until(driver, lambda: offered(driver) == ["default (10 labels)"])
    ask(driver, "200")
    until(driver, lambda: text(driver, "label"))
    assert text(driver, "label") == "ship"
    assert KEY not in driver.current_url
    assert driver.execute_script("return localStorage.length") == 0  # type: ignore[no-untyped-call]
    driver.refresh()
    until(driver, lambda: offered(driver) == ["default (10 labels)"])
    driver.find_element(By.ID, "forget").click()
    until(driver, lambda: "Enter yours" in text(driver, "access-note"))
    assert driver.execute_script("return sessionStorage.length") == 0  # type: ignore[no-untyped-call]


def test_docs_load_without_a_key_and_ask_for_it(browser: tuple[Chrome, str]) -> None:
    """/docs shows the interface to those without a key, and a button to enter one."""
    driver, url = browser
    driver.get(f"{url}/docs")
    until(driver, lambda: driver.find_elements(By.CSS_SELECTOR, ".btn.authorize"))
    assert driver.find_elements(By.CSS_SELECTOR, ".opblock")
