import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from zoo import report


class Balance(HTMLParser):
    """Fails on tags that do not pair."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img"):
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
