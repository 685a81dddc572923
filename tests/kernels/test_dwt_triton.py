import pytest
import torch

from tests.helpers import assert_within_budget, error, run
from tests.kernels.test_dwt import signal
from zoo.kernels.dwt import dwt, idwt
from zoo.kernels.dwt.ends import WEIGHTED, before, fill, sources
from zoo.kernels.dwt.filters import MODES

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}  # sums of up to 10^2 products
CASES = [
    ("haar", "symmetric", (5, 4)),
    ("haar", "zero", (3, 3)),
    ("haar", "symmetric", (2, 3, 2)),
    ("db2", "periodic", (7,)),
    ("db2", "symmetric", (4, 5)),
    ("db2", "periodization", (5, 4)),
    ("rbio2.2", "smooth", (3, 4)),
    ("bior2.4", "reflect", (3, 4)),  # 10 taps: one axis after the other
]


def there_and_back(x, bands, wave, mode, impl):
    """Bands of x, the signal rebuilt from others, and the gradient of each."""
    found, ndim = [], x.ndim - 2
    back = lambda y: idwt(y, wave, ndim=ndim, mode=mode, size=tuple(x.shape[2:]), impl=impl)
    for call, given in ((lambda x: dwt(x, wave, ndim=ndim, mode=mode, impl=impl), x), (back, bands)):
        found += run(call, [given])
    return found


@pytest.mark.parametrize(("wave", "mode", "size"), CASES, ids=str)
def test_output_and_gradients_match_the_float64_reference(wave, mode, size):
    dtype = torch.float64 if size == (4, 5) else torch.float32
    x = signal(*size, b=1, c=1, dtype=dtype)
    bands = torch.randn_like(dwt(x, wave, ndim=len(size), mode=mode))
    exact = there_and_back(x.double(), bands.double(), wave, mode, "reference")
    for actual, expected in zip(there_and_back(x, bands, wave, mode, "triton"), exact, strict=True):
        assert actual.dtype == dtype
        assert error(actual, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_rounded_once(dtype):
    x = signal(5, 4, b=1, c=1, dtype=dtype)
    bands = torch.randn_like(dwt(x))
    exact = there_and_back(x.double(), bands.double(), "haar", "symmetric", "reference")
    rounded, ours = (there_and_back(x, bands, "haar", "symmetric", impl) for impl in ("reference", "triton"))
    for actual, plain, expected in zip(ours, rounded, exact, strict=True):
        assert actual.dtype == dtype
        assert_within_budget(actual, plain, expected)


def test_planes_and_strides_do_not_matter_and_empty_batches_stay_empty():
    x = signal(4, 3).permute(1, 0, 3, 2)  # as channels last: no two axes lie next to each other
    exact = dwt(x, "haar", impl="reference")
    assert error(dwt(x, "haar", impl="triton"), exact) <= TOLERANCE[torch.float64]
    strange = exact.mT.contiguous().mT
    assert error(idwt(strange, "haar", size=(3, 4), impl="triton"), x) <= TOLERANCE[torch.float64]
    assert dwt(x[:0], "haar", impl="triton").shape == (0, 2, 4, 2, 2)
    assert idwt(exact[:, :0], "haar", impl="triton").shape == (2, 0, 4, 4)


def test_tiles_that_are_not_full_are_cut():
    x = signal(1, 131, b=1, c=1, dtype=torch.float32)
    exact = dwt(x.double(), "haar", impl="reference")
    bands = dwt(x, "haar", impl="triton")
    assert error(bands, exact) <= TOLERANCE[torch.float32]
    assert error(idwt(bands, "haar", size=(1, 131), impl="triton"), x) <= TOLERANCE[torch.float32]


def test_compiles_as_one_node_and_trains():
    x = signal(2, 3, b=1, c=1, dtype=torch.float32).requires_grad_()
    call = lambda x: dwt(x, "haar", impl="triton").square()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    actual, expected = compiled(x), call(x)
    assert torch.equal(actual, expected)
    assert torch.equal(*(torch.autograd.grad(y.sum(), x)[0] for y in (actual, expected)))


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in WEIGHTED])
def test_table_of_samples_says_what_the_ends_are_filled_with(mode):
    for n, taps in ((5, 2), (6, 4), (3, 10), (2, 24)):
        table = sources(n, taps, mode, torch.device("cpu"))
        x, start = torch.arange(1.0, n + 1), before(taps, mode)
        buffer = torch.zeros(len(table))
        buffer[start : start + n] = x
        fill(buffer, 0, start, n, mode)
        assert torch.equal(torch.where(table < 0, 0, x[table.clamp(min=0)]), buffer), (n, taps)
