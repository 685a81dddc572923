"""Histoformer as sunshangquan/Histoformer computes it: basicsr/models/archs/histoformer_arch.py."""

import torch
from torch import Tensor
from torch.nn import functional as F

from restorer_cases import Forwards
from zoo.models.restorers import histoformer


def layer_norm(self: histoformer.LayerNorm, features: Tensor) -> Tensor:
    """In steps, over the last axis of a view."""
    tokens = features.flatten(2).transpose(1, 2)  # b n c
    spread = tokens.var(2, keepdim=True, correction=0)
    centred = tokens - tokens.mean(2, keepdim=True) if self.centre else tokens
    return (centred / torch.sqrt(spread + 1e-5)).transpose(1, 2).unflatten(2, features.shape[2:])


def attention(self: histoformer.Attention_histogram, features: Tensor) -> Tensor:
    """Three sorts, a gather for each of q1, k1, q2 and k2, a scatter for each branch."""
    b, c, h, w = features.shape
    columns, by_row = features[:, : c // 2].sort(2)
    columns, by_column = columns.sort(3)
    features[:, : c // 2] = columns  # the norm's output, which nobody else reads
    *pairs, values = self.qkv_dwconv(self.qkv(features)).flatten(2).chunk(5, 1)
    values, order = values.sort(2)
    q1, k1, q2, k2 = (x.gather(2, order) for x in pairs)
    branches = [_attend(self, q1, k1, values, True), _attend(self, q2, k2, values, False)]
    first, second = (x.scatter(2, order, x).view(b, c, h, w) for x in branches)
    out = self.project_out(first * second)
    half = out[:, : c // 2]
    half = half.scatter(3, by_column, half)
    out[:, : c // 2] = half.scatter(2, by_row, half)
    return out


def _attend(self: histoformer.Attention_histogram, q: Tensor, k: Tensor, v: Tensor, bins: bool) -> Tensor:
    n, parts = v.shape[2], self.num_heads

    def split(x: Tensor) -> Tensor:
        x = F.pad(x, (0, -n % parts)).unflatten(1, (parts, -1))  # b heads c n
        x = x.unflatten(3, (parts, -1)) if bins else x.unflatten(3, (-1, parts)).transpose(3, 4)
        return x.flatten(2, 3)  # b heads (c parts) m

    q, k, v = split(q), split(k), split(v)
    weights = (F.normalize(q, dim=3) @ F.normalize(k, dim=3).mT * self.temperature).exp()
    out = (weights / (weights.sum(3, keepdim=True) + 1) @ v).unflatten(2, (-1, parts))  # b heads c parts m
    return (out if bins else out.transpose(3, 4)).flatten(3).flatten(1, 2)[:, :, :n]


def feed_forward(self: histoformer.FeedForward, features: Tensor) -> Tensor:
    """Everything at twice the resolution at once."""
    value, gate = F.pixel_shuffle(self.project_in(features), 2).chunk(2, 1)
    return self.project_out(F.pixel_unshuffle(F.mish(self.dwconv_dilated2_1(gate)) * self.dwconv_5(value), 2))


FORWARDS: Forwards = {
    histoformer.LayerNorm: layer_norm,
    histoformer.Attention_histogram: attention,
    histoformer.FeedForward: feed_forward,
}
