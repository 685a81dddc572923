"""Histoformer, a restorer for snow, rain and raindrops: pixels attend to pixels of similar value, wherever they lie.

Paper: "Restoring Images in Adverse Weather Conditions via Histogram Transformer" (ECCV 2024). Official code:
sunshangquan/Histoformer, basicsr/models/archs/histoformer_arch.py; weights MIT.

Same parameter names and numbers as the official code. What differs: both attentions share one gather and one scatter,
since their product may be taken while pixels are sorted; 1x1 convolutions are matrix products; sorting is stable, so
that pixels of equal value (black borders, saturated skies) keep their order on every device. With `stable_sort=False`
ties fall as torch's default sort lets them, as in the official code.

Where two values nearly coincide, rounding decides how they are sorted, and features then move to other pixels: outputs
of two devices, or of two dtypes, differ visibly in places. Only float64 is comparable end to end.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.layers.sorting import stable_sort
from zoo.models.entry import Entry, Needs, Variant, check_sizes, constructor_arguments, count

_LEVELS = 4
_AT_ONCE = 12  # channels, where memory is to be spared; rows that BLAS sums as it does those of all channels
_ALL = slice(None)


def _matrix(conv: nn.Conv2d, features: Tensor, rows: slice = _ALL) -> Tensor:
    """A 1x1 convolution as one matrix product, (b, c, ...) -> (b, c', ...); some of its output channels."""
    matrix = conv.weight[rows, :, 0, 0].expand(len(features), -1, -1)  # b c' c; not broadcast, which would copy maps
    out = torch.bmm(matrix, features.flatten(2))  # b c' n
    out = out if conv.bias is None else out + conv.bias[rows, None]
    return out.unflatten(2, features.shape[2:])


def _depthwise(conv: nn.Conv2d, features: Tensor, rows: slice) -> Tensor:
    """A depthwise convolution of some of its channels."""
    bias = None if conv.bias is None else conv.bias[rows]
    padding, dilation = conv.padding, conv.dilation
    return F.conv2d(features, conv.weight[rows], bias, 1, padding, dilation, features.shape[1])  # pyright: ignore


def _by_phase(parameter: Tensor | None, rows: slice) -> Tensor | None:
    """The same for each of four phases."""
    return None if parameter is None else parameter[rows].repeat_interleave(4, 0)


def _taps() -> Tensor:
    """Which of 25 taps leads from a phase of a pixel in 3x3 to a phase of the middle one; 25 = none. (4 4 3 3,)."""
    to, place, of = torch.arange(2)[:, None, None], torch.arange(-1, 2)[None, None], torch.arange(2)[None, :, None]
    steps = 2 * place + of - to + 2  # to of place; 0 to 4 along one axis
    inside = (steps >= 0) & (steps < 5)
    rows, columns = steps[:, None, :, None, :, None], steps[None, :, None, :, None, :]
    reached = inside[:, None, :, None, :, None] & inside[None, :, None, :, None, :]
    return torch.where(reached, 5 * rows + columns, 25).flatten()


def _parts(first: int, last: int) -> list[slice]:
    """Channels from `first` to before `last`, some at a time."""
    return [slice(start, min(start + _AT_ONCE, last)) for start in range(first, last, _AT_ONCE)]


class LayerNorm(nn.Module):
    """Normalise the channels of each pixel, without weights; BiasFree leaves their mean in.

    Args:
        kind: "WithBias" or "BiasFree".
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.centre = kind == "WithBias"

    def forward(self, features: Tensor) -> Tensor:  # b c h w
        centred = features - features.mean(1, keepdim=True)  # var_mean is four times as slow along this axis
        spread = centred.square().mean(1, keepdim=True)
        return (centred if self.centre else features) * torch.rsqrt(spread + 1e-5)


class Attention_histogram(nn.Module):
    """Dynamic-range histogram attention: bins of sorted pixels, and combs through all bins, look at each other.

    Args:
        channels: of the map.
        num_heads: of both attentions, and the number of bins.
        bias: of the convolutions.
        stable_sort: whether equal values keep their order.
    """

    def __init__(self, channels: int, num_heads: int, bias: bool, stable_sort: bool) -> None:
        super().__init__()
        self.num_heads, self.stable_sort, self.sparing = num_heads, stable_sort, False
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.qkv = nn.Conv2d(channels, 5 * channels, 1, bias=bias)
        self.qkv_dwconv = nn.Conv2d(5 * channels, 5 * channels, 3, padding=1, groups=5 * channels, bias=bias)
        self.project_out = nn.Conv2d(channels, channels, 1, bias=bias)

    def forward(self, features: Tensor) -> Tensor:  # b c h w
        b, c, h, w = features.shape
        half = c // 2
        columns, by_row = self._sort(features[:, :half], 2)
        columns, by_column = self._sort(columns, 3)
        mixed = torch.cat([columns, features[:, half:]], 1)
        product, order = self._attended_sparingly(mixed) if self.sparing else self._attended(mixed)  # b c n
        back = torch.empty_like(product).scatter(2, order, product).view(b, c, h, w)
        out = _matrix(self.project_out, back)
        # The first half goes back to where its pixels came from, although the projection has mixed it with the other.
        rows = torch.zeros_like(out[:, :half]).scatter(3, by_column, out[:, :half])
        return torch.cat([torch.zeros_like(rows).scatter(2, by_row, rows), out[:, half:]], 1)

    def _sort(self, x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        return stable_sort(x, axis) if self.stable_sort else torch.sort(x, dim=axis)

    def _attended(self, mixed: Tensor) -> tuple[Tensor, Tensor]:
        """The product of both attentions, sorted, and the place of each pixel, (b, c, n)."""
        c = mixed.shape[1]
        values, order = self._sort(self._projected(mixed, 4, slice(0, c)), 2)  # b c n

        def branch(place: int, bins: bool) -> Tensor:
            pair = self._projected(mixed, place, slice(0, 2 * c)).unflatten(1, (2, c))  # b 2 c n
            q, k = pair.gather(3, order[:, None].expand_as(pair)).unbind(1)
            return self._attend(q, k, values, bins)

        return branch(0, True) * branch(2, False), order

    def _attended_sparingly(self, mixed: Tensor) -> tuple[Tensor, Tensor]:
        """The same, some channels at a time; only values, keys and the product are there as a whole."""
        b, c, h, w = mixed.shape
        values = mixed.new_empty(b, c, h * w)
        order = torch.empty(b, c, h * w, dtype=torch.int64, device=mixed.device)
        for part in _parts(0, c):
            values[:, part], order[:, part] = self._sort(self._projected(mixed, 4, part), 2)
        product = torch.ones_like(values)
        size = c // self.num_heads
        for place, bins in ((0, True), (2, False)):
            for head in range(self.num_heads):
                own = slice(head * size, (head + 1) * size)
                keys = torch.empty_like(values[:, own])
                for part in _parts(own.start, own.stop):
                    found = self._projected(mixed, place + 1, part).gather(2, order[:, part])
                    keys[:, part.start - own.start : part.stop - own.start] = found
                k, v = self._split(keys, bins, 1), self._split(values[:, own], bins, 1)
                del keys
                for part in _parts(own.start, own.stop):
                    q = self._projected(mixed, place, part).gather(2, order[:, part])
                    q = self._split(q, bins, 1)
                    product[:, part] *= self._weighed(q, k, v, self.temperature[head : head + 1], bins)[:, :, : h * w]
        return product, order

    def _projected(self, mixed: Tensor, which: int, part: slice) -> Tensor:
        """Channels `part` of q1, k1, q2, k2, v, counted from the first of one of them; (b, c', n)."""
        rows = slice(which * mixed.shape[1] + part.start, which * mixed.shape[1] + part.stop)
        return _depthwise(self.qkv_dwconv, _matrix(self.qkv, mixed, rows), rows).flatten(2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, bins: bool) -> Tensor:
        """Attention of sorted pixels, (b, c, n): each channel and part of the pixels is a token.

        Args:
            q: queries.
            k: keys.
            v: values, ascending.
            bins: whether parts are neighbours in value, else each goes through the whole range.
        """
        n = v.shape[2]
        q, k, v = (self._split(x, bins, self.num_heads) for x in (q, k, v))  # b heads (c parts) m
        return self._weighed(q, k, v, self.temperature, bins)[:, :, :n]

    def _weighed(self, q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, bins: bool) -> Tensor:
        """Tokens b heads (c parts) m -> sorted pixels (b, c, n) with those that fill the last part."""
        across, along = (x.norm(dim=3, keepdim=True).clamp(min=1e-12) for x in (q, k))
        logits = q @ k.mT / across / along.mT * temperature  # of tokens of unit length, which need not be there
        weights = logits.to(torch.promote_types(q.dtype, torch.float32)).exp()
        weights = (weights / (1 + weights.sum(3, keepdim=True))).to(v.dtype)  # what is left over looks at nothing
        out = (weights @ v).unflatten(2, (-1, self.num_heads))  # b heads c parts m
        out = out if bins else out.transpose(3, 4)
        return out.flatten(3).flatten(1, 2)

    def _split(self, x: Tensor, bins: bool, heads: int) -> Tensor:
        parts = self.num_heads
        x = F.pad(x, (0, -x.shape[2] % parts)).unflatten(1, (heads, -1))  # b heads c n
        if bins:
            return x.unflatten(3, (parts, -1)).flatten(2, 3)  # b heads (c parts) m
        return x.unflatten(3, (-1, parts)).transpose(3, 4).flatten(2, 3)


class FeedForward(nn.Module):
    """Dual-scale gated feed-forward: at twice the resolution, a 5x5 view gated by a dilated 3x3 one.

    Nothing is there at twice the resolution. A pixel of it is one of four phases of a pixel here: the dilated
    convolution sees its own phase only, as a plain 3x3 one, and the 5x5 one sees four phases in 3x3 pixels.
    """

    taps: Tensor

    def __init__(self, channels: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.wide, self.sparing = hidden // 4, False
        wide = self.wide
        self.project_in = nn.Conv2d(channels, 2 * hidden, 1, bias=bias)
        self.dwconv_5 = nn.Conv2d(wide, wide, 5, padding=2, groups=wide, bias=bias)
        self.dwconv_dilated2_1 = nn.Conv2d(wide, wide, 3, padding=2, groups=wide, dilation=2, bias=bias)
        self.project_out = nn.Conv2d(hidden, channels, 1, bias=bias)
        self.register_buffer("taps", _taps(), persistent=False)

    def forward(self, features: Tensor) -> Tensor:  # b c h w
        parts = _parts(0, self.wide) if self.sparing else [slice(0, self.wide)]
        if len(parts) == 1:
            return _matrix(self.project_out, self._gated(features, parts[0]))
        b, _, h, w = features.shape
        gated = features.new_empty(b, 4 * self.wide, h, w)
        for part in parts:  # only what goes into the last projection is there as a whole
            gated[:, 4 * part.start : 4 * part.stop] = self._gated(features, part)
        return _matrix(self.project_out, gated)

    def _gated(self, features: Tensor, part: slice) -> Tensor:
        """Some channels of what goes into the last projection; of every four, each is a phase."""
        narrow, wide = self.dwconv_dilated2_1, self.dwconv_5
        gate = self._projected(features, self.wide, part)
        gate = F.conv2d(gate, _by_phase(narrow.weight, part), _by_phase(narrow.bias, part), 1, 1, 1, gate.shape[1])
        gate = F.mish(gate)
        value = self._projected(features, 0, part)
        kernels = F.pad(wide.weight[part].flatten(1), (0, 1))[:, self.taps].view(-1, 4, 3, 3)  # (c phases) phases 3 3
        return F.conv2d(value, kernels, _by_phase(wide.bias, part), 1, 1, 1, value.shape[1] // 4) * gate

    def _projected(self, features: Tensor, first: int, part: slice) -> Tensor:
        """All phases of some channels, counted from `first`."""
        return _matrix(self.project_in, features, slice(4 * (first + part.start), 4 * (first + part.stop)))


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each after a norm and around a residual."""

    def __init__(self, channels: int, num_heads: int, hidden: int, bias: bool, norm: str, stable_sort: bool) -> None:
        super().__init__()
        self.norm_g = LayerNorm(norm)
        self.attn_g = Attention_histogram(channels, num_heads, bias, stable_sort)
        self.norm_ff1 = LayerNorm(norm)
        self.ffn = FeedForward(channels, hidden, bias)

    def forward(self, features: Tensor) -> Tensor:  # b c h w
        features = features + self.attn_g(self.norm_g(features))
        return features + self.ffn(self.norm_ff1(features))


class OverlapPatchEmbed(nn.Module):
    """A 3x3 convolution of the image."""

    def __init__(self, in_channels: int, channels: int, bias: bool) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, channels, 3, padding=1, bias=bias)

    def forward(self, image: Tensor) -> Tensor:
        return self.proj(image)


class SkipPatchEmbed(nn.Module):
    """The image at half its size, filtered: what the next level sees of it directly."""

    def __init__(self, in_channels: int, bias: bool) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.AvgPool2d(2),
            nn.Conv2d(in_channels, in_channels, 1, bias=bias),
            nn.Conv2d(in_channels, in_channels, 3, padding=1, groups=in_channels, bias=bias),
        )

    def forward(self, image: Tensor) -> Tensor:
        return self.proj(image)


class Resample(nn.Module):
    """A 3x3 convolution, then half the size with twice the channels, or the other way round.

    Args:
        channels: of the input.
        down: which of the two.
    """

    def __init__(self, channels: int, down: bool) -> None:
        super().__init__()
        conv = nn.Conv2d(channels, channels // 2 if down else 2 * channels, 3, padding=1, bias=False)
        self.body = nn.Sequential(conv, nn.PixelUnshuffle(2) if down else nn.PixelShuffle(2))

    def forward(self, features: Tensor) -> Tensor:
        return self.body(features)


class Histoformer(nn.Module):
    """The network: (b, c, h, w) in [0, 1] with sides that are multiples of 8 -> the same size, unclamped.

    Keywords are those of the official constructor; the defaults are those of the released files.

    Args:
        inp_channels: image channels, in and out.
        dim: channels at full resolution.
        num_blocks: blocks of the levels from full resolution to an eighth.
        num_refinement_blocks: blocks after the decoder, 2 dim wide.
        heads: attention heads of the levels, which are bins as well.
        ffn_expansion_factor: hidden width of the feed-forwards over the level's; must make it a multiple of 4.
        bias: of the convolutions.
        LayerNorm_type: "WithBias" or "BiasFree"; neither has weights, so that weights do not tell.
        stable_sort: ours: whether pixels of equal value keep their order. Not visible in weights.

    Raises:
        ValueError: a keyword is outside its range.
    """

    def __init__(
        self,
        *,
        inp_channels: int = 3,
        dim: int = 36,
        num_blocks: Sequence[int] = (4, 4, 6, 8),
        num_refinement_blocks: int = 4,
        heads: Sequence[int] = (1, 2, 4, 8),
        ffn_expansion_factor: float = 2.667,
        bias: bool = False,
        LayerNorm_type: str = "WithBias",
        stable_sort: bool = True,
    ) -> None:
        config = constructor_arguments(locals())
        super().__init__()
        self.config = config
        check_sizes("Histoformer", inp_channels=inp_channels, num_refinement_blocks=num_refinement_blocks)
        if dim < 2 or dim % 2:
            raise ValueError(f"Histoformer: dim must be even and at least 2, got {dim}")
        widths = [dim * 2**level for level in range(_LEVELS)]
        hidden = [int(width * ffn_expansion_factor) for width in widths]
        if len(num_blocks) != _LEVELS or len(heads) != _LEVELS or min(*num_blocks, *heads) < 1:
            raise ValueError(
                f"Histoformer: num_blocks and heads must be four numbers from 1 up, got {num_blocks}, {heads}"
            )
        if any(width % number for width, number in zip(widths, heads, strict=True)) or 2 * dim % heads[0]:
            raise ValueError(f"Histoformer: heads must divide the levels' widths {widths}, got {list(heads)}")
        if any(width % 4 or not width for width in hidden):
            raise ValueError(
                "Histoformer: ffn_expansion_factor must make hidden widths that are multiples of 4, "
                f"got {ffn_expansion_factor}, which makes {hidden}"
            )
        if LayerNorm_type not in ("WithBias", "BiasFree"):
            raise ValueError(f"Histoformer: LayerNorm_type must be WithBias or BiasFree, got {LayerNorm_type!r}")
        self.inp_channels = inp_channels

        def level(at: int, blocks: int, wide: int = 1) -> nn.Sequential:
            width = wide * widths[at]
            size = int(width * ffn_expansion_factor)
            return nn.Sequential(
                *(TransformerBlock(width, heads[at], size, bias, LayerNorm_type, stable_sort) for _ in range(blocks))
            )

        def join(before: int, after: int) -> nn.Conv2d:
            return nn.Conv2d(before, after, 1, bias=bias)

        self.patch_embed = OverlapPatchEmbed(inp_channels, dim, bias=False)
        self.encoder_level1 = level(0, num_blocks[0])
        self.down1_2 = Resample(widths[0], down=True)
        self.reduce_chan_level_1 = join(widths[1] + inp_channels, widths[1])
        self.encoder_level2 = level(1, num_blocks[1])
        self.down2_3 = Resample(widths[1], down=True)
        self.reduce_chan_level_2 = join(widths[2] + inp_channels, widths[2])
        self.encoder_level3 = level(2, num_blocks[2])
        self.down3_4 = Resample(widths[2], down=True)
        self.reduce_chan_level_3 = join(widths[3] + inp_channels, widths[3])
        self.latent = level(3, num_blocks[3])
        self.up4_3 = Resample(widths[3], down=False)
        self.reduce_chan_level3 = join(widths[3], widths[2])
        self.decoder_level3 = level(2, num_blocks[2])
        self.up3_2 = Resample(widths[2], down=False)
        self.reduce_chan_level2 = join(widths[2], widths[1])
        self.decoder_level2 = level(1, num_blocks[1])
        self.up2_1 = Resample(widths[1], down=False)
        self.decoder_level1 = level(0, num_blocks[0], wide=2)
        self.refinement = level(0, num_refinement_blocks, wide=2)
        self.output = nn.Conv2d(2 * dim, inp_channels, 3, padding=1, bias=bias)
        self.skip_patch_embed1 = SkipPatchEmbed(inp_channels, bias)
        self.skip_patch_embed2 = SkipPatchEmbed(inp_channels, bias)
        self.skip_patch_embed3 = SkipPatchEmbed(inp_channels, bias)

    def spare_memory(self, spare: bool) -> None:
        """Whether to work on a few channels at a time: the same sums in two thirds of the memory, more slowly."""
        for module in self.modules():
            if isinstance(module, Attention_histogram | FeedForward):
                module.sparing = spare

    def forward(self, lq: Tensor) -> Tensor:
        """Restore `lq`, (b, inp_channels, h, w) in [0, 1], h and w multiples of 8.

        Raises:
            ValueError: a side is not a multiple of 8, or the channels do not fit.
        """
        if lq.shape[1] != self.inp_channels or lq.shape[2] % 8 or lq.shape[3] % 8:
            raise ValueError(
                f"Histoformer: input must be (b, {self.inp_channels}, h, w) with sides that are multiples of 8, "
                f"got {tuple(lq.shape)}"
            )
        cat = torch.cat
        first = self.encoder_level1(self.patch_embed(lq))  # b d h w
        image = self.skip_patch_embed1(lq)
        second = self.encoder_level2(_matrix(self.reduce_chan_level_1, cat([self.down1_2(first), image], 1)))
        image = self.skip_patch_embed2(image)
        third = self.encoder_level3(_matrix(self.reduce_chan_level_2, cat([self.down2_3(second), image], 1)))
        image = self.skip_patch_embed3(image)
        latent = self.latent(_matrix(self.reduce_chan_level_3, cat([self.down3_4(third), image], 1)))
        out = self.decoder_level3(_matrix(self.reduce_chan_level3, cat([self.up4_3(latent), third], 1)))
        out = self.decoder_level2(_matrix(self.reduce_chan_level2, cat([self.up3_2(out), second], 1)))
        out = self.refinement(self.decoder_level1(cat([self.up2_1(out), first], 1)))
        return self.output(out) + lq


VARIANTS = {
    "histoformer-allweather": Variant({}),
    "histoformer-realsnow": Variant({}),
    "histoformer-tiny": Variant(
        {
            "dim": 8,
            "num_blocks": [1, 1, 1, 1],
            "num_refinement_blocks": 1,
            "heads": [1, 1, 2, 4],
            "ffn_expansion_factor": 2.5,
        }
    ),
}


def detect(state_dict: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Constructor keywords read off Histoformer weights; None when the weights are not Histoformer's.

    `LayerNorm_type` and `stable_sort` leave no trace in weights.
    """
    levels = ("encoder_level1", "encoder_level2", "encoder_level3", "latent")
    keys = [f"{level}.0.attn_g.temperature" for level in levels]
    hidden = "encoder_level1.0.ffn.project_out.weight"
    if any(
        key not in state_dict for key in (*keys, hidden, "patch_embed.proj.weight", "refinement.0.ffn.dwconv_5.weight")
    ):
        return None
    dim, channels = state_dict["patch_embed.proj.weight"].shape[:2]
    return {
        "inp_channels": channels,
        "dim": dim,
        "num_blocks": [count(state_dict, f"{level}.") for level in levels],
        "num_refinement_blocks": count(state_dict, "refinement."),
        "heads": [len(state_dict[key]) for key in keys],
        "ffn_expansion_factor": _factor(state_dict, levels, dim),
        "bias": "encoder_level1.0.attn_g.qkv.bias" in state_dict,
    }


def _factor(state_dict: Mapping[str, Tensor], levels: Sequence[str], dim: int) -> float:
    """The smallest factor of three digits that makes the hidden widths of all levels."""
    hidden = [state_dict[f"{level}.0.ffn.project_out.weight"].shape[1] for level in levels]
    widths = [dim * 2**level for level in range(_LEVELS)]
    lowest = max(size / width for size, width in zip(hidden, widths, strict=True))
    thousandths = range(int(1000 * lowest), int(1000 * lowest) + 1000)
    fits = (n / 1000 for n in thousandths if [int(width * n / 1000) for width in widths] == hidden)
    return next(fits, lowest)


def _needs(network: Histoformer) -> Needs:
    return Needs(
        upscale=1,
        in_channels=network.inp_channels,
        multiple=8,
        dtypes=("float32",),
        overlap=32,
        bytes_per_pixel=400 * network.config["dim"],
        whole=True,
        spare_bytes_per_pixel=240 * network.config["dim"],
    )


ENTRY = Entry(
    network=Histoformer,
    variants=VARIANTS,
    detect=detect,
    convert=dict,
    needs=_needs,
    hidden=frozenset({"LayerNorm_type", "stable_sort"}),
)
