"""The registered op in plain tensor operations of any size, for formats that know no op of ours (torch.export, ONNX).

Nothing is saved and nothing is fast here: windows are copied out, all logits are held at once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    grid: Sequence[int],
    window: Sequence[int],
    dilation: Sequence[int],
    shift: Sequence[int],
    overlap: Sequence[int],
    wrap: bool,
    attend: bool,
    scale: float,
) -> Tensor:
    """As the op `zoo::window_attention`.

    Raises:
        NotImplementedError: windows with gaps, which no restorer that can be exported has.
    """
    if max(dilation) > 1:
        raise NotImplementedError("window_attention: windows with dilation cannot be exported")
    axes = [_Axis(*axis, q.device) for axis in zip(grid, window, shift, overlap, strict=True)]
    queries = _windows(q, axes, [axis.queries for axis in axes])
    keys, values = (_windows(x, axes, [axis.keys for axis in axes]) for x in (k, v))
    logits = queries @ keys.mT * scale  # b ny nx heads n m
    if bias is not None:
        logits = logits + bias.flatten(3, 4).flatten(1, 2).to(logits.dtype)
    masks = [axis.unseen(wrap, attend) for axis in axes]  # windows n m along each axis, or None
    if masks[0] is not None or masks[1] is not None:
        rows, columns = (axis.everything() if mask is None else mask for axis, mask in zip(axes, masks, strict=True))
        hidden = rows[:, None, :, None, :, None] | columns[None, :, None, :, None, :]  # ny nx wh ww kh kw
        logits = logits.masked_fill(hidden.flatten(4, 5).flatten(2, 3)[:, :, None], -torch.inf)
    out = logits.softmax(-1) @ values  # b ny nx heads n e
    (h, w), (wh, ww) = grid, window
    cells = out.unflatten(4, (wh, ww)).permute(0, 3, 1, 4, 2, 5, 6)  # b heads ny wh nx ww e
    whole = cells.flatten(4, 5).flatten(2, 3)
    if any(shift):
        whole = whole.roll(tuple(shift), (2, 3))
    return whole[:, :, :h, :w].flatten(2, 3)


class _Axis:
    """The windows along one axis: which places of the padded, rolled map each of them reads."""

    def __init__(self, n: int, window: int, shift: int, overlap: int, device: torch.device) -> None:
        self.n, self.shift, self.overlap, self.fits = n, shift, overlap, n % window == 0
        self.size = n if self.fits else (n // window + 1) * window
        first = torch.arange(0, self.size, window, device=device)[:, None]  # windows 1
        self.queries = first + torch.arange(window, device=device) + overlap  # windows wh, in the map with its frame
        self.keys = first + torch.arange(window + 2 * overlap, device=device)

    def unseen(self, wrap: bool, attend: bool) -> Tensor | None:
        """Which keys a query does not see, (windows, n, m); None where it sees all."""
        if (wrap or not self.shift) and (attend or (self.fits and not self.overlap)):
            return None
        hidden = self.everything()
        q, k = (places - self.overlap + self.shift for places in (self.queries, self.keys))
        if not wrap:
            hidden = hidden | ((q >= self.size)[:, :, None] != (k >= self.size)[:, None, :])
        if not attend:
            token = torch.where(k >= self.size, k - self.size, k)
            hidden = hidden | ((token < 0) | (token >= self.n))[:, None, :]
        # A padded query would see nothing at all: not a number, which nobody reads but some checkers count.
        return hidden & ~(torch.where(q >= self.size, q - self.size, q) >= self.n)[:, :, None]

    def everything(self) -> Tensor:
        """Nothing hidden, (windows, n, m)."""
        return torch.zeros_like(self.queries[:, :, None] + self.keys[:, None, :], dtype=torch.bool)


def _windows(x: Tensor, axes: Sequence[_Axis], places: Sequence[Tensor]) -> Tensor:
    """Tokens of the windows, (b, ny, nx, heads, n, d); padding is zero."""
    rows, columns = axes
    image = x.unflatten(2, (rows.n, columns.n))  # b heads h w d
    if not (rows.fits and columns.fits):
        image = F.pad(image, (0, 0, 0, columns.size - columns.n, 0, rows.size - rows.n))
    if rows.shift or columns.shift:
        image = image.roll((-rows.shift, -columns.shift), (2, 3))
    if rows.overlap or columns.overlap:
        image = F.pad(image, (0, 0, columns.overlap, columns.overlap, rows.overlap, rows.overlap))
    image = image.index_select(2, places[0].flatten()).unflatten(2, places[0].shape)  # b heads ny wh w d
    image = image.index_select(4, places[1].flatten()).unflatten(4, places[1].shape)  # b heads ny wh nx ww d
    return image.permute(0, 2, 4, 1, 3, 5, 6).flatten(4, 5)
