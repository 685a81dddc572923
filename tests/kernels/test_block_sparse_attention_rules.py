"""Merging, registration and the errors of block-sparse attention."""

import pytest
import torch

from tests.helpers import error, run
from zoo.kernels.block_sparse_attention import TokenRule, block_mass, block_sparse_attention, merge, torch_impl


def tokens(n, m, d, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, count, d, generator=g, dtype=dtype) for count in (n, m, m)]


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_merged_halves_of_the_keys_equal_the_whole_in_value_and_gradient(impl):
    def halves(q, k, v):
        parts = [
            block_sparse_attention(q, k[:, :, part], v[:, :, part], block=8, return_lse=True, impl=impl)
            for part in (slice(0, 9), slice(9, 24))
        ]
        return merge(*parts[0], *parts[1])

    whole = lambda q, k, v: block_sparse_attention(q, k, v, block=8, return_lse=True, impl="reference")
    args = tokens(10, 24, 8)
    for actual, expected in zip(run(halves, args), run(whole, args), strict=True):
        assert error(actual, expected) <= 1e-12


def test_merge_is_differentiable_in_all_four_and_ignores_what_saw_nothing():
    g = torch.Generator().manual_seed(0)
    args = [torch.randn(3, 4, *e, generator=g, dtype=torch.float64) for e in ((5,), (), (5,), ())]
    assert torch.autograd.gradcheck(merge, [t.requires_grad_() for t in args])
    o, lse = torch.randn(2, 3, requires_grad=True), torch.tensor([0.5, -torch.inf], requires_grad=True)
    nothing, empty = torch.zeros(2, 3, requires_grad=True), torch.full((2,), -torch.inf, requires_grad=True)
    out, both = merge(o, lse, nothing, empty)
    assert torch.equal(out[0], o[0])
    assert torch.equal(out[1], torch.zeros(3))
    assert both.tolist() == [0.5, -torch.inf]
    gradients = torch.autograd.grad(out.sum() + both[0], (o, lse, nothing, empty))
    assert all(t.isfinite().all() for t in gradients)


def test_merge_names_the_shapes_that_disagree():
    with pytest.raises(ValueError, match=r"merge: .* got \(2, 3\), \(2, 4\), \(2,\), \(2,\)"):
        merge(torch.zeros(2, 3), torch.zeros(2), torch.zeros(2, 4), torch.zeros(2))


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_gradients_agree_with_differences(impl):
    mask = torch.tensor([[True, False], [False, False], [True, True]])[None, None]
    call = lambda *a: block_sparse_attention(*a, block=2, mask=mask, impl=impl, return_lse=True)
    clean = lambda *a: [call(*a)[0], call(*a)[1][:, :, [0, 1, 4]]]
    assert torch.autograd.gradcheck(clean, [t.requires_grad_() for t in tokens(5, 4, 2)])


