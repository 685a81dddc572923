import pytest
import torch
from torch.nn import functional as F

from tests.helpers import assert_within_budget, error, golden, group, weighed
from zoo.kernels.selective_scan import selective_scan, torch_impl

IMPLS = ["reference", "torch"]
# Of the largest value. Float32: sums of up to a thousand terms in another order; the official results are float32, too.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6}
GOLDEN_TOLERANCE = 1e-6

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
CASES = {  # sizes and what is left out
    "plain": {},
    "one token": {"n": 1},
    "one state, one channel": {"e": 1, "s": 1},
    "sizes that divide nothing": {"b": 3, "e": 7, "s": 5, "n": 63},
    "no D, no gate, no bias": {"without": ("D", "z", "delta_bias")},
    "no softplus": {"softplus": False},
    "groups": {"e": 6, "groups": (2, 3)},
    "fixed B": {"fixed": "B"},
    "fixed C": {"fixed": "C"},
    "fixed B and C": {"fixed": "BC"},
    "two orders": {"e": 6, "paths": 2},
    "orders that share tokens": {"e": 6, "paths": 3, "shared": True},
    "orders in groups": {"e": 12, "paths": 2, "groups": (2, 1)},
    "more groups than orders that share tokens": {"e": 12, "paths": 2, "groups": (4, 2), "shared": True},
    "orders, fixed B": {"e": 4, "paths": 2, "fixed": "B"},
    "from a state": {"state": True},
    "orders, from a state": {"e": 6, "paths": 2, "groups": (2, 2), "state": True, "shared": True},
}


