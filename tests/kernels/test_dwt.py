from itertools import product

import numpy as np
import pytest
import pywt
import torch

from tests.helpers import assert_within_budget, error
from zoo.kernels.dwt import dwt, idwt, torch_impl
from zoo.kernels.dwt.filters import MODES, filter_bank

WAVES = ["haar", "db2", "db4", "sym5", "coif1", "bior2.2", "rbio3.1", "bior3.5", "coif4"]  # 2 to 24 taps
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5}  # sums of up to 24^2 products


def signal(*sizes, b=2, c=2, dtype=torch.float64):
    return torch.randn(b, c, *sizes, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def by_pywt(x, wave, mode):
    """Bands of pywt.dwtn, the first axis changing fastest."""
    ndim = x.ndim - 2
    bands = pywt.dwtn(x.numpy(), wave, mode=mode, axes=range(2, x.ndim))
    keys = ["".join("ad"[i >> axis & 1] for axis in range(ndim)) for i in range(2**ndim)]
    return torch.from_numpy(np.stack([bands[key] for key in keys], 2))


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wave", WAVES)
def test_bands_equal_pywt_and_rebuild_the_signal(wave, mode, impl):
    sizes = [(9,), (2,), (7, 6)]
    if impl == "torch":
        sizes += [(8, 12), (3, 33), (1, 5)]
        sizes += [(4, 5, 6)] * (wave != "coif4")
    for size in sizes:
        if min(size) < 2 and mode.endswith("reflect"):
            continue
        x, ndim = signal(*size), len(size)
        bands = dwt(x, wave, ndim=ndim, mode=mode, impl=impl)
        assert error(bands, by_pywt(x, wave, mode)) <= TOLERANCE[torch.float64], size
        assert error(idwt(bands, wave, ndim=ndim, mode=mode, size=size, impl=impl), x) <= 1e-9, (
            size
        )  # as exact as the taps


def test_two_axes_are_ordered_as_dwt2():
    x = signal(6, 8)
    approx, details = pywt.dwt2(x.numpy(), "db2")
    assert error(dwt(x, "db2"), torch.from_numpy(np.stack([approx, *details], 2))) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("mode", MODES)
def test_bands_that_come_from_no_signal_are_joined_as_pywt_does(mode, impl):
    for wave, ndim in product(["haar", "db2", "bior3.5"], [1, 2]):
        bands = signal(*[4, 7, 6][: ndim + 1], c=3) if ndim == 2 else signal(2, 7)
        keys = ["".join("ad"[i >> axis & 1] for axis in range(ndim)) for i in range(2**ndim)]
        parts = dict(zip(keys, bands.unbind(2), strict=True))
        expected = pywt.idwtn({k: t.numpy() for k, t in parts.items()}, wave, mode=mode, axes=range(2, 2 + ndim))
        actual = idwt(bands, wave, ndim=ndim, mode=mode, impl=impl)
        assert error(actual, torch.from_numpy(expected)) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("wave", ["haar", "db3", "bior2.2"])
def test_gradients_equal_those_of_the_reference(wave, dtype):
    for mode, size in product(MODES, [(8, 6), (7, 6), (9,), (4, 3, 5)]):
        ndim = len(size)
        gradients = []
        for impl, kind in (("torch", dtype), ("reference", torch.float64)):
            x = signal(*size, dtype=dtype).to(kind).requires_grad_()
            bands = dwt(x, wave, ndim=ndim, mode=mode, impl=impl)
            dx = torch.autograd.grad((bands * torch.linspace(-1, 1, bands.numel()).view(bands.shape)).sum(), x)[0]
            bands = bands.detach().requires_grad_()
            y = idwt(bands, wave, ndim=ndim, mode=mode, size=size, impl=impl)
            db = torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum(), bands)[0]
            gradients.append((dx, db))
        for actual, exact in zip(*gradients, strict=True):
            assert actual.dtype == dtype
            assert error(actual, exact) <= TOLERANCE[dtype], (mode, size)


@pytest.mark.parametrize("wave", ["haar", "db3"])
def test_result_does_not_depend_on_how_much_is_computed_at_once(wave, monkeypatch):
    for mode, size in product(["zero", "smooth", "periodization"], [(63,), (7, 10), (3, 4, 5)]):
        ndim, found = len(size), []
        for cache in (2**19, 1, 1000):  # all planes, one or a few of six, the last ones fewer
            monkeypatch.setattr(torch_impl, "_CACHE", cache)
            x = signal(*size, b=3).requires_grad_()
            bands = dwt(x, wave, ndim=ndim, mode=mode)
            y = idwt(bands * bands, wave, ndim=ndim, mode=mode, size=size)
            found.append((bands, y, torch.autograd.grad((y * signal(*size, b=3)).sum(), x)[0]))
        for other in found[1:]:
            assert all(error(a, b) <= TOLERANCE[torch.float64] for a, b in zip(other, found[0], strict=True)), size


@pytest.mark.parametrize("wave", ["haar", "db10"])
def test_long_signals_equal_pywt(wave):
    x = signal(1000, dtype=torch.float32)
    bands = dwt(x, wave, ndim=1)
    assert error(bands, by_pywt(x, wave, "symmetric")) <= TOLERANCE[torch.float32]
    assert error(idwt(bands, wave, ndim=1), x) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("wave", ["haar", "db2"])
