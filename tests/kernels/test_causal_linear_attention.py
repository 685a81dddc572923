import pytest
import torch

from tests.helpers import assert_within_budget, error, run
from zoo.kernels.causal_linear_attention import causal_linear_attention, plan, torch_impl
from zoo.kernels.causal_linear_attention.tuning import Tile

IMPLS = ["reference", "torch", "triton"]
# Gradients are sums over all tokens, 70 here; those of decays are sums over pairs of tokens, too.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}

CASES = {  # sizes, decay, options
    "plain": ({}, None, {}),
    "by head": ({"heads": 2}, "head", {}),
    "by token": ({"b": 2, "d": 24, "e": 40}, "token", {}),
    "by channel": ({"d": 30, "e": 30}, "channel", {}),
    "by channel, wide values": ({"n": 17, "e": 40}, "channel", {}),
    "one token": ({"n": 1}, "token", {}),
    "one token by channel": ({"n": 1}, "channel", {}),
    "one feature": ({"d": 1, "e": 1}, "channel", {}),
    "blocks": ({}, None, {"block": 4}),
    "blocks, by head": ({}, "head", {"block": 12}),
    "blocks, by token": ({}, "token", {"block": 3}),
    "blocks, by channel": ({}, "channel", {"block": 5}),
    "a block longer than a chunk": ({"n": 150}, "token", {"block": 70}),
    "long blocks, by channel": ({"n": 150}, "channel", {"block": 65}),
    "a block longer than all": ({}, "token", {"block": 100}),
    "norm": ({}, None, {"norm": "z", "eps": 1e-3}),
    "norm, by token": ({}, "token", {"norm": "z"}),
    "norm, blocks, by channel": ({}, "channel", {"norm": "z", "block": 2}),
}


@pytest.fixture
def small_tiles(monkeypatch):
    """16 rows a tile: several chunks of few tokens, because the interpreter takes its time."""
    monkeypatch.setattr(plan, "TILES", {80: Tile(256, 8)})


def problem(case, dtype, impl="torch", strength=1.0):
    """Float tensors of a case, q, k, v, initial state and log decay if any, and a call that takes them and an impl."""
    sizes, decay, options = CASES[case]
    if impl == "triton":
        sizes = {"n": 20} | sizes
    b, heads, n, d, e = ({"b": 1, "heads": 1, "n": 70, "d": 16, "e": 16} | sizes).values()
    normed = "norm" in options
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)
    args = [draw(b, n, heads, size).transpose(1, 2) for size in (d, d, e)]
    args.append(draw(b, heads, d, e + normed))
    if normed:  # weights that are positive
        args = [t.abs() + 0.1 for t in args]
    if decay:
        shape = {"head": (heads,), "token": (b, heads, n), "channel": (b, heads, n, d)}[decay]
        args.append(-strength * torch.rand(shape, generator=g, dtype=torch.float64).square())

    def call(q, k, v, state, log_decay=None, *, impl):
        options_ = options | {"log_decay": log_decay, "initial_state": state, "return_state": True}
        return causal_linear_attention(q, k, v, impl=impl, **options_)

    return [t.to(dtype) for t in args], call


