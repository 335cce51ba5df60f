"""The page in a browser: it draws, sorts, filters, links, and asks nothing of a network."""

import csv
import json
import pathlib
import time

import pytest
from report_examples import cell, sweep

from tl_jax import report
from tl_jax.workdir import WorkDir

BROWSER, DRIVER = pathlib.Path("/usr/bin/chromium"), pathlib.Path("/usr/bin/chromedriver")
if not (BROWSER.exists() and DRIVER.exists()):
    pytest.skip("chromium and chromedriver are not installed", allow_module_level=True)
pytest.importorskip("selenium")


@pytest.fixture(scope="module")
def browser():
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def folder(sample):
    return sample[1]


def opened(browser, file, fragment=""):
    """The page with all plots drawn, without what was logged before."""
    browser.get("about:blank")
    for log in ("browser", "performance"):
        browser.get_log(log)
    browser.get(file.as_uri() + fragment)
    deadline = time.monotonic() + 120
    while browser.execute_script("return document.body.dataset.plots") != "drawn":
        assert time.monotonic() < deadline, browser.get_log("browser")
        time.sleep(0.1)
    time.sleep(0.3)
    return browser


def complaints(browser):
    return [entry for entry in browser.get_log("browser") if entry["level"] != "INFO"]


def requests(browser):
    """The addresses that were asked for."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return {
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    }


def column(browser, key, title):
    """The column's number, and the texts of its visible cells."""
    return browser.execute_script(
        """
        const table = document.getElementById("table-" + arguments[0]);
        const heads = [...table.tHead.rows[0].cells];
        const i = heads.findIndex((head) => head.textContent.trim() === arguments[1]);
        const rows = [...table.tBodies[0].rows].filter((row) => !row.hidden);
        return [i, rows.map((row) => row.cells[i].dataset.value ?? row.cells[i].textContent)];
        """,
        key,
        title,
    )


def click_head(browser, key, title):
    number, _ = column(browser, key, title)
    browser.execute_script(
        "document.getElementById('table-' + arguments[0]).tHead.rows[0].cells[arguments[1]]"
        ".querySelector('button').click()",
        key,
        number,
    )
    head = f"document.getElementById('table-{key}').tHead.rows[0].cells[{number}]"
    return browser.execute_script(f"return {head}.getAttribute('aria-sort')")


def test_all_plots_are_drawn_without_a_complaint_or_a_request(browser, folder):
    page = opened(browser, folder / "report.html")
    assert complaints(page) == []
    asked = requests(page)  # which can be read once
    assert {url.partition(":")[0] for url in asked} <= {"file", "data"}
    assert {url for url in asked if url.startswith("file")} == {(folder / "report.html").as_uri()}
    images = page.execute_script("return [...document.images].map((i) => i.naturalWidth)")
    assert len(images) == 8 and min(images) > 500
    places = page.execute_script("return document.querySelectorAll('.plot').length")
    drawn = page.execute_script("return Bokeh.documents.length")
    assert places == drawn > 20
    sizes = page.execute_script(
        """
        return [...document.querySelectorAll('.plot')].map((place) => {
          const found = [];
          const walk = (node) => {
            if (node.tagName === 'CANVAS') found.push(node.width * node.height);
            for (const child of node.children) walk(child);
            if (node.shadowRoot) for (const child of node.shadowRoot.children) walk(child);
          };
          walk(place);
          return Math.max(0, ...found);
        });
        """
    )
    assert all(size > 10_000 for size in sizes)


