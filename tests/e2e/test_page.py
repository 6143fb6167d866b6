"""The page, driven as a person would in a real browser against a real server."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select

from benchmarks.server import serving
from service.tasks.repository import REFERENCES_SHOWN
from service.tasks.store import Store
from tests.support.adapting import make_store
from tests.support.browsing import ask, chromium, offered, show, text, until
from tests.support.fake_adaptation import GO
from tests.support.paths import ROOT

SHIP = ROOT / "docs" / "ship.png"
SERVER = (sys.executable, "-m", "tests.support.fake_server")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The tasks of the server behind the page, which makes them with the fake adaptation."""
    return make_store(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory, store: Store) -> Iterator[Chrome]:
    """Chromium on the page of a fresh server; skipped where there is none, but not in CI."""
    profile = tmp_path_factory.mktemp("profile")
    with serving(store.jobs.parent, SERVER) as (url, _), chromium(profile) as driver:
        driver.get(url)
        until(driver, lambda: offered(driver))
        driver.find_element(By.ID, "image").send_keys(str(SHIP))
        yield driver


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
    assert "the smallest n that works is 11" in text(browser, "problem")
    assert browser.find_element(By.ID, "ask").is_enabled()
    refused = browser.find_elements(By.CSS_SELECTOR, "[aria-invalid=true]")
    assert [field.get_attribute("id") for field in refused] == ["n"]


def test_a_long_question_can_be_cancelled(browser: Chrome) -> None:
    """Cancel appears while a question runs, ends it, and frees the form."""
    ask(browser, "90000")
    cancel = browser.find_element(By.ID, "cancel")
    until(browser, cancel.is_displayed)
    cancel.click()
    until(browser, browser.find_element(By.ID, "ask").is_enabled)
    assert text(browser, "label") == ""


def wish(driver: Chrome, labels: str, name: str) -> None:
    """Fill in the form of a new task and press the button."""
    show(driver, "tasks")
    for field, words in (("entry", labels), ("name", name)):
        driver.find_element(By.ID, field).clear()
        driver.find_element(By.ID, field).send_keys(words)
    driver.find_element(By.ID, "make").click()


def chips(driver: Chrome) -> list[str]:
    """The labels that the form holds."""
    return [chip.text.splitlines()[0] for chip in driver.find_elements(By.CLASS_NAME, "chip")]


def card(driver: Chrome, name: str) -> WebElement | None:
    """What the page shows of the task of this name, where it does."""
    for found in driver.find_elements(By.CSS_SELECTOR, ".task"):
        if found.find_element(By.CLASS_NAME, "name").text == name:
            return found
    return None


def shown(driver: Chrome, name: str, part: str) -> str:
    """The text of one part of a task's card."""
    found = card(driver, name)
    return found.find_element(By.CLASS_NAME, part).text if found else ""


def pictured(browser: Chrome) -> list[str]:
    """The labels of the pictures shown, in their order, of those that have arrived whole."""
    pictures = browser.find_elements(By.CSS_SELECTOR, ".pictures img")
    return [
        str(picture.get_attribute("alt"))
        for picture in pictures
        if picture.get_property("naturalWidth") == 32
    ]