def dense(q, k, v, g, block=1, z=False, eps=1e-6):
    """All pairs of tokens at once, in the dtype of `q`; `g` is (b, heads, n, 1 or d) or None."""
    n = q.shape[2]
    of = torch.arange(n) // block
    weights = q @ k.mT
    if g is not None:
        late = (of[:, None] > of).to(g.dtype)  # n m
        ends = torch.minimum((torch.arange(n) // block + 1) * block, torch.tensor(n)) - 1
        total = g.cumsum(2)[:, :, ends]  # b heads n d: up to the end of the block
        logs = (total[:, :, :, None] - total[:, :, None]) * late[..., None]  # b heads n m d
        weights = (q[:, :, :, None] * k[:, :, None] * logs.exp()).sum(-1)
    weights = weights * (of[:, None] >= of).to(q.dtype)
    y = weights @ v
    return y / (weights.sum(-1, keepdim=True) + eps) if z else y


@pytest.mark.parametrize(
    ("impl", "dtype"), [("torch", torch.float64), ("torch", torch.float32), ("triton", torch.float32)]
)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("small_tiles")
def test_output_state_and_gradients_match_the_float64_reference(case, impl, dtype):
    args, call = problem(case, dtype, impl)
    expected = run(lambda *a: call(*a, impl="reference"), [t.double() for t in args])
    actual = run(lambda *a: call(*a, impl=impl), args)
    assert [t.dtype for t in actual] == [dtype] * len(actual)
    for one, exact in zip(actual, expected, strict=True):
        assert error(one, exact) <= TOLERANCE[dtype]


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("block", [1, 3, 12, 80])
@pytest.mark.parametrize("decay", [None, "head", "token", "channel"])
def test_blocks_and_decays_equal_the_dense_form(decay, block, impl):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 100, size, generator=g, dtype=torch.float64) for size in (6, 6, 5))
    shape = {"head": (3,), "token": (2, 3, 100), "channel": (2, 3, 100, 6)}.get(decay)
    logs = full = None
    if shape:
        logs = -torch.rand(shape, generator=g, dtype=torch.float64)
        full = logs.view((1, 3, 1, 1) if decay == "head" else (2, 3, 100, -1)).expand(2, 3, 100, -1)
    for norm in ("z", None):
        actual = causal_linear_attention(q.abs(), k.abs(), v, log_decay=logs, block=block, norm=norm, impl=impl)
        assert error(actual, dense(q.abs(), k.abs(), v, full, block, z=bool(norm))) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("decay", [None, "token", "channel"])
def test_a_thousand_tokens_equal_the_float64_reference(decay):
    g = torch.Generator().manual_seed(0)
    args = [torch.randn(1, 2, 1000, 16, generator=g) for _ in range(3)] + [torch.randn(1, 2, 16, 16, generator=g)]
    if decay:
        args.append(-0.1 * torch.rand((1, 2, 1000, 16)[: 3 + (decay == "channel")], generator=g))
    call = lambda q, k, v, s, g=None, impl="torch": causal_linear_attention(
        q, k, v, log_decay=g, initial_state=s, return_state=True, impl=impl
    )
    expected = run(lambda *a: call(*a, impl="reference"), [t.double() for t in args])
    for actual, exact in zip(run(call, args), expected, strict=True):
        assert error(actual, exact) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize(("impl", "strength"), [("torch", 30.0), ("torch", 1e4), ("triton", 1e4)])
@pytest.mark.parametrize("case", ["by token", "by channel", "blocks, by token", "long blocks, by channel"])
def test_strong_and_weak_decays_side_by_side_stay_exact(case, strength, impl):
    args, call = problem(case, torch.float32, impl, strength)
    args[-1] = args[-1] * (torch.arange(args[-1].shape[2]).view(-1, *[1] * (args[-1].ndim - 3)) % 5 == 2) - 0.01
    expected = run(lambda *a: call(*a, impl="reference"), [t.double() for t in args])
    for one, exact in zip(run(lambda *a: call(*a, impl=impl), args), expected, strict=True):
        assert error(one, exact) <= TOLERANCE[torch.float32] or exact.abs().max() < 1e-38  # nothing, in float32


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", ["by token", "by channel"])
def test_a_decay_of_minus_infinity_starts_afresh(case, impl):
    args, call = problem(case, torch.float32, impl)
    args[-1][:, :, 10] = -torch.inf
    y, state = call(*args, impl=impl)
    q, k, v, s, g = (t if t.shape[2:3] != y.shape[2:3] else t[:, :, 10:] for t in args)
    alone, own = call(q, k, v, torch.zeros_like(s), g, impl="reference")
    assert error(y[:, :, 10:], alone) <= TOLERANCE[torch.float32]
    assert error(state, own) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", ["plain", "norm, by token", "blocks, by channel"])
