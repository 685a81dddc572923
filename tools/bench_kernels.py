#!/usr/bin/env python3
"""Time kernels on one CPU thread against named baselines: rows of tools/results/kernels-cpu.csv.

    python tools/bench_kernels.py [--op window_attention | dwt] [--repeats 15] [--quick]

A baseline does the same sums in plain torch, or is another library; results are compared before anything is timed.
Within one run ours and its baselines take turns, so that other programs slow all of them; `ratio` is the quotient of
the medians, above 1 where ours is faster. New rows of an op replace its old ones; `note` says how busy the machine was.
"""

import argparse
import csv
import io
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pywt
import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.files import write_file
from zoo.kernels.dwt import dwt
from zoo.kernels.window_attention import overlapping_position_index, relative_position_index, window_attention

TABLE = Path(__file__).parent / "results" / "kernels-cpu.csv"
COLUMNS = ("op", "shape", "impl", "baseline", "baseline_ms", "ms", "ratio", "threads", "torch", "cpu", "note")
TOLERANCE = 1e-4  # of the largest value, float32: the sums are the same, their order is not

Call = Callable[[], Tensor]
Case = tuple[str, str, Call, dict[str, Call]]  # op, shape, ours, baselines by name


class Attention:
    """Self-attention in shifted windows or cross-attention on overlapping ones, as HAT has them; sides fit."""

    def __init__(self, heads: int, d: int, side: int, window: int, shift: int, overlap: int) -> None:
        self.side, self.window, self.shift, self.overlap = side, window, shift, overlap
        self.shape = f"b=1 heads={heads} grid={side}x{side} d={d} window={window} shift={shift} overlap={overlap}"
        keys = window + 2 * overlap
        self.index = overlapping_position_index(window, keys) if overlap else relative_position_index(window)
        self.table = torch.randn((window + keys - 1) ** 2, heads, requires_grad=True)
        self.tokens = [torch.randn(1, side**2, heads, d).transpose(1, 2).requires_grad_() for _ in range(3)]
        # What depends on the shape alone is made beforehand, as the official code does.
        region = torch.zeros(1, 1, side, side)
        for axis in (2, 3):
            strip = torch.arange(side).ge(side - window).int() + torch.arange(side).ge(side - shift).int()
            region = 3 * region + (strip[:, None] if axis == 2 else strip)
        marks = self.cut(region.flatten(2)[..., None], 0)[:, 0, :, 0]  # nw n
        different = marks[:, None, :] != marks[:, :, None]
        self.mask = torch.zeros(different.shape).masked_fill(different, -100.0)[:, None] if shift else None  # nw 1 n n

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

    def ours(self) -> Tensor:
        """The kernel."""
        return window_attention(
            *self.tokens,
            grid=(self.side, self.side),
            window=self.window,
            shift=self.shift,
            overlap=self.overlap,
            bias_table=self.table,
            bias_index=self.index,
            pad="attend",
        )

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


def attention(quick: bool) -> Iterator[Case]:
    """Both of the attentions of hat-tiny; of hat-s and hat, too."""
    shapes = [(3, 16, 64, 8, 4, 0), (3, 16, 64, 8, 0, 4), (6, 24, 64, 16, 8, 0), (6, 30, 64, 16, 8, 0)]
    for numbers in shapes[:2] if quick else [*shapes, (6, 30, 64, 16, 0, 4)]:
        problem = Attention(*numbers)
        plain = {
            "unfused softmax": lambda p=problem: p.plain(False),
            "scaled_dot_product_attention": lambda p=problem: p.plain(True),
        }
        yield "window_attention", problem.shape, problem.ours, plain
        leaves = [*problem.tokens, problem.table]
        trained = {name: with_backward(call, leaves) for name, call in plain.items()}
        yield "window_attention, backward too", problem.shape, with_backward(problem.ours, leaves), trained


