"""The Triton path, through Triton's interpreter where there is no GPU: small problems, every branch of the kernels."""

import pytest
import torch

from tests.helpers import DEVICE, assert_within_budget, error, run
from tests.kernels.test_window_attention import bias, swin
from zoo.kernels.window_attention import launches, relative_position_index, triton_impl, window_attention

TOLERANCE = 3e-6  # float32; sums of up to a hundred terms
FLOAT16 = 1e-2  # logits of 1e5, whose last digit in float32 is 8e-3

CASES = {  # grid, window, options
    "shift, ragged": ((5, 6), (3, 4), {"shift": (2, 1)}),
    "shift, ragged, padding seen": ((5, 6), (3, 4), {"shift": (2, 1), "pad": "attend"}),
    "wrap, ragged": ((5, 6), (3, 4), {"shift": (2, 1), "wrap": True}),
    "overlap": ((4, 8), 4, {"overlap": 2}),
    "overlap, ragged, padding seen": ((5, 7), (4, 5), {"overlap": (1, 2), "pad": "attend"}),
    "overlap wider than a window": ((3, 5), (2, 3), {"overlap": (3, 0), "pad": "attend"}),
    "dilation, ragged": ((5, 5), (2, 3), {"dilation": (1, 2)}),
    "63 tokens": ((7, 9), (7, 5), {}),
}


