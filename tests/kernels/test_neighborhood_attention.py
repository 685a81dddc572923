from itertools import product

import pytest
import torch
from torch.nn import functional as F

from tests.helpers import assert_within_budget, error, run
from tests.kernels.neighborhoods import CASES, CIRCLE, attention, dense, inputs
from zoo.kernels.neighborhood_attention import neighborhood_attention, torch_impl
from zoo.kernels.neighborhood_attention.plan import Axis, key_tiles, query_tiles, spans

# Sums of up to 400 terms, gradients of biases and extra keys of a few thousand; relative to the largest element.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6}


@pytest.mark.parametrize("case", CASES)
def test_the_reference_equals_the_formulas_pair_by_pair(case):
    grid, options = CASES[case]
    args = inputs(grid, options)
    expected = run(lambda *a: dense(*a, grid=grid, **options), args)
    for actual, exact in zip(run(attention(grid, options, impl="reference"), args), expected, strict=True):
        assert error(actual, exact) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("plain", [False, True], ids=["extra keys and bias", "plain"])
@pytest.mark.parametrize("case", CASES)
def test_results_and_gradients_match_the_float64_reference(case, plain, dtype):
    grid, options = CASES[case]
    with_ = {"extra": not plain, "biased": not plain}
    args = inputs(grid, options, dtype=dtype, extra=0 if plain else 3, biased=not plain)
    expected = run(attention(grid, options, impl="reference", **with_), [t.double() for t in args])
    for actual, exact in zip(run(attention(grid, options, impl="torch", **with_), args), expected, strict=True):
        assert actual.dtype == dtype
        assert error(actual, exact) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dilation", [1, 2, 3, 5])
@pytest.mark.parametrize("kernel", [3, 5])
def test_windows_begin_where_those_of_natten_do(kernel, dilation):
    half = kernel // 2
    for length in range(kernel * dilation, 24):
        window = spans(Axis(length, kernel, dilation, 1, False, True))
        for p, (i, start, stop) in enumerate(zip(*(x.tolist() for x in window[:3]), strict=True)):
            official = i - half * dilation  # get_window_start of its early releases
            if official < 0:
                official = i % dilation
            elif i + half * dilation >= length:
                whole = length // dilation * dilation
                rest, residue = length - whole, i % dilation
                official = (
                    (length - rest + residue - 2 * half * dilation)
                    if residue < rest
                    else (whole + residue - kernel * dilation)
                )
            assert window.position[start] == official, (length, i, p)
            assert stop - start == kernel


