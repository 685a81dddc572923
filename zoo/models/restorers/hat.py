"""HAT, the Hybrid Attention Transformer: window attention and channel attention side by side, joined across windows.

Papers: "Activating More Pixels in Image Super-Resolution Transformer" (CVPR 2023) and "HAT: Hybrid Attention
Transformer for Image Restoration" (2309.05239). Official code: XPixelGroup/HAT, hat/archs/hat_arch.py, Apache-2.0.

Same parameter names and numbers as the official code. What differs: attention runs through
`zoo.kernels.window_attention` (no logits in memory, shift mask computed where it is needed), the mean is a buffer
outside the state dict, `use_checkpoint` works, `num_feat` is a keyword, and two flags are ours: `upscale=1` together
with `global_residual=True` is a restoration head for images that keep their size. `drop_rate` and `attn_drop_rate`,
0 in every official run, are left out.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from zoo.kernels.window_attention import overlapping_position_index, relative_position_index, window_attention
from zoo.layers.global_mean import GlobalMean
from zoo.layers.linear import Linear
from zoo.layers.mlp import Mlp
from zoo.layers.pixel_shuffle import UPSCALES, Upsample, upscale_of
from zoo.layers.tokens import to_map, to_tokens
from zoo.models.entry import Entry, Needs, Variant, check_sizes, constructor_arguments, count, ratio

RGB_MEAN = (0.4488, 0.4371, 0.4040)


class DropPath(nn.Module):
    """Stochastic depth: in training, drops the whole branch of a sample with probability `rate`."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:  # b ...
        if not self.training or self.rate == 0:
            return branch
        keep = torch.rand(branch.shape[0], device=branch.device) >= self.rate  # b
        return branch * (keep / (1 - self.rate)).to(branch.dtype).view(-1, *[1] * (branch.ndim - 1))


