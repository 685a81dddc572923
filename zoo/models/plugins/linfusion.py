"""LinFusion: self-attention of a Stable Diffusion UNet in linear time, without a softmax.

Paper: "LinFusion: 1 GPU, 1 Minute, 16K Image" (Liu et al. 2024, arXiv 2409.02097). Official code: Huage001/LinFusion,
src/linfusion/attention.py; Apache-2.0.

    P(x) = W2 leaky_relu(layer_norm(W1 x + b1)) + b2                     one for queries, one for keys
    q = Wq (x + P_q(x))    k = Wk (y + P_k(y))    v = Wv y               y = x, or a context of m tokens
    o_i = f(q_i) sum_j f(k_j) v_j^T / n / (f(q_i) . mean_j f(k_j) + 1e-4)         f(x) = elu(x) + 1

Same numbers as the official code, of which one is odd: the sum over the keys is divided by the number of queries n,
their mean by that of keys; that differs where a context attends. What differs: it comes off again, LoRA stays on, and
it may begin as the attention that it replaces (`init="unet"`: the UNet's own projections, and P = 0) instead of at
random, as the published training does.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from zoo.errors import UserError
from zoo.kernels.linear_attention import linear_attention
from zoo.models.plugins.hosts import Host, base
from zoo.models.plugins.hosts.unet import UNet
from zoo.models.plugins.plugin import Plugin

_EPS = 1e-4


class LinFusion(Plugin):
    """The method on one denoiser; parameters as in the official files, `{index of the layer}.{name}`."""

    title = "LinFusion"

    def __init__(self, config: "LinFusionConfig", host: Host, denoiser: nn.Module) -> None:
        super().__init__(config, host, denoiser)
        if not isinstance(host, UNet):
            raise UserError(f"LinFusion: the denoiser must be a UNet of Stable Diffusion, got {host.title}")

    def fresh(self) -> dict[str, Tensor] | None:
        """Random projections too, where that is asked for."""
        if self.config.init == "unet":
            return None
        tensors = {key: value.detach().clone() for key, value in self.parameters().items()}
        for index, attention in enumerate(self.layers.values()):
            for name, part in (
                *((n, getattr(attention, n)) for n in ("to_q", "to_k", "to_v")),
                ("to_out.0", attention.to_out[0]),
            ):
                linear = base(part)
                new = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None)
                tensors |= {f"{index}.{name}.{key}": value.detach() for key, value in new.named_parameters()}
        return tensors

    def additions(self, name: str, attention: Any) -> dict[str, nn.Module | nn.Parameter]:  # noqa: ANN401
        """The two P of a layer, `to_q_` and `to_k_`."""
        width = base(attention.to_q).in_features
        inner = self.config.inner(width)
        like = base(attention.to_q).weight
        made = {}
        for child in ("to_q_", "to_k_"):
            block = nn.Identity() if inner is None else _bottleneck(width, inner)
            if inner is not None and self.config.init == "unet":
                nn.init.zeros_(block[3].weight)
                nn.init.zeros_(block[3].bias)
            made[child] = block.to(like.device, like.dtype)
        return made

    def project(self, attention: Any, tokens: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ANN401
        """Queries and keys of tokens that P has been added to."""
        q = attention.to_q(tokens + attention.to_q_(tokens))
        k = attention.to_k(context + attention.to_k_(context))
        return q, k, attention.to_v(context)

    def attend(self, attention: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # noqa: ANN401
        """Linear attention."""
        return linear_attention(q, k, v, feature_map="elu1", norm="mean_queries", eps=_EPS)

    def parameters(self) -> dict[str, nn.Parameter]:
        """All of the layers, under the number of each in the order of the network."""
        own = {}
        for index, attention in enumerate(self.layers.values()):
            parts = {name: base(getattr(attention, name)) for name in ("to_q", "to_k", "to_v", "to_q_", "to_k_")}
            parts["to_out.0"] = base(attention.to_out[0])
            for name, part in parts.items():
                own |= {f"{index}.{name}.{key}": value for key, value in part.named_parameters()}
        return own

    def align(self) -> list[str]:
        """Every layer."""
        return list(self.layers)

    def described(self) -> dict[str, Any]:
        """The list of layers, as the official config.json has it."""
        listed = []
        for name, attention in self.layers.items():
            width = base(attention.to_q).in_features
            inner = self.config.inner(width)
            middle = -1 if inner is None else inner
            listed.append({"module_name": name, "dim_n": width, "heads": attention.heads, "projection_mid_dim": middle})
        return {"modules_list": listed}


@dataclass(frozen=True)
class LinFusionConfig:
    """Settings of LinFusion.

    Attributes:
        mid_dim_scale: channels over those between W1 and W2: 1 in the official weights of SD 1.5 and 2.1, 16 in the
            training of SDXL; None = no P, so that q = Wq 2x, as the official code has it then.
        init: "unet" or "random" (torch's defaults, also of Wq to Wo, as published), where no weights are given.
    """

    mid_dim_scale: int | None = 1
    init: str = "unet"
    plugin: ClassVar[type[Plugin]] = LinFusion

    def __post_init__(self) -> None:
        """Refuse impossible settings."""
        if self.mid_dim_scale is not None and self.mid_dim_scale < 1:
            raise UserError(f"LinFusionConfig: mid_dim_scale must be at least 1, or None, got {self.mid_dim_scale}")
        if self.init not in ("unet", "random"):
            raise UserError(f"LinFusionConfig: init must be unet or random, got {self.init!r}")

    def detected(self, weights: Mapping[str, Tensor]) -> "LinFusionConfig":
        """The settings that weights tell."""
        first = weights.get("0.to_q_.0.weight")
        return replace(self, mid_dim_scale=None if first is None else max(1, first.shape[1] // first.shape[0]))

    def inner(self, width: int) -> int | None:
        """Channels between W1 and W2 of a layer."""
        return None if self.mid_dim_scale is None else max(1, width // self.mid_dim_scale)

    @classmethod
    def read(cls, said: Mapping[str, Any]) -> "LinFusionConfig":
        """The settings of a config.json, the official one or ours; weights tell the rest."""
        return cls(init=said.get("init", "unet"))


VARIANTS = {"linfusion": LinFusionConfig(), "linfusion-16": LinFusionConfig(mid_dim_scale=16)}


def _bottleneck(width: int, inner: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, inner), nn.LayerNorm(inner), nn.LeakyReLU(), nn.Linear(inner, width))