@pytest.mark.parametrize("clamp", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_tiles_hold_every_pair_that_sees_each_other(causal, clamp):
    for length, kernel, dilation, stride, size in product((1, 9, 20), (1, 4, 7), (1, 3), (1, 3), (1, 4)):
        axis = Axis(length, kernel, dilation, min(stride, kernel), causal, clamp)
        window = spans(axis)
        pairs = {(i, j) for i in range(length) for j in range(window.start[i], window.stop[i])}
        queries, keys = query_tiles(axis, size), key_tiles(axis, size)
        assert pairs <= {(i, j) for tile in queries for i in tile.own for j in tile.other}
        assert pairs <= {(i, j) for tile in keys for j in tile.own for i in tile.other}
        assert [i for tile in queries for i in tile.own] == list(range(length)) == [j for t in keys for j in t.own]
        for tile in keys:  # and no more than the hull
            seeing = [i for i, j in pairs if j in tile.own]
            assert not seeing or (min(seeing), max(seeing) + 1) == (tile.other.start, tile.other.stop)


@pytest.mark.parametrize("limit", [1, 3000, 100_000])
@pytest.mark.parametrize("case", ["map, all at once", "circle", "ball"])
def test_the_result_does_not_depend_on_how_much_is_computed_at_once(case, limit, monkeypatch):
    grid, options = CASES[case]
    args = inputs(grid, options, b=3)
    expected = run(attention(grid, options, impl="reference"), args)
    monkeypatch.setattr(torch_impl, "_CPU_LOGITS", limit)
    monkeypatch.setattr(torch_impl, "_TILES", {2: (2, 4), 3: (1, 2, 3)})
    for actual, exact in zip(run(attention(grid, options, impl="torch"), args), expected, strict=True):
        assert error(actual, exact) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("grid", [63, 1000, (25, 40), (10, 10, 10)], ids=str)
def test_more_than_one_tile_in_every_direction(grid):
    options = {"kernel": 5}
    args = inputs(grid, options, b=1, d=8, e=8, dtype=torch.float32)
    expected = run(attention(grid, options, impl="reference"), [t.double() for t in args])
    for actual, exact in zip(run(attention(grid, options, impl="torch"), args), expected, strict=True):
        assert error(actual, exact) <= TOLERANCE[torch.float32]


def test_a_window_over_everything_is_plain_attention():
    q, k, v = inputs((6, 7), {"kernel": 7}, extra=0, biased=False)
    expected = F.scaled_dot_product_attention(q, k, v)
    for impl in ("reference", "torch"):
        for options in ({"kernel": 7}, {"kernel": 13, "edge": "truncate"}, {"radius": 10, **CIRCLE}):
            assert error(neighborhood_attention(q, k, v, grid=(6, 7), impl=impl, **options), expected) <= 1e-12


def test_pooled_cells_are_more_extra_keys():
    grid, options = (9, 10), {"radius": 2, **CIRCLE}
    q, k, v, *extra = inputs(grid, options, biased=False)
    weights = torch.randn(4, 3, dtype=torch.float64)
    cells = [
        torch.stack(
            [
                (x.unflatten(2, grid)[:, :, y : y + 4, x0 : x0 + 3] * weights[..., None]).sum((2, 3))
                for y, x0 in product((0, 4), (0, 3, 6))
            ],
            2,
        )
        for x in (k, v)
    ]
    more = tuple(torch.cat(pair, 2) for pair in zip(extra, cells, strict=True))
    expected = neighborhood_attention(q, k, v, grid=grid, extra_kv=more, **options)
    assert (
        error(neighborhood_attention(q, k, v, grid=grid, extra_kv=tuple(extra), pool=weights, **options), expected)
        <= 1e-12
    )
    call = lambda q, k, v, w: (neighborhood_attention(q, k, v, grid=(4, 6), kernel=3, pool=w),)
    small = [x[:1, :1, :24, :2].contiguous().requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(call, (*small, weights[:2, :2].clone().requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_stays_within_the_budget_of_a_dense_run(dtype):
    grid, options = (10, 14), {"kernel": 5}
    args = [t.to(dtype) for t in inputs(grid, options, b=1, d=24, e=24)]
    plain = run(lambda *a: dense(*a, grid=grid, **options), args)
    exact = run(lambda *a: dense(*a, grid=grid, **options), [t.double() for t in args])
    for actual, rough, expected in zip(run(attention(grid, options), args), plain, exact, strict=True):
        assert_within_budget(actual, rough, expected)


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("sizes", [(0, (4, 4)), (2, (0, 4)), (2, (4, 0))], ids=str)
def test_empty_inputs_give_empty_results(sizes, impl):
    b, grid = sizes
    options = {"kernel": 3}
    results = run(attention(grid, options, impl=impl), inputs(grid, options, b=b))
    assert [y.shape for y in results[:2]] == [(b, 2, grid[0] * grid[1], 4), (b, 2, grid[0] * grid[1])]


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_no_extra_keys_may_be_given_as_an_empty_pair(impl):
    q, k, v = inputs((4, 4), {}, extra=0, biased=False)
    call = lambda **more: neighborhood_attention(q, k, v, grid=(4, 4), kernel=3, impl=impl, **more)
    assert torch.equal(call(extra_kv=(k[:, :, :0], v[:, :, :0])), call())


def test_strides_do_not_matter():
    grid, options = (5, 6), {"kernel": 3}
    args = inputs(grid, options, b=4, d=6, e=6, heads=4)
    strange = [t.contiguous().mT.contiguous().mT[1::2, ::2, :, ::2] for t in args[:5]]
    strange.append(args[5].permute(2, 0, 1).contiguous().permute(1, 2, 0)[:2])
    call = attention(grid, options)
    for actual, expected in zip(run(call, strange), run(call, [t.contiguous() for t in strange]), strict=True):
        assert error(actual, expected) <= TOLERANCE[torch.float64]
    fused = torch.stack(args[:3], 3)  # views of one projection, as models have them
    assert torch.equal(call(*fused.unbind(3), *args[3:])[0], call(*args)[0])


def test_memory_is_linear_in_the_tokens():
    kept = []
    args = inputs((32, 32), {"kernel": 7}, b=1, d=8, e=8)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        attention((32, 32), {"kernel": 7})(*(t.requires_grad_() for t in args))
    assert sum(kept) <= sum(t.numel() for t in args)
    with torch.profiler.profile(profile_memory=True) as profile:  # 64 Ki tokens: a map of pairs would be 4 Gi
        q, k, v = (torch.zeros(1, 1, 2**16, 1) for _ in range(3))
        neighborhood_attention(q, k, v, grid=(256, 256), kernel=3)
    assert max(event.cpu_memory_usage for event in profile.key_averages()) < 2**16 * 4 * 100


def test_compiles_without_a_graph_break_and_trains():
    grid, options = (6, 8), {"kernel": 3, "dilation": 2}
    args = inputs(grid, options, dtype=torch.float32)
    call = attention(grid, options)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(run(compiled, args), run(call, args), strict=True):
        assert torch.equal(actual, expected)


def test_registered_op_keeps_the_rules_of_torch():
    args = [t.requires_grad_() for t in inputs((4, 6), {"kernel": 3}, b=1, dtype=torch.float32)]
    numbers = [4, 3, 1, 1, 0, 1, 6, 3, 2, 1, 0, 1, 0]
    torch.library.opcheck(
        torch_impl._neighborhood_attention, (*args[:5], args[5].detach().flatten(1).requires_grad_(), numbers, 0.5)
    )
    torch.library.opcheck(torch_impl._neighborhood_attention, (*args[:3], None, None, None, numbers, 0.5))


def test_autocast_does_not_lower_the_precision_inside():
    grid, options = (8, 8), {"kernel": 3}
    args = inputs(grid, options, dtype=torch.bfloat16)
    call = attention(grid, options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run(call, args)
    assert all(torch.equal(a, b) for a, b in zip(inside, run(call, args), strict=True))


def broken(**changes):
    q, k, v = (torch.zeros(1, 2, 16, 4) for _ in range(3))
    given = {"q": q, "k": k, "v": v, "grid": (4, 4), "kernel": 3} | changes
    return neighborhood_attention(given.pop("q"), given.pop("k"), given.pop("v"), **given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict.fromkeys("qk", torch.zeros(1, 2, 16, 0)) | {"scale": 1.0}, r"d at least 1, got \(1, 2, 16, 0\)"),
        ({"k": torch.zeros(1, 2, 15, 4)}, r"k must be .* got q \(1, 2, 16, 4\), k \(1, 2, 15, 4\)"),
        ({"v": torch.zeros(1, 1, 16, 4)}, r"v must be \(1, 2, 16, 'e'\), got \(1, 1, 16, 4\)"),
        ({"v": torch.zeros(1, 2, 16, 4).half()}, r"float like q, got torch.float32, torch.float32, torch.float16"),
        ({"grid": (4, 5)}, r"grid must be 1 to 3 lengths with a product of 16 tokens, got \(4, 5\)"),
        ({"grid": (2, 2, 2, 2)}, r"grid must be 1 to 3 lengths"),
        ({"kernel": None}, r"one of kernel and radius must be given, got kernel=None, radius=None"),
        ({"radius": 2}, r"one of kernel and radius must be given, got kernel=3, radius=2"),
        ({"kernel": (3, 0)}, r"kernel must be one number or 2 of them, at least 1, got \(3, 0\)"),
        ({"dilation": (1, 1, 1)}, r"dilation must be one number or 2 of them, at least 1, got \(1, 1, 1\)"),
        ({"stride": (1, 4)}, r"stride must be at most the kernel \(3, 3\), got \(1, 4\)"),
        ({"shape": "disc"}, r"shape must be box or circle, got 'disc'"),
        ({"edge": "wrap"}, r"edge must be clamp or truncate, got 'wrap'"),
        ({"shape": "circle", "kernel": None, "radius": 2}, r"a circle must have edge='truncate' and one radius"),
        ({"extra_kv": (torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 2, 4))}, r"got \(1, 2, 3, 4\), \(1, 2, 2, 4\)"),
        ({"extra_kv": 2 * (torch.zeros(1, 2, 3, 4).half(),)}, r"extra_kv must be torch.float32 like q"),
        ({"pool": torch.zeros(2)}, r"pool must be float with 2 axes as the grid \(4, 4\), got \(2,\)"),
        ({"bias": torch.zeros(2, 3, 5)}, r"bias must be float \(2, 5, 5\), got \(2, 3, 5\)"),
        ({"impl": "triton"} | dict.fromkeys("qkv", torch.zeros(1, 2, 16, 4).double()), r"impl must be auto, reference"),
    ],
)
def test_errors_name_the_rule_and_what_was_given(changes, message):
    with pytest.raises(ValueError, match="neighborhood_attention: .*" + message):
        broken(**changes)
