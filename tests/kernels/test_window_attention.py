from itertools import product

import pytest
import torch
from torch.nn import functional as F

from tests.helpers import assert_within_budget, error, run
from zoo.kernels.window_attention import (
    overlapping_position_index,
    relative_position_index,
    torch_impl,
    window_attention,
)
from zoo.kernels.window_attention.plan import runs

TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6}  # sums of up to 600 terms; gradients of the bias of a few more

CASES = {  # grid, window, options
    "whole": ((8, 8), 4, {}),
    "rectangle": ((6, 8), (2, 4), {}),
    "ragged": ((7, 5), (3, 4), {}),
    "smaller than a window": ((2, 3), 4, {}),
    "one token": ((1, 1), 4, {}),
    "shift": ((8, 12), 4, {"shift": 2}),
    "shift of one axis": ((6, 8), (2, 4), {"shift": (1, 0)}),
    "shift, ragged": ((9, 7), (4, 3), {"shift": (3, 1)}),
    "shift, ragged, padding seen": ((9, 7), (4, 3), {"shift": (3, 1), "pad": "attend"}),
    "shift, one token": ((1, 1), 4, {"shift": 3}),
    "wrap": ((8, 12), (4, 2), {"shift": (2, 1), "wrap": True}),
    "wrap, ragged": ((11, 8), (4, 3), {"shift": (2, 1), "wrap": True}),
    "wrap, ragged, padding seen": ((11, 8), (4, 3), {"shift": (2, 1), "wrap": True, "pad": "attend"}),
    "overlap": ((8, 12), 4, {"overlap": 1}),
    "overlap, padding seen": ((8, 12), 4, {"overlap": 1, "pad": "attend"}),
    "overlap wider than a window": ((5, 9), (2, 3), {"overlap": (5, 4), "pad": "attend"}),
    "63 tokens": ((7, 9), (4, 5), {"shift": (1, 2)}),
    "1000 tokens": ((25, 40), 8, {"shift": 4}),
    "dilation": ((8, 12), (2, 3), {"dilation": (2, 4)}),
    "dilation of many cells": ((4, 24), 2, {"dilation": (1, 3)}),
    "dilation, ragged": ((7, 11), (2, 3), {"dilation": (3, 2)}),
    "dilation, ragged, padding seen": ((7, 11), (2, 3), {"dilation": (3, 2), "pad": "attend"}),
    "dilation beyond the map": ((3, 5), 2, {"dilation": (4, 7)}),
    "overlap of one axis, ragged": ((7, 9), (4, 2), {"overlap": (0, 3)}),
    "overlap, ragged, padding seen": ((7, 9), (4, 2), {"overlap": (2, 1), "pad": "attend"}),
}


