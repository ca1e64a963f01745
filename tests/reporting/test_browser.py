"""The page in a real browser, where one is found: nothing fails, everything is drawn, and it works by keyboard."""

import os
import shutil
import time
from pathlib import Path

import pytest

from mixln_jax.reporting.panels import DARK, LIGHT

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
    page.wait_for_selector("html[data-drawn]", timeout=DRAWN)
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


def colours(page, chart):
  return page.evaluate("id => document.getElementById(id).data.map(trace => trace.marker.color)", chart)


def test_all_is_drawn_without_a_fault_and_works_by_keyboard(visit):
  page, wrong = visit(viewport={"width": 1280, "height": 900})
  assert page.get_attribute("html", "data-drawn") == "charts"
  empty = """() => [...document.querySelectorAll('.chart')].filter(chart => chart.getBoundingClientRect().height < 100
    || chart.querySelectorAll('.trace path, .heatmaplayer image, .bars path').length === 0).map(chart => chart.id)"""
  assert page.evaluate(empty) == []
  assert page.locator(".chart").count() > 30
  assert set(colours(page, "loss-0")) <= set(LIGHT)

  count = "id => document.getElementById(id).data.filter(trace => trace.visible !== false).length"
  assert page.evaluate(count, "loss-0") == 9
  page.locator("button", has_text="pre").first.focus()
  page.keyboard.press("Enter")
  wait_until(page, f"({count})('loss-0') === 6")
  assert page.locator("#shown").text_content() == "(6 of 9 shown)"
  page.keyboard.press("Enter")
  wait_until(page, f"({count})('loss-0') === 9")

  page.locator("button[data-figure=loss][data-log=yaxis]").focus()
  page.keyboard.press("Space")
  wait_until(page, "document.getElementById('loss-0').layout.yaxis.type === 'log'")
  page.locator("#loss summary").focus()
  page.keyboard.press("Enter")
  assert page.locator("#loss table").first.is_visible()

  page.evaluate("document.getElementById('effective_rank-0').scrollIntoView({block: 'center', behavior: 'instant'})")
  box = page.locator("#effective_rank-0 .nsewdrag").bounding_box()
  page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
  page.wait_for_selector("#effective_rank-0 .hoverlayer .hovertext")
  assert wrong == []


def test_dark_and_on_a_phone(visit):
  phone = {"width": 390, "height": 844}
  page, wrong = visit(viewport=phone, color_scheme="dark", is_mobile=True, has_touch=True)
  assert page.evaluate("document.documentElement.scrollWidth") <= phone["width"]  # only tables scroll sideways
  assert set(colours(page, "loss-0")) <= set(DARK)
  assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 28)"
  page.emulate_media(color_scheme="light")
  wait_until(page, f"document.getElementById('loss-0').data[0].marker.color === '{LIGHT[0]}'")
  assert wrong == []


def test_without_scripts_there_are_still_pictures(visit, browser, whole_report):
  context = browser.new_context(java_script_enabled=False)
  page = context.new_page()
  page.goto((whole_report / "report.html").as_uri())
  assert page.locator(".still").first.is_visible()
  assert page.locator(".still").count() == page.locator("figure").count()
  assert not page.locator(".chart").first.is_visible()
  assert not page.locator(".filters").is_visible()
  context.close()
