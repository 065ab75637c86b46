"""The pages in a real browser: no request leaves, nothing complains, everything is there and can be read."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from test_report import contrast, make, make_hostile, make_large

from fedara_flwr.report import write_comparison, write_report

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
QUIET = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update"]
PAGES = {"report": 6, "large": 6, "hostile": 6, "comparison": 3}

# colours of every text and of the ground under it, as the browser computes them
COLOURS = """() => {
  const hex = text => '#' + text.match(/[\\d.]+/g).slice(0, 3).map(v => (+v).toString(16).padStart(2, '0')).join('');
  const ground = element => {
    for (; element; element = element.parentElement) {
      const colour = getComputedStyle(element).backgroundColor;
      if (colour !== 'rgba(0, 0, 0, 0)') return hex(colour);
    }
    return '#ffffff';
  };
  const own = e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
  return [...document.querySelectorAll('main *')].filter(e => own(e) && e.tagName !== 'title').map(e => {
    const style = getComputedStyle(e);
    return [e.textContent.trim().slice(0, 40), hex(e.closest('svg') ? style.fill : style.color), ground(e)];
  });
}"""
# texts of a picture that lie on each other or outside of it
CLASHES = """() => [...document.querySelectorAll('svg')].flatMap(svg => {
  const frame = svg.getBoundingClientRect();
  const found = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
  const outside = found.filter(([, b]) => b.left < frame.left - 1 || b.right > frame.right + 1
    || b.top < frame.top - 1 || b.bottom > frame.bottom + 1).map(([t]) => 'outside: ' + t);
  const over = found.flatMap(([t, a], i) => found.slice(i + 1).filter(([, b]) =>
    Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top)
    > 0.45 * Math.min(a.height, b.height)).map(([u]) => t + ' over ' + u));
  return [...outside, ...over];
})"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pages")
    tiny, large, hostile = make(root / "tiny"), make_large(root / "large"), make_hostile(root / "hostile")
    return {
        "report": write_report(tiny),
        "large": write_report(large),
        "hostile": write_report(hostile),
        "comparison": write_comparison([tiny, large, hostile], root / "comparison.html", 0.3),
    }


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*QUIET, "--disable-sync"])
        yield browser
        browser.close()


@pytest.fixture
def view(browser, pages):
    """Opens a page; whatever it asks for or says is in `asked` and `said`."""
    opened = []

    def open_page(name: str, width: int = 1200, scheme: str = "light"):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        opened.append(page)
        page.asked, page.said = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("console", lambda message: page.said.append(message.text))
        page.on("pageerror", lambda error: page.said.append(str(error)))
        page.on("dialog", lambda dialog: (page.said.append(dialog.message), dialog.dismiss()))
        page.goto(pages[name].as_uri())
        return page

    yield open_page
    for page in opened:
        page.close()


@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_asked_for_and_nothing_said(view, pages, name):
    page = view(name)
    page.wait_for_timeout(100)
    assert page.asked == [pages[name].as_uri()]
    assert page.said == []


@pytest.mark.parametrize("name", PAGES)
def test_every_picture_is_there(view, name):
    page = view(name)
    boxes = page.evaluate(
        "() => [...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect()).map(b => [b.width, b.height])"
    )
    assert len(boxes) == PAGES[name] and all(width > 300 and height > 150 for width, height in boxes)
    assert page.evaluate("() => [...document.querySelectorAll('svg image')].every(i => i.getBoundingClientRect().width > 100)")


@pytest.mark.parametrize("name", ["report", "large", "comparison"])
def test_texts_of_pictures_keep_apart(view, name):
    assert view(name).evaluate(CLASHES) == []


@pytest.mark.parametrize("name", PAGES)
def test_a_phone_scrolls_tables_but_not_the_page(view, name):
    page = view(name, width=390)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 390
    assert (
        page.evaluate("() => Math.max(...[...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().right))")
        <= 390
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["report", "comparison"])
def test_texts_drop_busy(view, name, scheme):
    found = view(name, scheme=scheme).evaluate(COLOURS)
    assert len(found) > 40
    assert {ground for *_, ground in found} <= ({"#ffffff", "#f4f6f8"} if scheme == "light" else {"#14171c", "#1c2128"})
    faint = [(text, ink, ground) for text, ink, ground in found if contrast(ink, ground) < 4.5]
    assert faint == []


def test_prints_black_on_white_whatever_the_screen(view):
    page = view("report", scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert {ground for *_, ground in page.evaluate(COLOURS)} == {"#ffffff"}
    pdf = page.pdf(format="A4")
    assert pdf.startswith(b"%PDF") and len(pdf) > 20_000
