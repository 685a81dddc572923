from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import error
from zoo.layers.wavelet import DWT2d, IDWT2d

GOLDEN = Path(__file__).parents[1] / "golden" / "wavelet.safetensors"
TOLERANCE = 1e-6  # the golden numbers are float32, and were 7e-7 from pywt


@pytest.mark.parametrize("case", ["a", "b"])
def test_flat_haar_equals_the_published_transform_and_its_gradients(case):
    golden = load_file(GOLDEN)
    given, expected = (lambda name: golden[f"input.{case}.{name}"]), (lambda name: golden[f"output.{case}.{name}"])
    for module, source, name in ((DWT2d(flat=True), "x", "dwt"), (IDWT2d(flat=True), "s", "idwt")):
        images = given(source).requires_grad_()
        y = module(images)
        (gradient,) = torch.autograd.grad((y * given(f"{name}_loss_weight")).sum(), images)
        assert error(y, expected(name)) <= TOLERANCE
        assert error(gradient, expected(f"{name}_grad_{source}")) <= TOLERANCE


@pytest.mark.parametrize("flat", [False, True])
def test_inverse_undoes_the_transform_of_odd_images(flat):
    images = torch.randn(2, 3, 7, 10, dtype=torch.float64)
    options = {"wave": "db3", "mode": "reflect", "flat": flat}
    bands = DWT2d(**options)(images)
    assert bands.shape == ((2, 12, 6, 7) if flat else (2, 3, 4, 6, 7))
    assert error(IDWT2d(**options)(bands, size=(7, 10)), images) <= 1e-12


def test_printed_module_names_its_options():
    assert str(DWT2d("db2", flat=True)) == "DWT2d(wave='db2', mode='symmetric', flat=True)"
