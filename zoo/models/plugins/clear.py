"""CLEAR: each token of the picture attends to a circle around it and to the text, with a softmax.

Paper: "CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up" (Liu et al., NeurIPS 2025, arXiv
2412.16112). Official code: Huage001/CLEAR, attention_processor.py; Apache-2.0. Published for FLUX.1-dev.

    key j of query i of the picture:  a token of the text, or (y_i - y_j)^2 + (x_i - x_j)^2 < window_size^2
    key j of query i of the text:     any token
    with down_factor f:               the picture also sees sums over cells of f x f tokens, weighted by a table for
                                      each layer that begins as a mean
    scale with proportional attention:  (log_4608(n) / d)^0.5, with cells (log_4608(10 n) / d)^0.5

Same numbers as the official code. What differs: any length of the text, any size (tokens beyond the last whole cell
are in no cell), no state outside the denoiser, and it comes off again.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.errors import UserError
from zoo.kernels.neighborhood_attention import neighborhood_attention
from zoo.models.plugins.hosts import Host, Layout, base
from zoo.models.plugins.plugin import Plugin

_TOKENS = 64 * 64 + 512  # of FLUX.1 at 1024 pixels
_ALIGN = 4  # every so many layers


class Clear(Plugin):
    """The method on one denoiser; parameters as in the official files."""

    title = "CLEAR"

    def __init__(self, config: "ClearConfig", host: Host, denoiser: nn.Module) -> None:
        super().__init__(config, host, denoiser)
        if config.ntk_factor != 1 and not isinstance(
            getattr(getattr(denoiser, "pos_embed", None), "theta", None), int | float
        ):
            raise UserError(
                f"CLEAR: ntk_factor must be 1 on {host.title}, whose rotary embedding has no base to change"
            )

    def begin(self, denoiser: Any) -> None:  # noqa: ANN401
        """Stretch rotary embeddings."""
        if self.config.ntk_factor != 1:
            self.theta = denoiser.pos_embed.theta
            denoiser.pos_embed.theta = self.theta * self.config.ntk_factor

    def end(self, denoiser: Any) -> None:  # noqa: ANN401
        """Bring them back."""
        if self.config.ntk_factor != 1:
            denoiser.pos_embed.theta = self.theta

    def additions(self, name: str, attention: Any) -> dict[str, nn.Module | nn.Parameter]:  # noqa: ANN401
        """The weights of a cell of one layer, all the same."""
        f = self.config.down_factor
        if f is None:
            return {}
        like = next(attention.parameters())
        table = torch.full((1, 1, 1, f, 1, f, 1), 1 / f**2, device=like.device, dtype=like.dtype)
        return {"spatial_weight": nn.Parameter(table)}

    def attend(self, attention: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # noqa: ANN401
        """Around each token of the picture; text as it was."""
        assert self.layout is not None, "the denoiser says it before each call"
        layout, pool = self.layout.of(q.shape[2]), None
        if self.config.down_factor is not None:
            pool = attention.spatial_weight.view(self.config.down_factor, self.config.down_factor).to(q.dtype)
        if layout.texts is None:
            return self._attend(q, k, v, layout, pool)
        out = torch.zeros_like(v)
        for sample, length in enumerate(layout.texts):  # each without the padding of its text
            own = _seen(layout, length, q.shape[2])
            alone = Layout(layout.grid, layout.first if layout.first == 0 else length)
            out[sample, :, own] = self._attend(*(t[sample : sample + 1, :, own] for t in (q, k, v)), alone, pool)[0]
        return out

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, pool: Tensor | None) -> Tensor:
        n, first = math.prod(layout.grid), layout.first
        if first + n > q.shape[2]:
            raise ValueError(f"CLEAR: {q.shape[2]} tokens must hold {first} and a grid of {layout.grid}")
        scale = self.config.scale(q.shape[2], q.shape[3])
        picture = [t[:, :, first : first + n] for t in (q, k, v)]
        others = [_without(t, first, n) for t in (q, k, v)]
        out = neighborhood_attention(
            *picture,
            grid=layout.grid,
            radius=self.config.window_size,
            shape="circle",
            edge="truncate",
            extra_kv=(others[1], others[2]) if others[1].shape[2] else None,
            pool=pool,
            scale=scale,
        )
        assert isinstance(out, Tensor)
        if not others[0].shape[2]:
            return out
        rest = F.scaled_dot_product_attention(others[0], k, v, scale=scale)
        return torch.cat([rest[:, :, :first], out, rest[:, :, first:]], 2)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Projections of the picture's tokens, and the weights of cells."""
        own = {}
        for name, attention in self.layers.items():
            for part in ("to_q", "to_k", "to_v", "to_qkv_mlp_proj", "to_out"):
                module, key = getattr(attention, part, None), f"{name}.{part}"
                if isinstance(module, nn.ModuleList):
                    module, key = module[0], f"{key}.0"
                if module is not None:
                    own |= {f"{key}.{kind}": value for kind, value in base(module).named_parameters()}
            if hasattr(attention, "spatial_weight"):
                own[f"{name}.processor.spatial_weight"] = attention.spatial_weight
        return own

    def align(self) -> list[str]:
        """Every fourth layer, of the single blocks where there are some."""
        names = list(self.layers)
        single = any(name.startswith("single_") for name in names)
        chosen = [name for i, name in enumerate(names) if i % _ALIGN == 0]
        return [name for name in chosen if name.startswith("single_")] if single else chosen


