"""Pages that one file holds: pictures, sliders, tables and curves in plain HTML; no server, nothing fetched."""

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #1a1a1a }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.5rem }
figure { margin: 1rem 0 } img { max-width: 100% } figcaption { color: #555 }
table { border-collapse: collapse } td, th { padding: .2rem .8rem; border-bottom: 1px solid #ddd; text-align: left }
td.number { text-align: right; font-variant-numeric: tabular-nums }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto }
.slider { width: fit-content; max-width: 100% }
.slider div { position: relative; display: inline-block; max-width: 100%; cursor: ew-resize; touch-action: pan-y }
.slider div:focus-within { outline: 3px solid #1f5fa8; outline-offset: 2px }
.slider img { display: block; pointer-events: none; user-select: none; image-rendering: pixelated }
.slider img + img { position: absolute; inset: 0; width: 100%; height: 100%; clip-path: inset(0 0 0 var(--at, 50%)) }
.slider input { position: absolute; inset: 0; margin: 0; opacity: 0; pointer-events: none }
.slider div::after { content: ""; position: absolute; inset: 0 auto 0 var(--at, 50%); width: 2px; margin-left: -1px;
  background: #fff; box-shadow: 0 0 3px #000; pointer-events: none }
.slider div::before { content: "\\25c2\\2009\\25b8"; position: absolute; z-index: 1; top: 50%; left: var(--at, 50%);
  transform: translate(-50%, -50%); padding: 0 .6rem; border-radius: 1rem; background: #fff; box-shadow: 0 0 3px #000;
  pointer-events: none }
.slider figcaption { display: flex; justify-content: space-between; gap: 2rem }
"""
# The pointer (mouse, pen or finger) moves the line; arrow keys move the hidden range input, which tells screen readers.
_SLIDERS = """
for (const box of document.querySelectorAll(".slider div")) {
  const input = box.querySelector("input");
  const show = () => box.style.setProperty("--at", input.value + "%");
  const follow = (event) => {
    if (!event.buttons) return;
    const place = box.getBoundingClientRect();
    input.value = (100 * (event.clientX - place.left)) / place.width;
    show();
  };
  box.addEventListener("pointerdown", (event) => {
    event.preventDefault();
    box.setPointerCapture(event.pointerId);
    input.focus();
    follow(event);
  });
  box.addEventListener("pointermove", follow);
  input.addEventListener("input", show);
}
"""
_ROOM = 1100  # pixels; small pictures under a slider are shown at the largest multiple of their size that fits
_COLOURS = ("#1f5fa8", "#c2501c", "#3b7d3b", "#7a4aa0", "#8a6d1d", "#444444")
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 720, 260, 64, 28  # of a curve and its margins, pixels


def page(title: str, sections: Sequence[tuple[str, str]]) -> str:
    """A whole HTML document.

    Args:
        title: plain text.
        sections: heading (plain text) and content (HTML, such as the functions below return).
    """
    body = "".join(f"<h2>{html.escape(heading)}</h2>\n{content}\n" for heading, content in sections)
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    script = f"<script>{_SLIDERS}</script>" if 'class="slider"' in body else ""
    body = f"<h1>{html.escape(title)}</h1>\n{body}{script}"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'


def picture(image: str | Path | np.ndarray, caption: str = "") -> str:
    """An inlined picture.

    Args:
        image: a PNG file, or uint8 (h, w, 3) or (h, w).
        caption: plain text.
    """
    text = html.escape(caption)
    return f'<figure><img src="{_inlined(image)}" alt="{text}"><figcaption>{text}</figcaption></figure>'


def slider(left: np.ndarray, right: np.ndarray, captions: tuple[str, str]) -> str:
    """Two pictures of one scene on top of each other, and a line between them that mouse, finger and arrow keys move.

    Args:
        left: what is seen left of the line, uint8 (h, w, 3) or (h, w).
        right: what is seen right of it; of the same size.
        captions: of both, plain text.

    Raises:
        ValueError: the sizes differ.
    """
    if left.shape[:2] != right.shape[:2]:
        raise ValueError(f"slider: both pictures must have one size, got {left.shape} and {right.shape}")
    before, after = (html.escape(caption) for caption in captions)
    width = left.shape[1] * max(1, _ROOM // left.shape[1])
    return (
        f'<figure class="slider"><div><img src="{_inlined(left)}" alt="{before}" width="{width}">'
        f'<img src="{_inlined(right)}" alt="{after}"><input type="range" min="0" max="100" step="any" value="50" '
        f'aria-label="how much of {before} is seen, in percent"></div>'
        f"<figcaption><span>{before}</span><span>{after}</span></figcaption></figure>"
    )


def text(content: str) -> str:
    """Preformatted plain text."""
    return f"<pre>{html.escape(content)}</pre>"


def table(rows: Sequence[Mapping[str, str | float]]) -> str:
    """A table with one column per key of any row; numbers are shown with four digits.

    Args:
        rows: values by column.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(_cell(row.get(column, "")) for column in columns) + "</tr>\n" for row in rows)
    return f"<table><tr>{head}</tr>\n{body}</table>"


def curve(lines: Mapping[str, Sequence[tuple[float, float]]], unit: str = "", over: str = "step") -> str:
    """Lines over a common axis, drawn as SVG; points that are not finite are left out.

    Args:
        lines: name -> points (x, y).
        unit: of y.
        over: what x is.
    """
    kept = {name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in lines.items()}
    kept = {name: points for name, points in kept.items() if points}
    if not kept:
        return "<p>no values yet</p>"
    xs, ys = zip(*(point for points in kept.values() for point in points), strict=True)
    x_span, y_span = _span(xs), _span(ys)
    parts = []
    for share in (0, 0.5, 1):
        x, y = (span[0] + share * (span[1] - span[0]) for span in (x_span, y_span))
        column, row = _place(x, y, x_span, y_span)
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH}" y1="{row:.1f}" y2="{row:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{row + 4:.1f}" text-anchor="end">{y:.4g}</text>')
        anchor = ("start", "middle", "end")[int(2 * share)]
        label = f"{x:.4g} {html.escape(over)}" if share == 1 else f"{x:.4g}"
        parts.append(f'<text x="{column:.1f}" y="{_HEIGHT - 6}" text-anchor="{anchor}">{label}</text>')
    legend = []
    for number, (name, points) in enumerate(kept.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        places = " ".join("{:.1f},{:.1f}".format(*_place(x, y, x_span, y_span)) for x, y in sorted(points))
        parts.append(f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="2"/>')
        last = max(points)[1]
        legend.append(
            f'<span style="color:{colour}">&#9632; {html.escape(name)}: {last:.4g} {html.escape(unit)}</span>'
        )
    drawing = f'<svg viewBox="0 0 {_WIDTH + 8} {_HEIGHT}" width="100%" font-size="12" role="img">{"".join(parts)}</svg>'
    return f"<figure>{drawing}<figcaption>{' &nbsp; '.join(legend)}</figcaption></figure>"


def _inlined(image: str | Path | np.ndarray) -> str:
    """A PNG as a data URL."""
    if isinstance(image, np.ndarray):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "png")
        data = buffer.getvalue()
    else:
        data = Path(image).read_bytes()
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def _cell(value: str | float) -> str:
    if isinstance(value, str):
        return f"<td>{html.escape(value)}</td>"
    return f'<td class="number">{value:.4g}</td>'


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _place(x: float, y: float, x_span: tuple[float, float], y_span: tuple[float, float]) -> tuple[float, float]:
    """Pixels of a point, from the top left."""
    right = (x - x_span[0]) / (x_span[1] - x_span[0])
    up = (y - y_span[0]) / (y_span[1] - y_span[0])
    return _LEFT + right * (_WIDTH - _LEFT), 10 + (1 - up) * (_HEIGHT - _BOTTOM - 10)
