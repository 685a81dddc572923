"""The Triton path under the interpreter: small problems, each of its features at least once."""

from math import prod

import pytest
import torch

from tests.helpers import assert_within_budget, error, run
from tests.kernels.neighborhoods import CASES, CIRCLE, attention, dense, inputs
from zoo.kernels.neighborhood_attention.launches import Launch
from zoo.kernels.neighborhood_attention.plan import Axis, Geometry

triton_impl = pytest.importorskip("zoo.kernels.neighborhood_attention.triton_impl")

TOLERANCE = 5e-6  # float32, as for the torch path
PLAIN = [  # too many biases for the interpreter: it takes a program for each
    "line, even kernel",
    "line, shorter than a window",
    "map, all at once",
    "circle",
    "circle, dilated, grouped",
    "circle, causal groups",
    "box of frames",
    "ball",
]
BIASED = CASES | {
    "small map": ((4, 5), {"kernel": 2}),
    "small circle": ((4, 6), {"radius": 2, "stride": (1, 2), "dilation": (2, 1), **CIRCLE}),
    "few frames": ((2, 3, 4), {"kernel": (1, 2, 2), "dilation": (1, 1, 2)}),
}


def check(grid, options, tolerance=TOLERANCE, *, extra=3, biased=False, **sizes):
    with_ = {"extra": bool(extra), "biased": biased}
    args = inputs(grid, options, dtype=torch.float32, extra=extra, biased=biased, **sizes)
    expected = run(attention(grid, options, impl="reference", **with_), [t.double() for t in args])
    for actual, exact in zip(run(attention(grid, options, impl="triton", **with_), args), expected, strict=True):
        assert actual.dtype == torch.float32
        assert error(actual, exact) <= tolerance


@pytest.mark.parametrize("case", PLAIN)
def test_results_and_gradients_match_the_float64_reference(case):
    check(*CASES[case], b=1, heads=1)


@pytest.mark.parametrize("case", ["line, causal groups, dilated", "small map", "small circle", "few frames"])
def test_biases_are_learned(case):
    check(*BIASED[case], b=1, heads=1, biased=True)


def test_images_do_not_mix():
    check((2, 3), {"kernel": 2}, b=2, heads=2, biased=True)


@pytest.mark.parametrize("grid", [1, 63, (9, 20)], ids=str)
def test_tiles_meet_at_their_borders(grid):
    check(grid, {"kernel": 3, "dilation": 2}, b=1, heads=1, extra=0)


@pytest.mark.parametrize(("d", "e"), [(30, 24), (80, 16), (16, 256)])
def test_head_dims_need_not_be_powers_of_two(d, e):
    check(8, {"kernel": 3}, b=1, heads=1, d=d, e=e)


@pytest.mark.parametrize(("d", "dtype"), [(64, torch.bfloat16), (256, torch.bfloat16), (128, torch.float32)], ids=str)
@pytest.mark.parametrize("name", ["forward", "queries", "keys"])
def test_tiles_are_as_large_as_products_on_a_gpu_have_to_be(name, d, dtype):
    for grid in ((1,), (3,), (64,), (8, 8), (1, 50), (4, 4, 4)):
        geometry = Geometry(tuple(Axis(n, 3, 2, 1, False, True) for n in grid), 0)
        q = torch.zeros(1, 2, prod(grid), d, dtype=dtype)
        for table in (None, torch.zeros(2, 5 ** len(grid))):
            launch = Launch(name, geometry, q, q, None, table)
            assert min(prod(launch.constants[side]) for side in "TK") >= 16, grid


def test_sums_over_parts_of_the_queries_are_whole(monkeypatch):
    monkeypatch.setattr(triton_impl, "_CHUNK", 8)
    check(13, {"kernel": 2}, b=2, heads=1, biased=True)


def test_keys_that_are_hardly_seen_do_not_overflow():
    q, k, v, extra_k, extra_v = inputs((4, 5), {}, b=1, heads=1, dtype=torch.float32, biased=False)
    args = [q.abs() + 5, -40 * (k.abs() + 1), v, -40 * (extra_k.abs() + 1), extra_v]  # logits near -1000
    call = lambda impl: attention((4, 5), {"kernel": 2}, biased=False, impl=impl)
    for actual, exact in zip(run(call("triton"), args), run(call("reference"), args), strict=True):
        assert error(actual, exact) <= 1e-4  # differences of logits of that size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_stays_within_the_budget_of_a_dense_run(dtype):
    grid, options = 24, {"kernel": 7}
    args = [t.to(dtype) for t in inputs(grid, options, b=1, heads=1, d=24, e=24)]
    plain = run(lambda *a: dense(*a, grid=grid, **options), args)
    exact = run(lambda *a: dense(*a, grid=grid, **options), [t.double() for t in args])
    for actual, rough, expected in zip(run(attention(grid, options, impl="triton"), args), plain, exact, strict=True):
        assert_within_budget(actual, rough, expected)


def test_strides_do_not_matter():
    grid, options = 9, {"kernel": 3}
    args = inputs(grid, options, b=1, d=6, e=6, biased=False, dtype=torch.float32)
    call = attention(grid, options, biased=False, impl="triton")
    expected = run(call, args)
    for strange in ([t.mT.contiguous().mT for t in args], [torch.stack([t, t], 3)[:, :, :, 0] for t in args]):
        for actual, exact in zip(run(call, strange), expected, strict=True):
            assert error(actual, exact) <= TOLERANCE


@pytest.mark.parametrize("sizes", [(0, 4), (2, 0)], ids=str)
def test_empty_inputs_give_empty_results(sizes):
    b, n = sizes
    results = run(attention(n, {"kernel": 3}, impl="triton"), inputs(n, {"kernel": 3}, b=b, dtype=torch.float32))
    assert [y.shape for y in results[:2]] == [(b, 2, n, 4), (b, 2, n)]


def test_compiles_without_a_graph_break_and_trains():
    args = inputs(6, {"kernel": 3}, b=1, heads=1, dtype=torch.float32)
    call = attention(6, {"kernel": 3}, impl="triton")
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(run(compiled, args), run(call, args), strict=True):
        assert torch.equal(actual, expected)


def test_registered_op_keeps_the_rules_of_torch():
    args = [t.requires_grad_() for t in inputs(6, {"kernel": 2}, b=1, heads=1, dtype=torch.float32)]
    torch.library.opcheck(triton_impl._neighborhood_attention, (*args, [6, 2, 1, 1, 0, 1, 0], 0.5))
