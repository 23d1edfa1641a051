"""The report and a comparison in a real browser: on a desk, on a phone, in the dark and in print."""

import re

import pytest

from core.report.comparison import comparison_page, comparison_parts, comparison_table
from core.report.report import build_report
from tests.report.test_comparison import compared
from tests.support.browser import CHROMIUM, browser
from tests.support.reports import make_record

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the path"),
]

VIEWS = {
    "desk": {"width": 1200},
    "phone": {"width": 360},
    "dark": {"width": 1200, "scheme": "dark"},
    "print": {"width": 1050, "media": "print"},
}
BAD = (
    '<body style="background:#111"><p style="color:#222">dim</p><div style="width:2000px">wide</div>'
    '<img src="http://127.0.0.1:9/x.png"><script>console.error("broken")</script>'
)


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    pytest.importorskip("websocket", reason="the package websocket-client is not installed")
    with browser(tmp_path_factory.mktemp("chromium")) as tab:
        yield tab


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    tasks = ("arc_easy", "piqa", "hellaswag", "winogrande", "boolq")
    runs = [compared(tasks=tasks), compared("b" * 12, "another run with a long name", phases=6, tasks=tasks)]
    table = comparison_table(runs, against=runs[0])
    beside = comparison_parts(runs, table, against=runs[0])
    found = {
        "comparison": comparison_page(runs, table, against=runs[0]),
        "report": build_report(make_record(phases=6, tasks=tasks), compared=beside),
        "bad": f"<!DOCTYPE html><html><head><title>bad</title></head>{BAD}</body></html>",
    }
    for name, html in found.items():
        (folder / f"{name}.html").write_text(html)
    return folder


def luminance(colour):
    red, green, blue = (int(part) / 255 for part in re.findall(r"[0-9]+", colour)[:3])
    parts = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def contrast(tab):
    """Of the first paragraph's text with the page, as WCAG 2 defines it."""
    style = "getComputedStyle(document.querySelector('{}')).{}"
    values = [
        luminance(tab.evaluate(style.format(*of))) for of in (("p", "color"), ("body", "backgroundColor"))
    ]
    return (max(values) + 0.05) / (min(values) + 0.05)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("page", ["report", "comparison"])
def test_a_page_asks_for_nothing_says_nothing_and_fits(tab, pages, page, view):
    seen = tab.open(pages / f"{page}.html", **VIEWS[view])
    assert (seen.requests, seen.problems) == ([], [])
    assert tab.evaluate("document.documentElement.scrollWidth") <= VIEWS[view]["width"]
    assert contrast(tab) >= 4.5
    assert tab.evaluate("document.querySelectorAll('svg').length") >= 2
    assert tab.evaluate("Math.min(...[...document.querySelectorAll('svg')].map(e => e.clientWidth))") >= 600
    # What is wider than its box can be scrolled to, and is not cut in print.
    boxes = "[...document.querySelectorAll('.wide')]"
    hidden = "visible" if view == "print" else "auto"
    assert tab.evaluate(f"{boxes}.every(e => getComputedStyle(e).overflowX == '{hidden}')")


def test_what_is_wrong_with_a_page_is_seen(tab, pages):
    seen = tab.open(pages / "bad.html", **VIEWS["phone"])
    assert seen.requests == ["http://127.0.0.1:9/x.png"]
    assert any("broken" in problem for problem in seen.problems)
    assert tab.evaluate("document.documentElement.scrollWidth") > 360
    assert contrast(tab) < 4.5
