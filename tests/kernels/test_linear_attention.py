from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from tests.helpers import assert_within_budget, error, golden, group, run
from zoo.kernels.linear_attention import LinearState, linear_attention, torch_impl

IMPLS = ["reference", "torch", "triton"]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}  # gradients are sums over all tokens, 63 here
GOLDEN_TOLERANCE = 1e-5  # of the largest value: float32 sums in another order

LINFUSION = {"norm": "mean_queries", "eps": 1e-4}
LIT = {"feature_map": "relu", "map_eps": 1e-6, "eps": 1e-6}
SCATTER = {"feature_map": "relu", "norm": "sum", "eps": 1e-6}
EFFICIENT = {"feature_map": "softmax_qk", "norm": None}

CASES = {  # sizes, options
    "elu": ({"heads": 2}, {}),
    "LinFusion": ({"m": 41}, LINFUSION),
    "LiT": ({"d": 30, "e": 30}, LIT),
    "sum": ({"d": 24, "e": 80}, SCATTER),
    "no norm": ({"e": 3}, {"norm": None, "map_eps": 0.1}),
    "softmax": ({"m": 20}, EFFICIENT),
    "identity, decoupled": ({}, {"feature_map": "elu1", "decoupled": True, "eps": 1e-3}),
    # Of one key or feature the output barely depends on the query; a large eps makes it.
    "one token": ({"n": 1, "m": 1}, {"eps": 0.5}),
    "one key": ({"m": 1}, {"norm": "sum", "eps": 16.0}),
    "one feature": ({"d": 1, "e": 1}, {"eps": 0.5}),
    "segments": ({}, {"cu": [0, 7, 7, 40, 63]}),
    "segments, sum": ({"b": 2}, SCATTER | {"cu": [0, 33, 63]}),
    "segments, softmax": ({}, EFFICIENT | {"cu": [0, 1, 40, 63]}),
    "segments, decoupled": ({}, {"cu": [0, 20, 63], "decoupled": True}),
    "state": ({}, {"before": True}),
    "state, segments": ({}, {"before": True, "cu": [0, 30, 30, 63], "norm": "sum"}),
}


def problem(case, dtype):
    """Float tensors of a case, and a call that takes them and an impl."""
    sizes, options = CASES[case]
    sizes = {"b": 1, "heads": 1, "n": 63, "d": 16, "e": 16} | sizes
    b, heads, n, d, e = (sizes[name] for name in ("b", "heads", "n", "d", "e"))
    m = sizes.get("m", n)
    options = dict(options)
    cu, decoupled, before = (options.pop(name, None) for name in ("cu", "decoupled", "before"))
    g = torch.Generator().manual_seed(0)
    shapes = [
        (b, n, heads, d),
        (b, m, heads, d),
        (b, m, heads, e),
        *[(b, n, heads, d), (b, m, heads, d)] * bool(decoupled),
    ]
    args = [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).transpose(1, 2) for shape in shapes]
    if decoupled:  # numerators of both signs, on a denominator that stays away from zero
        args[3:] = [t.abs() - 0.2 for t in args[3:]]
    if before:
        segments = (len(cu) - 1,) if cu else ()
        args.append(torch.randn(b, heads, *segments, d, e, generator=g, dtype=torch.float64).to(dtype))
        args.append(torch.rand(b, heads, *segments, d, generator=g, dtype=torch.float64).to(dtype) * 9)
    borders = torch.tensor(cu) if cu else None

    def call(q, k, v, *more, impl):
        given = dict(zip(("q2", "k2"), more, strict=True)) if decoupled else {}
        if before:
            given["state"] = LinearState(*more, torch.tensor(12.0))
        return linear_attention(q, k, v, cu_seqlens=borders, impl=impl, **options, **given)

    return args, call


def dense(q, k, v, f, eps):
    """All pairs of tokens at once, in the dtype of `q`; the sums that LinFusion and LiT would make over a row."""
    weights = f(q) @ f(k).mT
    return weights @ v / (weights.sum(-1, keepdim=True) + k.shape[2] * eps)


