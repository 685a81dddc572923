"""CRAFT as AVC2-UESTC/CRAFT-SR computes it: basicsr/archs/craft_arch.py."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from restorer_cases import Forwards, attend, cut, merge, position_bias
from zoo.models.restorers import craft

Grid = tuple[int, int]
Position = tuple[Tensor, Tensor]


def network(self: craft.CRAFT, lq: Tensor) -> Tensor:
    """The whole, channels first."""
    shallow = self.conv_first((lq - self.mean) * self.img_range)
    positions = ((self.biases_h, self.relative_position_index_h), (self.biases_v, self.relative_position_index_v))
    deep = shallow
    for layer in self.layers:
        deep = layer(deep, positions)
    return self.upsample(self.conv_after_body(self.norm(deep)) + shallow) / self.img_range + self.mean


def crfb(self: craft.CRFB, features: Tensor, positions: Sequence[Position]) -> Tensor:
    """The fusions; tokens are a copy of the map."""
    grid = (features.shape[2], features.shape[3])
    for j, (enhance, fuse) in enumerate(zip(self.hfer_blocks, self.hf_blocks, strict=True)):
        tokens = features.permute(0, 2, 3, 1).flatten(1, 2)  # b n c
        for block in self.srwa_blocks[2 * j : 2 * j + 2]:
            tokens = block(tokens, grid, positions)
        features = fuse(tokens.unflatten(1, grid).permute(0, 3, 1, 2), enhance(features))
    return features


def srwab(self: craft.SRWAB, tokens: Tensor, grid: Grid, positions: Sequence[Position]) -> Tensor:
    """Both orientations of windows, each rolled and rolled back."""
    b, n, c = tokens.shape
    qkv = self.qkv(self.norm1(tokens)).view(b, *grid, 3, c).permute(3, 0, 1, 2, 4)  # 3 b h w c
    halves = []
    for attention, half, position in zip(self.attns, qkv.split(c // 2, 4), positions, strict=True):
        down, right = attention.shift
        if down or right:
            half = torch.roll(half, (-down, -right), (2, 3))
        out = attention(half, grid, *position)  # b h w c
        halves.append(torch.roll(out, (down, right), (1, 2)) if down or right else out)
    local = self.get_v(qkv[2].permute(0, 3, 1, 2).contiguous()).permute(0, 2, 3, 1).contiguous()
    tokens = tokens + self.proj(torch.cat(halves, 3).view(b, n, c) + local.view(b, n, c))
    return tokens + self.mlp(self.norm2(tokens))


def rectangle_attention(
    self: craft.RectangleAttention, qkv: Tensor, grid: Grid, offsets: Tensor, index: Tensor
) -> Tensor:
    """Attention of all windows of one orientation at once; the position bias is computed whatever it tells."""
    heads = self.pos.pos3[2].out_features
    q, k, v = (
        cut(part.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1), *self.window)
        .unflatten(2, (heads, -1))
        .transpose(1, 2)
        .contiguous()  # (b nw) heads n d
        for part in qkv
    )
    return merge(attend(q, k, v, position_bias(self.pos(offsets), index), None), *self.window, *grid)


def channel_norm(self: craft.ChannelNorm, features: Tensor) -> Tensor:
    """A layer norm in steps."""
    tokens = features.flatten(2).transpose(1, 2)  # b n c
    mean, spread = tokens.mean(2, keepdim=True), tokens.var(2, keepdim=True, correction=0)
    normed = (tokens - mean) / torch.sqrt(spread + 1e-5) * self.body.weight + self.body.bias
    return normed.transpose(1, 2).unflatten(2, features.shape[2:])


def channel_attention(self: craft.ChannelAttention, low: Tensor, high: Tensor) -> Tensor:
    """Attention of channels, with all steps for all pixels."""
    heads = len(self.temperature)
    maps = (self.q_dwconv(self.q(high)), *self.kv_dwconv(self.kv(low)).chunk(2, 1))
    q, k, v = (x.unflatten(1, (heads, -1)).flatten(3) for x in maps)  # b heads d n
    weights = (F.normalize(q, dim=3) @ F.normalize(k, dim=3).mT * self.temperature).softmax(3)
    return self.project_out((weights @ v).flatten(1, 2).unflatten(2, low.shape[2:]))


FORWARDS: Forwards = {
    craft.CRAFT: network,
    craft.CRFB: crfb,
    craft.SRWAB: srwab,
    craft.RectangleAttention: rectangle_attention,
    craft.ChannelNorm: channel_norm,
    craft.ChannelAttention: channel_attention,
}
