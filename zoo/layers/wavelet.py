"""The wavelet transform of images as modules without parameters."""

from torch import Tensor, nn

from zoo.kernels.dwt import dwt, idwt


class DWT2d(nn.Module):
    """Take images apart into approx, horizontal, vertical and diagonal bands of half the size.

    Args:
        wave: a discrete wavelet of pywt.
        mode: boundary mode, see `zoo.kernels.dwt`.
        flat: whether bands are groups of channels (b, 4 c, h, w), approx of all channels first, as DiMSUM has them;
            otherwise they have an axis of their own (b, c, 4, h, w).
    """

    def __init__(self, wave: str = "haar", mode: str = "symmetric", *, flat: bool = False) -> None:
        super().__init__()
        self.wave, self.mode, self.flat = wave, mode, flat

    def forward(self, images: Tensor) -> Tensor:
        """Transform images (b, c, h, w)."""
        bands = dwt(images, self.wave, mode=self.mode)  # b c 4 h w
        return bands.transpose(1, 2).flatten(1, 2) if self.flat else bands  # b (4 c) h w

    def extra_repr(self) -> str:
        """Options, for the printed module."""
        return f"wave={self.wave!r}, mode={self.mode!r}, flat={self.flat}"


class IDWT2d(DWT2d):
    """Put the bands of a `DWT2d` of the same options together again."""

    def forward(self, bands: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Rebuild images (b, c, h, w); `size` tells (h, w) where one of them is odd."""
        if self.flat:
            bands = bands.unflatten(1, (4, -1)).transpose(1, 2)  # b c 4 h w
        return idwt(bands, self.wave, mode=self.mode, size=size)
