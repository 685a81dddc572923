"""Stripes, grids, bins and combs are windows; each against the way that its authors cut the map."""

import pytest
import torch
from torch.nn import functional as F

from tests.helpers import error, golden, group, run
from tests.kernels.test_window_attention import bias, tokens
from zoo.kernels.window_attention import relative_position_index, window_attention

TOLERANCE = 1e-12  # float64, sums of at most a hundred terms
GOLDEN_TOLERANCE = 1e-4  # float32 traces, as the sheet of the model states

both = pytest.mark.parametrize("impl", ["reference", "torch"])


def softmax_attention(q, k, v, bias=0.0):
    return (q * q.shape[-1] ** -0.5 @ k.mT + bias).softmax(-1) @ v


def cswin_stripes(q, k, v, grid, stripe):
    """Cut into stripes of (rows, columns), attend in each, put together: one branch of CSWin's LePEAttention."""
    (h, w), (sh, sw) = grid, stripe

    def cut(x):  # b heads n d -> (b stripes) heads m d
        x = x.mT.unflatten(3, (h // sh, sh, w // sw, sw))  # b heads d rows sh columns sw
        return x.permute(0, 3, 5, 1, 4, 6, 2).flatten(4, 5).flatten(0, 2)

    y = softmax_attention(*map(cut, (q, k, v)))
    y = y.unflatten(2, (sh, sw)).unflatten(0, (q.shape[0], h // sh, w // sw))  # b rows columns heads sh sw d
    return y.permute(0, 3, 1, 4, 2, 5, 6).flatten(2, 5)


@both
def test_stripes_of_cswin_are_windows_as_long_as_the_map(impl):
    grid, width = (6, 8), 2
    args = tokens(grid, heads=4)
    upright, lying = zip(*(t.chunk(2, 1) for t in args), strict=True)  # half of the heads each
    expected = [cswin_stripes(*upright, grid, (6, width)), cswin_stripes(*lying, grid, (width, 8))]
    actual = [
        window_attention(*upright, grid=grid, window=(6, width), impl=impl),
        window_attention(*lying, grid=grid, window=(width, 8), impl=impl),
    ]
    assert error(torch.cat(actual, 1), torch.cat(expected, 1)) <= TOLERANCE


@both
def test_grid_attention_of_maxvit_is_a_dilated_window(impl):
    grid, cells = (6, 12), (3, 2)
    q, k, v = tokens(grid)
    table, index = bias(cells, rows=15)[0], relative_position_index(cells)

    def cut(x):  # a token of each cell of the grid, as timm's grid_partition takes them
        x = x.unflatten(2, (cells[0], grid[0] // cells[0], cells[1], grid[1] // cells[1]))
        return x.permute(0, 3, 5, 1, 2, 4, 6).flatten(4, 5)  # b dy dx heads m d

    y = softmax_attention(cut(q), cut(k), cut(v), table[index].permute(2, 0, 1)).unflatten(4, cells)
    expected = y.permute(0, 3, 4, 1, 5, 2, 6).flatten(2, 5)
    dilation = (grid[0] // cells[0], grid[1] // cells[1])
    actual = window_attention(
        q, k, v, grid=grid, window=cells, dilation=dilation, bias_table=table, bias_index=index, impl=impl
    )
    assert error(actual, expected) <= TOLERANCE


@both
@pytest.mark.parametrize("shared", [(1, 1), (2, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("layout", ["bins", "combs"])
def test_windows_on_an_order_equal_sorting_by_hand(layout, shared, impl):
    n, groups = 20, 4
    q, k, v = tokens((1, n))
    order = torch.rand(*shared, n, generator=torch.Generator().manual_seed(2)).argsort(-1)
    options = {"window": (1, n // groups), "dilation": (1, 1 if layout == "bins" else groups)}

    def by_hand(q, k, v):
        places = order.expand(2, 3, n)[..., None]
        split = (groups, -1) if layout == "bins" else (-1, groups)
        q, k, v = (t.take_along_dim(places, 2).unflatten(2, split) for t in (q, k, v))
        q, k, v = (t if layout == "bins" else t.transpose(2, 3) for t in (q, k, v))  # b heads groups m d
        y = softmax_attention(q, k, v)
        y = (y if layout == "bins" else y.transpose(2, 3)).flatten(2, 3)
        return y.take_along_dim(places.argsort(2), 2)

    ours = lambda q, k, v: window_attention(q, k, v, grid=(1, n), order=order, impl=impl, **options)
    for actual, expected in zip(run(ours, [q, k, v]), run(by_hand, [q, k, v]), strict=True):
        assert error(actual, expected) <= TOLERANCE


def histogram_attention(q, k, v, factor, temperature, layout, impl):
    """Histoformer's: channels times bins attend to each other over the pixels of a bin, with a softmax plus one."""
    (c, pixels), heads = q.shape[1:], len(temperature)

    def cut(x):  # -> b heads (channels bins) pixels
        x = F.pad(x, (0, -pixels % factor))
        x = x.unflatten(2, (factor, -1)) if layout == "bin" else x.unflatten(2, (-1, factor)).mT
        return x.flatten(1, 2).unflatten(1, (heads, -1))

    q, k, v = cut(q), cut(k), cut(v)
    q, k, n = F.normalize(q, dim=-1) * temperature, F.normalize(k, dim=-1), q.shape[2]
    y = window_attention(q, k, v, grid=(1, n), window=(1, n + 1), pad="attend", scale=1.0, impl=impl)
    y = y.flatten(1, 2).unflatten(1, (c, factor))
    return (y if layout == "bin" else y.mT).flatten(2)[:, :, :pixels]


@both
@pytest.mark.parametrize("block", ["encoder_level2.0.attn_g", "latent.0.attn_g", "refinement.0.attn_g"])
def test_softmax_plus_one_of_histoformer_is_a_window_with_one_padded_key(block, impl):
    facts, tensors = golden("histoformer")
    assert facts["config"]["heads"] == [1, 2, 4, 8]
    weight, traced = group(tensors, f"weight.{block}."), group(tensors, f"inter.{block}.")
    x, idx = traced["input"], traced["idx_v"].long()
    half = x.shape[1] // 2
    x = torch.cat([x[:, :half].sort(2).values.sort(3).values, x[:, half:]], 1)
    qkv = F.conv2d(F.conv2d(x, weight["qkv.weight"]), weight["qkv_dwconv.weight"], padding=1, groups=5 * x.shape[1])
    q1, k1, q2, k2, v = (t.flatten(2).gather(2, idx) for t in qkv.chunk(5, 1))
    temperature = weight["temperature"]
    for layout, q, k in (("bin", q1, k1), ("freq", q2, k2)):
        actual = histogram_attention(q, k, v, len(temperature), temperature, layout, impl)
        assert error(actual, traced[f"out_{layout}"]) <= GOLDEN_TOLERANCE
