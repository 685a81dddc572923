"""Tiny denoisers of every class that plug-ins know, with arguments for a call."""

import torch
from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)

H, W, TEXT = 6, 10, 7


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ids(columns, h=H, w=W):
    places = torch.zeros(h, w, columns)
    places[..., 1], places[..., 2] = torch.arange(h)[:, None], torch.arange(w)
    return places.flatten(0, 1)


def unet(heads=2, cross=24, linear=False, **more):
    network = UNet2DConditionModel(
        sample_size=16,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=cross,
        attention_head_dim=heads,
        use_linear_projection=linear,
        **more,
    )
    return network, {
        "sample": noise(2, 4, 2 * H, 2 * W),
        "timestep": torch.tensor([3, 700]),
        "encoder_hidden_states": noise(2, TEXT, cross, seed=2),
    }


def pixart():
    network = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        norm_num_groups=4,
        cross_attention_dim=16,
        sample_size=16,
        caption_channels=12,
        use_additional_conditions=False,
    )
    return network, {
        "hidden_states": noise(2, 4, 2 * H, 2 * W),
        "encoder_hidden_states": noise(2, TEXT, 12, seed=2),
        "timestep": torch.tensor([3, 700]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def sd3():
    network = SD3Transformer2DModel(
        sample_size=16,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        out_channels=4,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return network, {
        "hidden_states": noise(2, 4, 2 * H, 2 * W),
        "encoder_hidden_states": noise(2, TEXT, 12, seed=2),
        "pooled_projections": noise(2, 10, seed=3),
        "timestep": torch.tensor([3.0, 700.0]),
    }


def flux():
    network = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    return network, {
        "hidden_states": noise(2, H * W, 16),
        "encoder_hidden_states": noise(2, TEXT, 12, seed=2),
        "pooled_projections": noise(2, 10, seed=3),
        "timestep": torch.tensor([0.1, 0.7]),
        "guidance": torch.tensor([3.5, 3.5]),
        "img_ids": ids(3),
        "txt_ids": torch.zeros(TEXT, 3),
    }


def flux2():
    network = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )
    return network, {
        "hidden_states": noise(2, H * W, 16),
        "encoder_hidden_states": noise(2, TEXT, 12, seed=2),
        "timestep": torch.tensor([0.1, 0.7]),
        "guidance": torch.tensor([3.5, 3.5]),
        "img_ids": ids(4),
        "txt_ids": torch.zeros(TEXT, 4),
    }


def qwenimage(padded=False):
    network = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(4, 6, 6),
    )
    mask = torch.ones(2, TEXT, dtype=torch.bool)
    if padded:
        mask[1, 4:] = False
    return network, {
        "hidden_states": noise(2, H * W, 16),
        "encoder_hidden_states": noise(2, TEXT, 12, seed=2),
        "encoder_hidden_states_mask": mask,
        "timestep": torch.tensor([0.1, 0.7]),
        "img_shapes": [[(1, H, W)]] * 2,
    }


def zimage(padded=False):
    network = ZImageTransformer2DModel(
        in_channels=4,
        dim=48,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=12,
        axes_dims=[8, 8, 8],
        axes_lens=[128, 64, 64],
    )
    return network, {
        "x": [noise(4, 1, 2 * H, 2 * W, seed=n) for n in range(2)],
        "t": torch.tensor([0.1, 0.7]),
        "cap_feats": [noise(TEXT, 12, seed=2), noise(TEXT + 40 * padded, 12, seed=3)],
    }


DENOISERS = {f.__name__: f for f in (unet, pixart, sd3, flux, flux2, qwenimage, zimage)}


def built(name, **options):
    """One with random weights, none of them zero, and its arguments."""
    torch.manual_seed(0)
    network, call = DENOISERS[name](**options)
    with torch.no_grad():
        for parameter in network.parameters():  # gates that begin at zero would hide what attention does
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network.eval(), call


def output(network, call):
    with torch.no_grad():
        out = network(**call, return_dict=False)[0]
    return torch.stack(out) if isinstance(out, list) else out
