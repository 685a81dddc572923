import pytest
import torch
from torch.nn import functional as F

from tests.helpers import assert_within_budget, error, golden, run, weighed
from zoo.kernels.block_sparse_attention import (
    TokenRule,
    block_cover,
    block_mass,
    block_sparse_attention,
    merge,
    pack_mask,
    torch_impl,
    unpack_mask,
)

IMPLS = ["reference", "torch", "triton"]
# Relative to the largest value: sums of up to 300 terms; float32 exponentials of the interpreter cost a little more.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6}
GOLDEN_TOLERANCE = {"peaky": 2e-4, "low": 2e-2}  # logits up to 200; bfloat16; 2e-6 elsewhere, as the sheet has it
MASS_TOLERANCE = 1e-5  # relative to the largest, up to 29; lse in float32 alone costs 1.2e-6 of it

SIZES = {  # n, m, d, e, block
    "square": (32, 32, 16, 16, 16),
    "ragged": (45, 37, 24, 20, (32, 16)),
    "rectangular": (40, 33, 30, 30, (16, 32)),
    "one token": (1, 1, 16, 16, 16),
    "sixty-three": (63, 63, 8, 40, 32),
    "no power of two": (50, 90, 16, 16, (48, 80)),
}


def tokens(n, m, d, e, *, b=2, heads=2, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    sizes = [(b, count, heads, width) for count, width in ((n, d), (m, d), (m, e))]
    return [torch.randn(size, generator=g, dtype=torch.float64).to(dtype).transpose(1, 2) for size in sizes]


def pair(block):
    return (block, block) if isinstance(block, int) else block


def random_mask(n, m, block, *, b=2, heads=2, density=0.6, seed=1):
    g = torch.Generator().manual_seed(seed)
    bm, bn = pair(block)
    return torch.rand(b, heads, -(-n // bm), -(-m // bn), generator=g) < density


def frames(n, m, size=7, groups=4):
    """Frames of `size` tokens that see themselves and frame 0; the last group sees nothing."""
    allowed = torch.eye(groups, dtype=torch.bool)
    allowed[0], allowed[:, 0] = True, True
    allowed[-1] = False
    return TokenRule(*((torch.arange(count) // size).clamp(max=groups - 1) for count in (n, m)), allowed)


def choices(n, m, block):
    mask = random_mask(n, m, block)
    return {
        "all": {},
        "per head": {"mask": mask},
        "shared": {"mask": mask[:1, :1]},
        "bits": {"mask": pack_mask(mask[:, :1])},
        "empty row": {"mask": mask & (torch.arange(mask.shape[2]) > 0)[:, None]},
        "lengths": {"mask": mask, "key_lengths": torch.tensor([m - m // 3, 0])},
        "lengths alone": {"key_lengths": torch.tensor([m // 2, m])},
        "rule": {"rule": frames(n, m)},
        "everything": {"mask": mask, "rule": frames(n, m, 9), "key_lengths": torch.tensor([m, m // 2 + 1])},
    }


def attend(args, **options):
    """Output, lse and the gradient of q, k and v under a loss that weighs each number differently."""
    args = [t.detach().requires_grad_() for t in args]
    out, lse = block_sparse_attention(*args, return_lse=True, **options)
    empty = lse == -torch.inf
    finite = lse.masked_fill(empty, 0)
    return [out, finite, *torch.autograd.grad(weighed(out) + weighed(finite), args)], empty


def assert_matches(impl, dtype, size, options):
    n, m, d, e, block = SIZES[size]
    args = tokens(n, m, d, e, dtype=dtype)
    actual, empty = attend(args, block=block, impl=impl, **options)
    expected, nothing = attend([t.double() for t in args], block=block, impl="reference", **options)
    assert torch.equal(empty, nothing)
    for ours, exact in zip(actual, expected, strict=True):
        assert error(ours, exact) <= TOLERANCE[dtype]


@pytest.mark.parametrize("choice", choices(32, 32, 16))
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_output_lse_and_gradients_match_the_float64_reference(size, choice, dtype):
    n, m, _, _, block = SIZES[size]
    assert_matches("torch", dtype, size, choices(n, m, block)[choice])


@pytest.mark.parametrize(
    ("size", "choice"),
    [
        ("square", "all"),
        ("square", "per head"),
        ("ragged", "everything"),
        ("ragged", "lengths alone"),
        ("rectangular", "rule"),
        ("one token", "shared"),
        ("sixty-three", "bits"),
        ("no power of two", "everything"),
    ],
)
def test_triton_matches_the_float64_reference(size, choice):
    n, m, _, _, block = SIZES[size]
    assert_matches("triton", torch.float32, size, choices(n, m, block)[choice])


def read(name):
    facts, tensors = golden(name)
    return facts["config"]["cases"], tensors


SPARSE, TENSORS = read("block_sparse")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", SPARSE)
def test_golden_outputs_and_gradients_are_reproduced(case, impl):
    if impl == "triton" and case not in ("rect", "lse_grad", "peaky", "bf16"):
        pytest.skip("interpreted: one case of each kind")
    given, config = lambda name: TENSORS.get(f"input.{case}.{name}"), SPARSE[case]
    low = impl == "triton" and case == "bf16"
    args = [given(name).to(torch.bfloat16 if low else torch.float32).requires_grad_() for name in "qkv"]
    out, lse = block_sparse_attention(
        *args,
        block=(config["Bq"], config["Bk"]),
        mask=given("block_mask").bool(),
        key_lengths=given("kv_len"),
        scale=config["scale"],
        return_lse=True,
        impl=impl,
    )
    loss = (out * given("grad_out").float()).sum()
    if given("grad_lse") is not None:
        loss = loss + (lse * given("grad_lse")).sum()
    found = dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *torch.autograd.grad(loss, args)), strict=True))
    for name, actual in found.items():
        expected = TENSORS[f"output.{case}.{name}"]
        finite = expected.isfinite()
        assert torch.equal(actual.isfinite(), finite)
        worst = (actual - expected)[finite].abs().max() / expected[finite].abs().max().clamp(min=1)
        assert worst <= GOLDEN_TOLERANCE.get("low" if low else case, 2e-6), name


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", read("adaspa_search")[0])
def test_golden_masses_are_reproduced_from_exact_and_cached_lse(case, impl):
    config, given = read("adaspa_search")
    if impl == "triton" and case != "s20_clamp":
        pytest.skip("interpreted: the smallest case")
    few = (slice(None), slice(1)) if impl == "triton" else ()
    get = lambda name: given[f"input.{case}.{name}"][few]
    options = {"block": config[case]["block"], "scale": config[case]["scale"], "impl": impl}
    first, second = (get("q"), get("k")), (get("q_step2"), get("k_step2"))
    _, lse, mass = block_sparse_attention(*first, first[1], return_lse=True, return_block_mass=True, **options)
    found = {"lse": lse, "block_mass": mass, "block_mass_cached_lse": block_mass(*second, lse=lse, **options)}
    if impl != "triton":
        found["block_mass_step2_exact"] = block_mass(*second, **options)
        assert torch.equal(block_mass(*first, **options), mass)
    for name, actual in found.items():
        assert error(actual, given[f"output.{case}.{name}"][few]) <= MASS_TOLERANCE, name


@pytest.mark.parametrize("case", read("tile_mask")[0])
def test_golden_covers_of_frames_by_blocks_are_reproduced(case):
    configs, given = read("tile_mask")
    config, frame_mask = configs[case], given[f"output.{case}.frame_mask"].bool()
    groups, text = config["T"], config.get("text", 0)
    frame = torch.arange(groups).repeat_interleave(config["P"])
    words = torch.full((text,), groups)
    group = torch.cat([words, frame] if config.get("text_first") else [frame, words])
    rule = TokenRule(group, group, F.pad(frame_mask, (0, 1, 0, 1), value=True))
    for name, blocks in zip(("any", "full"), block_cover(rule, (config["Bq"], config["Bk"])), strict=True):
        assert torch.equal(pack_mask(blocks), given[f"output.{case}.block_{name}_packed"]), name
    some = block_cover(rule, (config["Bq"], config["Bk"]))[0]
    assert 1 - some.double().mean().item() == pytest.approx(config["block_sparsity"])


@pytest.mark.parametrize("impl", IMPLS)
def test_rule_by_frame_equals_dense_attention_under_the_same_token_mask(impl):
    n, block = 70, (32, 16)
    rule = frames(n, n, 13, 6)._replace(allowed=torch.rand(6, 6, generator=torch.Generator().manual_seed(5)) < 0.5)
    q, k, v = (t.float() for t in tokens(n, n, 16, 16, b=1))
    allowed = rule.allowed[rule.query][:, rule.key]
    dense = F.scaled_dot_product_attention(*(t.double() for t in (q, k, v)), attn_mask=allowed)
    dense = dense.masked_fill(~allowed.any(1)[:, None], 0)
    assert error(block_sparse_attention(q, k, v, block=block, rule=rule, impl=impl), dense) <= TOLERANCE[q.dtype]


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("choice", ["all", "everything"])
def test_largest_and_mass_of_blocks_match_the_reference(choice, impl):
    n, m, d, e, block = SIZES["ragged"]
    options = {"block": block, "return_block_max": True, "return_block_mass": True} | choices(n, m, block)[choice]
    args = tokens(n, m, d, e, dtype=torch.float32)
    _, *actual = block_sparse_attention(*args, impl=impl, **options)
    _, *expected = block_sparse_attention(*(t.double() for t in args), impl="reference", **options)
    for ours, exact in zip(actual, expected, strict=True):
        assert error(ours, exact) <= TOLERANCE[torch.float32]
    if choice == "all":
        assert error(actual[1].sum(-1), torch.tensor([32.0, 13.0]).expand(2, 2, 2)) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("choice", ["lengths", "lengths alone"])
@pytest.mark.parametrize("impl", IMPLS)
def test_what_lies_behind_the_last_key_of_a_sample_may_be_nan(impl, choice):
    n, m, d, e, block = SIZES["ragged"]
    options = {"block": block, "impl": impl} | choices(n, m, block)[choice]
    q, k, v = tokens(n, m, d, e, dtype=torch.float32)
    behind = (torch.arange(m) >= options["key_lengths"][:, None])[:, None, :, None]
    zeros, nans = ([q, *(t.masked_fill(behind, x) for t in (k, v))] for x in (0.0, torch.nan))
    for actual, expected in zip(attend(nans, **options)[0], attend(zeros, **options)[0], strict=True):
        assert torch.equal(actual, expected)


def test_index_equals_the_mask_that_it_names():
    n, m, d, e, block = SIZES["ragged"]
    mask, args = random_mask(n, m, block), tokens(n, m, d, e)
    index = torch.where(mask, torch.arange(mask.shape[3]), -1).flip(-1).int()
    assert torch.equal(
        block_sparse_attention(*args, block=block, index=index), block_sparse_attention(*args, block=block, mask=mask)
    )


@pytest.mark.parametrize("columns", [0, 1, 8, 13])
def test_bits_round_trip_and_equal_those_of_numpy(columns):
    mask = torch.rand(2, 3, columns, generator=torch.Generator().manual_seed(0)) < 0.5
    packed = pack_mask(mask)
    assert torch.equal(unpack_mask(packed, columns), mask)
    numpy = pytest.importorskip("numpy")
    assert numpy.array_equal(packed.numpy(), numpy.packbits(mask.numpy(), axis=-1))


def test_result_does_not_depend_on_how_much_is_computed_at_once(monkeypatch):
    args = tokens(45, 37, 24, 20)
    options = {"block": (32, 16), "impl": "torch"} | choices(45, 37, (32, 16))["everything"]
    expected, _ = attend(args, **options)
    masses = block_mass(*args[:2], block=(32, 16))
    monkeypatch.setattr(torch_impl, "_LOGITS", 100)
    for actual, exact in zip(attend(args, **options)[0], expected, strict=True):
        assert error(actual, exact) <= TOLERANCE[torch.float64]
    assert error(block_mass(*args[:2], block=(32, 16)), masses) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("block", [16, 32, 64, 128, (128, 32), (16, 64)], ids=str)
def test_thousand_tokens_match_dense_attention_when_all_blocks_are_kept(block):
    args = tokens(1000, 1000, 24, 24, b=1, dtype=torch.float32)
    dense = F.scaled_dot_product_attention(*(t.double() for t in args))
    assert error(block_sparse_attention(*args, block=block), dense) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_stays_within_the_budget_of_a_dense_run(dtype, impl):
    n = 48
    args = [t.to(dtype) for t in tokens(n, n, 32, 32, b=1, heads=1)]
    mask = random_mask(n, n, 16, b=1, heads=1) | torch.eye(3, dtype=torch.bool)
    seen = mask.repeat_interleave(16, 2).repeat_interleave(16, 3)

    def dense(q, k, v):
        logits = (q @ k.mT * 32**-0.5).masked_fill(~seen, -torch.inf)
        return logits.softmax(-1) @ v, logits.logsumexp(-1)

    plain, exact = run(dense, args), run(dense, [t.double() for t in args])
    for actual, low, expected in zip(attend(args, block=16, mask=mask, impl=impl)[0], plain, exact, strict=True):
        assert_within_budget(actual, low, expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("sizes", [(0, 5, 5), (2, 0, 5), (2, 5, 0)], ids=str)
def test_empty_inputs_give_empty_outputs_or_zeros(sizes, impl):
    b, n, m = sizes
    args = tokens(n, m, 16, 16, b=b, dtype=torch.float32)
    (out, *gradients), empty = attend(args, block=16, impl=impl)
    assert out.shape == (b, 2, n, 16)
    assert empty.all()
    assert not any(t.any() for t in (out, *gradients))
    assert not block_mass(*args[:2], block=16, impl=impl).any()


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_strides_do_not_matter(impl):
    q, k, v = tokens(20, 20, 32, 32, b=2, heads=3, dtype=torch.float32)
    strange = [t.contiguous().mT.contiguous().mT[:, :, :, ::2][1:, ::2] for t in (q, k, v)]
    plain, _ = attend([t.contiguous() for t in strange], block=16, impl=impl)
    for actual, expected in zip(attend(strange, block=16, impl=impl)[0], plain, strict=True):
        assert error(actual, expected) <= TOLERANCE[torch.float32]
    fused = torch.stack([q, k, v], 3)  # views of one projection, as models have them
    call = lambda *a: block_sparse_attention(*a, block=16, impl=impl)
    assert error(call(*fused.unbind(3)), call(q, k, v)) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_compiles_without_a_graph_break_and_trains(impl):
    args = tokens(20, 36, 16, 16, b=1, heads=1, dtype=torch.float32)
    mask = random_mask(20, 36, 16, b=1, heads=1)
    options = {"block": 16, "impl": impl, "mask": pack_mask(mask), "rule": frames(20, 36)}

    def call(q, k, v):
        found = block_sparse_attention(q, k, v, return_lse=True, return_block_mass=True, **options)
        return (
            *merge(*found[:2], v[:, :, :20], torch.zeros_like(found[1])),
            found[2],
            block_mass(q, k, block=16, impl=impl),
        )

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    gradients = []
    for function in (compiled, call):
        leaves = [t.detach().requires_grad_() for t in args]
        gradients.append([*torch.autograd.grad(function(*leaves)[0].square().sum(), leaves), *function(*leaves)])
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected)