@pytest.mark.parametrize(
    ("impl", "dtype"), [("torch", torch.float64), ("torch", torch.float32), ("triton", torch.float32)]
)
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_match_the_float64_reference(case, impl, dtype):
    args, call = problem(case, dtype)
    expected = run(lambda *a: call(*a, impl="reference"), [t.double() for t in args])
    actual = run(lambda *a: call(*a, impl=impl), args)
    assert {t.dtype for t in actual} == {dtype}
    for one, exact in zip(actual, expected, strict=True):
        assert error(one, exact) <= TOLERANCE[dtype]


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_a_thousand_tokens_equal_the_dense_form(impl):
    g = torch.Generator().manual_seed(0)
    args = [torch.randn(2, 3, n, 16, generator=g, dtype=torch.float64) for n in (1000, 999, 999)]
    for f, options in ((lambda x: F.elu(x) + 1, {"eps": 1e-4}), (lambda x: x.relu() + 1e-6, LIT)):
        expected = run(lambda *a, f=f, options=options: dense(*a, f, options["eps"]), args)
        actual = run(lambda *a, options=options: linear_attention(*a, impl=impl, **options), args)
        for one, other in zip(actual, expected, strict=True):
            assert error(one, other) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("impl", IMPLS)
def test_softmax_of_features_and_of_tokens_equals_efficient_attention(impl):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 40, 16, generator=g) for _ in range(3))
    expected = q.double().softmax(-1) @ (k.double().softmax(-2).mT @ v.double())
    assert error(linear_attention(q, k, v, impl=impl, **EFFICIENT), expected) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("impl", IMPLS)
def test_segments_equal_calls_of_their_own(impl):
    g = torch.Generator().manual_seed(0)
    args, borders = [torch.randn(1, 2, 50, 16, generator=g) for _ in range(3)], [0, 20, 21, 50]
    for options in ({}, SCATTER, EFFICIENT):
        packed = linear_attention(*args, cu_seqlens=torch.tensor(borders, dtype=torch.int32), impl=impl, **options)
        for start, stop in pairwise(borders):
            alone = linear_attention(*(t[:, :, start:stop] for t in args), impl=impl, **options)
            assert error(packed[:, :, start:stop], alone) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("norm", ["mean", "sum", None])
def test_states_of_token_shards_add_up_to_the_whole_with_gradients(norm, impl):
    g = torch.Generator().manual_seed(0)
    args = [torch.randn(1, 2, 50, 16, generator=g) for _ in range(3)]
    shards = [slice(0, 13), slice(13, 50)]

    def sharded(q, k, v):
        own = [linear_attention(q[:, :, :0], k[:, :, s], v[:, :, s], return_state=True, impl=impl)[1] for s in shards]
        state = LinearState(*(a + b for a, b in zip(*own, strict=True)))
        none = k[:, :, :0], v[:, :, :0]
        return torch.cat([linear_attention(q[:, :, s], *none, state=state, norm=norm, impl=impl) for s in shards], 2)

    expected = run(lambda *a: linear_attention(*a, norm=norm), [t.double() for t in args])
    for actual, exact in zip(run(sharded, args), expected, strict=True):
        assert error(actual, exact) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("cu", [None, [0, 9, 30]])