@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_is_no_wider_than_the_window(browser, folder, width):
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    page = opened(browser, folder / "report.html")
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_head_sorts_numbers_as_numbers(browser, folder):
    page = opened(browser, folder / "report.html")
    original = column(page, "cells", "accuracy")[1]
    assert click_head(page, "cells", "accuracy") == "descending"
    _, values = column(page, "cells", "accuracy")
    numbers = [float(value) for value in values if value]
    assert numbers == sorted(numbers, reverse=True) and values[-2:] == ["", ""]
    assert click_head(page, "cells", "accuracy") == "ascending"
    numbers = [float(value) for value in column(page, "cells", "accuracy")[1] if value]
    assert numbers == sorted(numbers)
    assert click_head(page, "cells", "accuracy") is None
    assert column(page, "cells", "accuracy")[1] == original


def test_a_head_of_text_sorts_decimals_too(browser, tmp_path):
    rates = ("0.05", "0.003", "none", "0.1")
    made = [cell({"strategy": "full", "rate": rate}, status="missing") for rate in rates]
    report.write(WorkDir(tmp_path), sweep(made))
    page = opened(browser, tmp_path / "ablation" / "report.html")
    assert click_head(page, "cells", "rate") == "ascending"
    assert column(page, "cells", "rate")[1] == ["0.003", "0.05", "0.1", "none"]


def test_a_head_sorts_by_keyboard(browser, folder):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    page = opened(browser, folder / "report.html")
    head = page.find_element(By.CSS_SELECTOR, "#table-strategies-0 th")
    head.find_element(By.TAG_NAME, "button").send_keys(Keys.ENTER)
    assert head.get_attribute("aria-sort") == "ascending"
    names = column(page, "strategies-0", "strategy")[1]
    assert names == sorted(names)


def test_words_filter_and_the_link_restores_the_view(browser, folder):
    from selenium.webdriver.common.by import By

    page = opened(browser, folder / "report.html")
    page.execute_script("document.getElementById('table-cells').scrollIntoView()")
    above = "//table[@id='table-cells']/../preceding-sibling::label[1]/input"
    box = page.find_element(By.XPATH, above)
    box.send_keys("lora 100")
    click_head(page, "cells", "accuracy")
    _, values = column(page, "cells", "accuracy")
    assert len(values) == 3
    fragment = page.execute_script("return location.hash")
    assert "cells.filter=lora+100" in fragment and "cells.sort=" in fragment
    again = opened(browser, folder / "report.html", fragment)
    assert column(again, "cells", "accuracy")[1] == values
    filtered = again.execute_script("return document.getElementById('table-cells').filterBox.value")
    assert filtered == "lora 100"


@pytest.mark.parametrize(
    "fragment", ["#table-cells.sort=99.up", "#table-cells.sort=x", "#plans", "#=&==%"]
)
def test_a_strange_fragment_does_no_harm(browser, folder, fragment):
    page = opened(browser, folder / "report.html", fragment)
    assert complaints(page) == []
    assert len(column(page, "cells", "accuracy")[1]) == 48


def test_a_strategy_can_be_hidden_in_all_plots(browser, folder):
    page = opened(browser, folder / "report.html")
    count = (
        "return Bokeh.documents.flatMap((d) => [...d.all_models])"
        ".filter((m) => m.name === 'style-0' && m.visible).length"
    )
    before = page.execute_script(count)
    assert before > 10
    page.execute_script("document.querySelector('.key button').click()")
    assert page.execute_script(count) == 0
    page.execute_script("document.querySelector('.key button').click()")
    assert page.execute_script(count) == before


def test_the_page_shows_what_the_csv_holds(browser, folder):
    page = opened(browser, folder / "report.html")
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    for key, title in (
        ("accuracy", "accuracy"),
        ("training_seconds", "training"),
        ("loss", "loss"),
    ):
        assert column(page, "cells", title)[1] == [row[key] for row in rows]


def test_hostile_names_run_nothing(browser, hostile):
    page = opened(browser, hostile / "report.html")
    assert complaints(page) == []
    asked = {url for url in requests(page) if not url.startswith("data:")}
    assert asked == {(hostile / "report.html").as_uri()}
    assert page.execute_script("return document.querySelectorAll('img[src=x]').length") == 0
