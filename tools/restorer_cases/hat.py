"""HAT as XPixelGroup/HAT computes it: hat/archs/hat_arch.py."""

import torch
from torch import Tensor
from torch.nn import functional as F

from restorer_cases import Forwards, attend, cut, merge, position_bias
from zoo.models.restorers import hat

Grid = tuple[int, int]


def network(self: hat.HAT, lq: Tensor) -> Tensor:
    """The whole; the mask of shifted windows is made for each image."""
    shallow = self.conv_first((lq - self.mean) * self.img_range)  # b c h w
    grid = (lq.shape[2], lq.shape[3])
    index = (self.relative_position_index_SA, _mask(grid, self.window_size))
    tokens = self.patch_embed(shallow)
    for layer in self.layers:
        tokens = layer(tokens, grid, index, self.relative_position_index_OCA)
    deep = self.conv_after_body(_image(self.norm(tokens), grid)) + shallow
    return self.conv_last(self.upsample(self.conv_before_upsample(deep))) / self.img_range + self.mean


def rhag(self: hat.RHAG, tokens: Tensor, grid: Grid, index_self: tuple[Tensor, Tensor], index_cross: Tensor) -> Tensor:
    """The residual group, its convolution on a copy with channels first."""
    out = self.residual_group(tokens, grid, index_self, index_cross)
    return self.conv(_image(out, grid)).flatten(2).transpose(1, 2) + tokens


def hab(self: hat.HAB, tokens: Tensor, grid: Grid, index: tuple[Tensor, Tensor]) -> Tensor:
    """The hybrid block: roll, cut, attend, merge, roll back."""
    normed = self.norm1(tokens).view(-1, *grid, tokens.shape[2])  # b h w c
    local = self.conv_block(normed.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous().view(tokens.shape)
    if self.shift_size:
        normed = torch.roll(normed, (-self.shift_size, -self.shift_size), (1, 2))
    side = self.attn.window_size
    windows = self.attn(cut(normed, side, side), index[0], index[1] if self.shift_size else None)
    attended = merge(windows, side, side, *grid)
    if self.shift_size:
        attended = torch.roll(attended, (self.shift_size, self.shift_size), (1, 2))
    tokens = tokens + attended.view(tokens.shape) + local * self.conv_scale
    return tokens + self.mlp(self.norm2(tokens))


def window_attention(self: hat.WindowAttention, windows: Tensor, index: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of all windows at once, (b nw) n c."""
    q, k, v = self.qkv(windows).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (b nw) heads n d
    bias = position_bias(self.relative_position_bias_table, index)
    return self.proj(attend(q, k, v, bias, self.qk_scale, mask))


def ocab(self: hat.OCAB, tokens: Tensor, grid: Grid, index: Tensor) -> Tensor:
    """The overlapping block: keys and values are unfolded."""
    b, n, c = tokens.shape
    side, reach = self.window_size, self.window_size + 2 * self.overlap
    qkv = self.qkv(self.norm1(tokens)).view(b, *grid, 3, c).permute(3, 0, 4, 1, 2)  # 3 b c h w
    q = cut(qkv[0].permute(0, 2, 3, 1), side, side).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
    kv = F.unfold(torch.cat([qkv[1], qkv[2]], 1), reach, stride=side, padding=self.overlap)  # b (2 c m) nw
    kv = kv.view(b, 2, c, reach**2, -1).permute(1, 0, 4, 3, 2).contiguous().view(2, -1, reach**2, c)
    k, v = kv.unflatten(3, (self.num_heads, -1)).transpose(2, 3)  # (b nw) heads m d
    windows = attend(q, k, v, position_bias(self.relative_position_bias_table, index), self.qk_scale)
    tokens = self.proj(merge(windows, side, side, *grid).view(b, n, c)) + tokens
    return tokens + self.mlp(self.norm2(tokens))


def _image(tokens: Tensor, grid: Grid) -> Tensor:
    return tokens.transpose(1, 2).contiguous().unflatten(2, grid)  # b c h w


def _mask(grid: Grid, window: int) -> Tensor:
    """-100 where two tokens of a shifted window come from different regions of the image, nw n n."""
    shift = window // 2
    regions = torch.zeros(1, *grid, 1)
    for i, rows in enumerate(_strips(window, shift)):
        for j, columns in enumerate(_strips(window, shift)):
            regions[:, rows, columns] = 3 * i + j
    tokens = cut(regions, window, window)[..., 0]  # nw n
    apart = tokens[:, None] - tokens[:, :, None]
    return apart.masked_fill(apart != 0, -100.0)


def _strips(window: int, shift: int) -> tuple[slice, slice, slice]:
    return slice(0, -window), slice(-window, -shift), slice(-shift, None)


FORWARDS: Forwards = {
    hat.HAT: network,
    hat.RHAG: rhag,
    hat.HAB: hab,
    hat.WindowAttention: window_attention,
    hat.OCAB: ocab,
}
