"""Attention of CLEAR as FLUX runs it: image queries by the kernel, text queries by plain attention."""

import math

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.embeddings import apply_rotary_emb
from torch.nn import functional as F

from tests.helpers import error, golden, group
from zoo.kernels.neighborhood_attention import neighborhood_attention

TOLERANCE = 1e-5  # relative to the largest magnitude of each golden tensor, architecture.md section 5


def read(name):
    facts, tensors = golden(name)
    return facts["json"], tensors


MASKS = read("clear-masks")[0]["cases"]
FILES = ("clear-local", "clear-down", "clear-down-text512")
MODELS = [(name, case) for name in FILES for case in read(name)[0]["cases"]]


class Processor:
    """Attention of one layer of FLUX for one case of the golden file."""

    def __init__(self, case, pool):
        self.case, self.pool = case, pool

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb):
        def project(x, prefix, names, norms):
            parts = (getattr(attn, prefix + name)(x).unflatten(-1, (attn.heads, -1)) for name in names)
            return [norm(part) if norm else part for part, norm in zip(parts, norms, strict=True)]

        tokens = project(hidden_states, "to_", "qkv", (attn.norm_q, attn.norm_k, None))
        if encoder_hidden_states is not None:
            names, norms = ("q_proj", "k_proj", "v_proj"), (attn.norm_added_q, attn.norm_added_k, None)
            text = project(encoder_hidden_states, "add_", names, norms)
            tokens = [torch.cat(pair, 1) for pair in zip(text, tokens, strict=True)]
        q, k, v = (
            (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) if turn else x).transpose(1, 2)  # b heads n d
            for x, turn in zip(tokens, (True, True, False), strict=True)
        )
        y = self.attend(q, k, v).transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return y
        length = self.case["text_length"]
        return attn.to_out[0](y[:, length:]), attn.to_add_out(y[:, :length])

    def attend(self, q, k, v):
        case, length = self.case, self.case["text_length"]
        scale = q.shape[-1] ** -0.5
        if case.get("proportional_attention"):
            scale *= math.log(q.shape[2] * (1 if self.pool is None else 10), 64**2 + 512) ** 0.5
        text = F.scaled_dot_product_attention(q[:, :, :length], k, v, scale=scale)
        image = neighborhood_attention(
            *(x[:, :, length:] for x in (q, k, v)),
            grid=tuple(case["grid"]),
            radius=case["window_size"],
            shape="circle",
            edge="truncate",
            extra_kv=(k[:, :, :length], v[:, :, :length]),
            pool=self.pool,
            scale=scale,
        )
        return torch.cat([text, image], 2)


@pytest.mark.parametrize(("name", "case"), MODELS)
def test_flux_with_clear_gives_the_golden_output(name, case):
    told, tensors = read(name)
    weights = group(tensors, "weight.")
    model = FluxTransformer2DModel(**told["config"]).eval()
    model.load_state_dict({key: t for key, t in weights.items() if "spatial_weight" not in key})
    case_facts = told["cases"][case]
    model.pos_embed.theta *= case_facts.get("ntk_factor", 1)
    for layer, module in [(key, m) for key, m in model.named_modules() if key.endswith(".attn")]:
        pool = weights.get(f"{layer}.processor.spatial_weight")  # 1 1 1 f 1 f 1
        module.set_processor(Processor(case_facts, None if pool is None else pool[0, 0, 0, :, 0, :, 0]))
    with torch.no_grad():
        actual = model(**group(tensors, f"input.{case}."), txt_ids=torch.zeros(case_facts["text_length"], 3)).sample
    assert error(actual, tensors[f"output.{case}"]) <= TOLERANCE


# The interpreter is slow: triton on small maps only.
@pytest.mark.parametrize(
    ("case", "impl"),
    [(case, impl) for case in MASKS for impl in ("reference", "torch")]
    + [(case, "triton") for case, told in MASKS.items() if told["height"] * told["width"] <= 40],
)
def test_equal_logits_weigh_what_the_golden_mask_allows(case, impl):
    told = MASKS[case]
    height, width, text, cell = (told[key] for key in ("height", "width", "text_length", "down_factor"))
    n = height * width
    dtype = torch.float32 if impl == "triton" else torch.float64
    mask = read("clear-masks")[1][f"output.{case}"][text:].double()  # n (text n cells)
    columns = torch.eye(text + n, dtype=dtype)
    seen = mask[:, : text + n]
    if cell > 1:  # a pooled key has the values of all tokens of its cell
        whole = torch.zeros(height // cell * (width // cell), height, width, dtype=torch.float64)
        for i, one in enumerate(whole):
            top, left = i // (width // cell) * cell, i % (width // cell) * cell
            one[top : top + cell, left : left + cell] = 1
        seen = torch.cat([seen[:, :text], seen[:, text:] + mask[:, text + n :] @ whole.flatten(1)], 1)
    zeros = torch.zeros(1, 1, n, 1, dtype=dtype)
    actual = neighborhood_attention(
        zeros,
        zeros,
        columns[None, None, text:],
        grid=(height, width),
        radius=told["window_size"],
        shape="circle",
        edge="truncate",
        extra_kv=(zeros[:, :, :1].expand(-1, -1, text, -1), columns[None, None, :text]),
        pool=torch.ones(cell, cell) if cell > 1 else None,
        impl=impl,
    )
    assert error(actual[0, 0], seen / mask.sum(1, keepdim=True)) <= 4 * torch.finfo(dtype).eps
