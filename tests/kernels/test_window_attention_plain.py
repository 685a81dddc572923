"""The op in plain operations, which exported files hold, equals the op."""

import pytest
import torch

from zoo.kernels.window_attention import plain, torch_impl

EXACT = 1e-12  # float64 sums in another order
CASES = {
    "fits": ((8, 12), (4, 4), (0, 0), (0, 0), False, False),
    "shifted": ((8, 12), (4, 4), (2, 1), (0, 0), False, False),
    "shifted around": ((8, 16), (4, 8), (2, 4), (0, 0), True, False),
    "does not fit": ((7, 10), (4, 4), (0, 0), (0, 0), False, False),
    "shifted, does not fit": ((7, 10), (4, 4), (2, 3), (0, 0), False, False),
    "padding attended": ((7, 10), (4, 4), (0, 0), (0, 0), False, True),
    "shifted, padding attended": ((7, 10), (4, 4), (2, 3), (0, 0), False, True),
    "overlap, attended": ((8, 12), (4, 4), (0, 0), (1, 2), False, True),
    "overlap, masked": ((8, 9), (4, 4), (0, 0), (2, 1), False, False),
}


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_plain_operations_equal_the_op(case, biased):
    grid, window, shift, overlap, wrap, attend = CASES[case]
    draw = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, grid[0] * grid[1], 5, generator=draw, dtype=torch.float64)
    keys = [size + 2 * more for size, more in zip(window, overlap, strict=True)]
    bias = torch.randn(3, *window, *keys, generator=draw, dtype=torch.float64) if biased else None
    words = (q, k, v, bias, grid, window, (1, 1), shift, overlap, wrap, attend, 0.4)
    expected = torch_impl._window_attention(*words)
    found = plain.window_attention(*words)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < EXACT


def test_windows_with_gaps_are_refused():
    x = torch.zeros(1, 1, 16, 2)
    with pytest.raises(NotImplementedError, match="dilation"):
        plain.window_attention(x, x, x, None, (4, 4), (2, 2), (2, 2), (0, 0), (0, 0), False, False, 1.0)
