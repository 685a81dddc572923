"""Networks that tell restored images from real ones, for adversarial training."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SpectralConv2d(nn.Module):
    """Convolution without bias whose weight is divided by its largest singular value.

    A training forward pass first brings the estimate of the singular vectors one power iteration further. Names and
    numbers are those of torch.nn.utils.spectral_norm, which the official weights were written with.

    Args:
        before: channels of the input.
        after: channels of the output.
        kernel_size: side in pixels.
        stride: step in pixels; the padding is 1.

    Source: Miyato et al. 2018, "Spectral Normalization for Generative Adversarial Networks", algorithm 1.
    """

    def __init__(self, before: int, after: int, kernel_size: int = 3, stride: int = 1) -> None:
        super().__init__()
        conv = nn.Conv2d(before, after, kernel_size, bias=False)  # for its initial weight
        self.stride = stride
        self.weight_orig = conv.weight
        self.weight_u = nn.Buffer(F.normalize(torch.randn(after), dim=0, eps=1e-12))
        self.weight_v = nn.Buffer(F.normalize(torch.randn(before * kernel_size**2), dim=0, eps=1e-12))

    def forward(self, x: Tensor) -> Tensor:
        """(b, before, h, w) -> (b, after, h', w')."""
        matrix = self.weight_orig.flatten(1)
        u, v = self.weight_u, self.weight_v
        if self.training:
            with torch.no_grad():
                v = F.normalize(matrix.T @ u, dim=0, eps=1e-12)
                u = F.normalize(matrix @ v, dim=0, eps=1e-12)
                self.weight_u.copy_(u)  # the buffers change again before backward; u and v do not
                self.weight_v.copy_(v)
        return F.conv2d(x, self.weight_orig / (u @ matrix @ v), stride=self.stride, padding=1)


class UNetDiscriminatorSN(nn.Module):
    """U-Net that judges every pixel, with spectral norm: the discriminator of Real-ESRGAN and Real-HAT.

    Args:
        num_in_ch: channels of the image.
        num_feat: channels at full resolution.
        skip_connection: add the features of the way down on the way up.

    Source: Wang et al. 2021 (Real-ESRGAN), section 3.4; hat/archs/discriminator_arch.py, whose parameter names these
    are. There sides must be multiples of 8.
    """

    def __init__(self, num_in_ch: int = 3, num_feat: int = 64, skip_connection: bool = True) -> None:
        super().__init__()
        c = num_feat
        self.skip_connection = skip_connection
        self.conv0 = nn.Conv2d(num_in_ch, c, 3, padding=1)
        self.conv1 = SpectralConv2d(c, 2 * c, 4, stride=2)
        self.conv2 = SpectralConv2d(2 * c, 4 * c, 4, stride=2)
        self.conv3 = SpectralConv2d(4 * c, 8 * c, 4, stride=2)
        self.conv4 = SpectralConv2d(8 * c, 4 * c)
        self.conv5 = SpectralConv2d(4 * c, 2 * c)
        self.conv6 = SpectralConv2d(2 * c, c)
        self.conv7 = SpectralConv2d(c, c)
        self.conv8 = SpectralConv2d(c, c)
        self.conv9 = nn.Conv2d(c, 1, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        """Logits of being real, one a pixel.

        Args:
            image: (b, num_in_ch, h, w) in [0, 1], sides of at least 8.

        Returns:
            (b, 1, h, w).

        Raises:
            ValueError: the image is too small.
        """
        if min(image.shape[-2:]) < 8:
            raise ValueError(f"UNetDiscriminatorSN: image must be at least 8x8, got {tuple(image.shape)}")
        skips = [_active(self.conv0(image))]
        for conv in (self.conv1, self.conv2, self.conv3):
            skips.append(_active(conv(skips[-1])))
        x = skips.pop()
        for conv in (self.conv4, self.conv5, self.conv6):
            skip = skips.pop()
            x = _active(conv(F.interpolate(x, skip.shape[-2:], mode="bilinear")))
            x = x + skip if self.skip_connection else x
        return self.conv9(_active(self.conv8(_active(self.conv7(x)))))


def _active(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2)