def wavelets(quick: bool) -> Iterator[Case]:
    """Images of several channels, a short and a long filter."""
    for sizes, wave in (((1, 3, 256, 256), "haar"), ((4, 48, 64, 64), "haar"), ((1, 3, 256, 256), "db4")):
        if quick and wave != "haar":
            continue
        x = torch.randn(sizes)
        pixels, filters = x.numpy(), pywt.Wavelet(wave)
        lo, hi = (torch.tensor(taps[::-1]) for taps in (filters.dec_lo, filters.dec_hi))
        bank = torch.stack([torch.outer(a, b) for a, b in ((lo, lo), (hi, lo), (lo, hi), (hi, hi))])[:, None]  # 4 1 k k
        bank = bank.repeat(sizes[1], 1, 1, 1)
        reach = filters.dec_len - 2

        def by_conv(x: Tensor = x, bank: Tensor = bank, reach: int = reach) -> Tensor:
            out = F.conv2d(F.pad(x, [reach] * 4), bank, stride=2, groups=x.shape[1])
            return out.unflatten(1, (x.shape[1], 4))

        def by_pywt(pixels: np.ndarray = pixels, wave: str = wave) -> Tensor:
            approx, details = pywt.dwt2(pixels, wave, "zero")
            return torch.from_numpy(np.stack([approx, *details], 2))

        ours = lambda x=x, wave=wave: dwt(x, wave, mode="zero")
        yield "dwt", f"{sizes} {wave} zero", ours, {"grouped conv2d": by_conv, "pywt.dwt2": by_pywt}


def with_backward(call: Call, leaves: list[Tensor]) -> Call:
    """The gradients of all leaves, one after the other."""
    weight = torch.randn(call().shape, generator=torch.Generator().manual_seed(0))
    return lambda: torch.cat([g.flatten() for g in torch.autograd.grad(call(), leaves, weight)])


def medians(calls: list[Call], repeats: int) -> list[float]:
    """Milliseconds of each, in turns."""
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(repeats + 2):
        for call, own in zip(calls, times, strict=True):
            began = time.perf_counter()
            call()
            if turn >= 2:  # the first ones warm up
                own.append(1e3 * (time.perf_counter() - began))
    return [statistics.median(own) for own in times]


def rows_of(cases: Iterator[Case], repeats: int) -> Iterator[dict[str, str]]:
    """Compare, time, and describe each case against each of its baselines."""
    for op, shape, ours, baselines in cases:
        with torch.set_grad_enabled("backward" in op):
            expected = ours()
            for name, call in baselines.items():
                error = float((call() - expected).abs().max() / expected.abs().max())
                if not error <= TOLERANCE:
                    sys.exit(f"bench: {op} on {shape} differs from {name} by {error:.1e}; nothing is timed")
            mine, *others = medians([ours, *baselines.values()], repeats)
        for name, other in zip(baselines, others, strict=True):
            values = (op, shape, "torch", name, f"{other:.3f}", f"{mine:.3f}", f"{other / mine:.2f}")
            facts = (str(torch.get_num_threads()), torch.__version__, cpu(), note())
            yield dict(zip(COLUMNS, values + facts, strict=True))


def cpu() -> str:
    """Model and number of cores."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
    return f"{model}, {os.cpu_count()} cores"


def note() -> str:
    """What else runs: the load of the last minute, of which one is ours."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    return f"{'busy' if load > max(1.5, 0.75 * cores) else 'quiet'} machine, load {load:.1f} on {cores} cores"


def main() -> int:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=["window_attention", "dwt"], help="only this one")
    parser.add_argument("--repeats", type=int, default=15, help="timed calls of each")
    parser.add_argument("--quick", action="store_true", help="few shapes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    kept, fresh = [], []
    if TABLE.is_file():
        kept = list(csv.DictReader(io.StringIO(TABLE.read_text(encoding="utf-8"))))
    for name, cases in (("window_attention", attention), ("dwt", wavelets)):
        if args.op in (None, name):
            kept = [row for row in kept if not row["op"].startswith(name)]
            for row in rows_of(cases(args.quick), args.repeats):
                print("  ".join(row[column] for column in COLUMNS[:7]), flush=True)
                fresh.append(row)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows([*kept, *fresh])
    write_file(TABLE, stream.getvalue(), force=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
