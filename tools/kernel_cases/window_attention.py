"""Window attention as HAT has it: shifted windows, and windows that look beyond their border."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from kernel_cases import Case
from zoo.kernels.window_attention import overlapping_position_index, relative_position_index, window_attention


def compiled(dtype: torch.dtype, head_dim: int) -> None:
    """Windows of 16 a side, shifted; with overlap; of 8 a side on an order."""
    for window, shift, overlap, ordered in ((16, 8, 0, False), (16, 0, 4, False), (8, 0, 0, True)):
        problem = Attention(2, head_dim, 32, window, shift, overlap, dtype)
        order = torch.arange(32 * 32).expand(1, 2, -1) if ordered else None
        problem.ours("triton", order).sum().backward()


def timed(quick: bool) -> Iterator[Case]:
    """Both of the attentions of hat-tiny; of hat-s and hat, too."""
    shapes = [(3, 16, 64, 8, 4, 0), (3, 16, 64, 8, 0, 4), (6, 24, 64, 16, 8, 0), (6, 30, 64, 16, 8, 0)]
    for numbers in shapes[:2] if quick else [*shapes, (6, 30, 64, 16, 0, 4)]:
        problem = Attention(*numbers)
        peers = {
            "unfused softmax": partial(problem.plain, fused=False),
            "scaled_dot_product_attention": partial(problem.plain, fused=True),
        }
        ours = {"torch": partial(problem.ours, "torch")}
        yield Case("window_attention", problem.shape, ours, peers, problem.exact, problem.flops, problem.bytes)
        yield Case(
            "window_attention, backward too",
            problem.shape,
            {name: problem.trained(call) for name, call in ours.items()},
            {name: problem.trained(call) for name, call in peers.items()},
            problem.trained(problem.exact),
            3.5 * problem.flops,  # five products for two
            3 * problem.bytes,
        )


class Attention:
    """Self-attention in shifted windows or cross-attention on overlapping ones, as HAT has them; sides fit."""

    def __init__(
        self, heads: int, d: int, side: int, window: int, shift: int, overlap: int, dtype: torch.dtype = torch.float32
    ) -> None:
        self.side, self.window, self.shift, self.overlap = side, window, shift, overlap
        self.shape = f"b=1 heads={heads} grid={side}x{side} d={d} window={window} shift={shift} overlap={overlap}"
        keys = window + 2 * overlap
        self.index = overlapping_position_index(window, keys) if overlap else relative_position_index(window)
        self.table = torch.randn((window + keys - 1) ** 2, heads, requires_grad=True)
        qkv = torch.randn(1, side**2, 3, heads, d, dtype=dtype)  # views of one projection, as models have them
        self.tokens = [t.requires_grad_() for t in qkv.permute(2, 0, 3, 1, 4).unbind(0)]
        # What depends on the shape alone is made beforehand, as the official code does.
        region = torch.zeros(1, 1, side, side)
        for axis in (2, 3):
            strip = torch.arange(side).ge(side - window).int() + torch.arange(side).ge(side - shift).int()
            region = 3 * region + (strip[:, None] if axis == 2 else strip)
        marks = self.cut(region.flatten(2)[..., None], 0)[:, 0, :, 0]  # nw n
        different = marks[:, None, :] != marks[:, :, None]
        self.mask = torch.zeros(different.shape).masked_fill(different, -100.0)[:, None] if shift else None  # nw 1 n n

        pairs = heads * side**2 * keys**2
        self.flops, self.bytes = 4.0 * pairs * d, float(4 * self.tokens[0].nbytes + self.table.nbytes)
        self.weight = torch.randn(1, heads, side**2, d)

    def cut(self, tokens: Tensor, overlap: int) -> Tensor:
        """(1, heads, n, d) to windows (nw, heads, m, d)."""
        image = tokens[0].transpose(1, 2).unflatten(2, (self.side, self.side))  # heads d h w
        heads, size = image.shape[0], self.window + 2 * overlap
        if overlap:
            columns = F.unfold(image.flatten(0, 1)[None], size, stride=self.window, padding=overlap)[0]
            return columns.unflatten(0, (heads, -1, size**2)).permute(3, 0, 2, 1)
        count = self.side // self.window
        cells = image.unflatten(3, (count, -1)).unflatten(2, (count, -1))  # heads d rows wh columns ww
        return cells.permute(2, 4, 0, 3, 5, 1).flatten(3, 4).flatten(0, 1)

    def ours(self, impl: str, order: Tensor | None = None) -> Tensor:
        """The kernel."""
        return self.attend(*self.tokens, self.table, impl, order)

    def exact(self) -> Tensor:
        """The definition in float64."""
        return self.attend(*(t.double() for t in (*self.tokens, self.table)), "reference")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, table: Tensor, impl: str, order: Tensor | None = None) -> Tensor:
        """The call that a model makes."""
        return window_attention(
            q,
            k,
            v,
            grid=(self.side, self.side),
            window=self.window,
            shift=self.shift,
            overlap=self.overlap,
            order=order,
            bias_table=table,
            bias_index=self.index,
            pad="attend",
            impl=impl,
        )

    def trained(self, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """The gradients of tokens and table, one after the other."""
        leaves = [*self.tokens, self.table]

        def gradients() -> Tensor:
            with torch.enable_grad():
                out = call()
            return torch.cat([g.flatten() for g in torch.autograd.grad(out, leaves, self.weight.to(out))])

        return gradients

    def plain(self, fused: bool) -> Tensor:
        """Roll, cut into windows, attend in each, put together, roll back."""
        reaches = (0, self.overlap, self.overlap)
        q, k, v = (self.cut(self.rolled(t, -self.shift), o) for t, o in zip(self.tokens, reaches, strict=True))
        bias = self.table[self.index % len(self.table)].permute(2, 0, 1)  # heads n m
        bias = bias if self.mask is None else bias + self.mask
        if fused:
            out = F.scaled_dot_product_attention(q, k, v, bias.expand(len(q), -1, -1, -1))
        else:
            out = (q * q.shape[-1] ** -0.5 @ k.mT + bias).softmax(-1) @ v  # nw heads n d
        count = self.side // self.window
        cells = out.unflatten(2, (self.window, -1)).unflatten(0, (count, -1)).permute(2, 0, 3, 1, 4, 5)
        return self.rolled(cells.reshape(1, out.shape[1], -1, out.shape[-1]), self.shift)

    def rolled(self, tokens: Tensor, by: int) -> Tensor:
        """The map displaced along both axes."""
        return tokens.unflatten(2, (self.side, self.side)).roll((by, by), (2, 3)).flatten(2, 3) if by else tokens
