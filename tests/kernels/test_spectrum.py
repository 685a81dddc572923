import math
from itertools import pairwise

import pytest
import torch

from tests.helpers import assert_within_budget, error, weighed
from zoo.kernels.spectrum import inverse_spectrum, radial_mask, spectrum

IMPLS = ["reference", "torch"]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}  # sums over up to 1,000 values
SIZES = [(8, 8), (7, 9), (6, 5), (5, 6), (1, 4), (63, 1), (1, 1), (1000, 2)]


def images(*size, b=2, c=3, dtype=torch.float64, seed=0):
    return torch.randn(b, c, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_sums(x, factor):
    """Every coefficient of the whole plane, one after the other."""
    h, w = x.shape[-2:]
    y, column = torch.arange(h, dtype=torch.float64)[:, None], torch.arange(w, dtype=torch.float64)
    turns = [[u * y / h + v * column / w for v in range(w)] for u in range(h)]
    wave = torch.stack([torch.stack([torch.exp(-2j * math.pi * t.to(torch.complex128)) for t in row]) for row in turns])
    return factor * torch.einsum("uvyx,bcyx->bcuv", wave, x.to(torch.complex128))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("norm", "power"), [("ortho", -0.5), ("backward", 0.0)])
@pytest.mark.parametrize("size", [(4, 6), (5, 3), (1, 4)], ids=str)
def test_coefficients_are_the_sums_of_the_definition(size, norm, power, impl):
    x = images(*size)
    expected = by_sums(x, math.prod(size) ** power)[..., : size[1] // 2 + 1]
    z = spectrum(x, norm=norm, impl=impl)
    assert error(torch.view_as_real(z), torch.view_as_real(expected)) <= 1e-12
    assert error(spectrum(x, part="amplitude", norm=norm, impl=impl), expected.abs()) <= 1e-12
    assert error(torch.polar(z.abs(), spectrum(x, part="phase", norm=norm, impl=impl)).real, expected.real) <= 1e-12


def gradients(dtype, impl, size, norm, part):
    x = images(*size, dtype=dtype).requires_grad_()
    y = spectrum(x, part=part, norm=norm, impl=impl)
    flat = torch.view_as_real(y) if y.is_complex() else y
    back = inverse_spectrum(y * y, size, norm=norm, impl=impl) if y.is_complex() else y
    return flat, back, torch.autograd.grad(weighed(back), x)[0]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("part", ["complex", "amplitude"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_output_inverse_and_gradients_match_the_float64_reference(size, part, dtype):
    for norm in ("ortho", "backward"):
        exact = gradients(torch.float64, "reference", size, norm, part)
        for actual, expected in zip(gradients(dtype, "torch", size, norm, part), exact, strict=True):
            assert actual.dtype == dtype
            assert error(actual, expected.detach()) <= 4 * TOLERANCE[dtype], norm  # squared on the way


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_inverse_rebuilds_the_image_and_ortho_keeps_energy(size, impl):
    x = images(*size)
    z = spectrum(x, impl=impl)
    assert error(inverse_spectrum(z, size, impl=impl), x) <= TOLERANCE[torch.float64]
    columns = torch.arange(size[1] // 2 + 1)
    twice = torch.where((columns == 0) | (2 * columns == size[1]), 1.0, 2.0)
    assert (z.abs().square() * twice).sum().item() == pytest.approx(x.square().sum().item(), rel=1e-12)


def test_phase_moves_with_a_shift_and_amplitude_does_not():
    x = images(8, 6)
    moved = x.roll((3, 1), (2, 3))
    assert error(spectrum(moved, part="amplitude"), spectrum(x, part="amplitude")) <= TOLERANCE[torch.float64]
    turn = 3 * torch.fft.fftfreq(8, dtype=x.dtype)[:, None] + torch.fft.rfftfreq(6, dtype=x.dtype)
    difference = spectrum(moved, part="phase") - spectrum(x, part="phase") + 2 * math.pi * turn
    assert torch.sin(difference / 2).abs().max() <= 1e-12  # whole turns do not count


@pytest.mark.parametrize("part", ["amplitude", "phase"])
def test_gradient_is_zero_where_nothing_is(part):
    x = torch.zeros(1, 1, 4, 4, requires_grad=True)
    assert torch.autograd.grad(spectrum(x, part=part).sum(), x)[0].eq(0).all()


def test_phase_has_the_gradient_of_the_reference():
    both = []
    for impl in IMPLS:
        x = images(5, 3).requires_grad_()  # no coefficient but the mean is real
        both.append(torch.autograd.grad(spectrum(x, part="phase", impl=impl)[..., 1].sum(), x)[0])
    assert error(*both) <= 1e-10
    assert both[0].abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_widened_first(dtype):
    x = images(16, 24, dtype=dtype)
    actual = spectrum(x, part="amplitude")
    assert actual.dtype == torch.float32
    rows, columns = (torch.fft.fft(torch.eye(n, dtype=torch.float64)) / n**0.5 for n in (16, 24))
    parts = [torch.einsum("uy,bcyx->bcux", m.to(dtype), x) for m in (rows.real, rows.imag)]
    dense = torch.einsum("bcux,xv->bcuv", parts[0], columns.real[:, :13].to(dtype))
    dense = dense - torch.einsum("bcux,xv->bcuv", parts[1], columns.imag[:, :13].to(dtype))
    assert_within_budget(spectrum(x).real, dense, spectrum(x.double(), impl="reference").real)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(spectrum(x, part="amplitude"), actual)


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_and_empty_batches(impl):
    x = images(6, 8)
    strange = x.mT.contiguous().mT
    assert error(spectrum(strange, impl=impl).abs(), spectrum(x).abs()) <= TOLERANCE[torch.float64]
    z = spectrum(x[:0], impl=impl)
    assert z.shape == (0, 3, 6, 5)
    assert inverse_spectrum(z, (6, 8), impl=impl).shape == (0, 3, 6, 8)


def test_compiles_without_a_graph_break_and_trains():
    x = images(6, 8, dtype=torch.float32).requires_grad_()
    call = lambda x: inverse_spectrum(spectrum(x) * radial_mask((6, 8), 0, 0.3), (6, 8))
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    actual, expected = compiled(x), call(x)
    assert torch.equal(actual, expected)
    assert torch.equal(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (actual, expected)))


@pytest.mark.parametrize("size", [(8, 8), (7, 10), (1, 5), (4, 1)], ids=str)
def test_rings_share_nothing_and_cover_the_plane(size):
    bounds = [0.0, 0.1, 0.25, 0.5, math.inf]
    masks = [radial_mask(size, low, high) for low, high in pairwise(bounds)]
    assert torch.equal(sum(masks), torch.ones(size[0], size[1] // 2 + 1))
    for u in range(size[0]):
        for v in range(size[1] // 2 + 1):
            radius = math.hypot(min(u, size[0] - u) / size[0], v / size[1])
            ring = next(i for i, high in enumerate(bounds[1:]) if radius < high)
            assert masks[ring][u, v] == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: spectrum(torch.zeros(3)), r"spectrum: x must be float \(..., h, w\), .* got \(3,\)"),
        (lambda: spectrum(torch.zeros(2, 0, 3)), r"each at least 1, got \(2, 0, 3\)"),
        (lambda: spectrum(torch.zeros(2, 3).long()), r"got \(2, 3\) torch.int64"),
        (
            lambda: spectrum(torch.zeros(2, 3), part="real"),
            r"part must be one of complex, amplitude, phase, got 'real'",
        ),
        (lambda: spectrum(torch.zeros(2, 3), norm="unit"), r"norm must be ortho or backward, got 'unit'"),
        (lambda: spectrum(torch.zeros(2, 3), impl="triton"), r"impl must be auto, reference or torch .* got 'triton'"),
        (
            lambda: inverse_spectrum(torch.zeros(4, 4, dtype=torch.complex64), (4, 4)),
            r"inverse_spectrum: z must be complex \(..., 4, 3\) for size \(4, 4\), got \(4, 4\)",
        ),
        (lambda: radial_mask((0, 4), 0, 1), r"radial_mask: size must be at least \(1, 1\), got \(0, 4\)"),
        (lambda: radial_mask((4, 4), 0.5, 0.5), r"0 <= inner < outer, got 0.5, 0.5"),
    ],
)
def test_errors_name_the_rule_and_what_was_given(call, message):
    with pytest.raises(ValueError, match=message):
        call()