def problem(
    b=2, e=4, n=13, s=3, groups=(1, 1), paths=1, shared=False, fixed="", state=False, softplus=True, without=(), seed=0
):
    """Float64 tensors by name, and the other arguments."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    channels = e // paths if shared else e
    floats = {"u": draw(b, channels, n), "delta": draw(b, e, n), "A": -3 * draw(e, s).abs()}
    for name, count in zip("BC", groups, strict=True):
        floats[name] = draw(e, s) if name in fixed else draw(b, s, n) if count == 1 else draw(b, count, s, n)
    floats |= {"D": draw(e), "z": draw(b, channels, n), "delta_bias": draw(e)}
    floats = {name: x for name, x in floats.items() if name not in without}
    if not softplus:
        floats["delta"] = floats["delta"].abs()
    if state:
        floats["initial_state"] = draw(b, e, s)
    orders = torch.stack([torch.randperm(n, generator=g) for _ in range(paths)]) if paths > 1 else None
    return floats, {"delta_softplus": softplus, "orders": orders}


def run(floats, options, call=selective_scan):
    """Output, last state and the gradient of every tensor under a loss that weighs each value differently."""
    floats = {name: x.detach().requires_grad_() for name, x in floats.items()}
    y, state = call(**floats, **options, return_state=True)
    loss = weighed(y) + weighed(state)
    return [y, state, *torch.autograd.grad(loss, list(floats.values()), materialize_grads=True)]


def official(u, delta, A, B, C, D, z, delta_bias, **_):
    """All decays and inputs (b, e, n, s) first, then a loop, in the dtype of `u`: as the published code does it."""
    dt = F.softplus(delta + delta_bias[:, None])
    decay = torch.exp(torch.einsum("ben,es->bens", dt, A))
    drive = torch.einsum("ben,bsn,ben->bens", dt, B, u)
    h, ys = torch.zeros_like(decay[:, :, 0]), []
    for i in range(u.shape[2]):
        h = decay[:, :, i] * h + drive[:, :, i]
        ys.append(torch.einsum("bes,bs->be", h, C[:, :, i]))
    return (torch.stack(ys, 2) + u * D[:, None]) * F.silu(z), h


def published(case):
    """Inputs, options and outputs of the published code."""
    facts, tensors = golden("selective_scan")
    given, found = (group(tensors, f"{kind}.{case}.") for kind in ("input", "output"))
    floats = {name: given[name] for name in NAMES if name in given}
    options = {"delta_softplus": facts["config"]["cases"][case]["delta_softplus"]}
    return floats, options, found | {"weight": given["loss_weight"]}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "case", ["full", "grouped", "fixedBC", "nosoftplus", "noz_noD", "odd", "slow_decay", "strong_decay"]
)
def test_official_results_are_reproduced(case, impl):
    floats, options, expected = published(case)
    floats = {name: x.requires_grad_() for name, x in floats.items()}
    y, state = selective_scan(**floats, **options, return_state=True, impl=impl)
    assert error(y, expected["out"]) <= GOLDEN_TOLERANCE
    assert error(state, expected["last_state"]) <= GOLDEN_TOLERANCE
    grads = torch.autograd.grad((y * expected["weight"]).sum(), list(floats.values()))
    for name, grad in zip(floats, grads, strict=True):
        assert error(grad, expected[f"grad.{name}"]) <= GOLDEN_TOLERANCE, name


def test_reference_equals_the_published_form():
    floats, options = problem(e=5, n=21, s=4)
    for actual, exact in zip(
        run(floats, options | {"impl": "reference"}),
        run(floats, options, lambda return_state, **given: official(**given)),
        strict=True,
    ):
        assert error(actual, exact) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_match_the_float64_reference(case, dtype):
    floats, options = problem(**CASES[case])
    floats = {name: x.to(dtype) for name, x in floats.items()}
    expected = run({name: x.double() for name, x in floats.items()}, options | {"impl": "reference"})
    actual = run(floats, options | {"impl": "torch"})
    for name, value, exact in zip(("y", "state", *floats), actual, expected, strict=True):
        assert value.dtype == dtype
        assert error(value, exact) <= TOLERANCE[dtype], name


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["sweep", "zigma", "jpeg"])
def test_published_orders_equal_permuted_copies_put_back(kind, impl):
    tensors = golden("dimsum-orders")[1]
    orders, inverse = (tensors[f"output.{name}.4"][:3] for name in (kind, f"{kind}_inverse"))
    floats, options = problem(e=6, n=16, paths=3, shared=True, groups=(3, 3))
    y, state = selective_scan(**floats, **options | {"orders": orders}, return_state=True, impl=impl)
    for k, order in enumerate(orders):
        part = slice(2 * k, 2 * k + 2)
        own = {name: floats[name][part] for name in ("A", "D", "delta_bias")}
        own |= {name: floats[name][:, k][..., order] for name in "BC"}
        own |= {name: floats[name][..., order] for name in "uz"} | {"delta": floats["delta"][:, part][..., order]}
        once, last = selective_scan(**own, delta_softplus=True, return_state=True, impl="reference")
        assert error(y[:, part], once[..., inverse[k]]) <= TOLERANCE[torch.float64]
        assert error(state[:, part], last) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("impl", IMPLS)
def test_a_sequence_in_two_parts_gives_what_the_whole_does(impl):
    floats, options = problem(n=17)
    whole, last = selective_scan(**floats, **options, return_state=True, impl=impl)
    cut = lambda x, part: x[..., part] if x.ndim == 3 else x
    first = {name: cut(x, slice(0, 6)) for name, x in floats.items()}
    second = {name: cut(x, slice(6, None)) for name, x in floats.items()}
    y, state = selective_scan(**first, **options, return_state=True, impl=impl)
    rest, end = selective_scan(**second, **options, initial_state=state, return_state=True, impl=impl)
    assert error(torch.cat([y, rest], 2), whole) <= TOLERANCE[torch.float64]
    assert error(end, last) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize(("chunk", "step"), [(1, 1), (5, 8), (1000, 20), (None, 24)])
@pytest.mark.parametrize("case", ["orders, from a state", "groups", "fixed B and C"])
def test_result_does_not_depend_on_how_much_is_computed_at_once(case, chunk, step, monkeypatch):
    floats, options = problem(**CASES[case] | {"e": 12, "b": 2, "n": 11})
    expected = run(floats, options)
    monkeypatch.setattr(torch_impl, "_STEP", step)
    for actual, exact in zip(run(floats, options | {"chunk": chunk}), expected, strict=True):
        assert error(actual, exact) <= TOLERANCE[torch.float64]


def test_a_thousand_tokens_with_strong_and_weak_decay_stay_exact_in_float32():
    floats, options = problem(b=1, e=6, n=1000, s=16)
    floats["A"] = -torch.tensor([1e-3, 1.0, 16.0, 1e3, 0.1, 40.0])[:, None] * torch.ones(16)
    floats = {name: x.float() for name, x in floats.items()}
    expected = run({name: x.double() for name, x in floats.items()}, options)
    for name, actual, exact in zip(("y", "state", *floats), run(floats, options), expected, strict=True):
        assert error(actual, exact) <= TOLERANCE[torch.float32], name


def test_softplus_is_the_identity_above_twenty():
    floats, options = problem(n=9, without=("delta_bias",))
    floats["delta"] = torch.linspace(-40, 60, floats["delta"].numel(), dtype=torch.float64).view(floats["delta"].shape)
    expected = run(floats, options | {"impl": "reference"})
    for actual, exact in zip(run(floats, options), expected, strict=True):
        assert error(actual, exact) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_stays_within_the_budget_of_the_published_form(dtype):
    floats, options = problem(e=8, n=40, s=8)
    floats = {name: x.to(dtype) for name, x in floats.items()}
    plain = run(floats, options, lambda return_state, **given: official(**given))
    exact = run({name: x.double() for name, x in floats.items()}, options)
    for i, (actual, dense, expected) in enumerate(zip(run(floats, options), plain, exact, strict=True)):
        assert actual.dtype == (torch.float32 if i == 1 else dtype)
        assert_within_budget(actual, dense, expected)


def test_decay_rates_in_float32_stay_so_beside_tokens_in_bfloat16():
    floats, options = problem()
    floats = {name: x.bfloat16() if name in ("u", "delta", "B", "C", "z") else x.float() for name, x in floats.items()}
    results = run(floats, options)
    assert [x.dtype for x in results[2:]] == [x.dtype for x in floats.values()]
    assert error(results[0], run({name: x.double() for name, x in floats.items()}, options)[0]) <= 2**-8


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("sizes", [{"n": 0}, {"b": 0}, {"n": 0, "paths": 2}], ids=str)
def test_empty_inputs_give_empty_outputs_and_keep_the_state(sizes, impl):
    floats, options = problem(**sizes, state=True)
    y, state, *grads = run(floats, options | {"impl": impl})
    assert y.shape == floats["u"].shape
    assert torch.equal(state, floats["initial_state"])
    assert all(torch.isfinite(grad).all() for grad in grads)


@pytest.mark.parametrize("inputs", ["n innermost", "e innermost", "strided"])
def test_strides_do_not_matter_and_nothing_given_is_changed(inputs):
    floats, options = problem(b=2, e=6, n=16, paths=2, groups=(2, 1), state=True)
    turned = {
        "n innermost": lambda x: x.clone(),
        "e innermost": lambda x: x.mT.contiguous().mT if x.ndim > 1 else x,
        "strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    }[inputs]
    strange = {name: turned(x) for name, x in floats.items()}
    for actual, exact in zip(run(strange, options), run(floats, options), strict=True):
        assert error(actual, exact) <= TOLERANCE[torch.float64]
    assert all(torch.equal(strange[name], x) for name, x in floats.items())


def test_what_is_kept_for_the_backward_are_the_inputs_and_a_state_a_chunk():
    floats, options = problem(b=1, e=16, n=256, s=16)
    floats = {name: x.requires_grad_() for name, x in floats.items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        selective_scan(**floats, **options, chunk=64)
    assert sum(kept) == sum(x.numel() for x in floats.values()) + 4 * 16 * 16


def test_either_output_can_be_trained_alone():
    floats, options = problem(state=True)
    both = run(floats, options)[2:]
    leaves = [x.requires_grad_() for x in floats.values()]
    y, state = selective_scan(**floats, **options, return_state=True)
    alone = [torch.autograd.grad(weighed(x), leaves, retain_graph=True, materialize_grads=True) for x in (y, state)]
    for first, second, exact in zip(*alone, both, strict=True):
        assert error(first + second, exact) <= TOLERANCE[torch.float64]


def test_compiles_without_a_graph_break_and_trains():
    floats, options = problem(e=6, paths=2, shared=True, state=True)
    compiled = torch.compile(selective_scan, fullgraph=True, backend="aot_eager")
    for actual, exact in zip(run(floats, options, compiled), run(floats, options), strict=True):
        assert torch.equal(actual, exact)


def test_registered_op_keeps_the_rules_of_torch():
    given = [torch.randn(2, 2, 3, 7) for _ in range(3)]  # b r d n
    weights = [torch.randn(2, 3, 4), torch.randn(2, 2, 4, 7)]  # the same for all tokens, and by path
    floats = [*given[:2], -torch.rand(2, 3, 4), *weights, torch.randn(2, 3), given[2], None, torch.randn(2, 2, 3, 4)]
    floats = [x if x is None else x.requires_grad_() for x in floats]
    orders = torch.stack([torch.arange(7), torch.arange(6, -1, -1)])
    torch.library.opcheck(torch_impl._scan, (*floats, orders, True, 3, True))


def test_autocast_does_not_lower_the_precision_inside():
    floats, options = problem()
    floats = {name: x.float() for name, x in floats.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run(floats, options)
    assert all(torch.equal(a, b) for a, b in zip(inside, run(floats, options), strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"delta": torch.zeros(2, 5, 13)}, r"got \(2, 5, 13\), \(4, 3\)"),
        ({"u": torch.zeros(2, 4, 12)}, r"u must be \(2, 4, 13\) like delta, got \(2, 4, 12\)"),
        ({"z": torch.zeros(2, 2, 13)}, r"z must be \(2, 4, 13\) like delta, got \(2, 2, 13\)"),
        ({"B": torch.zeros(2, 3, 12)}, r"B must be \(2, 3, 13\), \(2, 'groups', 3, 13\) or \(4, 3\), got \(2, 3, 12\)"),
        ({"C": torch.zeros(2, 3, 3, 13)}, r"e must be a multiple .* got e 4, B \(2, 3, 13\), C \(2, 3, 3, 13\), K 1"),
        ({"D": torch.zeros(5)}, r"D must be \(4,\), got \(5,\)"),
        ({"delta_bias": torch.zeros(4, 1)}, r"delta_bias must be \(4,\), got \(4, 1\)"),
        ({"initial_state": torch.zeros(2, 3, 4)}, r"initial_state must be \(2, 4, 3\), got \(2, 3, 4\)"),
        ({"A": torch.zeros(4, 3, dtype=torch.complex64)}, r"A must be real floating point, got torch.complex64"),
        ({"orders": torch.arange(13)}, r"orders must be \(K, 13\) with K a divisor of e 4, got \(13,\)"),
        ({"orders": torch.zeros(3, 13, dtype=torch.long)}, r"with K a divisor of e 4, got \(3, 13\)"),
        ({"orders": torch.zeros(2, 13)}, r"orders must be integers, got torch.float32"),
        ({"orders": torch.stack([torch.arange(13), torch.arange(13) // 2])}, r"got another order in row 1"),
        ({"chunk": 0}, r"chunk must be at least 1, got 0"),
        ({"chunk": 24, "impl": "triton"}, r"chunk must be a power of two, got 24"),
        ({"impl": "cuda"}, r"impl must be auto, reference, torch or triton, got 'cuda'"),
    ],
)
def test_errors_name_the_rule_and_what_was_given(changes, message):
    floats, options = problem()
    with pytest.raises(ValueError, match="selective_scan: .*" + message):
        selective_scan(**(floats | options | changes))
