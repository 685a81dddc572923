"""CRAFT, a light super-resolver: rectangle-window attention for low frequencies, max-pooling for high ones, then both.

Paper: "Feature Modulation Transformer: Cross-Refinement of Global Representation via High-Frequency Prior for Image
Super-Resolution" (ICCV 2023). Official code: AVC2-UESTC/CRAFT-SR, basicsr/archs/craft_arch.py, Apache-2.0.

Same parameter names and numbers as the official code. What differs: attention runs through
`zoo.kernels.window_attention`; maps stay in channels-last memory, so that tokens are views of them; channel attention
takes its cosines from one product over all pixels, which tiles can add up; a position bias that cannot depend on the
position is left out of inference: at the released width its layer norms see one number, so that it is one constant for
each head, to which the softmax is blind. Two keywords are ours: `mask_shift`, because the official windows let tokens
see those that the shift brought from the opposite border, and `global_residual`, which helps small networks.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.kernels.window_attention import relative_position_index, window_attention
from zoo.layers.global_mean import GlobalGram
from zoo.layers.linear import Linear
from zoo.layers.mlp import Mlp
from zoo.layers.pointwise import Pointwise
from zoo.layers.tokens import to_map, to_tokens
from zoo.models.entry import Entry, Needs, Variant, check_sizes, constructor_arguments, count, ratio

RGB_MEAN = (0.4488, 0.4371, 0.4040)
UPSCALES = (1, 2, 3, 4)
_FFN_FACTOR = 2.66  # of all official files


class DynamicPosBias(nn.Module):
    """The position bias of a window: an MLP of the offset, (rows, 2) -> (rows, num_heads)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.pos_proj = nn.Linear(2, width)
        self.pos1 = nn.Sequential(nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, width))
        self.pos2 = nn.Sequential(nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, width))
        self.pos3 = nn.Sequential(nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, num_heads))
        self.tells = width > 1  # a layer norm over one number returns its bias, whatever the number

    def forward(self, offsets: Tensor) -> Tensor:
        return self.pos3(self.pos2(self.pos1(self.pos_proj(offsets))))