def test_returned_state_has_the_gradients_of_its_sums(cu, impl):
    g = torch.Generator().manual_seed(0)
    args = [torch.randn(2, 1, 30, 16, generator=g) for _ in range(3)]
    spans = [slice(0, 30)] if cu is None else [slice(0, 9), slice(9, 30)]

    def sums(q, k, v):
        f = F.elu(k) + 1
        kv, z = ([t[:, :, s].mT @ u[:, :, s] for s in spans] for t, u in ((f, v), (f, torch.ones_like(f[..., :1]))))
        kv, z = torch.stack(kv, 2), torch.stack(z, 2).squeeze(-1)
        return linear_attention(q, k, v, cu_seqlens=borders, impl="reference"), *(
            (kv, z) if cu else (kv[:, :, 0], z[:, :, 0])
        )

    borders = cu and torch.tensor(cu)
    call = lambda *a: (lambda y, s: (y, s.kv, s.k))(
        *linear_attention(*a, cu_seqlens=borders, return_state=True, impl=impl)
    )
    expected = run(sums, [t.double() for t in args])
    for actual, exact in zip(run(call, args), expected, strict=True):
        assert error(actual, exact) <= TOLERANCE[torch.float32]
    keys = linear_attention(*args, cu_seqlens=borders, return_state=True, impl=impl)[1].keys
    assert keys.tolist() == ([9, 21] if cu else 30)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("call", ["self", "cross"])
@pytest.mark.parametrize("name", ["linfusion-attn", "linfusion-attn-rank", "linfusion-attn-identity"])
def test_linfusion_golden_is_reproduced(name, call, impl):
    facts, t = golden(name)
    heads, weight = facts["json"]["heads"], group(t, "weight.")

    def project(x, side):
        if f"{side}_.0.weight" not in weight:
            y = x
        else:
            y = F.linear(x, weight[f"{side}_.0.weight"], weight[f"{side}_.0.bias"])
            y = F.layer_norm(y, y.shape[-1:], weight[f"{side}_.1.weight"], weight[f"{side}_.1.bias"])
            y = F.linear(F.leaky_relu(y), weight[f"{side}_.3.weight"], weight[f"{side}_.3.bias"])
        return F.linear(x + y, weight[f"{side}.weight"])

    x = t[f"input.{call}.hidden_states"]
    context = t.get(f"input.{call}.encoder_hidden_states", x)
    qkv = project(x, "to_q"), project(context, "to_k"), F.linear(context, weight["to_v.weight"])
    qkv = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in qkv)
    y, state = linear_attention(*qkv, **LINFUSION, return_state=True, impl=impl)
    y = F.linear(y.transpose(1, 2).flatten(2), weight["to_out.0.weight"], weight["to_out.0.bias"])
    assert error(y, t[f"output.{call}"]) <= GOLDEN_TOLERANCE
    if call == "self":
        assert error(state.kv.flatten(0, 1) / state.keys, t["intermediate.self.kv"]) <= GOLDEN_TOLERANCE


@pytest.mark.parametrize("impl", IMPLS)
def test_lit_golden_is_reproduced(impl):
    tensors = golden("lit")[1]
    weight, traced = group(tensors, "weight.blocks.0.attn."), group(tensors, "output.mid.block0.attn.")
    linear = lambda x, name: F.linear(x, weight[f"{name}.weight"], weight[f"{name}.bias"])
    x = traced["in"]
    q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in (linear(x, "q"), *linear(x, "kv").chunk(2, -1)))
    y = linear_attention(q, k, v, **LIT, impl=impl)
    image = v.mT.flatten(0, 1).unflatten(-1, (8, 8))  # (b heads) d h w
    near = F.conv2d(image, weight["dwc.weight"], weight["dwc.bias"], padding=2, groups=image.shape[1])
    y = y + near.flatten(2).mT.view(y.shape)
    assert error(linear(y.transpose(1, 2).flatten(2), "proj"), traced["out"]) <= GOLDEN_TOLERANCE


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_stays_within_the_budget_of_a_dense_run(dtype, impl):
    g = torch.Generator().manual_seed(0)
    args = [torch.randn(1, 2, 100, 32, generator=g).to(dtype) for _ in range(3)]
    f = lambda x: F.elu(x) + 1
    plain = run(lambda *a: dense(*a, f, 1e-4), args)
    exact = run(lambda *a: dense(*a, f, 1e-4), [t.double() for t in args])
    ours = run(lambda *a: linear_attention(*a, eps=1e-4, impl=impl), args)
    for actual, other, expected in zip(ours, plain, exact, strict=True):
        assert_within_budget(actual, other, expected)


