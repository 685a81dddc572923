"""The transform along one axis as products with one small matrix, slid over the signal.

Both directions read `2 side + L - 2` neighbours and give `2 side` results, and go on by `2 side`.
"""

from torch import Tensor


def analysis_matrix(taps: Tensor, side: int) -> Tensor:
    """Samples to `side` coefficients of each band, low ones first: y[k] = sum_j taps[j] x[2 k + L - 1 - j].

    Args:
        taps: low and high, (2, L).
        side: coefficients of each band, at least 1.

    Returns:
        (2 side, 2 side + L - 2).
    """
    return _toeplitz(taps.flip(1), side).flatten(0, 1)


def synthesis_matrix(taps: Tensor, side: int) -> Tensor:
    """The adjoint: coefficients of both bands in turns to `2 side` samples x[m] = sum_k taps[2 k + L - 1 - m] y[k].

    The first sample is 2 (L / 2 - 1) places further than twice the first coefficient.

    Returns:
        (2 side, 2 side + L - 2).
    """
    rows = taps.unflatten(1, (-1, 2)).flip(2).permute(2, 1, 0).flatten(1)  # (j mod 2 reversed) (L / 2 bands)
    return _toeplitz(rows, side).transpose(0, 1).flatten(0, 1)


def _toeplitz(rows: Tensor, side: int) -> Tensor:
    """Each row `side` times, two places further each time: (n, L) -> (n, side, 2 side + L - 2)."""
    width = 2 * side + rows.shape[1] - 2
    table = rows.new_zeros(len(rows), side, width + 2)
    table[:, :, : rows.shape[1]] = rows[:, None]
    return table.flatten(1)[:, : side * width].unflatten(1, (side, width))