@dataclass(frozen=True)
class ClearConfig:
    """Settings of CLEAR.

    Attributes:
        window_size: radius of the circle in tokens, itself not reached; 1 = the token alone. Published: 8, 16, 32.
        down_factor: side of the cells that are summed to further keys; None = none. Published: 4.
        proportional_attention: whether the scale grows with the logarithm of the number of tokens, for more than the
            base model was trained on.
        ntk_factor: multiplies the base of rotary embeddings, for the same.
    """

    window_size: int = 16
    down_factor: int | None = None
    proportional_attention: bool = False
    ntk_factor: float = 1.0
    plugin: ClassVar[type[Plugin]] = Clear

    def __post_init__(self) -> None:
        """Refuse impossible settings."""
        if self.window_size < 1 or (self.down_factor is not None and self.down_factor < 1):
            raise UserError(f"ClearConfig: window_size and down_factor must be at least 1, got {self}")
        if not self.ntk_factor > 0:
            raise UserError(f"ClearConfig: ntk_factor must be positive, got {self.ntk_factor}")

    def detected(self, weights: Mapping[str, Tensor]) -> "ClearConfig":
        """The settings that weights tell."""
        tables = [value for key, value in weights.items() if key.endswith("spatial_weight")]
        return replace(self, down_factor=tables[0].shape[3] if tables else None)

    @classmethod
    def read(cls, said: Mapping[str, Any]) -> "ClearConfig":
        """The settings of our config.json."""
        return cls(**{field.name: said[field.name] for field in fields(cls) if field.name in said})

    def scale(self, tokens: int, width: int) -> float:
        """Factor of the products of queries and keys of `width` channels."""
        if not self.proportional_attention:
            return width**-0.5
        return math.sqrt(math.log(tokens if self.down_factor is None else 10 * tokens, _TOKENS) / width)


VARIANTS = {f"clear-{size}": ClearConfig(size) for size in (8, 16, 32)}
VARIANTS |= {f"clear-{size}-down4": ClearConfig(size, 4) for size in (8, 16)}


def _without(t: Tensor, first: int, n: int) -> Tensor:
    """The tokens that are not of the picture."""
    if first and first + n < t.shape[2]:
        return torch.cat([t[:, :, :first], t[:, :, first + n :]], 2)
    return t[:, :, :first] if first else t[:, :, n:]


def _seen(layout: Layout, length: int, tokens: int) -> Tensor:
    """Places of the picture and of the first `length` tokens of the text, which lies before or behind it."""
    n = math.prod(layout.grid)
    if layout.first:
        return torch.cat([torch.arange(length), torch.arange(layout.first, tokens)])
    return torch.arange(min(n + length, tokens))
