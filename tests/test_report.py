import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from tests.browser import Browser, find
from zoo import report


class Balance(HTMLParser):
    """Fails on tags that do not pair."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def balanced(text):
    parser = Balance()
    parser.feed(text)
    assert not parser.open
    return text


def test_a_page_is_whole_and_foreign_text_stays_text():
    parts = [("<b>", report.text("a < b & c")), ("rows", report.table([{"name": "<i>", "dB": 27.12345}, {"x": "y"}]))]
    text = balanced(report.page("<script>", parts))
    assert "<script>" not in text
    assert "<i>" not in text
    assert "a &lt; b &amp; c" in text
    assert '<td class="number">27.12</td>' in text
    assert text.count("<tr>") == 3


def test_a_picture_is_inlined_without_loss(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for source in (pixels, tmp_path / "a.png"):
        text = balanced(report.picture(source, 'step "3"'))
        data = base64.b64decode(re.search(r"base64,([^\"]+)", text)[1])
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), pixels)
        assert "step &quot;3&quot;" in text


def test_a_curve_reaches_the_corners_of_its_values():
    text = balanced(report.curve({"a": [(0, 1.0), (10, 3.0)], "b": [(5, 2.0)], "c": [(1, float("nan"))]}, "dB"))
    lines = re.findall(r'points="([^"]+)"', text)
    assert len(lines) == 2, "what is not finite is left out"
    (x0, y0), (x1, y1) = (tuple(map(float, point.split(","))) for point in lines[0].split())
    (x2, y2) = tuple(map(float, lines[1].split(",")))
    assert x0 < x2 < x1
    assert y0 > y2 > y1, "larger values are higher"
    assert x2 == pytest.approx((x0 + x1) / 2, abs=0.1)
    assert y2 == pytest.approx((y0 + y1) / 2, abs=0.1)
    assert "a: 3 dB" in text


@pytest.mark.parametrize("lines", [{}, {"a": []}, {"a": [(1, float("inf"))]}])
def test_no_values_are_said(lines):
    assert report.curve(lines) == "<p>no values yet</p>"


def test_one_value_has_a_curve():
    assert "<polyline" in balanced(report.curve({"a": [(3, 3.0)]}))


def sheet(colour):
    return np.full((40, 80, 3), colour, np.uint8)


def test_a_slider_holds_both_pictures_and_needs_one_size():
    text = balanced(report.slider(sheet(1), sheet(2), ("<left>", "right")))
    pictures = re.findall(r"base64,([^\"]+)", text)
    assert [np.asarray(Image.open(io.BytesIO(base64.b64decode(p)))).max() for p in pictures] == [1, 2]
    assert "&lt;left&gt;" in text
    assert "<script>" in report.page("t", [("h", text)])
    assert "<script>" not in report.page("t", [("h", report.picture(sheet(1)))])
    with pytest.raises(ValueError, match="one size"):
        report.slider(sheet(1), sheet(2)[1:], ("a", "b"))


@pytest.mark.browser
def test_the_slider_follows_mouse_finger_and_keys_in_a_real_browser(tmp_path):
    program = find()
    if program is None:
        pytest.skip("no Chromium here: install Debian's package chromium, or name one in ZOO_BROWSER")
    red, blue = (np.tile(np.array(c, np.uint8), (40, 80, 1)) for c in ((255, 0, 0), (0, 0, 255)))
    section = report.slider(red, blue, ("red", "blue")) + report.slider(blue, red, ("other", "one"))
    path = tmp_path / "page.html"
    path.write_text(report.page("t", [("h", section)]), encoding="utf-8")
    with Browser(program, path.as_uri(), tmp_path / "profile") as browser:
        left, top, width, height = browser.ask(
            "(() => { const r = document.querySelector('.slider div').getBoundingClientRect();"
            "return [r.left, r.top, r.width, r.height] })()"
        )
        assert width == 80 * (1100 // 80)

        def at(share, down=0.2):
            return left + width * share, top + height * down

        def line():
            return browser.ask("document.querySelector('.slider input').valueAsNumber")

        def seen(share):
            """Whether the picture shows red or blue there."""
            pixels = np.asarray(Image.open(io.BytesIO(browser.screenshot())).convert("RGB"))
            column, row = (round(v) for v in at(share))
            return {(255, 0, 0): "red", (0, 0, 255): "blue"}[tuple(pixels[row, column].tolist())]

        assert (line(), seen(0.4), seen(0.6)) == (50, "red", "blue")
        browser.mouse("down", *at(0.5))
        browser.mouse("move", *at(0.25))
        browser.mouse("up", *at(0.25))
        assert line() == pytest.approx(25, abs=0.2)
        assert (seen(0.2), seen(0.4)) == ("red", "blue")
        browser.mouse("hover", *at(0.9))
        assert line() == pytest.approx(25, abs=0.2), "a mouse that only passes moves nothing"
        before = line()
        browser.key("ArrowRight")
        assert line() > before
        browser.key("End")
        assert (line(), seen(0.9)) == (100, "red")
        browser.call("Emulation.setTouchEmulationEnabled", enabled=True)
        browser.touch("down", *at(0.3))
        for share in (0.4, 0.5, 0.6):
            browser.touch("move", *at(share))
        browser.until("Math.abs(document.querySelector('.slider input').valueAsNumber - 60) < 0.2")
        browser.touch("up")
        assert (seen(0.55), seen(0.7)) == ("red", "blue")
        assert browser.ask("document.querySelectorAll('.slider input')[1].valueAsNumber") == 50, "each has its own line"
        assert [url for url in browser.requests if not url.startswith("data:")] == [path.as_uri()]
