"""The page in headless Chromium: ask, read the answer and its documents, be told when the server is
gone; also in a narrow window.

With CLARA_SCREENSHOTS=DIR the pages are kept as pictures.
"""

import os
import shutil

import pytest
from playwright import sync_api as playwright

from clara_jax.inference.answer import Answerer, Question
from clara_jax.memory.store import MemoryStore
from clara_jax.retrieval import index
from clara_jax.serving import server
from tests.helpers import free_port, question, running
from tests.test_following import checkpoint, new_store

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
    page.wait_for_selector(".words span", state="attached")
    assert page.inner_text(".answer") == (expected.answer or "(an empty answer)")
    assert page.evaluate("document.activeElement.id") == "question"
    documents = page.query_selector_all("article li")
    assert len(documents) == len(expected.documents)
    for shown, document in zip(documents, expected.documents, strict=True):
      text = shown.inner_text()
      assert document.text[: document.characters] in text and "score" in text
      assert "2 memory tokens" in text
      assert ("The end was cut" in text) == (document.tokens < document.whole_tokens)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    keep(page, size)
    page.fill("#question", "word " * 500)
    page.keyboard.press("Enter")
    page.wait_for_selector("#error:not([hidden])")
    assert "decoder_max_length" in page.inner_text("#error")
    assert len(page.query_selector_all("article")) == 1  # what failed is no turn
    faults.clear()  # the refusal is an error of the console, too
  page.fill("#question", question())
  page.keyboard.press("Enter")
  page.locator("#error", has_text="cannot be reached").wait_for()
  assert page.input_value("#question") == question()  # nothing that was typed is lost
  keep(page, f"{size}-stopped")
  assert all("ERR_CONNECTION_REFUSED" in fault or "Failed to load" in fault for fault in faults), (
    faults
  )
  page.close()


def test_a_conversation(browser, answerer):
  """Several turns, newest first; they stay when the page is read again from another server."""
  page = browser.new_page(color_scheme="dark")
  port = free_port()
  with running(answerer, server.Limits(), port=port) as (client, service):
    service.examples = [question(4)]
    page.goto(str(client.base_url))
    page.locator("#examples button").click()
    page.locator("article").nth(0).locator(".words span").first.wait_for(state="attached")
    page.fill("#k", "1")
    page.check("#together")
    page.fill("#question", question(1))
    page.keyboard.press("Enter")
    page.locator("article").nth(1).wait_for()
    page.locator("article").nth(0).locator(".words span").first.wait_for(state="attached")
    assert page.locator("h2").all_inner_texts() == [question(1), question(4)]
    (expected,) = answerer.answer([Question(f"{question(4)} {question(1)}", top_k=1)])
    assert page.locator(".answer").first.inner_text() == expected.answer
    assert page.locator("article").nth(0).locator("li").count() == 1
    keep(page, "conversation")
  with running(answerer, server.Limits(), port=port):
    page.reload()
    assert page.locator("h2").all_inner_texts() == [question(1), question(4)]
    page.fill("#question", question(2))
    page.keyboard.press("Enter")
    page.locator("article").nth(2).wait_for()
    page.locator("#ask:enabled").wait_for()
    page.click("#clear")
    assert page.locator("article").count() == 0
  page.close()


def test_a_document_is_added(browser, tmp_path):
  new_store(tmp_path / "store", 20)
  store = MemoryStore(str(tmp_path / "store"))
  answerer = Answerer(checkpoint(), store, index=index.build(store), max_new_tokens=2)
  (tmp_path / "news.txt").write_text("Mila Brojax was born in Jaford. " + "She is a baker. " * 20)
  page = browser.new_page(viewport={"width": 400, "height": 800})
  with running(answerer, server.Limits(upload=True)) as (client, _):
    page.goto(str(client.base_url))
    page.locator("#adding summary").click()
    page.set_input_files("#file", tmp_path / "news.txt")
    page.click("#add")
    page.locator("#added", has_text="ready to be asked about").wait_for()
    page.locator("#about", has_text="documents").wait_for()
    added = client.get("/healthz").json()["documents"] - 20
    assert added > 1 and f"{20 + added} documents" in page.inner_text("#about")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    keep(page, "upload")
    broken = {"name": "../../x.pdf", "content": "JVBERi0="}
    refused = client.post("/documents", json=broken)
    assert refused.status_code == 422 and "x.pdf" in refused.json()["error"]
    assert "/" not in refused.json()["error"].partition(":")[0]
  with running(answerer, server.Limits()) as (client, _):
    assert client.post("/documents", json=broken).status_code == 403
  page.close()
