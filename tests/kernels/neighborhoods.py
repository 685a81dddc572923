"""Problems of neighbourhood attention, and the formulas of its docstring pair by pair."""

from itertools import product

import torch

from zoo.kernels.neighborhood_attention import neighborhood_attention

CIRCLE = {"shape": "circle", "edge": "truncate"}
CASES = {  # grid, options
    "line": (11, {"kernel": 5}),
    "line, even kernel": (12, {"kernel": 4}),
    "line, dilation that does not divide": (17, {"kernel": 3, "dilation": 3}),
    "line, stride": (13, {"kernel": 5, "stride": 3}),
    "line, causal": (10, {"kernel": 4, "causal": True}),
    "line, causal groups, dilated": (23, {"kernel": 4, "stride": 3, "dilation": 2, "causal": True}),
    "line of blocks": (12, {"kernel": 4, "stride": 4}),
    "line, cut off": (9, {"radius": 2, "edge": "truncate"}),
    "line, shorter than a window": (3, {"kernel": 7, "stride": 5}),
    "one token": ((1, 1), {"kernel": 3}),
    "no neighbours": ((3, 4), {"radius": 0, "edge": "truncate"}),
    "map": ((7, 9), {"kernel": 3}),
    "map, all at once": ((9, 6), {"kernel": (4, 3), "dilation": (2, 1), "stride": (1, 2), "causal": (False, True)}),
    "map, cut off, stride": ((6, 11), {"kernel": (3, 5), "stride": (2, 3), "edge": "truncate"}),
    "circle": ((9, 11), {"radius": 5, **CIRCLE}),  # 3, 4 away is outside, by the strict rule alone
    "circle of one": ((4, 5), {"radius": 1, **CIRCLE}),
    "circle wider than the map": ((3, 8), {"radius": 20, **CIRCLE}),
    "circle, dilated, grouped": ((9, 10), {"radius": 3, "dilation": 2, "stride": (2, 3), **CIRCLE}),
    "circle, causal groups": ((6, 7), {"radius": 3, "stride": 3, "causal": True, **CIRCLE}),
    "box of frames": ((4, 5, 6), {"kernel": (2, 3, 3), "causal": (True, False, False)}),
    "ball": ((3, 5, 4), {"radius": 2, "dilation": (1, 2, 1), **CIRCLE}),
}


def axes(grid, options):
    """Length, kernel, dilation, stride and causal of each axis, as the sheet tells them."""
    grid = (grid,) if isinstance(grid, int) else grid
    per = lambda value: value if isinstance(value, tuple) else (value,) * len(grid)
    causal = per(options.get("causal", False))
    kernel = options.get("kernel")
    if kernel is None:
        more = options.get("shape") != "circle"
        kernel = tuple(
            r + more if c else 2 * r - 1 + 2 * more for r, c in zip(per(options["radius"]), causal, strict=True)
        )
    return list(
        zip(grid, per(kernel), per(options.get("dilation", 1)), per(options.get("stride", 1)), causal, strict=True)
    )


def bias_shape(grid, options):
    clamp = options.get("edge", "clamp") == "clamp"
    return [2 * (k - 1 if clamp or causal else k // 2 + s // 2) + 1 for _, k, _, s, causal in axes(grid, options)]


def sees(i, j, length, kernel, dilation, stride, causal, clamp):
    """Whether i sees j along an axis, and how far j lies from the centre; the formulas of the docstring, one pair."""
    if (i - j) % dilation:
        return False, 0
    length, i, j = len(range(i % dilation, length, dilation)), i // dilation, j // dilation
    if causal:
        leader = min(i // stride * stride + stride - 1, length - 1)
        return max(leader - kernel + 1, 0) <= j <= i, j - i
    leader = min(i // stride * stride + stride // 2, length - 1)
    start = leader - kernel // 2
    if clamp:
        start = max(min(start, length - kernel), 0)
    return start <= j < start + kernel, j - leader


def dense(q, k, v, extra_k=None, extra_v=None, bias=None, *, grid, scale=None, **options):
    """Every pair of tokens, in the dtype of `q`; (out, lse)."""
    along, clamp = axes(grid, options), options.get("edge", "clamp") == "clamp"
    points = list(product(*(range(length) for length, *_ in along)))
    seen = torch.zeros(len(points), len(points), dtype=torch.bool)
    row = torch.zeros(len(points), len(points), dtype=torch.int64)
    sizes = bias_shape(grid, options)
    for (n, i), (m, j) in product(enumerate(points), enumerate(points)):
        found = [sees(a, b, *axis, clamp) for a, b, axis in zip(i, j, along, strict=True)]
        circle = options.get("shape") != "circle" or sum(far**2 for _, far in found) < options["radius"] ** 2
        if all(inside for inside, _ in found) and circle:
            seen[n, m] = True
            for a, b, (_, _, dilation, _, _), size in zip(i, j, along, sizes, strict=True):
                row[n, m] = row[n, m] * size + (b - a) // dilation + size // 2
    logits = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        logits = logits + bias.flatten(1)[:, row]
    logits = logits.masked_fill(~seen, -torch.inf)
    if extra_k is not None:
        logits = torch.cat([logits, q @ extra_k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)], -1)
        v = torch.cat([v, extra_v], 2)
    return logits.softmax(-1) @ v, logits.logsumexp(-1)


def inputs(grid, options, *, b=2, heads=2, d=5, e=4, extra=3, biased=True, dtype=torch.float64):
    """q, k, v, then extra keys and values and a bias where wanted; as views of token-major memory."""
    g = torch.Generator().manual_seed(0)
    n = torch.Size((grid,) if isinstance(grid, int) else grid).numel()
    sizes = [(b, length, heads, width) for length, width in ((n, d), (n, d), (n, e), (extra, d), (extra, e))]
    tensors = [torch.randn(size, generator=g, dtype=torch.float64).transpose(1, 2) for size in sizes]
    tensors = tensors if extra else tensors[:3]
    if biased:
        tensors.append(torch.randn(heads, *bias_shape(grid, options), generator=g, dtype=torch.float64))
    return [t.to(dtype) for t in tensors]


def attention(grid, options, *, extra=True, biased=True, **more):
    """The op as a function of the tensors that `inputs` gives."""

    def call(q, k, v, *rest):
        rest = list(rest)
        extra_kv = (rest.pop(0), rest.pop(0)) if extra else None
        bias = rest.pop() if biased else None
        settings = {"return_lse": True, **options, **more}
        return neighborhood_attention(q, k, v, grid=grid, extra_kv=extra_kv, bias=bias, **settings)

    return call
