import numpy as np
import pytest
import pywt
import torch

from tests.helpers import error
from tests.kernels.test_dwt import signal
from zoo.kernels.dwt import dwt
from zoo.kernels.dwt.filters import MODES
from zoo.kernels.dwt.levels import packet, unpacket, wavedec, waverec

EXACT = 1e-9  # float64; as exact as the taps of pywt
WAVES = ["haar", "db3", "bior2.2"]


def keys(ndim):
    """Names of pywt.wavedecn for our bands but the first."""
    return ["".join("ad"[i >> axis & 1] for axis in range(ndim)) for i in range(1, 2**ndim)]


@pytest.mark.filterwarnings("ignore:Level value of")  # pywt says so where filters are longer than bands
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wave", WAVES)
def test_levels_equal_pywt_wavedecn_and_rebuild_the_signal(wave, mode):
    for size, levels in (((33,), 3), ((18, 23), 2), ((16, 16), 3), ((7, 9, 8), 2)):
        x, ndim = signal(*size), len(size)
        if mode.endswith("reflect") and min(size) < 8:
            continue
        approx, *details = wavedec(x, wave, levels=levels, ndim=ndim, mode=mode)
        expected = pywt.wavedecn(x.numpy(), wave, mode, levels, axes=range(2, 2 + ndim))
        assert error(approx[:, :, 0], torch.from_numpy(expected[0])) <= EXACT
        for bands, named in zip(details, expected[1:], strict=True):
            assert error(bands, torch.from_numpy(np.stack([named[key] for key in keys(ndim)], 2))) <= EXACT
        assert error(waverec([approx, *details], wave, ndim=ndim, mode=mode, size=size), x) <= EXACT


def test_details_of_two_axes_are_ordered_as_wavedec2():
    x = signal(16, 20)
    approx, *details = wavedec(x, "db2", levels=2)
    expected = pywt.wavedec2(x.numpy(), "db2", level=2)
    assert error(approx[:, :, 0], torch.from_numpy(expected[0])) <= EXACT
    for bands, named in zip(details, expected[1:], strict=True):
        assert error(bands, torch.from_numpy(np.stack(named, 2))) <= EXACT


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wave", WAVES)
def test_packet_equals_pywt_in_natural_order_and_rebuilds_the_signal(wave, mode):
    for size, levels in (((21,), 3), ((13, 18), 2)):
        x, ndim = signal(*size, b=1), len(size)
        bands = packet(x, wave, levels=levels, ndim=ndim, mode=mode)
        tree = {1: pywt.WaveletPacket, 2: pywt.WaveletPacket2D}[ndim]
        for channel in range(2):
            nodes = tree(x[0, channel].numpy(), wave, mode, levels).get_level(levels, "natural")
            assert error(bands[0, channel], torch.from_numpy(np.stack([node.data for node in nodes]))) <= EXACT
        assert error(unpacket(bands, wave, levels=levels, ndim=ndim, mode=mode, size=size), x) <= EXACT


def test_packet_of_volumes_names_the_first_level_slowest():
    x = signal(6, 5, 8)
    first = dwt(x, "db2", ndim=3)
    expected = torch.stack([dwt(first[:, :, i], "db2", ndim=3) for i in range(8)], 2).flatten(2, 3)
    bands = packet(x, "db2", levels=2, ndim=3)
    assert error(bands, expected) <= EXACT
    assert error(unpacket(bands, "db2", levels=2, ndim=3, size=(6, 5, 8)), x) <= EXACT


def test_haar_packet_is_the_hadamard_transform_of_small_tiles():
    x = signal(8, 12)
    step = torch.tensor([[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]]).double() / 2  # a h v d, samples
    tiles = x.unflatten(3, (3, 2, 2)).unflatten(2, (2, 2, 2))  # b c y outer inner x outer inner
    tiles = tiles.permute(0, 1, 3, 6, 4, 7, 2, 5).flatten(4, 5).flatten(2, 3)  # b c outer inner y x
    expected = torch.einsum("pi,qo,bcoiyx->bcpqyx", step, step, tiles).flatten(2, 3)
    assert error(packet(x, levels=2), expected) <= EXACT


def test_gradients_flow_through_all_levels_and_sizes_default_to_even():
    x = signal(16, 24, b=1, c=1).requires_grad_()
    parts = wavedec(x, "db2", levels=2, mode="periodization")
    y = waverec(parts, "db2", mode="periodization")
    assert y.shape == x.shape
    bands = packet(x, "db2", levels=2, mode="periodization")
    z = unpacket(bands, "db2", levels=2, mode="periodization")
    weight = signal(16, 24, b=1, c=1)
    for whole in (y, z):
        assert error(torch.autograd.grad((whole * weight).sum(), x)[0], weight) <= EXACT


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: wavedec(torch.zeros(1, 1, 4, 4), levels=0), r"wavedec: levels must be at least 1, got 0"),
        (lambda: packet(torch.zeros(1, 1, 4, 4), levels=0), r"packet: levels must be at least 1, got 0"),
        (lambda: waverec([torch.zeros(1, 1, 1, 4, 4)]), r"waverec: levels must be at least 1, got 0"),
        (
            lambda: unpacket(torch.zeros(1, 1, 4, 4, 4), levels=2),
            r"unpacket: bands must be \(b, c, 16, ...\) for levels=2, ndim=2, got \(1, 1, 4, 4, 4\)",
        ),
        (lambda: wavedec(torch.zeros(1, 4, 4), levels=1), r"dwt: input must be float with 4 axes"),
    ],
)
def test_errors_name_the_rule_and_what_was_given(call, message):
    with pytest.raises(ValueError, match=message):
        call()