def test_labels_become_a_task_to_ask(browser: Chrome, store: Store) -> None:
    """A task's stage, progress and pictures are shown as it is made; then it can be asked."""
    wish(browser, "frog\n\n ship \n", "wait and see")
    making = "adapting the classifier, 50 %"
    until(browser, lambda: making in shown(browser, "wait and see", "state"))
    assert "about 2 s left" in shown(browser, "wait and see", "state")
    assert shown(browser, "wait and see", "measure") == ""
    each = min(store.all()[0].settings["shots"], REFERENCES_SHOWN // 2)
    until(browser, lambda: pictured(browser) == ["frog", "ship"] * each)
    assert offered(browser) == ["default (10 labels)"]
    (store.jobs / store.all()[0].id / GO).touch()
    until(browser, lambda: shown(browser, "wait and see", "state") == "ready")
    until(browser, lambda: "wait and see (2 labels)" in offered(browser))
    made = card(browser, "wait and see")
    assert made is not None
    made_id = store.all()[0].id
    assert shown(browser, "wait and see", "id") == made_id
    measured = f"vouchsafe evaluate --task {made_id} --images FOLDER"
    assert shown(browser, "wait and see", "measure").endswith(measured)
    assert f"-F task={made_id}" in shown(browser, "wait and see", "curl")
    made.find_element(By.CLASS_NAME, "use").click()
    until(browser, browser.find_element(By.ID, "task").is_displayed)
    chosen = Select(browser.find_element(By.ID, "task")).first_selected_option
    assert chosen.text == "wait and see (2 labels)"
    ask(browser, "100")
    until(browser, lambda: text(browser, "label"))
    assert text(browser, "label") in ("frog", "ship", "No answer")
    browser.refresh()
    show(browser, "tasks")
    until(browser, lambda: card(browser, "wait and see") is not None)
    for _ in range(3):  # Opened, closed, and opened again: each picture is shown once.
        browser.find_element(By.CSS_SELECTOR, ".task summary").click()
    until(browser, lambda: pictured(browser) == ["frog", "ship"] * each)


def test_tasks_of_one_name_are_told_apart(browser: Chrome) -> None:
    """Where two tasks have a name, the selection shows the begin of their ids."""
    wish(browser, "bird, dog, ", "twins")
    until(browser, lambda: shown(browser, "twins", "state") == "ready")
    wish(browser, "bird, frog, ", "twins")
    until(browser, lambda: [name.count(" · ") for name in offered(browser)].count(1) == 2)


def test_known_words_are_offered(browser: Chrome) -> None:
    """A click on a word that the networks know adds it, and its cross removes it."""
    show(browser, "tasks")
    words = browser.find_elements(By.CSS_SELECTOR, "#words button")
    assert {"cat", "kitten", "ship"} <= {word.text for word in words}
    for word in words[:2]:
        word.click()
    assert chips(browser) == ["airplane", "plane"]
    for _ in range(2):
        browser.find_element(By.CSS_SELECTOR, ".chip button").click()
    assert chips(browser) == []


def test_a_task_that_cannot_be_says_why(browser: Chrome) -> None:
    """Labels that are refused keep the form as it was; a job that fails shows its problem."""
    wish(browser, "cat\nxylophone\n", "odd")
    until(browser, lambda: text(browser, "labels-problem"))
    assert '"xylophone" is not a word' in text(browser, "labels-problem")
    assert chips(browser) == ["cat", "xylophone"]
    assert browser.find_element(By.CLASS_NAME, "wrong").text.startswith("xylophone")
    browser.find_element(By.ID, "insist").click()
    wish(browser, "", "fail for me")
    until(browser, lambda: shown(browser, "fail for me", "state") == "failed")
    assert "lower steps" in shown(browser, "fail for me", "problem")
    assert text(browser, "labels-problem") == text(browser, "refusal") == ""
    assert "fail for me (2 labels)" not in offered(browser)


def test_a_task_can_be_deleted(browser: Chrome, store: Store) -> None:
    """Delete asks once more, ends the job of a task in the making, and leaves nothing of it."""
    wish(browser, "cat\ndog\n", "hang on")
    until(browser, lambda: "adapting the classifier" in shown(browser, "hang on", "state"))
    found = card(browser, "hang on")
    assert found is not None
    found.find_element(By.CLASS_NAME, "delete").click()
    browser.switch_to.alert.dismiss()
    assert card(browser, "hang on") is not None
    found.find_element(By.CLASS_NAME, "delete").click()
    browser.switch_to.alert.accept()
    until(browser, lambda: card(browser, "hang on") is None)
    assert "hang on" not in [task.name for task in store.all()]


def test_nothing_is_fetched_from_elsewhere(browser: Chrome) -> None:
    """The page needs the service and nothing else, and runs without a complaint of the browser."""
    fetched = browser.execute_script(
        "return performance.getEntriesByType('resource').map(entry => entry.name)"
    )
    here = browser.current_url.partition("#")[0]
    assert [address for address in fetched if not address.startswith((here, "data:"))] == []
    complaints = [entry["message"] for entry in browser.get_log("browser")]
    assert [message for message in complaints if "422" not in message] == []
    assert not browser.find_element(By.ID, "access").is_displayed()