class RectangleAttention(nn.Module):
    """Half of the heads in windows of one orientation."""

    def __init__(self, num_heads: int, width: int, window: tuple[int, int], shifted: bool, mask_shift: bool) -> None:
        super().__init__()
        self.window, self.shift = window, (window[0] // 2, window[1] // 2) if shifted else (0, 0)
        self.mask_shift = mask_shift
        self.pos = DynamicPosBias(width, num_heads)

    def forward(self, qkv: Sequence[Tensor], grid: tuple[int, int], offsets: Tensor, index: Tensor) -> Tensor:
        biased = self.pos.tells or self.training  # in training so that every parameter has a gradient, if only 0
        return window_attention(
            *qkv,
            grid=grid,
            window=self.window,
            shift=self.shift,
            wrap=not self.mask_shift,
            bias_table=self.pos(offsets) if biased else None,
            bias_index=index if biased else None,
        )


class SRWAB(nn.Module):
    """Shift rectangle window attention block: half of the channels in wide windows, half in high ones, then an MLP."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        split_size: tuple[int, int],
        shifted: bool,
        mlp_ratio: float,
        mask_shift: bool,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(embed_dim)
        self.qkv = Linear(embed_dim, 3 * embed_dim)
        width, (h, w) = embed_dim // 2 // 4 // 4, split_size
        self.attns = nn.ModuleList(
            RectangleAttention(num_heads // 2, width, window, shifted, mask_shift) for window in ((h, w), (w, h))
        )
        self.get_v = nn.Conv2d(embed_dim, embed_dim, 3, padding=1, groups=embed_dim)
        self.proj = Linear(embed_dim, embed_dim)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.mlp = Mlp(embed_dim, int(embed_dim * mlp_ratio))

    def forward(self, tokens: Tensor, grid: tuple[int, int], positions: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        b, n, c = tokens.shape
        qkv = self.qkv(self.norm1(tokens))  # b n (3 c)
        heads = qkv.view(b, n, 3, 2, self.num_heads // 2, -1).permute(3, 2, 0, 4, 1, 5)  # 2 3 b heads n d
        branches = [
            attend(half.unbind(0), grid, *position).transpose(1, 2).reshape(b, n, c // 2)
            for attend, half, position in zip(self.attns, heads, positions, strict=True)
        ]
        local = to_tokens(self.get_v(to_map(qkv[..., 2 * c :], grid)))  # b n c
        tokens = tokens + self.proj(torch.cat(branches, 2) + local)
        return tokens + self.mlp(self.norm2(tokens))


class HFERB(nn.Module):
    """High-frequency enhancement residual block: a convolution of half of the channels, the maxima of the others."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(embed_dim // 2, embed_dim // 2, 3, padding=1)
        self.fc = Pointwise(embed_dim // 2, embed_dim // 2)
        self.last_fc = Pointwise(embed_dim, embed_dim)

    def forward(self, features: Tensor) -> Tensor:  # b c h w
        smooth, sharp = features.chunk(2, 1)
        edges = self.fc(F.max_pool2d(sharp, 3, 1, 1))
        return features + self.last_fc(torch.cat([F.gelu(self.conv(smooth)), F.gelu(edges)], 1))


class ChannelNorm(nn.Module):
    """Layer norm over the channels of each pixel, (b, c, h, w) -> same."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.body = nn.LayerNorm(embed_dim)

    def forward(self, features: Tensor) -> Tensor:
        return self.body(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ChannelAttention(nn.Module):
    """Channels of the high-frequency map look at channels of the other, over all pixels."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.q = Pointwise(embed_dim, embed_dim, bias=False)
        self.q_dwconv = nn.Conv2d(embed_dim, embed_dim, 3, padding=1, groups=embed_dim, bias=False)
        self.kv = Pointwise(embed_dim, 2 * embed_dim, bias=False)
        self.kv_dwconv = nn.Conv2d(2 * embed_dim, 2 * embed_dim, 3, padding=1, groups=2 * embed_dim, bias=False)
        self.project_out = Pointwise(embed_dim, embed_dim, bias=False)
        self.gram = GlobalGram(num_heads)

    def forward(self, low: Tensor, high: Tensor) -> Tensor:  # b c h w
        num_heads, size = len(self.temperature), low.shape[1] // len(self.temperature)
        q = self.q_dwconv(self.q(high))
        k, v = self.kv_dwconv(self.kv(low)).chunk(2, 1)
        pairs = torch.cat([x.unflatten(1, (num_heads, -1)) for x in (q, k)], 2).flatten(1, 2)  # b (heads 2 d) h w
        gram = self.gram(pairs)  # b heads (2 d) (2 d); its diagonal holds the squared lengths
        lengths = gram.diagonal(dim1=2, dim2=3).clamp(min=1e-24).sqrt()  # b heads (2 d)
        cosines = gram[:, :, :size, size:] / (lengths[:, :, :size, None] * lengths[:, :, None, size:])
        weights = (cosines * self.temperature).softmax(-1).to(v.dtype)  # b heads d d
        # Attention and the projection behind it are one matrix for all pixels.
        projection = self.project_out.weight[:, :, 0, 0].unflatten(1, (num_heads, -1))  # c heads d
        matrix = torch.einsum("ohd,bhde->bohe", projection.to(v.dtype), weights).flatten(2)  # b c c
        return to_map(to_tokens(v) @ matrix.mT, (v.shape[2], v.shape[3]))


class GatedFeedForward(nn.Module):
    """Two depthwise maps, one gating the other."""

    def __init__(self, embed_dim: int, factor: float) -> None:
        super().__init__()
        hidden = int(embed_dim * factor)
        self.project_in = Pointwise(embed_dim, 2 * hidden, bias=False)
        self.dwconv = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden, bias=False)
        self.project_out = Pointwise(hidden, embed_dim, bias=False)

    def forward(self, features: Tensor) -> Tensor:  # b c h w
        gate, value = self.dwconv(self.project_in(features)).chunk(2, 1)
        return self.project_out(F.gelu(gate) * value)


class HFB(nn.Module):
    """Hybrid fusion block: the high-frequency map asks, the other answers."""

    def __init__(self, embed_dim: int, num_heads: int, ffn_factor: float) -> None:
        super().__init__()
        self.norm1 = ChannelNorm(embed_dim)
        self.attn = ChannelAttention(embed_dim, num_heads)
        self.norm2 = ChannelNorm(embed_dim)
        self.ffn = GatedFeedForward(embed_dim, ffn_factor)

    def forward(self, low: Tensor, high: Tensor) -> Tensor:  # b c h w
        fused = low + self.attn(self.norm1(low), high)
        return fused + self.ffn(self.norm2(fused))


class CRFB(nn.Module):
    """Cross-refinement fusion: for each step two window blocks, one high-frequency block, and their fusion."""

    def __init__(
        self,
        embed_dim: int,
        depth: int,
        num_heads: int,
        split_size: tuple[int, int],
        mlp_ratio: float,
        ffn_factor: float,
        mask_shift: bool,
    ) -> None:
        super().__init__()
        self.srwa_blocks = nn.ModuleList(
            SRWAB(embed_dim, num_heads, split_size, bool(j % 2), mlp_ratio, mask_shift) for j in range(2 * depth)
        )
        self.hfer_blocks = nn.ModuleList(HFERB(embed_dim) for _ in range(depth))
        self.hf_blocks = nn.ModuleList(HFB(embed_dim, num_heads, ffn_factor) for _ in range(depth))

    def forward(self, features: Tensor, positions: Sequence[tuple[Tensor, Tensor]]) -> Tensor:  # b c h w
        grid = (features.shape[2], features.shape[3])
        for j, (enhance, fuse) in enumerate(zip(self.hfer_blocks, self.hf_blocks, strict=True)):
            tokens = to_tokens(features)  # b n c
            for block in self.srwa_blocks[2 * j : 2 * j + 2]:
                tokens = block(tokens, grid, positions)
            features = fuse(to_map(tokens, grid), enhance(features))
        return features


class RCRFG(nn.Module):
    """Residual group: fusions, a 3x3 convolution, a residual."""

    def __init__(self, group: CRFB, embed_dim: int) -> None:
        super().__init__()
        self.residual_group = group
        self.conv = nn.Conv2d(embed_dim, embed_dim, 3, padding=1)

    def forward(self, features: Tensor, positions: Sequence[tuple[Tensor, Tensor]]) -> Tensor:  # b c h w
        return self.conv(self.residual_group(features, positions)) + features


class CRAFT(nn.Module):
    """The network: (b, c, h, w) in [0, 1] with sides that fit both windows -> (b, c, h*upscale, w*upscale).

    Keywords are those of the official constructor that have an effect; the defaults are those of the released files.

    Args:
        in_chans: image channels, in and out; 3 subtracts the RGB mean.
        embed_dim: channels of every map.
        depths: fusions per group.
        num_heads: heads per group, even.
        split_size_0: short side of the windows, tokens.
        split_size_1: long side.
        mlp_ratio: hidden width of the MLPs over `embed_dim`.
        ffn_factor: hidden width of the gated layers over `embed_dim`.
        upscale: 1, 2, 3 or 4.
        img_range: factor on the inputs after the mean is taken off. Not visible in weights.
        resi_connection: "1conv" or "identity".
        mask_shift: ours: shifted windows keep tokens of opposite borders apart. Not visible in weights.
        global_residual: ours: add the (bicubic-enlarged) input to the output. Not visible in weights.

    Raises:
        ValueError: a keyword is outside its range.
    """

    mean: Tensor
    relative_position_index_h: Tensor
    relative_position_index_v: Tensor
    biases_h: Tensor
    biases_v: Tensor

    def __init__(
        self,
        *,
        in_chans: int = 3,
        embed_dim: int = 48,
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (6, 6, 6, 6),
        split_size_0: int = 4,
        split_size_1: int = 16,
        mlp_ratio: float = 2.0,
        ffn_factor: float = _FFN_FACTOR,
        upscale: int = 4,
        img_range: float = 1.0,
        resi_connection: str = "1conv",
        mask_shift: bool = False,
        global_residual: bool = False,
    ) -> None:
        config = constructor_arguments(locals())
        super().__init__()
        self.config = config
        check_sizes("CRAFT", in_chans=in_chans, split_size_0=split_size_0, split_size_1=split_size_1)
        if embed_dim < 32 or embed_dim % 2:
            raise ValueError(f"CRAFT: embed_dim must be even and at least 32, got {embed_dim}")
        if not depths or min(depths) < 1:
            raise ValueError(f"CRAFT: depths must list at least one group of at least one fusion, got {list(depths)}")
        if len(depths) != len(num_heads) or any(heads < 2 or heads % 2 or embed_dim % heads for heads in num_heads):
            raise ValueError(
                f"CRAFT: num_heads must be one even divisor of embed_dim={embed_dim} per group of "
                f"depths={list(depths)}, got {list(num_heads)}"
            )
        if upscale not in UPSCALES or resi_connection not in ("1conv", "identity"):
            raise ValueError(
                "CRAFT: upscale must be 1, 2, 3 or 4 and resi_connection '1conv' or 'identity', "
                f"got {upscale}, {resi_connection!r}"
            )
        if int(embed_dim * min(mlp_ratio, ffn_factor)) < 1 or img_range <= 0:
            raise ValueError(
                "CRAFT: embed_dim * mlp_ratio and embed_dim * ffn_factor must be at least 1 and img_range above 0, "
                f"got {embed_dim * mlp_ratio}, {embed_dim * ffn_factor}, {img_range}"
            )
        self.in_chans, self.upscale, self.img_range = in_chans, upscale, img_range
        self.global_residual = global_residual
        self.multiple = math.lcm(split_size_0, split_size_1)
        split_size = (split_size_0, split_size_1)
        mean = RGB_MEAN if in_chans == 3 else (0.0,)
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        for name, window in (("h", split_size), ("v", (split_size_1, split_size_0))):
            self.register_buffer(f"relative_position_index_{name}", relative_position_index(window))
            self.register_buffer(f"biases_{name}", _offsets(window))
        self.conv_first = nn.Conv2d(in_chans, embed_dim, 3, padding=1)
        self.layers = nn.ModuleList(
            RCRFG(CRFB(embed_dim, depth, heads, split_size, mlp_ratio, ffn_factor, mask_shift), embed_dim)
            for depth, heads in zip(depths, num_heads, strict=True)
        )
        self.norm = ChannelNorm(embed_dim)
        residual = resi_connection == "1conv"
        self.conv_after_body = nn.Conv2d(embed_dim, embed_dim, 3, padding=1) if residual else nn.Identity()
        self.upsample = nn.Sequential(
            nn.Conv2d(embed_dim, upscale**2 * in_chans, 3, padding=1), nn.PixelShuffle(upscale)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw random weights: linear layers normal with std 0.02, convolutions as torch does."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, lq: Tensor) -> Tensor:
        """Restore `lq`, (b, in_chans, h, w) in [0, 1], h and w multiples of both window sides.

        Raises:
            ValueError: a side fits no windows, or the channels do not fit.
        """
        if lq.shape[1] != self.in_chans or lq.shape[2] % self.multiple or lq.shape[3] % self.multiple:
            raise ValueError(
                f"CRAFT: input must be (b, {self.in_chans}, h, w) with sides that are multiples of {self.multiple}, "
                f"got {tuple(lq.shape)}"
            )
        shallow = self.conv_first((lq - self.mean) * self.img_range)
        shallow = shallow.contiguous(memory_format=torch.channels_last)  # b c h w
        positions = (
            (self.biases_h, self.relative_position_index_h),
            (self.biases_v, self.relative_position_index_v),
        )
        deep = shallow
        for layer in self.layers:
            deep = layer(deep, positions)
        deep = self.conv_after_body(self.norm(deep)) + shallow
        out = self.upsample(deep) / self.img_range
        if self.global_residual:
            return out + F.interpolate(lq, scale_factor=self.upscale, mode="bicubic", align_corners=False)
        return out + self.mean


def _offsets(window: tuple[int, int]) -> Tensor:
    """(dy, dx) of every row of a bias table, ((2 wh - 1) (2 ww - 1), 2)."""
    dy, dx = (torch.arange(1 - side, side, dtype=torch.float32) for side in window)
    return torch.cartesian_prod(dy, dx)


def _released(upscale: int) -> Variant:
    return Variant({"upscale": upscale})


VARIANTS = {
    **{f"craft-x{upscale}": _released(upscale) for upscale in (2, 3, 4)},
    "craft-tiny-x2": Variant(
        # Wide enough for a position bias that tells positions.
        {"embed_dim": 64, "depths": [1], "num_heads": [4], "upscale": 2, "global_residual": True}
    ),
}


def detect(state_dict: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Constructor keywords read off CRAFT weights; None when the weights are not CRAFT's.

    `img_range`, `mask_shift` and `global_residual` leave no trace in weights; ratios come back as one of the values
    that give the widths.
    """
    first = "layers.0.residual_group."
    hidden = (first + "srwa_blocks.0.mlp.fc1.weight", first + "hf_blocks.0.ffn.project_out.weight")
    needed = (*hidden, "conv_first.weight", "upsample.0.weight", first + "hf_blocks.0.attn.temperature")
    if any(key not in state_dict for key in needed):
        return None
    embed_dim, in_chans = state_dict["conv_first.weight"].shape[:2]
    narrow = state_dict[hidden[1]].shape[1]
    group = "layers.{}.residual_group."
    groups = range(count(state_dict, "layers."))
    return {
        "in_chans": in_chans,
        "embed_dim": embed_dim,
        "depths": [count(state_dict, group.format(i) + "hfer_blocks.") for i in groups],
        "num_heads": [len(state_dict[group.format(i) + "hf_blocks.0.attn.temperature"]) for i in groups],
        **_split_size(state_dict),
        "mlp_ratio": ratio(state_dict[hidden[0]].shape[0], embed_dim),
        "ffn_factor": _FFN_FACTOR if int(embed_dim * _FFN_FACTOR) == narrow else ratio(narrow, embed_dim),
        "upscale": math.isqrt(state_dict["upsample.0.weight"].shape[0] // in_chans),
        "resi_connection": "1conv" if "conv_after_body.weight" in state_dict else "identity",
    }


def _split_size(state_dict: Mapping[str, Tensor]) -> dict[str, int]:
    """Both sides of the windows; sizes alone, since weights on the meta device hold no numbers."""
    rows = state_dict["biases_h"].shape[0]  # (2 s0 - 1) (2 s1 - 1)
    tokens = math.isqrt(state_dict["relative_position_index_h"].numel())  # s0 s1
    total = (4 * tokens + 1 - rows) // 2  # s0 + s1
    apart = math.isqrt(total**2 - 4 * tokens)
    sides = (total - apart) // 2, (total + apart) // 2
    table = state_dict["biases_h"]
    if not table.is_meta and round(1 - float(table[0, 0])) == sides[1]:
        sides = sides[::-1]
    return {"split_size_0": sides[0], "split_size_1": sides[1]}


def _needs(network: CRAFT) -> Needs:
    embed_dim = network.config["embed_dim"]
    return Needs(
        upscale=network.upscale,
        in_channels=network.in_chans,
        multiple=network.multiple,
        dtypes=("float32", "bfloat16"),
        overlap=2 * network.multiple,
        bytes_per_pixel=4 * (22 * embed_dim + 2 * network.in_chans * network.upscale**2),
        passes=2,
    )


ENTRY = Entry(
    network=CRAFT,
    variants=VARIANTS,
    detect=detect,
    convert=dict,
    needs=_needs,
    hidden=frozenset({"img_range", "mask_shift", "global_residual"}),
)