GPU_NAN = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # what GPUs make of inf - inf


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("feature_map", ["elu1", "relu", "identity"])
def test_nan_is_not_hidden(feature_map, impl):
    q, k, v = (torch.randn(1, 1, 9, 16, generator=torch.Generator().manual_seed(i)).half() for i in range(3))
    q[0, 0, 3, 1] = torch.nan
    call = lambda *a, **more: linear_attention(*a, feature_map=feature_map, impl=impl, **more)
    assert torch.equal(call(q, k, v).isnan().any(-1)[0, 0], torch.arange(9) == 3)
    assert call(k, q, v).isnan().all()
    state = LinearState(GPU_NAN.expand(1, 1, 16, 16), torch.zeros(1, 1, 16), torch.tensor(1.0))
    assert call(k, k, v, norm=None, state=state).isnan().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_state_may_be_wider_than_the_sums(impl):
    q, k, v = (torch.rand(1, 1, 9, 16) for _ in range(3))
    state = linear_attention(q.double(), k.double(), v.double(), return_state=True)[1]
    y, own = linear_attention(q, k, v, state=state, return_state=True, impl=impl)
    assert (y.dtype, own.kv.dtype, own.k.dtype) == (torch.float32,) * 3
    assert error(y, linear_attention(*(torch.cat([t, t], 2) for t in (q, k, v)))[:, :, :9]) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("impl", IMPLS)
def test_float16_sums_beyond_its_range(impl):
    q, k, v = (torch.full((1, 1, 300, 16), size, dtype=torch.float16) for size in (30.0, 300.0, 300.0))
    y = linear_attention(q, k, v, norm="sum", impl=impl)
    assert torch.equal(y, v)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("b", "n", "m"), [(0, 4, 4), (2, 0, 4), (2, 4, 0), (2, 0, 0)])
def test_without_tokens_there_is_nothing_and_without_keys_zero(b, n, m, impl):
    args = [torch.randn(b, 3, size, 16, requires_grad=True) for size in (n, m, m)]
    y = linear_attention(*args, impl=impl)
    assert y.shape == (b, 3, n, 16)
    assert m or not y.any()
    assert all(torch.isfinite(t).all() for t in torch.autograd.grad(y.sum(), args))


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_do_not_matter(impl):
    g = torch.Generator().manual_seed(0)
    fused = torch.randn(2, 20, 3, 2, 16, generator=g)  # b n 3 heads d: one projection, as models have it
    views = [t.transpose(1, 2) for t in fused.unbind(2)]
    views[1] = views[1].contiguous().mT.contiguous().mT
    call = lambda *a: linear_attention(*a, impl=impl)
    for actual, expected in zip(run(call, views), run(call, [t.contiguous() for t in views]), strict=True):
        assert error(actual, expected) <= TOLERANCE[torch.float32]


def test_result_does_not_depend_on_how_much_is_computed_at_once(monkeypatch):
    args, call = problem("segments, decoupled", torch.float64)
    expected = run(lambda *a: call(*a, impl="torch"), args)
    monkeypatch.setattr(torch_impl, "_CPU_NUMBERS", 1)
    for actual, exact in zip(run(lambda *a: call(*a, impl="torch"), args), expected, strict=True):
        assert error(actual, exact) <= TOLERANCE[torch.float64]


def test_only_inputs_and_sums_are_kept_for_the_backward():
    args = [torch.randn(1, 2, 500, 8, requires_grad=True) for _ in range(3)]
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t.numel()}) or t, lambda t: t):
        linear_attention(*args, impl="torch")
    assert sum(kept.values()) <= 3 * 8000 + 8 * 2 * 72, kept


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_compiles_without_a_graph_break_and_trains(impl):
    args, _ = problem("elu", torch.float32)
    borders = torch.tensor([0, 10, 63])

    def call(q, k, v):
        y, state = linear_attention(q, k, v, return_state=True, impl=impl)
        return (
            y,
            linear_attention(q, k, v, state=state, impl=impl),
            linear_attention(q, k, v, cu_seqlens=borders, impl=impl),
        )

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(run(compiled, args), run(call, args), strict=True):
        assert error(actual, expected) <= 1e-6