def test_only_inputs_are_kept_for_the_backward():
    args = [t.requires_grad_() for t in tokens(256, 256, 8)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        block_sparse_attention(*args)
    assert sum(kept) <= 3 * args[0].numel()


def test_registered_ops_keep_the_rules_of_torch():
    q, k, v = (t.requires_grad_() for t in tokens(9, 12, 8, torch.float32))
    group = lambda n: torch.arange(n) // 5
    rule = (group(9), group(12), torch.rand(3, 3) < 0.6)
    choice = (torch.rand(1, 2, 3, 3) < 0.7, *rule, torch.tensor([10]), (4, 4), 0.3)
    torch.library.opcheck(torch_impl._attention, (q, k, v, *choice))
    lse = torch.zeros(1, 2, 9)
    torch.library.opcheck(torch_impl._statistic, (q.detach(), k.detach(), lse, False, *choice))


@pytest.mark.parametrize("module", [torch_impl, pytest.importorskip("zoo.kernels.block_sparse_attention.triton_impl")])
def test_gradients_lie_as_registered_ops_promise(module):
    q, k, v = (t.mT.contiguous().mT.detach() for t in tokens(9, 13, 8, torch.float32))
    choice = (torch.ones(1, 1, 1, 1, dtype=torch.bool), None, None, None, None, (16, 16), 0.3)
    out, lse = module._attention(q, k, v, *choice)
    forward = () if module is torch_impl else (out, lse)
    for count in (9, 0):
        given = (t[:, :, :count] for t in (out, lse, *forward, q))
        torch.library.opcheck(module._backward, (*given, k, v, *choice), test_utils=("test_schema", "test_faketensor"))


def test_autocast_does_not_lower_the_precision_inside():
    args = [t.bfloat16() for t in tokens(20, 20, 8)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = block_sparse_attention(*args, block=8, return_lse=True)
    outside = block_sparse_attention(*args, block=8, return_lse=True)
    assert inside[1].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


def broken(**changes):
    q, k, v = tokens(16, 20, 4, torch.float32)
    given = {"q": q, "k": k, "v": v, "block": 8} | changes
    return block_sparse_attention(given.pop("q"), given.pop("k"), given.pop("v"), **given)


GROUP, ALLOWED = torch.zeros(16, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(1, 2, 16, 0)}, r"q must be .* d at least 1, got torch.float32 \(1, 2, 16, 0\)"),
        ({"k": torch.zeros(1, 2, 20, 5)}, r"k must be .*\(1, 2, 'm', 4\) for q \(1, 2, 16, 4\), got .*\(1, 2, 20, 5\)"),
        ({"k": torch.zeros(1, 2, 20, 4).half()}, r"k must be torch.float32 .* got torch.float16"),
        (
            {"v": torch.zeros(1, 2, 19, 4)},
            r"v must be .*\(1, 2, 20, 'e'\) for k \(1, 2, 20, 4\), got .*\(1, 2, 19, 4\)",
        ),
        ({"block": 0}, r"block must be one number or \(bm, bn\), each at least 1, got 0"),
        ({"block": (8, 8, 8)}, r"block must be one number or \(bm, bn\), each at least 1, got \(8, 8, 8\)"),
        (
            {"mask": torch.ones(1, 2, 2, 2, dtype=torch.bool)},
            r"mask must be bool, or uint8 in bits, \('1 or 1', '2 or 1', 2, 3\), got torch.bool \(1, 2, 2, 2\)",
        ),
        ({"mask": torch.ones(1, 2, 2, 3, dtype=torch.uint8)}, r"mask must be .* got torch.uint8 \(1, 2, 2, 3\)"),
        ({"mask": torch.ones(1, 2, 2, 3)}, r"mask must be .* got torch.float32 \(1, 2, 2, 3\)"),
        (
            {"index": torch.zeros(1, 3, 2, 9, dtype=torch.int32)},
            r"index must be integers .* got torch.int32 \(1, 3, 2, 9\)",
        ),
        (
            {"index": torch.zeros(1, 1, 2, 1, dtype=torch.int32), "mask": torch.ones(1, 1, 2, 3, dtype=torch.bool)},
            r"mask and index must not come together, got both",
        ),
        ({"key_lengths": torch.tensor([1, 2])}, r"key_lengths must be int32 or int64 \(1,\), got torch.int64 \(2,\)"),
        ({"rule": TokenRule(GROUP, GROUP, ALLOWED)}, r"rule.key must be .* \(20,\), got torch.int64 \(16,\)"),
        (
            {"rule": TokenRule(GROUP, GROUP.new_zeros(20), ALLOWED[0])},
            r"rule.allowed must be bool \(query groups, key groups\), got torch.bool \(1,\)",
        ),
        ({"impl": "triton"}, r"impl must be auto, reference or torch for this call, got 'triton'"),
        ({"impl": "fast"}, r"impl must be auto, reference, torch or triton, got 'fast'"),
    ],
)
def test_errors_name_the_rule_and_what_was_given(changes, message):
    with pytest.raises(ValueError, match="block_sparse_attention: " + message):
        broken(**changes)


def test_mass_names_the_shape_of_lse():
    q, k, _ = tokens(16, 20, 4)
    with pytest.raises(ValueError, match=r"block_mass: lse must be \(1, 2, 16\) for q \(1, 2, 16, 4\), got \(1, 16\)"):
        block_mass(q, k, lse=torch.zeros(1, 16))