def test_registered_ops_keep_the_rules_of_torch(wave):
    taps = filter_bank(wave)[:2]
    x = signal(5, 6, b=1)[0].requires_grad_()
    torch.library.opcheck(torch_impl._analysis, (x, taps, "symmetric"))
    bands = torch_impl._analysis(x, taps, "symmetric").detach().requires_grad_()
    torch.library.opcheck(torch_impl._synthesis, (bands, taps, "symmetric", [5, 6]))


def test_gradients_have_gradients():
    x = signal(5, 6, b=1, c=1).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: dwt(x, "db2", mode="symmetric").square(), x)


@pytest.mark.parametrize("wave", ["haar", "db2", "sym5", "coif1"])
@pytest.mark.parametrize("size", [(8,), (16, 12), (4, 6, 8)], ids=str)
def test_orthogonal_banks_keep_energy_and_are_their_own_adjoint_inverse(wave, size):
    x, ndim = signal(*size), len(size)
    bands = dwt(x, wave, ndim=ndim, mode="periodization")
    assert bands.numel() == x.numel()
    assert bands.square().sum().item() == pytest.approx(x.square().sum().item(), rel=1e-10)
    other = signal(*bands.shape[2:])
    back = idwt(other, wave, ndim=ndim, mode="periodization")
    assert (bands * other).sum().item() == pytest.approx((x * back).sum().item(), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("wave", ["haar", "db4"])
def test_low_precision_stays_within_the_budget_of_a_dense_run(wave, dtype):
    x = signal(16, 24).to(dtype)
    units = (torch.eye(n, dtype=torch.float64)[None] for n in (16, 24))
    rows, columns = (dwt(unit, wave, ndim=1)[0].permute(1, 2, 0).to(dtype) for unit in units)  # band k n
    dense = torch.einsum("ikh,bchw,jlw->bcjikl", rows, x, columns).flatten(2, 3)
    exact = dwt(x.double(), wave, impl="reference")
    ours = dwt(x, wave)
    assert torch.equal(ours, dwt(x.float(), wave).to(dtype))  # rounded once
    assert_within_budget(ours, dense, exact)


def test_strides_autocast_and_empty_batches():
    x = signal(6, 8, dtype=torch.float32)
    strange = x.mT.contiguous().mT
    assert not strange.is_contiguous()
    for wave in ("haar", "db2"):
        plain = dwt(x, wave)
        assert error(dwt(strange, wave), plain) <= TOLERANCE[torch.float32]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(dwt(x, wave), plain)
            assert torch.equal(idwt(plain, wave), idwt(plain, wave))
        assert dwt(x[:0], wave).shape == (0, *plain.shape[1:])
        assert idwt(plain[:0], wave).shape == (0, *x.shape[1:])


def test_compiles_without_a_graph_break_and_trains():
    x = signal(8, 6, b=1, dtype=torch.float32).requires_grad_()
    call = lambda x: idwt(dwt(x, "db2").square())
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    actual, expected = compiled(x), call(x)
    assert torch.equal(actual, expected)
    assert torch.equal(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (actual, expected)))


def test_filters_are_those_of_pywt_and_only_haar_has_two_taps():
    short = {str(filter_bank(w).tolist()) for w in pywt.wavelist(kind="discrete") if filter_bank(w).shape[1] == 2}
    assert short == {str(filter_bank("haar").tolist())}
    assert filter_bank("db2").tolist() == [list(taps) for taps in pywt.Wavelet("db2").filter_bank]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dwt(torch.zeros(1, 1, 4)), r"dwt: input must be float with 4 axes for ndim=2, got \(1, 1, 4\)"),
        (lambda: dwt(torch.zeros(1, 1, 4, 4).long()), r"dwt: input must be float .* torch.int64"),
        (lambda: dwt(torch.zeros(1, 1, 4, 4), ndim=4), r"dwt: ndim must be 1, 2 or 3, got 4"),
        (lambda: dwt(torch.zeros(1, 1, 4, 4), mode="mirror"), r"dwt: mode must be one of zero, .*, got 'mirror'"),
        (lambda: dwt(torch.zeros(1, 1, 4, 4), "db99"), r"dwt: wave must be a discrete wavelet of pywt .* got 'db99'"),
        (
            lambda: dwt(torch.zeros(1, 1, 4, 1), mode="reflect"),
            r"sizes must be at least 2 for mode 'reflect', got \(4, 1\)",
        ),
        (lambda: dwt(torch.zeros(1, 1, 4, 4), impl="cuda"), r"dwt: impl must be auto, reference, torch or triton"),
        (lambda: idwt(torch.zeros(1, 1, 2, 4, 4)), r"idwt: bands must be \(b, c, 4, ...\) .* got \(1, 1, 2, 4, 4\)"),
        (
            lambda: idwt(torch.zeros(1, 1, 4, 2, 9), "db4"),
            r"idwt: bands of 'db4' must be longer .* got \(1, 1, 4, 2, 9\)",
        ),
        (
            lambda: idwt(torch.zeros(1, 1, 4, 4, 4), size=(8, 6)),
            r"idwt: size must be \(8, 8\), or one less .* \(8, 6\)",
        ),
    ],
)
def test_errors_name_the_rule_and_what_was_given(call, message):
    with pytest.raises(ValueError, match=message):
        call()