def test_state_of_the_first_tokens_continues_with_the_rest(case, impl):
    args, call = problem(case, torch.float32, impl)
    split, n = 10, args[0].shape[2]  # a multiple of the blocks
    parts = lambda span: [t[:, :, span] if t.shape[2] == n else t for t in args]
    y, state = call(*args, impl=impl)
    first, between = call(*parts(slice(0, split)), impl=impl)
    rest = parts(slice(split, None))
    rest[3] = between
    second, last = call(*rest, impl=impl)
    assert error(torch.cat([first, second], 2), y) <= TOLERANCE[torch.float32]
    assert error(last, state) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("decay", [None, "token", "channel"])
def test_later_tokens_have_no_influence(decay, impl):
    args, call = problem("plain" if decay is None else f"by {decay}", torch.float32, impl)
    y, _ = call(*args, impl=impl)
    changed = [t.clone() for t in args]
    for t in changed[1:3] + changed[4:]:
        t[:, :, 12:] -= 1
    assert torch.equal(call(*changed, impl=impl)[0][:, :, :12], y[:, :, :12])


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("decay", [None, "token", "channel"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_stays_within_the_budget_of_a_dense_run(dtype, decay, impl):
    g = torch.Generator().manual_seed(0)
    args = [torch.randn(1, 1, 24, 32, generator=g).to(dtype) for _ in range(3)]
    if decay:
        args.append((-0.2 * torch.rand((1, 1, 24, 32)[: 3 + (decay == "channel")], generator=g)).to(dtype))
    full = lambda q, k, v, g=None: (dense(q, k, v, g if g is None or g.ndim == 4 else g[..., None]), q.new_zeros(1))
    plain, exact = run(full, args), run(full, [t.double() for t in args])
    call = lambda q, k, v, g=None: (causal_linear_attention(q, k, v, log_decay=g, impl=impl), q.new_zeros(1))
    for actual, other, expected in zip(run(call, args), plain, exact, strict=True):
        assert_within_budget(actual, other, expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("b", "n"), [(0, 4), (2, 0)])
def test_without_tokens_there_is_nothing_but_the_state(b, n, impl):
    q, k, v = (torch.randn(b, 3, n, size, requires_grad=True) for size in (16, 16, 20))
    state, g = torch.randn(b, 3, 16, 20, requires_grad=True), torch.zeros(b, 3, n, requires_grad=True)
    y, last = causal_linear_attention(q, k, v, log_decay=g, initial_state=state, return_state=True, impl=impl)
    assert y.shape == v.shape
    assert torch.equal(last, state)
    grads = torch.autograd.grad(y.sum() + last.sum(), (q, k, v, g, state), allow_unused=True)
    assert torch.equal(grads[-1], torch.ones_like(state))


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_do_not_matter(impl):
    g = torch.Generator().manual_seed(0)
    fused = torch.randn(2, 9, 3, 1, 16, generator=g)  # b n 3 heads d: one projection, as models have it
    views = [t.transpose(1, 2) for t in fused.unbind(2)]
    views[1] = views[1].contiguous().mT.contiguous().mT
    views.append(-torch.rand(2, 9, 16, 1, generator=g).permute(0, 3, 1, 2))
    call = lambda q, k, v, g: causal_linear_attention(q, k, v, log_decay=g, block=2, return_state=True, impl=impl)
    for actual, expected in zip(run(call, views), run(call, [t.contiguous() for t in views]), strict=True):
        assert error(actual, expected) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize(("name", "value"), [("_NUMBERS", 1), ("_CHUNK", 16), ("_CHUNK", 1)])
@pytest.mark.parametrize("case", ["by token", "blocks, by channel"])
def test_result_does_not_depend_on_how_much_is_computed_at_once(case, name, value, monkeypatch):
    args, call = problem(case, torch.float64)
    expected = run(lambda *a: call(*a, impl="torch"), args)
    monkeypatch.setattr(torch_impl, name, value)
    for actual, exact in zip(run(lambda *a: call(*a, impl="torch"), args), expected, strict=True):
        assert error(actual, exact) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_compiles_without_a_graph_break_and_trains(impl):
    args, call = problem("norm, blocks, by channel", torch.float32, impl)
    call_ = lambda *a: call(*a, impl=impl)
    compiled = torch.compile(call_, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(run(compiled, args), run(call_, args), strict=True):
        assert error(actual, expected) <= 1e-6


def test_registered_op_keeps_the_rules_of_torch():
    q, k, v = (torch.randn(1, 2, 9, size, requires_grad=True) for size in (4, 4, 5))
    g, state = (-torch.rand(1, 2, 9, 1)).requires_grad_(), torch.randn(1, 2, 4, 5, requires_grad=True)
    torch.library.opcheck(torch_impl._causal, (q, k, v, g, state, 2, torch.float32))


@pytest.mark.parametrize("module", [torch_impl, pytest.importorskip("zoo.kernels.causal_linear_attention.triton_impl")])
@pytest.mark.parametrize("n", [9, 0])
def test_results_lie_as_registered_ops_promise(n, module):
    turned = lambda *shape: torch.randn(*shape[:-2], shape[-1], shape[-2]).mT
    q, k, v, g = (turned(1, 2, n, size) for size in (4, 4, 5, 4))
    state, tests = turned(1, 2, 4, 5), ("test_schema", "test_faketensor")
    torch.library.opcheck(module._causal, (q, k, v, -g.abs(), state, 2, torch.float32), test_utils=tests)
    torch.library.opcheck(module._causal_backward, (v, state, q, k, v, -g.abs(), state, 2), test_utils=tests)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", ["by head", "by token", "by channel"])
def test_decays_may_be_wider_or_narrower_than_tokens(case, impl):
    args, call = problem(case, torch.float32, impl)
    for dtype in (torch.float64, torch.bfloat16):
        own = [*args[:-1], args[-1].to(dtype)]
        expected = run(lambda *a: call(*a, impl="reference"), [t.double() for t in own])
        actual = run(lambda *a: call(*a, impl=impl), own)
        assert actual[-1].dtype == dtype
        for one, exact in zip(actual[:-1], expected[:-1], strict=True):
            assert error(one, exact) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_in_a_state_is_not_hidden(impl):
    q = torch.rand(1, 1, 9, 16, dtype=torch.float16)
    nan = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # what GPUs make of inf - inf
    assert causal_linear_attention(q, q, q, initial_state=nan.expand(1, 1, 16, 16), impl=impl).isnan().all()


def test_autocast_does_not_lower_the_precision_inside():
    args, call = problem("by channel", torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run(lambda *a: call(*a, impl="torch"), args)
    assert all(torch.equal(a, b) for a, b in zip(inside, run(lambda *a: call(*a, impl="torch"), args), strict=True))


Q = torch.zeros(1, 2, 6, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": Q[0]}, r"q must be \(b, heads, n, d\) with d at least 1, got \(2, 6, 4\)"),
        ({"k": Q[:, :, :5]}, r"k must be .* like q, got q \(1, 2, 6, 4\), k \(1, 2, 5, 4\)"),
        ({"v": Q[:, :1]}, r"v must be \(1, 2, 6, 'e'\), got \(1, 1, 6, 4\)"),
        ({"v": Q.half()}, r"float like q, got torch.float32, torch.float32, torch.float16"),
        ({"log_decay": Q[0]}, r"one of \[\(2,\), \(1, 2, 6\), \(1, 2, 6, 4\)\], got torch.float32 \(2, 6, 4\)"),
        ({"log_decay": Q.long()}, r"log_decay must be float, .* got torch.int64 \(1, 2, 6, 4\)"),
        ({"block": 0}, r"block must be at least 1, got 0"),
        ({"norm": "mean"}, r"norm must be z or None, and eps at least 0, got 'mean', 1e-06"),
        ({"initial_state": Q, "norm": "z"}, r"initial_state must be \(1, 2, 4, 5\), got \(1, 2, 6, 4\)"),
        ({"impl": "cuda"}, r"impl must be auto, reference, torch or triton, got 'cuda'"),
    ],
)
def test_errors_name_the_rule_and_what_was_given(changes, message):
    given = {"q": Q, "k": Q, "v": Q} | changes
    with pytest.raises(ValueError, match="causal_linear_attention: .*" + message):
        causal_linear_attention(given.pop("q"), given.pop("k"), given.pop("v"), **given)
