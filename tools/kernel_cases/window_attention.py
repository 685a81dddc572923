"""Window attention as HAT has it: shifted windows, and windows that look beyond their border."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

from kernel_cases import Case, by_impl, on_gpu
from zoo.kernels.window_attention import overlapping_position_index, relative_position_index, window_attention


def compiled(dtype: torch.dtype, head_dim: int) -> None:
    """Windows of 16 a side, shifted; with overlap; of 8 a side on an order."""
    for window, shift, overlap, ordered in ((16, 8, 0, False), (16, 0, 4, False), (8, 0, 0, True)):
        problem = Attention(1, 2, head_dim, 32, window, shift, overlap, dtype)
        order = torch.arange(32 * 32).expand(1, 2, -1) if ordered else None
        inputs = [x.requires_grad_() for x in (*problem.tokens, problem.table)]
        problem.ours("triton", *inputs, order=order).sum().backward()


def timed(quick: bool) -> Iterator[Case]:
    """Both of the attentions of hat-tiny; of hat-s and hat, too."""
    shapes = [(3, 16, 64, 8, 4, 0), (3, 16, 64, 8, 0, 4), (6, 24, 64, 16, 8, 0), (6, 30, 64, 16, 8, 0)]
    for numbers in shapes[:2] if quick else [*shapes, (6, 30, 64, 16, 0, 4)]:
        problem = Attention(16 if on_gpu() else 1, *numbers)
        yield Case(
            op="window_attention",
            shape=problem.shape,
            inputs=(*problem.tokens, problem.table),
            ours=by_impl(problem.ours),
            peers={
                "unfused softmax": partial(problem.plain, softmax),
                "scaled_dot_product_attention": partial(problem.plain, F.scaled_dot_product_attention),
                "flex_attention": partial(problem.flexible, torch.compile(flex_attention, dynamic=False)),
            },
            flops=problem.flops,
            bytes=problem.bytes,
            trained=(3.5 * problem.flops, 3 * problem.bytes),  # five products for two
            untrained=frozenset() if on_gpu() else frozenset(["flex_attention"]),
        )


def softmax(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """As the published code has it."""
    return (q * q.shape[-1] ** -0.5 @ k.mT + bias).softmax(-1) @ v


class Attention:
    """Self-attention in shifted windows or cross-attention on overlapping ones, as HAT has them; sides fit."""

    def __init__(
        self,
        b: int,
        heads: int,
        d: int,
        side: int,
        window: int,
        shift: int,
        overlap: int,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.side, self.window, self.shift, self.overlap = side, window, shift, overlap
        self.shape = f"b={b} heads={heads} grid={side}x{side} d={d} window={window} shift={shift} overlap={overlap}"
        keys = window + 2 * overlap
        self.index = overlapping_position_index(window, keys) if overlap else relative_position_index(window)
        self.table = torch.randn((window + keys - 1) ** 2, heads, dtype=torch.float32)
        qkv = torch.randn(b, side**2, 3, heads, d, dtype=dtype)  # views of one projection, as models have them
        self.tokens = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        # What depends on the shape alone is made beforehand, as the official code does.
        region = torch.zeros(side, side)
        for axis in (0, 1):
            strip = torch.arange(side).ge(side - window).int() + torch.arange(side).ge(side - shift).int()
            region = 3 * region + (strip[:, None] if axis == 0 else strip)
        self.region = self.cut(region.flatten()[None, None, :, None], 0)[:, 0, :, 0]  # nw n
        different = self.region[:, None, :] != self.region[:, :, None]
        self.mask = torch.zeros(different.shape).masked_fill(different, -100.0)[:, None] if shift else None  # nw 1 n n

        self.flops = 4.0 * b * heads * side**2 * keys**2 * d
        self.bytes = float(4 * self.tokens[0].nbytes + self.table.nbytes)

    def ours(self, impl: str, q: Tensor, k: Tensor, v: Tensor, table: Tensor, order: Tensor | None = None) -> Tensor:
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

    def plain(self, attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        """Roll, cut into windows, attend in each, put together, roll back."""
        bias = table[self.index % len(table)].permute(2, 0, 1)  # heads n m
        if self.mask is not None:
            bias = bias + self.mask.repeat(len(q), 1, 1, 1)  # (b nw) heads n m
        windows = self.windows(q, k, v)
        return self.together(attend(*windows, bias.to(q.dtype).expand(len(windows[0]), -1, -1, -1)), len(q))

    def flexible(self, attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        """The same through flex_attention; bias and mask are functions of the position."""
        bias = table[self.index % len(table)].permute(2, 0, 1)  # heads n m
        count = (self.side // self.window) ** 2

        def change(score: Tensor, window: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
            score = score + bias[head, i, j]
            if self.mask is None:
                return score
            same = self.region[window % count, i] == self.region[window % count, j]
            return torch.where(same, score, score - 100.0)

        windows = [t.contiguous() for t in self.windows(q, k, v)]
        return self.together(attend(*windows, score_mod=change), len(q))

    def windows(self, *tokens: Tensor) -> list[Tensor]:
        """Queries, keys and values by window."""
        reaches = (0, self.overlap, self.overlap)
        return [self.cut(self.rolled(t, -self.shift), reach) for t, reach in zip(tokens, reaches, strict=True)]

    def cut(self, tokens: Tensor, overlap: int) -> Tensor:
        """(b, heads, n, d) to windows ((b nw), heads, m, d)."""
        image = tokens.transpose(2, 3).unflatten(3, (self.side, self.side))  # b heads d h w
        heads, size = image.shape[1], self.window + 2 * overlap
        if overlap:
            columns = F.unfold(image.flatten(1, 2), size, stride=self.window, padding=overlap)  # b (heads d m) nw
            return columns.unflatten(1, (heads, -1, size**2)).permute(0, 4, 1, 3, 2).flatten(0, 1)
        count = self.side // self.window
        cells = image.unflatten(4, (count, -1)).unflatten(3, (count, -1))  # b heads d rows wh columns ww
        return cells.permute(0, 3, 5, 1, 4, 6, 2).flatten(4, 5).flatten(0, 2)

    def together(self, windows: Tensor, b: int) -> Tensor:
        """Undo `windows` for the output."""
        count = self.side // self.window
        cells = windows.unflatten(2, (self.window, -1)).unflatten(0, (b, count, -1))  # b rows columns heads wh ww d
        return self.rolled(cells.permute(0, 3, 1, 4, 2, 5, 6).flatten(2, 5), self.shift)

    def rolled(self, tokens: Tensor, by: int) -> Tensor:
        """The map displaced along both axes."""
        return tokens.unflatten(2, (self.side, self.side)).roll((by, by), (2, 3)).flatten(2, 3) if by else tokens