def tokens(grid, *, b=2, heads=3, d=5, e=4, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    sizes = [(b, grid[0] * grid[1], heads, width) for width in (d, d, e)]
    return [torch.randn(size, generator=g, dtype=torch.float64).to(dtype).transpose(1, 2) for size in sizes]


def bias(window, overlap=0, *, heads=3, rows=23, dtype=torch.float64):
    (wh, ww), (oh, ow) = (2 * (x,) if isinstance(x, int) else x for x in (window, overlap))
    g = torch.Generator().manual_seed(1)
    table = torch.randn(rows, heads, generator=g, dtype=torch.float64).to(dtype)
    return table, torch.randint(-rows, rows, (wh * ww, (wh + 2 * oh) * (ww + 2 * ow)), generator=g)


def swin(q, k, v, table, index, grid, window, shift, mask=True):
    """Roll, cut, mask by the nine regions, attend, undo: as published models do it, in the dtype of `q`."""
    (h, w), ws = grid, window

    def cut(x):
        x = x.unflatten(3, (w // ws, ws)).unflatten(2, (h // ws, ws))  # b heads nh wh nw ww d
        return x.permute(0, 2, 4, 1, 3, 5, 6).flatten(4, 5).flatten(1, 2)  # b nw heads n d

    q, k, v = (cut(t.unflatten(2, grid).roll((-shift, -shift), (2, 3))) for t in (q, k, v))
    logits = q * q.shape[-1] ** -0.5 @ k.mT + table[index].permute(2, 0, 1)
    if mask and shift:
        region = torch.zeros(1, 1, h, w, 1)  # of the rolled map
        slices = slice(0, -ws), slice(-ws, -shift), slice(-shift, None)
        for i, (rows, columns) in enumerate(product(slices, slices)):
            region[:, :, rows, columns] = i
        logits = logits.masked_fill(cut(region) != cut(region).mT, -torch.inf)
    y = logits.softmax(-1) @ v  # b nw heads n e
    y = y.unflatten(1, (h // ws, w // ws)).unflatten(4, (ws, ws)).permute(0, 3, 1, 4, 2, 5, 6)  # b heads nh wh nw ww e
    return y.flatten(4, 5).flatten(2, 3).roll((shift, shift), (2, 3)).flatten(2, 3)


def hat_overlapping(q, k, v, table, index, grid, window, key_window):
    """Unfold zero-padded keys and values under each window, as HAT does it; indices below zero count from the end."""
    b, heads, _, d = q.shape
    q = q.unflatten(2, (grid[0] // window, window, grid[1] // window, window)).permute(0, 2, 4, 1, 3, 5, 6)
    q = q.flatten(4, 5).flatten(1, 2)  # b nw heads n d

    def unfold(x):
        x = x.mT.flatten(1, 2).unflatten(2, grid)  # b (heads d) h w
        x = F.unfold(x, key_window, stride=window, padding=(key_window - window) // 2)
        return x.view(b, heads, x.shape[1] // heads // key_window**2, key_window**2, -1).permute(0, 4, 1, 3, 2)

    y = (q * d**-0.5 @ unfold(k).mT + table[index].permute(2, 0, 1)).softmax(-1) @ unfold(v)  # b nw heads n e
    y = y.unflatten(1, (grid[0] // window, -1)).unflatten(4, (window, window)).permute(0, 3, 1, 4, 2, 5, 6)
    return y.flatten(4, 5).flatten(2, 3).flatten(2, 3)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_match_the_float64_reference(case, biased, dtype):
    grid, window, options = CASES[case]
    table, index = bias(window, options.get("overlap", 0), dtype=dtype)

    def attention(impl):
        def call(q, k, v, table=None):
            options_ = options if table is None else options | {"bias_table": table, "bias_index": index}
            return window_attention(q, k, v, grid=grid, window=window, impl=impl, **options_)

        return call

    args = tokens(grid, dtype=dtype) + [table] * biased
    expected = run(attention("reference"), [t.double() for t in args])
    for actual, exact in zip(run(attention("torch"), args), expected, strict=True):
        assert actual.dtype == dtype
        assert error(actual, exact) <= TOLERANCE[dtype]


@pytest.mark.parametrize("limit", [1, 300, 2000])
@pytest.mark.parametrize("case", ["shift, ragged", "overlap, ragged, padding seen"])
def test_result_does_not_depend_on_how_much_is_computed_at_once(case, limit, monkeypatch):
    grid, window, options = CASES[case]
    table, index = bias(window, options.get("overlap", 0))
    call = lambda q, k, v, t: window_attention(
        q, k, v, grid=grid, window=window, bias_table=t, bias_index=index, **options
    )
    args = [*tokens(grid, b=3), table]
    expected = run(call, args)
    monkeypatch.setattr(torch_impl, "_CPU_LOGITS", limit)
    for actual, exact in zip(run(call, args), expected, strict=True):
        assert error(actual, exact) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize(("shift", "wrap"), [(0, False), (2, False), (1, False), (2, True)])
def test_shifted_windows_equal_the_rolled_and_masked_form(shift, wrap, impl):
    grid, window = (8, 12), 4
    index, args = relative_position_index(window), tokens(grid)
    table = bias(window, rows=49)[0]
    actual = window_attention(
        *args, grid=grid, window=window, shift=shift, wrap=wrap, bias_table=table, bias_index=index, impl=impl
    )
    assert error(actual, swin(*args, table, index, grid, window, shift, mask=not wrap)) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_overlapping_keys_equal_the_unfolded_form_with_zero_keys_attended(impl):
    grid, window, overlap = (8, 12), 4, 1
    index, args = overlapping_position_index(window, window + 2 * overlap), tokens(grid)
    table = bias(window, rows=(2 * window + 2 * overlap - 1) ** 2)[0]
    actual = window_attention(
        *args, grid=grid, window=window, overlap=overlap, pad="attend", bias_table=table, bias_index=index, impl=impl
    )
    expected = hat_overlapping(*args, table, index, grid, window, window + 2 * overlap)
    assert error(actual, expected) <= TOLERANCE[torch.float64]


def test_windows_whose_tokens_all_see_each_other_are_not_looked_at_pair_by_pair():
    for attend, n in ((False, 8192), (True, 4095)):  # two bins; softmax plus one
        found = runs(n, 4096, 1, 0, 0, False, attend, False)
        assert not any(run.seen for run in found)
        assert all(run.mask().all() for run in found[:1])


def test_padding_that_is_masked_has_no_influence_and_none_is_read():
    grid, window = (5, 6), 4
    q, k, v = tokens(grid, e=5)
    alone = window_attention(
        *(t.unflatten(2, grid)[:, :, 4:, 4:].flatten(2, 3) for t in (q, k, v)), grid=(1, 2), window=window
    )
    whole = window_attention(q, k, v, grid=grid, window=window).unflatten(2, grid)
    assert error(whole[:, :, 4:, 4:].flatten(2, 3), alone) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_stays_within_the_budget_of_a_dense_run(dtype):
    grid, window, shift = (16, 24), 8, 4
    index = relative_position_index(window)
    args = [*tokens(grid, d=24, e=24), bias(window, rows=225)[0]]
    args = [t.to(dtype) for t in args]
    dense = run(lambda *a: swin(*a, index, grid, window, shift), args)
    exact = run(lambda *a: swin(*a, index, grid, window, shift), [t.double() for t in args])
    ours = lambda q, k, v, table: window_attention(
        q, k, v, grid=grid, window=window, shift=shift, bias_table=table, bias_index=index
    )
    for actual, plain, expected in zip(run(ours, args), dense, exact, strict=True):
        assert actual.dtype == dtype
        assert_within_budget(actual, plain, expected)


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("sizes", [(0, (4, 4)), (2, (0, 4)), (2, (4, 0))], ids=str)
def test_empty_inputs_give_empty_outputs(sizes, impl):
    b, grid = sizes
    args = tokens(grid, b=b)
    table, index = bias(4)
    y = window_attention(*args, grid=grid, window=4, shift=2, bias_table=table, bias_index=index, impl=impl)
    assert y.shape == args[2].shape


def test_strides_do_not_matter():
    grid, window = (6, 8), 4
    q, k, v = tokens(grid, d=6, e=6, b=4, heads=3)
    call = lambda *a: window_attention(*a, grid=grid, window=window, shift=1)
    strange = [t.contiguous().mT.contiguous().mT[:, :, :, ::2][1::2] for t in (q, k, v)]
    for actual, expected in zip(run(call, strange), run(call, [t.contiguous() for t in strange]), strict=True):
        assert error(actual, expected) <= TOLERANCE[torch.float64]
    fused = torch.stack([q, k, v], 3)  # views of one projection, as models have them
    assert torch.equal(call(*fused.unbind(3)), call(q, k, v))


def test_only_the_inputs_are_kept_for_the_backward():
    grid, window = (16, 16), 8
    table, index = bias(window)
    args = [t.requires_grad_() for t in (*tokens(grid), table)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        window_attention(*args[:3], grid=grid, window=window, bias_table=args[3], bias_index=index)
    logits = 2 * 3 * 16 * 16 * 64
    assert sum(kept) < logits / 2, kept


def test_compiles_without_a_graph_break_and_trains():
    grid, window = (6, 8), 4
    table, index = bias(window)
    args = [*tokens(grid, dtype=torch.float32), table.float()]
    call = lambda q, k, v, t: window_attention(
        q, k, v, grid=grid, window=window, shift=2, bias_table=t, bias_index=index
    )
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(run(compiled, args), run(call, args), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("learned", [True, False])
def test_registered_op_keeps_the_rules_of_torch(learned):
    args = [t.requires_grad_() for t in tokens((4, 6), b=1, dtype=torch.float32)]
    table = torch.randn(3, 2, 2, 4, 4, requires_grad=True) if learned else None
    torch.library.opcheck(
        torch_impl._window_attention, (*args, table, (4, 6), (2, 2), (1, 1), (0, 0), (1, 1), False, True, 0.5)
    )


def test_autocast_does_not_lower_the_precision_inside():
    grid, window = (8, 8), 4
    table, index = bias(window, dtype=torch.float32)
    args = [*tokens(grid, dtype=torch.bfloat16), table]
    call = lambda q, k, v, t: window_attention(q, k, v, grid=grid, window=window, bias_table=t, bias_index=index)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run(call, args)
    assert [t.dtype for t in inside] == [torch.bfloat16] * 4 + [torch.float32]
    assert all(torch.equal(a, b) for a, b in zip(inside, run(call, args), strict=True))


def test_position_index_numbers_the_offsets_row_by_row():
    index = relative_position_index((2, 3))
    assert index.dtype == torch.int64
    assert index[0].tolist() == [7, 6, 5, 2, 1, 0]
    assert index[5].tolist() == [14, 13, 12, 9, 8, 7]
    assert relative_position_index(16).unique().numel() == 31**2


def test_overlapping_index_reaches_below_zero_and_names_each_row_once():
    index = overlapping_position_index(16, 24)
    assert index.dtype == torch.int64
    assert index.shape == (256, 576)
    assert (index.min().item(), index.max().item()) == (-880, 640)
    assert index[0, :2].tolist() == [-7 * 39 - 7, -7 * 39 - 6]  # the first query and the first key are at offset 0
    assert torch.equal(index.unique().remainder(1521).sort().values, torch.arange(1521))


def broken(**changes):
    q, k, v = (torch.zeros(1, 2, 16, 4) for _ in range(3))
    table, index = torch.zeros(9, 2), torch.zeros(4, 4, dtype=torch.int64)
    given = {"q": q, "k": k, "v": v, "grid": (4, 4), "window": 2, "bias_table": table, "bias_index": index} | changes
    return window_attention(given.pop("q"), given.pop("k"), given.pop("v"), **given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict.fromkeys("qk", torch.zeros(1, 2, 16, 0)) | {"scale": 1.0}, r"d at least 1, got \(1, 2, 16, 0\)"),
        ({"k": torch.zeros(1, 2, 15, 4)}, r"k must be .* got q \(1, 2, 16, 4\), k \(1, 2, 15, 4\)"),
        ({"v": torch.zeros(1, 1, 16, 4)}, r"v must be \(1, 2, 16, 'e'\), got \(1, 1, 16, 4\)"),
        ({"v": torch.zeros(1, 2, 16, 4).half()}, r"float like q, got torch.float32, torch.float32, torch.float16"),
        ({"grid": (4, 5)}, r"grid must be \(h, w\) with h w = 16 tokens, got \(4, 5\)"),
        ({"window": 0}, r"window must be at least \(1, 1\), got \(0, 0\)"),
        ({"window": (2, 2, 2)}, r"window must be one number or \(rows, columns\), got \(2, 2, 2\)"),
        ({"shift": 2}, r"shift must be in \[0, window\) for window \(2, 2\), got \(2, 2\)"),
        ({"overlap": 1, "shift": 1}, r"overlap must be \(0, 0\) for windows that shift or wrap, got \(1, 1\)"),
        ({"overlap": -1}, r"overlap must be at least \(0, 0\), got \(-1, -1\)"),
        ({"overlap": 1}, r"bias_index must be int64 \(4, 16\), got torch.int64 \(4, 4\)"),
        ({"bias_index": torch.ones(4, 4, dtype=torch.bool)}, r"bias_index must be int64 \(4, 4\), got torch.bool"),
        ({"bias_index": None}, r"bias_table and bias_index must come together"),
        ({"bias_table": torch.zeros(9, 3)}, r"bias_table must be float \(rows, 2\), got \(9, 3\)"),
        ({"pad": "zeros"}, r"pad must be mask or attend, got 'zeros'"),
        ({"dilation": 0}, r"dilation must be at least \(1, 1\), got \(0, 0\)"),
        (
            {"dilation": 2, "wrap": True},
            r"dilation must be \(1, 1\) for windows that shift, overlap or wrap, got \(2, 2\)",
        ),
        ({"order": torch.arange(16)}, r"order must be int64 \(1 or 1, 2 or 1, 16\), got torch.int64 \(16,\)"),
        ({"order": torch.zeros(1, 1, 16)}, r"order must be int64 .* got torch.float32 \(1, 1, 16\)"),
        ({"impl": "cuda"}, r"impl must be auto, reference, torch or triton, got 'cuda'"),
        (
            dict.fromkeys("qkv", torch.zeros(1, 2, 16, 4).double()) | {"impl": "triton"},
            r"impl must be auto, reference or torch for this call, got 'triton'",
        ),
    ],
)
def test_errors_name_the_rule_and_what_was_given(changes, message):
    with pytest.raises(ValueError, match="window_attention: .*" + message):
        broken(**changes)
