"""Build small timm models for every branch of their attention, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

SIZE, PATCH = 96, 8
SMALL = dict(
    img_size=SIZE, patch_size=PATCH, embed_dim=48, depth=2, num_heads=4, mlp_ratio=2, num_classes=0
)


def vit(**changes: Any) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(**{**SMALL, "global_pool": "", **changes})


def eva(**changes: Any) -> nn.Module:
    from timm.models.eva import Eva

    return Eva(**{**SMALL, "global_pool": "", **changes})


def post_norm(**changes: Any) -> nn.Module:
    from timm.models.vision_transformer import ResPostBlock

    return vit(block_fn=ResPostBlock, **changes)


def gated(**changes: Any) -> nn.Module:
    """Use `Attention` with a gate and an output norm, which no argument of a ViT enables."""
    from timm.layers.attention import Attention

    model = vit(**changes)
    for block in model.blocks:
        block.attn = Attention(
            48, 4, qkv_bias=True, gated=True, scale_norm=True, norm_layer=nn.LayerNorm
        )
    return model


def not_fused(make: Callable[..., nn.Module], **changes: Any) -> nn.Module:
    model = make(**changes)
    for block in model.blocks:
        block.attn.fused_attn = False
    return model


dinov3 = partial(
    eva,
    num_reg_tokens=4,
    use_rot_pos_emb=True,
    use_abs_pos_emb=False,
    rope_type="dinov3",
    rope_rotate_half=True,
    qkv_fused=False,
    dynamic_img_size=True,
)
MODELS: dict[str, Callable[..., nn.Module]] = {
    "vit": vit,
    "vit, any size": partial(vit, dynamic_img_size=True),
    "vit, not fused": partial(not_fused, vit),
    "vit, qk-norm": partial(vit, qk_norm=True),
    "vit, registers": partial(vit, reg_tokens=4, no_embed_class=True, init_values=1.0),
    "vit, no class token": partial(vit, class_token=False, global_pool="map"),
    "vit, post norm": post_norm,
    "vit, gate and scale norm": gated,
    "eva, fused": partial(eva, use_rot_pos_emb=True),
    "eva, not fused": partial(not_fused, eva, use_rot_pos_emb=True, qkv_fused=False),
    "eva, scale norm": partial(eva, use_rot_pos_emb=True, scale_attn_inner=True, swiglu_mlp=True),
    "eva, dinov3": dinov3,
    "rope, mixed": partial(eva, use_rot_pos_emb=True, rope_type="mixed", attn_type="rope"),
    "rope, grouped heads": partial(
        eva, use_rot_pos_emb=True, attn_type="rope", num_kv_heads=2, qkv_fused=False
    ),
}
ANY_SIZE = {"vit, any size", "eva, dinov3"}


def make(name: str, seed: int = 0, **changes: Any) -> nn.Module:
    torch.manual_seed(seed)
    model = MODELS[name](**changes).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                gain = 2.2 if any(part in key for part in ("qkv", "q_proj", "k_proj")) else 0.8
                parameter.copy_(torch.randn_like(parameter) * gain * parameter[0].numel() ** -0.5)
            elif "bias" in key:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
            elif "q_norm" in key or "k_norm" in key:
                parameter.copy_(1.4 + 0.2 * torch.randn_like(parameter))
    return model


def image(height: int = SIZE, width: int = SIZE, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))
