"""The page's answers in a real browser, 360 pixels wide, with an API key; the votes are fake."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select

from service.predictions.verification import Verifier
from tests.support.browsing import ask, chromium, offered, text, unfold, until
from tests.support.listening import Listening, listening
from tests.support.paths import ROOT
from tests.support.serving import KEYS, Service, nine_of_ten, split

SHIP = ROOT / "docs" / "ship.png"
NARROW = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": False}
Page = tuple[Chrome, Listening]


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where the browser saves files."""
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, downloads: Path) -> Iterator[Page]:
    """Chromium on the page of a service, with its key entered and a picture chosen."""
    data, profile = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("profile")
    service = Service(data_dir=data, backlog_rows=100_000, api_keys="ann:key-of-ann")
    with listening(service) as served, chromium(profile) as driver:
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", NARROW)
        saving = {"behavior": "allow", "downloadPath": str(downloads)}
        driver.execute_cdp_cmd("Browser.setDownloadBehavior", saving)
        driver.get(served.url)
        until(driver, driver.find_element(By.ID, "access").is_displayed)
        driver.find_element(By.ID, "key").send_keys("key-of-ann")
        driver.find_element(By.ID, "use-key").click()
        until(driver, lambda: offered(driver))
        driver.find_element(By.ID, "image").send_keys(str(SHIP))
        yield driver, served


def fill(driver: Chrome, mode: str, target: str) -> None:
    """Choose the mode, and the radius that suffices where the mode has one."""
    unfold(driver)
    Select(driver.find_element(By.ID, "mode")).select_by_value("certify")
    field = driver.find_element(By.ID, "target_radius")
    field.clear()
    field.send_keys(target)
    Select(driver.find_element(By.ID, "mode")).select_by_value(mode)


def answered(driver: Chrome, n: str, mode: str = "certify", target: str = "") -> str:
    """The label of the answer to a question, once it is shown."""
    fill(driver, mode, target)
    ask(driver, n)
    until(driver, lambda: text(driver, "label") or text(driver, "problem"))
    assert text(driver, "problem") == ""
    return text(driver, "label")


def fits(driver: Chrome) -> bool:
    """Whether the page scrolls in one direction only."""
    width = "return document.documentElement.scrollWidth <= innerWidth"
    return bool(driver.execute_script(width))  # type: ignore[no-untyped-call]


def test_a_radius_is_shown_in_gray_levels(page: Page) -> None:
    """The radius stands in l2 norm and in gray levels, with the runner-up's name."""
    driver, served = page
    served.service.voter.votes = nine_of_ten
    assert answered(driver, "200") == "cat"
    assert text(driver, "statement").startswith("Certified: no change shorter than 0.25 in l2")
    assert "may change by up to 4.6 of 255 gray levels" in text(driver, "levels")
    assert text(driver, "runner-up") == "Runner-up: ant."
    assert text(driver, "among").startswith("Chosen among 4 labels: ant, bee, cat, dog. A picture")
    assert text(driver, "reached") == ""
    assert fits(driver)


def test_a_small_radius_is_less_than_one_gray_level(page: Page) -> None:
    """Below one gray level the page says so."""
    driver, served = page
    served.service.voter.votes = lambda rows: [rows // 4, rows // 4, rows - rows // 4 * 2, 0]
    assert answered(driver, "300") == "cat"
    assert "by less than one gray level of 255: by up to 0." in text(driver, "levels")


def test_a_certificate_is_saved_as_the_verifier_reads_it(page: Page, downloads: Path) -> None:
    """The saved file has the name that the page shows, and passes every check of its signature."""
    driver, served = page
    served.service.voter.votes = nine_of_ten
    assert answered(driver, "200") == "cat"
    command = text(driver, "verify")
    assert fits(driver)
    driver.find_element(By.ID, "save").click()
    file = downloads / command.removeprefix("vouchsafe verify ")
    until(driver, file.exists)
    document, checks = Verifier(file.read_bytes(), KEYS.jwks).checks()
    assert [check for check in checks if not check.passed] == []
    assert document is not None
    assert file.name == f"certificate-{document.id}.json"


def test_a_radius_that_suffices_ends_the_rows(page: Page) -> None:
    """The proven radius is shown while rows come, and then how few of them were used."""
    driver, served = page
    voter, drawn = served.service.voter, [0]

    def unanimous(rows: int) -> list[int]:
        drawn[0] += rows
        if drawn[0] == 16 + 32:  # The selection and the first look: the voter waits after it.
            voter.open.clear()
        return [0, 0, rows, 0]

    voter.votes = unanimous
    fill(driver, "certify", "0.3")
    assert driver.find_element(By.ID, "n").get_property("placeholder") == "10000"
    ask(driver, "")
    until(driver, lambda: text(driver, "proven"))
    assert text(driver, "proven").startswith("Proven so far: radius 0.1")
    assert text(driver, "proven").endswith("from 32 noisy copies.")
    served.go_on()
    until(driver, lambda: text(driver, "label"))
    assert text(driver, "proven") == ""
    reached = "The radius that suffices, 0.3, was reached with 96 of at most 10,016 noisy copies."
    assert text(driver, "reached") == reached
    assert text(driver, "runner-up") == "No other label has a vote."
    bar = driver.find_element(By.CSS_SELECTOR, "#votes meter")
    assert bar.get_property("value") == bar.get_property("max") == 80
    assert fits(driver)


def test_an_abstention_says_why(page: Page) -> None:
    """Too close, too few rows, and a radius out of reach are three things; none has a file."""
    driver, served = page
    served.service.voter.votes = split
    assert answered(driver, "300") == "No answer"
    assert text(driver, "statement").startswith("The votes are too close to answer.")
    served.service.voter.votes = lambda rows: [rows * 2 // 5, 0, rows - rows * 2 // 5, 0]
    assert answered(driver, "100") == "No answer"
    assert "too few to answer. About 191 would do;" in text(driver, "statement")
    assert "asking with them is a new trial" in text(driver, "statement")
    assert answered(driver, "", target="0.5") == "No answer"
    assert text(driver, "statement").startswith("The service gave up early")
    assert text(driver, "reached").startswith("The radius that suffices, 0.5, was not reached")
    assert not driver.find_element(By.ID, "save").is_displayed()
    assert [text(driver, name) for name in ("levels", "runner-up")] == ["", ""]


def test_a_label_alone_needs_no_radius(page: Page) -> None:
    """In predict mode the radius is no field of the question, though it is still filled in."""
    driver, served = page
    served.service.voter.votes = nine_of_ten
    assert answered(driver, "", mode="predict", target="0.3") == "cat"
    assert text(driver, "statement") == "From 100 noisy copies, without a radius."
    assert [text(driver, name) for name in ("levels", "reached", "verify")] == ["", "", ""]


def test_the_browser_does_not_complain(page: Page) -> None:
    """The policy of the page allows everything that the page does."""
    driver, served = page
    served.service.voter.votes = nine_of_ten
    answered(driver, "200")
    driver.find_element(By.ID, "save").click()
    complaints = [entry["message"] for entry in driver.get_log("browser")]
    assert [message for message in complaints if "401" not in message] == []