def test_registered_ops_keep_the_rules_of_torch():
    q, k, v = (torch.randn(1, 2, 9, size, requires_grad=True) for size in (4, 4, 5))
    kv, z = torch.randn(1, 2, 2, 4, 5, requires_grad=True), torch.rand(1, 2, 2, 4, requires_grad=True)
    borders = torch.tensor([0, 4, 9])
    torch.library.opcheck(torch_impl._sum, (k, q, v, borders, "relu", 0.1))
    torch.library.opcheck(torch_impl._read, (q, None, kv, z, borders, "elu1", 0.0, 0.1))


def test_autocast_does_not_lower_the_precision_inside():
    args, call = problem("elu", torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run(lambda *a: call(*a, impl="torch"), args)
    assert all(torch.equal(a, b) for a, b in zip(inside, run(lambda *a: call(*a, impl="torch"), args), strict=True))


Q = torch.zeros(1, 2, 6, 4)
STATE = LinearState(torch.zeros(1, 2, 4, 5), torch.zeros(1, 2, 4), torch.tensor(1.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": Q[0]}, r"q must be \(b, heads, n, d\) with d at least 1, got \(2, 6, 4\)"),
        ({"k": Q[..., :3]}, r"k must be \(1, 2, 'm', 4\), got \(1, 2, 6, 3\)"),
        ({"v": Q[:, :, :5]}, r"v must be \(1, 2, 6, 'e'\), got \(1, 2, 5, 4\)"),
        ({"v": Q.half()}, r"of one float dtype, got \[torch.float32, torch.float32, torch.float16\]"),
        ({"q2": Q}, r"q2 and k2 must come together"),
        ({"q2": Q, "k2": Q[:, :, :5]}, r"k2 must be \(1, 2, 6, 4\), got \(1, 2, 5, 4\)"),
        ({"q2": Q, "k2": Q, "norm": None}, r"norm must not be None where q2 and k2"),
        ({"feature_map": "elu"}, r"feature_map must be one of elu1, relu, identity, softmax_qk, got 'elu'"),
        ({"norm": "max"}, r"norm must be mean, mean_queries, sum or None, got 'max'"),
        ({"eps": -1.0}, r"map_eps and eps must be at least 0, got 0.0, -1.0"),
        ({"feature_map": "softmax_qk"}, r"softmax_qk must have norm=None, map_eps=0 and no state .* got norm='mean'"),
        ({"cu_seqlens": torch.tensor([0.0, 6.0])}, r"cu_seqlens must be int32 or int64 .* got torch.float32 \(2,\)"),
        ({"cu_seqlens": torch.tensor([0, 5])}, r"cu_seqlens must rise from 0 to 6, got \[0, 5\]"),
        ({"cu_seqlens": torch.tensor([0, 5, 4, 6])}, r"cu_seqlens must rise from 0 to 6, got \[0, 5, 4, 6\]"),
        ({"q": Q[:, :, :5], "cu_seqlens": torch.tensor([0, 6])}, r"q and k must have the same tokens"),
        ({"state": STATE}, r"state must have kv \(1, 2, 4, 4\) and k \(1, 2, 4\), got \(1, 2, 4, 5\), \(1, 2, 4\)"),
        ({"impl": "cuda"}, r"impl must be auto, reference, torch or triton, got 'cuda'"),
    ],
)
def test_errors_name_the_rule_and_what_was_given(changes, message):
    given = {"q": Q, "k": Q, "v": Q} | changes
    with pytest.raises(ValueError, match="linear_attention: .*" + message):
        linear_attention(given.pop("q"), given.pop("k"), given.pop("v"), **given)
