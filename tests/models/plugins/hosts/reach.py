"""What the test of every host says: with a circle that reaches everything CLEAR is the attention that was there."""

import torch

from tests.models.plugins.denoisers import built, output
from zoo import apply
from zoo.models.plugins.clear import ClearConfig

REST = 1e-6  # rounding: picture and text are computed one after the other


def check(name, **options):
    """Full reach is the stock denoiser, a short one is not, and after removal the bits are the same."""
    denoiser, call = built(name, **options)
    stock = output(denoiser, call)
    handle = apply(denoiser, ClearConfig(40))
    assert (output(denoiser, call) - stock).abs().max() <= REST * stock.abs().max()
    layout = handle.plugin.layout
    layers = list(handle.plugin.layers)
    handle.remove()
    with_holes = apply(denoiser, ClearConfig(2))
    assert (output(denoiser, call) - stock).abs().max() > 1e-3 * stock.abs().max()
    with_holes.remove()
    assert torch.equal(output(denoiser, call), stock)
    return layout, layers
