"""The GPU kernels, in Triton's interpreter where there is no GPU: problems are tiny, chunks of four tokens."""

import pytest
import torch

from tests.helpers import DEVICE, assert_within_budget, error
from tests.kernels.test_selective_scan import CASES, GOLDEN_TOLERANCE, official, problem, published, run
from zoo.kernels.selective_scan import selective_scan

triton_impl = pytest.importorskip("zoo.kernels.selective_scan.triton_impl")
# Of the largest value. The kernels compute in the wider of float32 and the dtype given, here on at most 60 terms.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6}
TINY = {"b": 1, "n": 6}
SMALL = [name for name in CASES if name != "sizes that divide nothing"]


def there(floats, options):
    orders = options.get("orders")
    options = options | {"impl": "triton", "orders": orders if orders is None else orders.to(DEVICE)}
    return {name: x.to(DEVICE) for name, x in floats.items()}, options


@pytest.mark.parametrize("case", SMALL)
def test_output_and_gradients_match_the_float64_reference(case):
    floats, options = problem(**(TINY | CASES[case]))
    expected = run(floats, options | {"impl": "reference"})
    floats, options = there(floats, options)
    for name, actual, exact in zip(("y", "state", *floats), run(floats, options | {"chunk": 4}), expected, strict=True):
        assert actual.dtype == torch.float64
        assert error(actual.cpu(), exact) <= TOLERANCE[torch.float64], name


def test_sizes_that_divide_nothing_in_float32():
    floats, options = problem(b=2, e=5, n=11, s=3)
    floats = {name: x.float() for name, x in floats.items()}
    expected = run({name: x.double() for name, x in floats.items()}, options | {"impl": "reference"})
    floats, options = there(floats, options)
    for name, actual, exact in zip(("y", "state", *floats), run(floats, options), expected, strict=True):
        assert actual.dtype == torch.float32
        assert error(actual.cpu(), exact) <= TOLERANCE[torch.float32], name


def test_tiles_and_shares_do_not_change_the_result(monkeypatch):
    floats, options = problem(b=1, e=6, n=7, paths=2, groups=(2, 1))
    floats, options = there(floats, options)
    expected = run(floats, options | {"impl": "torch"})
    tile = triton_impl.TILES[80]._replace(values=32, back_values=16)
    monkeypatch.setattr(triton_impl, "TILES", {80: tile})
    monkeypatch.setattr(triton_impl, "PROGRAMS", 8)  # two shares of the channels
    for actual, exact in zip(run(floats, options | {"chunk": 4}), expected, strict=True):
        assert error(actual, exact) <= TOLERANCE[torch.float64]


def test_official_results_are_reproduced():
    floats, options, expected = published("odd")
    cut = {name: x[..., :12].contiguous() if x.ndim == 3 else x for name, x in floats.items()}
    cut, options = there(cut, options)
    y = selective_scan(**cut, **options)
    assert error(y.cpu(), expected["out"][..., :12]) <= GOLDEN_TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_stays_within_the_budget_of_the_published_form(dtype):
    floats, options = problem(b=1, n=12)
    floats = {name: x.to(dtype) for name, x in floats.items()}
    plain = run(floats, options, lambda return_state, **given: official(**given))
    exact = run({name: x.double() for name, x in floats.items()}, options)
    floats, options = there(floats, options)
    for i, (actual, dense, best) in enumerate(zip(run(floats, options), plain, exact, strict=True)):
        assert actual.dtype == (torch.float32 if i == 1 else dtype)
        assert_within_budget(actual.cpu(), dense, best)


def test_softplus_keeps_small_steps_and_is_the_identity_above_twenty():
    floats, options = problem(b=1, e=1, n=8, s=1, without=("delta_bias", "D", "z"))
    floats = {name: x.float() for name, x in floats.items()}
    floats["delta"] = torch.tensor([[[-30.0, -16.0, -9.0, -1.0, 3.0, 19.0, 21.0, 60.0]]])
    expected = run({name: x.double() for name, x in floats.items()}, options | {"impl": "reference"})
    results = run(*there(floats, options))
    assert error(results[0].cpu(), expected[0]) <= TOLERANCE[torch.float32]
    relative = (results[3].cpu() / expected[3] - 1).abs().max()
    assert relative <= 1e-5, relative


@pytest.mark.parametrize("sizes", [{"n": 0}, {"b": 0}, {"n": 0, "paths": 2}], ids=str)
def test_empty_inputs_give_empty_outputs_and_keep_the_state(sizes):
    floats, options = there(*problem(**sizes, state=True))
    y, state, *grads = run(floats, options)
    assert y.shape == floats["u"].shape
    assert torch.equal(state, floats["initial_state"])
    assert all(torch.isfinite(grad).all() for grad in grads)


def test_strides_do_not_matter():
    floats, options = there(*problem(b=2, e=2, n=4, s=2, paths=2, groups=(2, 1), state=True))
    turned = lambda x: x.mT.contiguous().mT if x.ndim > 2 else x.repeat_interleave(2, -1)[..., ::2]
    strange = {name: turned(x) for name, x in floats.items()}
    for actual, exact in zip(run(strange, options), run(floats, options | {"impl": "torch"}), strict=True):
        assert error(actual, exact) <= TOLERANCE[torch.float64]


def test_compiles_without_a_graph_break_and_trains():
    floats, options = there(*problem(b=1, n=2, e=2, s=2, paths=2, shared=True, state=True))
    compiled = torch.compile(selective_scan, fullgraph=True, backend="aot_eager")
    for actual, exact in zip(run(floats, options, compiled), run(floats, options), strict=True):
        assert torch.equal(actual, exact)


def test_registered_op_keeps_the_rules_of_torch():
    given = [torch.randn(1, 2, 1, 4) for _ in range(3)]  # b r d n
    weights = [torch.randn(2, 1, 2), torch.randn(1, 2, 2, 4)]  # the same for all tokens, and by path
    floats = [*given[:2], -torch.rand(2, 1, 2), *weights, torch.randn(2, 1), given[2]]
    floats = [x.to(DEVICE).requires_grad_() for x in floats] + [None, None]
    orders = torch.stack([torch.arange(4), torch.arange(3, -1, -1)]).to(DEVICE)
    torch.library.opcheck(triton_impl._scan, (*floats, orders, True, 4, True))
