"""What training minimises: each objective compares a restored image with its ground truth."""

import inspect
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zoo.data.blur import usm
from zoo.errors import UserError, nearest
from zoo.files import cache_folder
from zoo.kernels.dwt.levels import wavedec
from zoo.kernels.spectrum import spectrum
from zoo.layers.vgg import NAMES, VGG19
from zoo.models.weights import read_weights

# What Real-ESRGAN and Real-HAT compare.
_LAYERS = {"conv1_2": 0.1, "conv2_2": 0.1, "conv3_4": 1.0, "conv4_4": 1.0, "conv5_4": 1.0}


class Objective(nn.Module):
    """A term of the training loss; subclasses define `compare`.

    The arguments of a subclass's constructor are kept as attributes of the same name, so that `settings` can tell
    them as plain data for checkpoints.

    Args:
        weight: factor in the sum over all objectives.
        usm: compare with the ground truth after unsharp masking (see `zoo.data.blur.usm`), as trainings for photos of
            the real world do; crops of gt need sides above 25 pixels.

    Raises:
        UserError: the weight is not positive.
    """

    def __init__(self, weight: float = 1.0, usm: bool = False) -> None:
        super().__init__()
        if not weight > 0:
            raise UserError(f"objective {type(self).__name__}: weight must be positive, got {weight}; or leave it out")
        self.weight = weight
        self.usm = usm

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
            gt = gt.to(dtype)
            return self.compare(restored.to(dtype), usm(gt) if self.usm else gt)

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


class Pearson(Objective):
    """(1 - rho) / 2, with rho the correlation of all values of a sample: 0 for equal images, 1/2 for unrelated ones.

    Samples whose value is not finite are left out of the mean.

    Source: Sun et al. 2024 (Histoformer), section 3.4; basicsr/models/image_restoration_model.py.
    """

    def compare(self, restored: Tensor, gt: Tensor) -> Tensor:
        """Mean over samples of (1 - rho) / 2; a constant image has rho 0."""
        first, second = (image.flatten(1) - image.flatten(1).mean(1, keepdim=True) for image in (restored, gt))
        norms = torch.linalg.vector_norm(first, dim=1) * torch.linalg.vector_norm(second, dim=1)
        values = (1 - (first * second).sum(1) / (norms + 1e-6)) / 2  # b
        return values[values.isfinite()].mean()


class Perceptual(Objective):
    """L1 between features that VGG19, trained on ImageNet, finds in the two images, before its ReLUs.

    Args:
        weight: factor in the sum.
        file: torchvision's weights, a path; a bare name is also looked for in the cache folder (ZOO_CACHE).
        layers: name -> factor, such as {"conv5_4": 1.0}; None = what Real-ESRGAN and Real-HAT take.
        usm: see `Objective`.

    Raises:
        FileNotFoundError: the weights are not there.
        UserError: they are others, or a layer is unknown.

    Source: Johnson et al. 2016; basicsr/losses/basic_loss.py (PerceptualLoss).
    """

    def __init__(
        self,
        weight: float = 1.0,
        file: str = "vgg19-dcbb9e9d.pth",
        layers: dict[str, float] | None = None,
        usm: bool = False,
    ) -> None:
        super().__init__(weight, usm)
        self.file, self.layers = file, dict(_LAYERS if layers is None else layers)
        if not self.layers:
            raise UserError("objective Perceptual: layers is empty; name one such as conv5_4, or leave layers out")
        for name in self.layers:
            if name not in NAMES:
                raise UserError(
                    f"objective Perceptual: no layer {name!r}.{nearest(name, NAMES) or ' See zoo.layers.vgg'}"
                )
        # In a tuple torch does not see it: neither checkpoints nor optimisers are to hold these 80 MB.
        self._network = (_vgg19(file),)

    def compare(self, restored: Tensor, gt: Tensor) -> Tensor:
        """Weighted sum over layers of the mean absolute difference of features."""
        network = self._network[0].to(restored)
        found = network(restored, self.layers)
        with torch.no_grad():
            wanted = network(gt, self.layers)
        parts = [factor * (found[name] - wanted[name]).abs().mean() for name, factor in self.layers.items()]
        return torch.stack(parts).sum()


def _vgg19(file: str) -> VGG19:
    """The network with the weights of `file`; without any where a recipe is only sketched on the meta device."""
    network = VGG19().eval().requires_grad_(False)
    if next(network.parameters()).is_meta:
        return network
    path = next((place for place in (Path(file).expanduser(), cache_folder() / file) if place.is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"objective Perceptual: {file} is neither here nor in {cache_folder()}; fetch it from "
            "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth, or set file to where it lies"
        )
    state, _ = read_weights(path)
    own = network.state_dict()
    wrong = [name for name, tensor in own.items() if name not in state or state[name].shape != tensor.shape]
    if wrong:
        raise UserError(f"objective Perceptual: {path} lacks or misshapes {wrong[0]}; give torchvision's vgg19 weights")
    network.load_state_dict({name: state[name] for name in own})  # without the classifier
    return network
