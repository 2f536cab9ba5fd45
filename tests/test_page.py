"""The page in headless Chromium: ask, read the answer and its documents, be told when the server is
gone; also in a narrow window.

With CLARA_SCREENSHOTS=DIR the pages are kept as pictures.
"""

import os
import shutil

import pytest
from playwright import sync_api as playwright

from clara_jax.serving import server
from tests.helpers import question, running

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if not CHROMIUM:
  pytest.skip(
    "Chromium is not installed here (Debian: apt-get install chromium)", allow_module_level=True
  )

SIZES = {"wide": (1100, 900), "narrow": (360, 740)}


@pytest.fixture(scope="module")
def browser():
  with playwright.sync_playwright() as p:
    browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
    yield browser
    browser.close()


def keep(page, name):
  if folder := os.environ.get("CLARA_SCREENSHOTS"):
    page.screenshot(path=os.path.join(folder, f"{name}.png"), full_page=True)


@pytest.mark.parametrize("size", SIZES)
def test_ask_and_be_answered(browser, answerer, size):
  expected = answerer.answer([question()])[0]
  page = browser.new_page(viewport=dict(zip(("width", "height"), SIZES[size], strict=True)))
  faults = []
  page.on("pageerror", lambda error: faults.append(str(error)))
  page.on(
    "console", lambda message: faults.append(message.text) if message.type == "error" else None
  )
  with running(answerer, server.Limits(batch=2)) as (client, _):
    page.goto(str(client.base_url))
    page.locator("#about", has_text="20 documents").wait_for()
    # By keyboard alone: the field has the focus.
    page.keyboard.type(question())
    page.keyboard.press("Enter")
    page.wait_for_selector("#lens span")
    assert page.inner_text("#answer") == (expected.answer or "(an empty answer)")
    documents = page.query_selector_all("#documents li")
    assert len(documents) == len(expected.documents)
    for shown, document in zip(documents, expected.documents, strict=True):
      assert (
        document.text in shown.inner_text()
        and "score" in shown.inner_text()
        and "2 memory tokens" in shown.inner_text()
      )
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.evaluate("document.activeElement.id") == "question"
    keep(page, size)
    page.fill("#question", "word " * 500)
    page.keyboard.press("Enter")
    page.wait_for_selector("#error:not([hidden])")
    assert "decoder_max_length" in page.inner_text("#error")
    faults.clear()  # the refusal is an error of the console, too
  page.fill("#question", question())
  page.keyboard.press("Enter")
  page.locator("#error", has_text="cannot be reached").wait_for()
  assert page.is_hidden("#result")
  keep(page, f"{size}-stopped")
  assert all("ERR_CONNECTION_REFUSED" in fault or "Failed to load" in fault for fault in faults), (
    faults
  )
  page.close()
