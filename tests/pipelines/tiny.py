"""Tiny pipelines of diffusers, built from scratch: no download, a second each."""

import diffusers
import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from zoo.pipelines.parts import assemble, build_parts
from zoo.pipelines.words import build_tokenizer
from zoo.scene import WORDS

VAE = {
    "class_name": "AutoencoderKL",
    "block_out_channels": [4, 4, 4],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "latent_channels": 4,
    "norm_num_groups": 2,
}
CLIP = {
    "class_name": "CLIPTextModel",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
TOKENIZER = {"class_name": "CLIPTokenizer", "words": "shapes", "max_length": 24}
UNET = {
    "class_name": "UNet2DConditionModel",
    "sample_size": 8,
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
    "norm_num_groups": 2,
}
DDIM = {
    "class_name": "DDIMScheduler",
    "prediction_type": "v_prediction",
    "beta_schedule": "scaled_linear",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "steps_offset": 1,
    "clip_sample": False,
}
PARTS = {"vae": VAE, "tokenizer": TOKENIZER, "text_encoder": CLIP, "unet": UNET, "scheduler": DDIM}
FLOW = {"class_name": "FlowMatchEulerDiscreteScheduler"}


def stable_diffusion(**changes):
    """A complete StableDiffusionPipeline with random weights."""
    torch.manual_seed(0)
    return assemble("StableDiffusionPipeline", {**PARTS, **changes})


def t5():
    """A T5 encoder and its tokenizer, for pipelines that want one."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), *((f"▁{word}", -1.0) for word in WORDS), ("▁", -2.0)]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0)
    config = T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval(), tokenizer


def _clip(tokenizer, projected=False):
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def flux():
    """Latents of 4 channels packed 2x2, text through CLIP and T5."""
    torch.manual_seed(0)
    encoder, tokenizer = t5()
    words = build_tokenizer(WORDS, 24)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    vae = build_parts({"vae": {**VAE, "shift_factor": 0.0}})["vae"]
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.FluxPipeline(scheduler, vae, _clip(words), words, encoder, tokenizer, transformer)


def stable_diffusion_3():
    """Two CLIPs with projection and no T5."""
    torch.manual_seed(0)
    words = build_tokenizer(WORDS, 77)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=16,
    )
    vae = build_parts({"vae": {**VAE, "shift_factor": 0.0}})["vae"]
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    clips = [_clip(words, projected=True) for _ in range(2)]
    return diffusers.StableDiffusion3Pipeline(transformer, scheduler, vae, clips[0], words, clips[1], words, None, None)


def pixart():
    """Text through T5, a prediction with a variance behind it."""
    torch.manual_seed(0)
    encoder, tokenizer = t5()
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=16,
        in_channels=4,
        cross_attention_dim=16,
        out_channels=8,
    )
    vae = build_parts({"vae": VAE})["vae"]
    return diffusers.PixArtAlphaPipeline(tokenizer, encoder, vae, transformer, diffusers.DDIMScheduler())


def wan():
    """Video latents b c t h w."""
    torch.manual_seed(0)
    encoder, tokenizer = t5()
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=32,
    )
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return diffusers.WanPipeline(tokenizer, encoder, vae, scheduler, transformer)


def cogvideox(**changes):
    """Video latents b t c h w inside, v prediction."""
    torch.manual_seed(0)
    encoder, tokenizer = t5()
    sizes = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 8,
        "text_embed_dim": 16,
        "num_layers": 1,
        "sample_width": 4,
        "sample_height": 4,
        "sample_frames": 5,
        "patch_size": 2,
        "temporal_compression_ratio": 4,
        "max_text_seq_length": 16,
    }
    transformer = diffusers.CogVideoXTransformer3DModel(**sizes | changes)
    vae = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
    )  # fmt: skip
    scheduler = diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction")
    return diffusers.CogVideoXPipeline(tokenizer, encoder, vae, transformer, scheduler)