def inputs(grid, *, b=1, heads=2, d=5, e=6, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    made = [torch.randn(b, grid[0] * grid[1], heads, width, generator=g).to(DEVICE, dtype) for width in (d, d, e)]
    return [t.transpose(1, 2) for t in made]


def compare(grid, window, options, args, tolerance=TOLERANCE):
    """Triton against the float64 reference; with a table as the fourth of `args`, biased."""
    index = bias(window, options.get("overlap", 0))[1].to(DEVICE)

    def attention(impl):
        def call(q, k, v, table=None):
            biased = {} if table is None else {"bias_table": table, "bias_index": index}
            return window_attention(q, k, v, grid=grid, window=window, impl=impl, **options, **biased)

        return call

    expected = run(attention("reference"), [t.double() for t in args])
    for actual, exact in zip(run(attention("triton"), args), expected, strict=True):
        assert actual.dtype == args[0].dtype
        assert error(actual, exact) <= tolerance


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_match_the_float64_reference(case):
    grid, window, options = CASES[case]
    compare(grid, window, options, [*inputs(grid, heads=1), bias(window, heads=1)[0].float().to(DEVICE)])


@pytest.mark.parametrize("overlap", [0, 1])
def test_windows_larger_than_a_tile_and_programs_with_several_windows_change_nothing(overlap, monkeypatch):
    monkeypatch.setattr(launches, "PROGRAMS", 2)
    monkeypatch.setattr(launches, "TILES", {80: dict.fromkeys((64, 128), (launches.Tile(16, 16, 4, 1),) * 4)})
    grid, window = (5, 7), (5, 4)
    args = [*inputs(grid, heads=1), bias(window, overlap, heads=1)[0].float().to(DEVICE)]
    compare(grid, window, {"overlap": overlap} if overlap else {"shift": (2, 1)}, args)


def test_heads_and_images_have_places_and_biases_of_their_own():
    compare((2, 3), (2, 3), {}, [*inputs((2, 3), b=2), bias((2, 3), heads=2)[0].float().to(DEVICE)])


@pytest.mark.parametrize("overlap", [0, 1])
def test_an_order_of_each_head_is_followed(overlap):
    grid, window = (4, 6), (3, 4)
    order = torch.rand(1, 2, 24, generator=torch.Generator().manual_seed(2)).argsort(-1).to(DEVICE)
    compare(grid, window, {"order": order, "overlap": overlap}, inputs(grid))


@pytest.mark.parametrize("d", [1, 24, 30])
def test_head_dims_need_not_be_powers_of_two(d):
    compare((3, 3), (3, 3), {}, inputs((3, 3), heads=1, d=d, e=d + 1))


def test_strides_do_not_matter():
    q, k, v = (t.mT.contiguous().mT[:, :, :, ::2] for t in inputs((2, 6), d=10, e=10))
    compare((2, 6), (2, 3), {}, [q, k, v])


def test_a_single_token_sees_itself():
    q, k, v = inputs((1, 1))
    y, dq, dk, dv = run(lambda *a: window_attention(*a, grid=(1, 1), window=4, shift=3, impl="triton"), [q, k, v])
    assert torch.equal(y, v)
    assert dv.shape == v.shape
    assert max(dq.abs().max(), dk.abs().max()) <= TOLERANCE  # nothing, up to how the two sums round


@pytest.mark.parametrize("sizes", [(0, (4, 4)), (2, (0, 4))], ids=str)
def test_empty_inputs_give_empty_outputs_and_gradients(sizes):
    b, grid = sizes
    index = bias(4)[1].to(DEVICE)
    args = [*inputs(grid, b=b), torch.ones(23, 2, device=DEVICE)]
    call = lambda q, k, v, t: window_attention(
        q, k, v, grid=grid, window=4, shift=2, bias_table=t, bias_index=index, impl="triton"
    )
    for actual, given in zip(run(call, args), [args[2], *args], strict=True):
        assert actual.shape == given.shape
        assert not actual.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_stays_within_the_budget_of_a_dense_run(dtype):
    grid, window, shift = (8, 8), 4, 2
    index = relative_position_index(window).to(DEVICE)
    args = [*inputs(grid, heads=1, d=24, e=24), bias(window, heads=1, rows=49)[0].to(DEVICE)]
    args = [t.to(dtype) for t in args]
    dense = run(lambda *a: swin(*a, index, grid, window, shift), args)
    exact = run(lambda *a: swin(*a, index, grid, window, shift), [t.double() for t in args])
    ours = lambda q, k, v, table: window_attention(
        q, k, v, grid=grid, window=window, shift=shift, bias_table=table, bias_index=index, impl="triton"
    )
    for actual, plain, expected in zip(run(ours, args), dense, exact, strict=True):
        assert actual.dtype == dtype
        assert_within_budget(actual, plain, expected)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_logits_beyond_the_range_of_float16_do_no_harm(impl):
    grid, window = (4, 4), 4
    q, k, v = (t.half() for t in inputs(grid, heads=1, d=30, e=30))
    q, k = 400 * q, 100 * k
    index = relative_position_index(window).to(DEVICE)
    table = bias(window, heads=1, rows=49)[0].half().to(DEVICE)
    plain = run(lambda *a: swin(*a, index, grid, window, 0), [q, k, v, table])
    assert not all(t.isfinite().all() for t in plain)  # what goes wrong elsewhere
    call = lambda impl: (
        lambda q, k, v, t: window_attention(
            q, k, v, grid=grid, window=window, bias_table=t, bias_index=index, impl=impl
        )
    )
    y, *gradients = run(call(impl), [q, k, v, table])
    assert error(y, call("reference")(*(t.double() for t in (q, k, v, table)))) <= FLOAT16
    assert all(t.isfinite().all() for t in gradients)


def test_compiles_without_a_graph_break_and_trains():
    grid, window = (3, 4), (3, 2)
    index = bias(window)[1].to(DEVICE)
    args = [*inputs(grid, heads=1), torch.randn(23, 1, device=DEVICE)]
    call = lambda q, k, v, t: window_attention(
        q, k, v, grid=grid, window=window, bias_table=t, bias_index=index, impl="triton"
    )
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(run(compiled, args), run(call, args), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("learned", [True, False])
def test_registered_op_keeps_the_rules_of_torch(learned):
    args = [t.requires_grad_() for t in inputs((2, 2), heads=1)]
    table = torch.randn(1, 4, 4, requires_grad=True, device=DEVICE) if learned else None
    geometry = (2, 2, 2, 2, 1, 1, 0, 0, 0, 0, 0, 0)
    torch.library.opcheck(triton_impl._window_attention, (*args, table, None, geometry, 0.5))
