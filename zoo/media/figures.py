"""Labelled figures of at most 4096 pixels a side: grids, one scene side by side with a magnified square, heat maps."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .pixels import to_uint8, to_unit

_PAPER, _INK, _FAINT, _MARK = "#ffffff", "#1a1a1a", "#d0d0d0", "#ffd23f"
_MARGIN, _GAP = 16, 12  # pixels around the sheet, between cells
_LONGEST = 300  # characters of a label
_SMALLEST, _LARGEST, _COLUMN = 192, 768, 480  # longest side of a grid cell; width of a column side by side
_TALLEST, _NARROWEST = 1920, 96  # an overview side by side; a column, which its label must fit into
_LIMIT = 4096  # either side of a sheet


def grid(
    images: Sequence[np.ndarray], labels: Sequence[str], columns: int | None = None, title: str | None = None
) -> np.ndarray:
    """Images in rows under their labels; small ones are enlarged by whole numbers, large ones shrunk to 768 px.

    Args:
        images: each (h, w), (h, w, 1) or (h, w, 3), float in [0, 1] or uint8; sizes may differ.
        labels: one text per image.
        columns: images per row; None = about as many as rows.
        title: a line above everything.

    Returns:
        uint8 (h, w, 3).

    Raises:
        ValueError: not one label per image.
    """
    cells = _cells("grid", images, labels)
    across = min(columns or math.ceil(len(cells) ** 0.5), len(cells))
    room = _room(max(across, math.ceil(len(cells) / across)))
    target = min(max(_SMALLEST, *(max(cell.size) for cell in cells)), _LARGEST, room)
    fitted = []
    for cell in cells:
        longest = max(cell.size)
        ratio = target // longest if longest <= target else target / longest
        fitted.append(_resized(cell, max(1, round(cell.width * ratio)), max(1, round(cell.height * ratio))))
    return _sheet(fitted, labels, across, title)


def side_by_side(
    images: Sequence[np.ndarray],
    labels: Sequence[str],
    zoom: tuple[int, int, int] | None = None,
    title: str | None = None,
) -> np.ndarray:
    """One row of labelled images of one scene; below it the marked square of each, magnified pixel by pixel.

    Args:
        images: as for `grid`; smaller ones are shown at the size of the largest.
        labels: one text per image.
        zoom: (top, left, size) of the square in pixels of the largest image; None = no second row.
        title: a line above everything.

    Returns:
        uint8 (h, w, 3).

    Raises:
        ValueError: not one label per image.
    """
    cells = _cells("side_by_side", images, labels)
    width, height = max((cell.size for cell in cells), key=math.prod)
    size = min(zoom[2], width, height) if zoom else 1
    # A whole number of dots for every pixel of the square; fewer where many columns share the sheet.
    column = max(1, min(round(_COLUMN / size), _room(len(cells)) // size)) * size
    ratio = min(column / width, _TALLEST / height)
    overview = [_resized(cell, max(1, round(width * ratio)), max(1, round(height * ratio))) for cell in cells]
    strip = []
    if zoom:
        top, left, _ = zoom
        for cell in cells:
            across, down = cell.width / width, cell.height / height
            box = (left * across, top * down, (left + size) * across, (top + size) * down)
            strip.append(cell.resize((column, column), Image.Resampling.NEAREST, box=box))
        frame = [round(v * ratio) for v in (left, top, left + size, top + size)]
        for cell in overview:
            pen = ImageDraw.Draw(cell)
            pen.rectangle((frame[0] - 3, frame[1] - 3, frame[2] + 2, frame[3] + 2), outline=_INK, width=1)
            pen.rectangle((frame[0] - 2, frame[1] - 2, frame[2] + 1, frame[3] + 1), outline=_MARK, width=2)
    return _sheet(overview + strip, [*labels, *[""] * len(strip)], len(cells), title)


def strip(clip: np.ndarray, count: int = 4) -> np.ndarray:
    """Frames of a clip side by side, evenly spaced from the first to the last.

    Args:
        clip: (t, h, w, c), float in [0, 1] or uint8.
        count: frames at most.

    Returns:
        (h, frames * w, c), dtype of the clip.
    """
    places = np.linspace(0, len(clip) - 1, min(count, len(clip))).round().astype(int)
    return np.concatenate([clip[place] for place in places], axis=1)


def heat_map(restored: np.ndarray, gt: np.ndarray, most: float = 0.1) -> np.ndarray:
    """Where two images differ: mean absolute difference of the channels, black = 0 to pale yellow = `most` or above.

    Args:
        restored: (h, w, c), float in [0, 1] or uint8.
        gt: the same shape.
        most: the difference that gets the brightest colour, in [0, 1] units.

    Returns:
        uint8 (h, w, 3).
    """
    error = np.abs(to_unit(restored) - to_unit(gt)).mean(axis=2)
    stops = np.array([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]], np.float64)
    place = np.clip(error / most, 0, 1) * (len(stops) - 1)
    planes = [np.interp(place, np.arange(len(stops)), stops[:, channel]) for channel in range(3)]
    return np.rint(np.stack(planes, axis=2)).astype(np.uint8)


def hot_spot(error: np.ndarray, size: int) -> tuple[int, int, int]:
    """The square (top, left, size) over which `error` (h, w) sums up highest; `size` shrinks to fit."""
    size = min(size, *error.shape)
    total = np.pad(error.astype(np.float64), ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    sums = total[size:, size:] - total[:-size, size:] - total[size:, :-size] + total[:-size, :-size]
    top, left = np.unravel_index(int(sums.argmax()), sums.shape)
    return int(top), int(left), size


def _cells(function: str, images: Sequence[np.ndarray], labels: Sequence[str]) -> list[Image.Image]:
    if not images or len(images) != len(labels):
        raise ValueError(f"{function}: needs images and one label for each, got {len(images)} and {len(labels)}")
    eight = [to_uint8(to_unit(image)) for image in images]
    return [Image.fromarray(np.repeat(e, 3, axis=2) if e.shape[2] == 1 else e) for e in eight]


def _resized(cell: Image.Image, width: int, height: int) -> Image.Image:
    """Pixels stay visible squares when enlarged, and are averaged when shrunk."""
    grow = width >= cell.width
    return cell.resize((width, height), Image.Resampling.NEAREST if grow else Image.Resampling.LANCZOS)


def _room(number: int) -> int:
    """Pixels for each of so many cells beside or above each other."""
    return max(1, (_LIMIT - 2 * _MARGIN) // number - _GAP)


def _sheet(cells: list[Image.Image], labels: Sequence[str], columns: int, title: str | None) -> np.ndarray:
    """Place cells in rows; a row without labels gets no space for them. Beyond the limit the whole is shrunk."""
    font, big = ImageFont.load_default(15), ImageFont.load_default(20)
    width = max(_NARROWEST, *(cell.width for cell in cells))
    rows = [range(start, min(start + columns, len(cells))) for start in range(0, len(cells), columns)]
    texts = [_wrapped(label, font, width) for label in labels]
    line, big_line = 20, 26
    above = [max(len(texts[i]) for i in row) * line for row in rows]
    heights = [max(cells[i].height for i in row) for row in rows]
    sheet_width = 2 * _MARGIN + columns * width + (columns - 1) * _GAP
    head = _wrapped(title or "", big, sheet_width - 2 * _MARGIN)
    y = _MARGIN + len(head) * big_line + (6 if head else 0)
    sheet = Image.new("RGB", (sheet_width, y + sum(above) + sum(heights) + _GAP * (len(rows) - 1) + _MARGIN), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, text in enumerate(head):
        pen.text((_MARGIN, _MARGIN + number * big_line), text, _INK, big)
    for row, space, height in zip(rows, above, heights, strict=True):
        for place, i in enumerate(row):
            x = _MARGIN + place * (width + _GAP)
            top = y + space
            for number, text in enumerate(texts[i]):  # the last line of every label stands on its picture
                pen.text((x, top - (len(texts[i]) - number) * line), text, _INK, font)
            pen.rectangle((x - 1, top - 1, x + cells[i].width, top + cells[i].height), outline=_FAINT)
            sheet.paste(cells[i], (x, top))
        y += space + height + _GAP
    sheet.thumbnail((_LIMIT, _LIMIT), Image.Resampling.LANCZOS)  # only ever shrinks
    return np.asarray(sheet)


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Break `text` at spaces, and inside words only when a word alone is too wide; very long texts are cut off."""
    lines: list[str] = []
    text = text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        while font.getlength(word) > width and len(word) > 1:
            fits = max(n for n in range(1, len(word)) if n == 1 or font.getlength(word[:n]) <= width)
            lines.append(word[:fits])
            word = word[fits:]
        lines.append(word)
    return lines
