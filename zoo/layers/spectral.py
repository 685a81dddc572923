"""Filters of images by frequency, as modules without parameters."""

import math

from torch import Tensor, nn

from zoo.kernels.spectrum import inverse_spectrum, radial_mask, spectrum


class LowPass(nn.Module):
    """Keep what is coarser than a frequency; the image is taken to repeat itself beyond its borders.

    Args:
        cutoff: first frequency that is taken out, cycles per pixel, above 0; from sqrt(1/2) on everything passes.

    Raises:
        ValueError: the cutoff is not positive.
    """

    def __init__(self, cutoff: float) -> None:
        super().__init__()
        if not cutoff > 0:
            raise ValueError(f"{type(self).__name__}: cutoff must be above 0 cycles per pixel, got {cutoff}")
        self.cutoff = cutoff

    def ring(self) -> tuple[float, float]:
        """Frequencies that pass, [first, second)."""
        return 0.0, self.cutoff

    def forward(self, images: Tensor) -> Tensor:
        """Filter images (b, c, h, w); dtype of `images`."""
        z = spectrum(images)  # b c h w//2+1
        size = images.shape[-2], images.shape[-1]
        mask = radial_mask(size, *self.ring(), dtype=z.real.dtype, device=z.device)
        return inverse_spectrum(z * mask, size).to(images.dtype)

    def extra_repr(self) -> str:
        """Options, for the printed module."""
        return f"cutoff={self.cutoff}"


class HighPass(LowPass):
    """Keep what a `LowPass` of the same cutoff takes out: both add up to the image."""

    def ring(self) -> tuple[float, float]:
        """Frequencies that pass, [first, second)."""
        return self.cutoff, math.inf
