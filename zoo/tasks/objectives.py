"""What training minimises: each objective compares a restored image with its ground truth."""

import inspect
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zoo.errors import UserError
from zoo.kernels.dwt.levels import wavedec
from zoo.kernels.spectrum import spectrum


class Objective(nn.Module):
    """A term of the training loss; subclasses define `compare`.

    The arguments of a subclass's constructor are kept as attributes of the same name, so that `settings` can tell
    them as plain data for checkpoints.

    Args:
        weight: factor in the sum over all objectives.

    Raises:
        UserError: the weight is not positive.
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        if not weight > 0:
            raise UserError(f"objective {type(self).__name__}: weight must be positive, got {weight}; or leave it out")
        self.weight = weight

    def compare(self, restored: Tensor, gt: Tensor) -> Tensor:
        """The unweighted value, a scalar, for two images (b, c, h, w) in float32 or wider."""
        raise NotImplementedError

    def forward(self, restored: Tensor, gt: Tensor) -> Tensor:
        """The unweighted value, a scalar in float32 or wider, also inside bf16 autocast.

        Args:
            restored: (b, c, h, w), about [0, 1].
            gt: (b, c, h, w), [0, 1].
        """
        # Differences of close images, and spectra even more, drown in the 8 bits of bf16.
        dtype = torch.promote_types(torch.promote_types(restored.dtype, gt.dtype), torch.float32)
        with torch.autocast(restored.device.type, enabled=False):
            return self.compare(restored.to(dtype), gt.to(dtype))

    def settings(self) -> dict[str, Any]:
        """{class_path, init_args} as a recipe writes it."""
        names = inspect.signature(type(self)).parameters
        return {"class_path": type(self).__name__, "init_args": {name: getattr(self, name) for name in names}}


class L1(Objective):
    """Mean absolute difference."""

    def compare(self, restored: Tensor, gt: Tensor) -> Tensor:
        """Mean of |restored - gt|."""
        return (restored - gt).abs().mean()


class MSE(Objective):
    """Mean squared difference: what PSNR measures; large errors count most."""

    def compare(self, restored: Tensor, gt: Tensor) -> Tensor:
        """Mean of (restored - gt) squared."""
        return (restored - gt).square().mean()


class Charbonnier(Objective):
    """Mean of sqrt(difference^2 + eps^2), an L1 that is smooth at zero.

    Args:
        weight: factor in the sum.
        eps: width of the smooth part, in image units. 1e-3 is LapSRN's; BasicSR writes 1e-12 for eps^2, here 1e-6.

    Source: Lai et al. 2017 (LapSRN), section 3.2.
    """

    def __init__(self, weight: float = 1.0, eps: float = 1e-3) -> None:
        super().__init__(weight)
        self.eps = eps

    def compare(self, restored: Tensor, gt: Tensor) -> Tensor:
        """Mean of sqrt((restored - gt)^2 + eps^2)."""
        return torch.sqrt((restored - gt).square() + self.eps**2).mean()


class FFT(Objective):
    """L1 between the spectra of the two images.

    Args:
        weight: factor in the sum.
        part: "complex" = mean of |real| and |imaginary| differences, "amplitude" = difference of magnitudes, which
            leaves the phase free.
        norm: "ortho" keeps the value of the size of L1 for every patch size; "backward" is torch's unscaled
            transform, in which papers give weights such as 0.1 or 0.01.

    Source: Cho et al. 2021 (MIMO-UNet), equation 9, for "complex" and "backward".
    """

    def __init__(
        self,
        weight: float = 1.0,
        part: Literal["complex", "amplitude"] = "complex",
        norm: Literal["ortho", "backward"] = "ortho",
    ) -> None:
        super().__init__(weight)
        self.part = part
        self.norm = norm

    def compare(self, restored: Tensor, gt: Tensor) -> Tensor:
        """Mean absolute difference over the half plane of frequencies."""
        if self.part == "complex":
            return torch.view_as_real(spectrum(restored - gt, norm=self.norm)).abs().mean()
        first, second = (spectrum(image, part="amplitude", norm=self.norm) for image in (restored, gt))
        return (first - second).abs().mean()


class Wavelet(Objective):
    """L1 over the bands of a wavelet transform: every level's details and the last approximation weigh the same.

    Args:
        weight: factor in the sum.
        wave: name of an orthogonal or biorthogonal wavelet of pywt.
        levels: how often the approximation is transformed again.
    """

    def __init__(self, weight: float = 1.0, wave: str = "haar", levels: int = 1) -> None:
        super().__init__(weight)
        if levels < 1:
            raise UserError(f"objective Wavelet: levels must be at least 1, got {levels}")
        self.wave = wave
        self.levels = levels

    def compare(self, restored: Tensor, gt: Tensor) -> Tensor:
        """Mean over `levels` detail groups and one approximation of their mean absolute differences."""
        parts = wavedec(restored - gt, self.wave, levels=self.levels)  # the transform is linear
        return torch.stack([part.abs().mean() for part in reversed(parts)]).mean()
