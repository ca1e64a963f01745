"""The page in a real browser, where one is found: nothing fails, everything is drawn, and it works by keyboard."""

import os
import shutil
import time
from pathlib import Path

import pytest

from mixln_jax.reporting import figures
from mixln_jax.reporting.loading import load
from mixln_jax.reporting.page import write_report
from mixln_jax.reporting.panels import DARK, LIGHT
from reporting.making import make_run

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "headless_shell")
CACHED = ("chromium-*/chrome-linux*/chrome", "chromium_headless_shell-*/*/*headless*shell")
DRAWN = 60_000  # ms that a slow machine may take


def find_chromium():
  """A Chromium on PATH, or one that playwright has fetched before."""
  on_path = filter(None, map(shutil.which, NAMES))
  cache = Path(os.environ.get("PLAYWRIGHT_BROWSERS_PATH", "~/.cache/ms-playwright")).expanduser()
  cached = (str(path) for pattern in CACHED for path in sorted(cache.glob(pattern)))
  return next(on_path, None) or next(cached, None)


@pytest.fixture(scope="session")  # like the report, so that without a browser none is made
def browser():
  playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
  path = find_chromium()
  if path is None:
    pytest.skip(f"no Chromium: looked for {', '.join(NAMES)} on PATH and in playwright's cache")
  with playwright.sync_playwright() as driver:
    sandbox = os.geteuid() != 0  # Chromium refuses to sandbox root
    browser = driver.chromium.launch(executable_path=path, chromium_sandbox=sandbox)
    yield browser
    browser.close()


@pytest.fixture
def visit(browser, whole_report):
  """`visit(**context)`: the whole report, opened from disk and drawn; and everything that went wrong."""
  contexts = []

  def visit(**settings):
    context = browser.new_context(**settings)
    contexts.append(context)
    page, wrong = context.new_page(), []
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
      "request",
      lambda request: None if request.url.startswith(("file:", "data:", "blob:")) else wrong.append(request.url),
    )
    page.add_init_script("window.pwned = () => console.error('a name from a file was run')")
    page.goto((whole_report / "report.html").as_uri())
    page.wait_for_selector("html.interactive", timeout=DRAWN)
    return page, wrong

  yield visit
  for context in contexts:
    context.close()


def wait_until(page, expression):
  """Playwright's own wait evaluates text in the page, which the page's policy forbids."""
  deadline = time.monotonic() + DRAWN / 1000
  while not page.evaluate(expression):
    assert time.monotonic() < deadline, f"never came true: {expression}"
    page.wait_for_timeout(50)


FIRST_CURVE = "document.querySelector('#loss .series path[style*=stroke]')"


def ink(page):
  """The colour of the first curve."""
  return page.evaluate(f"getComputedStyle({FIRST_CURVE}).stroke")


def rgb(colour):
  return f"rgb({', '.join(str(int(colour[at : at + 2], 16)) for at in (1, 3, 5))})"


SHOWN = """name => [...document.querySelectorAll(`#${name} .panel:first-child .series`)]
  .filter(part => part.getBoundingClientRect().height > 0).length"""


def test_all_is_drawn_without_a_fault_and_works_by_keyboard(visit):
  page, wrong = visit(viewport={"width": 1400, "height": 900})
  empty = """() => [...document.querySelectorAll('.panel svg')].filter(drawing =>
    drawing.getBoundingClientRect().height < 60 || drawing.querySelectorAll('path, image').length < 2).length"""
  assert page.evaluate(empty) == 0
  assert page.locator(".panel svg").count() > 30
  assert ink(page) == rgb(LIGHT[0])

  groups = page.evaluate(SHOWN, "removal")
  assert groups > 0
  page.locator(".filters summary").focus()
  page.keyboard.press("Enter")
  page.locator("button", has_text="pre").first.focus()
  page.keyboard.press("Enter")
  wait_until(page, f"({SHOWN})('removal') < {groups}")
  assert page.locator("#shown").text_content() == "6 of 9 runs shown"
  page.keyboard.press("Enter")
  wait_until(page, f"({SHOWN})('removal') === {groups}")

  seed = page.locator("#loss .seed").first
  assert not seed.is_visible()
  page.locator("button[data-seeds=loss]").focus()
  page.keyboard.press("Space")
  assert seed.is_visible()
  page.locator("#loss summary").focus()
  page.keyboard.press("Enter")
  assert page.locator("#loss table").first.is_visible()
  assert wrong == []


def test_the_answer_is_on_the_first_screen(visit):
  """Would catch a headline or its picture that has slipped below what a laptop shows."""
  page, _ = visit(viewport={"width": 1400, "height": 900})
  assert page.locator(".headline").first.bounding_box()["y"] < 250
  assert page.locator("#difference svg").bounding_box()["y"] < 600
  cut = "[...document.querySelectorAll('#summary .scroll')].filter(box => box.scrollWidth > box.clientWidth + 1).length"
  assert page.evaluate(cut) == 0  # its tables fit


def test_dark_and_on_a_phone(visit):
  phone = {"width": 390, "height": 844}
  page, wrong = visit(viewport=phone, color_scheme="dark", is_mobile=True, has_touch=True)
  assert page.evaluate("document.documentElement.scrollWidth") <= phone["width"]  # only tables scroll sideways
  assert ink(page) == rgb(DARK[0])
  assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 28)"
  # A table that is cut says so, and the difference and its interval come before it is.
  assert page.locator(".scroll.cut + .more").first.is_visible()
  interval = page.locator("#summary table").first.locator("th", has_text="interval").bounding_box()
  assert interval["x"] + interval["width"] <= phone["width"]
  page.emulate_media(color_scheme="light")
  wait_until(page, f"getComputedStyle({FIRST_CURVE}).stroke === '{rgb(LIGHT[0])}'")
  assert wrong == []


def test_without_scripts_there_are_the_same_pictures(visit, browser, whole_report):
  context = browser.new_context(java_script_enabled=False)
  page = context.new_page()
  page.goto((whole_report / "report.html").as_uri())
  assert page.locator(".panel svg").first.is_visible()
  assert not page.locator(".filters").is_visible()
  context.close()


def test_the_page_of_one_run_shows_its_curves(browser, tmp_path, monkeypatch):
  """Would catch a page with nothing to choose from that hides everything."""
  monkeypatch.setattr(figures, "FORMATS", ("svg",))
  write_report(load([str(make_run(tmp_path / "run"))]), tmp_path / "report")
  context = browser.new_context()
  page = context.new_page()
  page.goto((tmp_path / "report" / "report.html").as_uri())
  page.wait_for_selector("html.interactive", timeout=DRAWN)
  hidden = "[...document.querySelectorAll('.series, .layer-lists li')].filter(e => !e.getClientRects().length).length"
  assert page.evaluate("document.querySelectorAll('.series').length") > 0
  assert page.evaluate(hidden) == 0
  context.close()