class ChannelAttention(nn.Module):
    """Scale each channel by a gate computed from the global average of all channels."""

    def __init__(self, num_feat: int, squeeze_factor: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(
            GlobalMean(),
            nn.Conv2d(num_feat, num_feat // squeeze_factor, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(num_feat // squeeze_factor, num_feat, 1),
            nn.Sigmoid(),
        )

    def forward(self, features: Tensor) -> Tensor:  # b c h w
        return features * self.attention(features)


class CAB(nn.Module):
    """Channel attention block: two 3x3 convolutions through a narrow middle, then channel attention."""

    def __init__(self, num_feat: int, compress_ratio: int, squeeze_factor: int) -> None:
        super().__init__()
        self.cab = nn.Sequential(
            nn.Conv2d(num_feat, num_feat // compress_ratio, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(num_feat // compress_ratio, num_feat, 3, padding=1),
            ChannelAttention(num_feat, squeeze_factor),
        )

    def forward(self, features: Tensor) -> Tensor:  # b c h w
        return self.cab(features)


class WindowAttention(nn.Module):
    """Self-attention inside windows, with a position bias table shared by all windows."""

    def __init__(
        self, embed_dim: int, window_size: int, num_heads: int, qkv_bias: bool, qk_scale: float | None
    ) -> None:
        super().__init__()
        self.window_size, self.num_heads, self.qk_scale = window_size, num_heads, qk_scale
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window_size - 1) ** 2, num_heads))
        self.qkv = Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        self.proj = Linear(embed_dim, embed_dim)

    def forward(self, tokens: Tensor, grid: tuple[int, int], index: Tensor, shift: int) -> Tensor:
        b, n, c = tokens.shape
        q, k, v = self.qkv(tokens).view(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # b heads n d
        out = window_attention(
            q,
            k,
            v,
            grid=grid,
            window=(self.window_size, self.window_size),
            shift=(shift, shift),
            bias_table=self.relative_position_bias_table,
            bias_index=index,
            scale=self.qk_scale,
        )
        return self.proj(out.transpose(1, 2).reshape(b, n, c))


class HAB(nn.Module):
    """Hybrid attention block: (shifted) window attention plus scaled channel attention, then an MLP."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        window_size: int,
        shift_size: int,
        compress_ratio: int,
        squeeze_factor: int,
        conv_scale: float,
        mlp_ratio: float,
        qkv_bias: bool,
        qk_scale: float | None,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.shift_size, self.conv_scale = shift_size, conv_scale
        self.norm1 = nn.LayerNorm(embed_dim)
        self.attn = WindowAttention(embed_dim, window_size, num_heads, qkv_bias, qk_scale)
        self.conv_block = CAB(embed_dim, compress_ratio, squeeze_factor)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.mlp = Mlp(embed_dim, int(embed_dim * mlp_ratio))

    def forward(self, tokens: Tensor, grid: tuple[int, int], index: Tensor) -> Tensor:
        normed = self.norm1(tokens)  # b n c
        local = to_tokens(self.conv_block(to_map(normed, grid)))  # b n c; neither shifted nor dropped
        attended = self.drop_path(self.attn(normed, grid, index, self.shift_size))
        tokens = torch.add(tokens + attended, local, alpha=self.conv_scale)
        return tokens + self.drop_path(self.mlp(self.norm2(tokens)))


class OCAB(nn.Module):
    """Overlapping cross-attention block: queries of a window look at keys of a larger window around it."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        window_size: int,
        overlap_ratio: float,
        mlp_ratio: float,
        qkv_bias: bool,
        qk_scale: float | None,
    ) -> None:
        super().__init__()
        self.window_size, self.num_heads, self.qk_scale = window_size, num_heads, qk_scale
        self.overlap = int(window_size * overlap_ratio) // 2
        rows = (2 * window_size + 2 * self.overlap - 1) ** 2
        self.norm1 = nn.LayerNorm(embed_dim)
        self.qkv = Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        self.relative_position_bias_table = nn.Parameter(torch.empty(rows, num_heads))
        self.proj = Linear(embed_dim, embed_dim)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.mlp = Mlp(embed_dim, int(embed_dim * mlp_ratio))

    def forward(self, tokens: Tensor, grid: tuple[int, int], index: Tensor) -> Tensor:
        b, n, c = tokens.shape
        q, k, v = self.qkv(self.norm1(tokens)).view(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # b heads n d
        out = window_attention(
            q,
            k,
            v,
            grid=grid,
            window=(self.window_size, self.window_size),
            overlap=(self.overlap, self.overlap),
            bias_table=self.relative_position_bias_table,
            bias_index=index,
            pad="attend",  # zero keys beyond the border are attended in the official code
            scale=self.qk_scale,
        )
        tokens = tokens + self.proj(out.transpose(1, 2).reshape(b, n, c))
        return tokens + self.mlp(self.norm2(tokens))


class AttenBlocks(nn.Module):
    """Hybrid blocks, every second one shifted, followed by one overlapping block."""

    def __init__(self, blocks: Sequence[HAB], overlap_attn: OCAB) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.overlap_attn = overlap_attn

    def forward(self, tokens: Tensor, grid: tuple[int, int], index_self: Tensor, index_cross: Tensor) -> Tensor:
        for block in self.blocks:
            tokens = block(tokens, grid, index_self)
        return self.overlap_attn(tokens, grid, index_cross)


class RHAG(nn.Module):
    """Residual hybrid attention group: blocks, a 3x3 convolution (or nothing), a residual."""

    def __init__(self, group: AttenBlocks, embed_dim: int, resi_connection: str) -> None:
        super().__init__()
        self.residual_group = group
        self.conv = nn.Conv2d(embed_dim, embed_dim, 3, padding=1) if resi_connection == "1conv" else nn.Identity()

    def forward(self, tokens: Tensor, grid: tuple[int, int], index_self: Tensor, index_cross: Tensor) -> Tensor:
        out = self.residual_group(tokens, grid, index_self, index_cross)
        return to_tokens(self.conv(to_map(out, grid))) + tokens


class PatchEmbed(nn.Module):
    """Layer norm of the tokens right after the first convolution; absent when `patch_norm` is off."""

    def __init__(self, embed_dim: int, patch_norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(embed_dim) if patch_norm else None

    def forward(self, features: Tensor) -> Tensor:  # b c h w
        tokens = to_tokens(features)  # b n c
        return tokens if self.norm is None else self.norm(tokens)


class HAT(nn.Module):
    """The network: (b, c, h, w) in [0, 1] with sides that are multiples of the window -> (b, c, h*upscale, w*upscale).

    Keywords are those of the official constructor; the defaults are those of the released HAT, not the official
    defaults, which no released file uses.

    Args:
        img_size: training size. Weights do not depend on it, except that a size equal to the window turns shifts off.
        patch_size: 1, the only size that has a meaning here.
        in_chans: image channels, in and out; 3 subtracts the RGB mean.
        embed_dim: token width.
        depths: hybrid blocks per group.
        num_heads: attention heads per group.
        window_size: side of the attention windows, tokens.
        compress_ratio: width over the narrow middle of the convolution branch.
        squeeze_factor: width over the narrow middle of channel attention.
        conv_scale: weight of the convolution branch. Not visible in weights.
        overlap_ratio: how much larger the key windows of the overlapping block are.
        mlp_ratio: hidden width of the MLPs over `embed_dim`.
        qkv_bias: whether query, key and value projections have a bias.
        qk_scale: attention softmax scale, None for head_dim ** -0.5.
        drop_path_rate: stochastic depth of the last block; blocks before it get linearly less.
        ape: absolute position embedding; ties the network to inputs of `img_size`.
        patch_norm: layer norm after the first convolution.
        use_checkpoint: recompute each group in the backward pass instead of keeping its activations.
        upscale: 1, 2, 3, 4 or 8.
        img_range: factor on the inputs after the mean is taken off. Not visible in weights.
        upsampler: "pixelshuffle"; the official code returns its input unchanged for every other word.
        resi_connection: "1conv" or "identity".
        num_feat: width of the reconstruction head (64 in every official file).
        global_residual: ours: add the (bicubic-enlarged) input to the output. Not visible in weights.

    Raises:
        ValueError: a keyword is outside its range.
    """

    mean: Tensor
    relative_position_index_SA: Tensor
    relative_position_index_OCA: Tensor

    def __init__(
        self,
        *,
        img_size: int = 64,
        patch_size: int = 1,
        in_chans: int = 3,
        embed_dim: int = 180,
        depths: Sequence[int] = (6, 6, 6, 6, 6, 6),
        num_heads: Sequence[int] = (6, 6, 6, 6, 6, 6),
        window_size: int = 16,
        compress_ratio: int = 3,
        squeeze_factor: int = 30,
        conv_scale: float = 0.01,
        overlap_ratio: float = 0.5,
        mlp_ratio: float = 2.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_path_rate: float = 0.1,
        ape: bool = False,
        patch_norm: bool = True,
        use_checkpoint: bool = False,
        upscale: int = 2,
        img_range: float = 1.0,
        upsampler: str = "pixelshuffle",
        resi_connection: str = "1conv",
        num_feat: int = 64,
        global_residual: bool = False,
    ) -> None:
        config = constructor_arguments(locals())
        super().__init__()
        self.config = config
        sizes = {"in_chans": in_chans, "embed_dim": embed_dim, "window_size": window_size, "num_feat": num_feat}
        check_sizes("HAT", **sizes, compress_ratio=compress_ratio, squeeze_factor=squeeze_factor)
        if upsampler != "pixelshuffle":
            raise ValueError(f"HAT: upsampler must be 'pixelshuffle' (use upscale=1 for same size), got {upsampler!r}")
        if patch_size != 1 or upscale not in UPSCALES or resi_connection not in ("1conv", "identity"):
            raise ValueError(
                "HAT: patch_size must be 1, upscale 1, 2, 3, 4 or 8, resi_connection '1conv' or 'identity', "
                f"got {patch_size}, {upscale}, {resi_connection!r}"
            )
        if not depths or min(depths) < 1:
            raise ValueError(f"HAT: depths must list at least one group of at least one block, got {list(depths)}")
        if len(depths) != len(num_heads) or any(heads < 1 or embed_dim % heads for heads in num_heads):
            raise ValueError(
                f"HAT: num_heads must be one divisor of embed_dim={embed_dim} per group of depths={list(depths)}, "
                f"got {list(num_heads)}"
            )
        if max(compress_ratio, squeeze_factor) > embed_dim:
            raise ValueError(
                f"HAT: compress_ratio and squeeze_factor must be at most embed_dim={embed_dim}, "
                f"got {compress_ratio}, {squeeze_factor}"
            )
        if overlap_ratio < 0 or int(embed_dim * mlp_ratio) < 1 or not 0 <= drop_path_rate < 1 or img_range <= 0:
            raise ValueError(
                "HAT: overlap_ratio must be at least 0, embed_dim * mlp_ratio at least 1, drop_path_rate in [0, 1) "
                f"and img_range above 0, got {overlap_ratio}, {embed_dim * mlp_ratio}, {drop_path_rate}, {img_range}"
            )
        if img_size < window_size or int(window_size * overlap_ratio) % 2:
            raise ValueError(
                f"HAT: img_size must be at least window_size={window_size} and window_size * overlap_ratio even, "
                f"got {img_size}, {overlap_ratio}"
            )
        self.upscale, self.in_chans, self.window_size, self.num_feat = upscale, in_chans, window_size, num_feat
        self.embed_dim, self.img_range, self.global_residual = embed_dim, img_range, global_residual
        self.use_checkpoint = use_checkpoint
        overlap = int(window_size * overlap_ratio) // 2
        mean = RGB_MEAN if in_chans == 3 else (0.0,)
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("relative_position_index_SA", relative_position_index(window_size))
        self.register_buffer(
            "relative_position_index_OCA", overlapping_position_index(window_size, window_size + 2 * overlap)
        )

        self.conv_first = nn.Conv2d(in_chans, embed_dim, 3, padding=1)
        self.patch_embed = PatchEmbed(embed_dim, patch_norm)
        self.absolute_pos_embed = nn.Parameter(torch.empty(1, img_size**2, embed_dim)) if ape else None
        shift = 0 if img_size == window_size else window_size // 2
        total = sum(depths)
        rates = [drop_path_rate * i / max(1, total - 1) for i in range(total)]
        groups = []
        for i, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
            before = sum(depths[:i])
            blocks = [
                HAB(
                    embed_dim,
                    heads,
                    window_size,
                    shift if j % 2 else 0,
                    compress_ratio,
                    squeeze_factor,
                    conv_scale,
                    mlp_ratio,
                    qkv_bias,
                    qk_scale,
                    rates[before + j],
                )
                for j in range(depth)
            ]
            last = OCAB(embed_dim, heads, window_size, overlap_ratio, mlp_ratio, qkv_bias, qk_scale)
            groups.append(RHAG(AttenBlocks(blocks, last), embed_dim, resi_connection))
        self.layers = nn.ModuleList(groups)
        self.norm = nn.LayerNorm(embed_dim)
        residual = resi_connection == "1conv"
        self.conv_after_body = nn.Conv2d(embed_dim, embed_dim, 3, padding=1) if residual else nn.Identity()
        self.conv_before_upsample = nn.Sequential(nn.Conv2d(embed_dim, num_feat, 3, padding=1), nn.LeakyReLU())
        self.upsample = Upsample(upscale, num_feat)
        self.conv_last = nn.Conv2d(num_feat, in_chans, 3, padding=1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw random weights: linear layers and tables normal with std 0.02, convolutions as torch does."""
        for name, parameter in self.named_parameters():
            if name.endswith(("relative_position_bias_table", "absolute_pos_embed")):
                nn.init.trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, lq: Tensor) -> Tensor:
        """Restore `lq`, (b, in_chans, h, w) in [0, 1], h and w multiples of window_size.

        Raises:
            ValueError: a side is not a multiple of the window, or the channels do not fit.
        """
        if lq.shape[1] != self.in_chans or lq.shape[2] % self.window_size or lq.shape[3] % self.window_size:
            raise ValueError(
                f"HAT: input must be (b, {self.in_chans}, h, w) with sides that are multiples of {self.window_size}, "
                f"got {tuple(lq.shape)}"
            )
        shallow = self.conv_first((lq - self.mean) * self.img_range)  # b c h w
        deep = self.conv_after_body(self.forward_features(shallow)) + shallow
        out = self.conv_last(self.upsample(self.conv_before_upsample(deep))) / self.img_range + self.mean
        if self.global_residual:
            out = out - self.mean + F.interpolate(lq, scale_factor=self.upscale, mode="bicubic", align_corners=False)
        return out

    def forward_features(self, features: Tensor) -> Tensor:
        """The attention groups on a feature map, (b, embed_dim, h, w) -> same."""
        grid = (features.shape[2], features.shape[3])
        tokens = self.patch_embed(features)  # b n c
        if self.absolute_pos_embed is not None:
            tokens = tokens + self.absolute_pos_embed
        indices = (self.relative_position_index_SA, self.relative_position_index_OCA)
        for layer in self.layers:
            if self.use_checkpoint and self.training:
                tokens = checkpoint(layer, tokens, grid, *indices, use_reentrant=False)
            else:
                tokens = layer(tokens, grid, *indices)
        return to_map(self.norm(tokens), grid)


def _released(upscale: int, *, embed_dim: int = 180, groups: int = 6, compress: int = 3, squeeze: int = 30) -> dict:
    return {
        "embed_dim": embed_dim,
        "depths": [6] * groups,
        "num_heads": [6] * groups,
        "compress_ratio": compress,
        "squeeze_factor": squeeze,
        "upscale": upscale,
    }


_TINY = {
    "embed_dim": 48,
    "depths": [2],
    "num_heads": [3],
    "window_size": 8,
    "compress_ratio": 1,
    "squeeze_factor": 48,  # one number per photo: more would name it
    "conv_scale": 1.0,
    "drop_path_rate": 0.0,
    "num_feat": 32,
    "global_residual": True,
}
_SMALL = {"embed_dim": 144, "compress": 24, "squeeze": 24}
VARIANTS = {
    "hat-s-x2": Variant(_released(2, **_SMALL)),
    "hat-s-x3": Variant(_released(3, **_SMALL)),
    "hat-s-x4": Variant(_released(4, **_SMALL)),
    "hat-x2": Variant(_released(2)),
    "hat-x3": Variant(_released(3)),
    "hat-x4": Variant(_released(4)),
    "hat-x2-imagenet": Variant(_released(2)),
    "hat-x3-imagenet": Variant(_released(3)),
    "hat-x4-imagenet": Variant(_released(4)),
    "hat-x4-real": Variant(_released(4)),
    "hat-x4-real-sharper": Variant(_released(4)),
    "hat-l-x2": Variant(_released(2, groups=12)),
    "hat-l-x3": Variant(_released(3, groups=12)),
    "hat-l-x4": Variant(_released(4, groups=12)),
    "hat-tiny-x2": Variant(_TINY | {"upscale": 2}),
    "hat-tiny-x4": Variant(_TINY | {"upscale": 4}),
}


def detect(state_dict: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Constructor keywords read off HAT weights; None when the weights are not HAT's.

    `conv_scale`, `img_range`, `qk_scale`, `global_residual` and the drop rate leave no trace in weights; ratios come
    back as one of the values that give the same widths.
    """
    attention = "layers.0.residual_group.blocks.0.attn.relative_position_bias_table"
    crossing = "layers.0.residual_group.overlap_attn.relative_position_bias_table"
    first = "layers.0.residual_group.blocks.0."
    needed = (attention, crossing, "conv_first.weight", "conv_before_upsample.0.weight", first + "mlp.fc1.weight")
    if any(key not in state_dict for key in needed):
        return None
    embed_dim, in_chans = state_dict["conv_first.weight"].shape[:2]
    window = (math.isqrt(state_dict[attention].shape[0]) + 1) // 2
    key_window = math.isqrt(state_dict[crossing].shape[0]) - window + 1
    num_feat = state_dict["conv_before_upsample.0.weight"].shape[0]
    groups = count(state_dict, "layers.")
    group = "layers.{}.residual_group."
    head = [v.shape[0] for k, v in state_dict.items() if k.startswith("upsample.") and k.endswith(".weight")]
    found: dict[str, Any] = {
        "in_chans": in_chans,
        "embed_dim": embed_dim,
        "depths": [count(state_dict, group.format(i) + "blocks.") for i in range(groups)],
        "num_heads": [
            state_dict[group.format(i) + "overlap_attn.relative_position_bias_table"].shape[1] for i in range(groups)
        ],
        "window_size": window,
        "compress_ratio": embed_dim // state_dict[first + "conv_block.cab.0.weight"].shape[0],
        "squeeze_factor": embed_dim // state_dict[first + "conv_block.cab.3.attention.1.weight"].shape[0],
        "overlap_ratio": ratio(key_window - window, window),
        "mlp_ratio": ratio(state_dict[first + "mlp.fc1.weight"].shape[0], embed_dim),
        "qkv_bias": first + "attn.qkv.bias" in state_dict,
        "ape": "absolute_pos_embed" in state_dict,
        "patch_norm": "patch_embed.norm.weight" in state_dict,
        "upscale": upscale_of(head, num_feat),
        "resi_connection": "1conv" if "conv_after_body.weight" in state_dict else "identity",
        "num_feat": num_feat,
    }
    if found["ape"]:
        found["img_size"] = math.isqrt(state_dict["absolute_pos_embed"].shape[1])
    return found


def _needs(network: HAT) -> Needs:
    # Per input pixel in float32: about 17 live token maps, and two maps of the head at full size (measured).
    head = network.num_feat * network.upscale**2 * 2
    return Needs(
        upscale=network.upscale,
        in_channels=network.in_chans,
        multiple=network.window_size,
        dtypes=("float32", "bfloat16"),
        overlap=2 * network.window_size,
        bytes_per_pixel=4 * (17 * network.embed_dim + head),
        # At the official 0.01 channel attention weighs too little for its means to matter (measured).
        passes=2 if network.config["conv_scale"] > 0.05 else 0,
    )


ENTRY = Entry(
    network=HAT,
    variants=VARIANTS,
    detect=detect,
    convert=dict,
    needs=_needs,
    hidden=frozenset({"conv_scale", "img_range", "img_size", "qk_scale", "drop_path_rate", "global_residual"}),
)
