"""Configurations of well-known models of transformers, to build them without a network.

`CONFIGS` maps names to (model type, config). A config holds the values that differ from the
defaults of transformers' classes, and those whose defaults may change between versions.
"""

from __future__ import annotations

from typing import Any


def _vit(width: int, depth: int, heads: int, **more: Any) -> dict[str, Any]:
    return {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads, **more}


def _mlp(width: int, depth: int, heads: int, hidden: int = 0, **more: Any) -> dict[str, Any]:
    return _vit(width, depth, heads, intermediate_size=hidden or 4 * width, **more)


SMALL, BASE, LARGE, HUGE = (384, 12, 6), (768, 12, 12), (1024, 24, 16), (1280, 32, 16)
GIANT, SO400M = (1536, 40, 24), (1152, 27, 16)

_DINOV2: dict[str, dict[str, Any]] = {
    "small": _vit(*SMALL, image_size=518, patch_size=14),
    "base": _vit(*BASE, image_size=518, patch_size=14),
    "large": _vit(*LARGE, image_size=518, patch_size=14),
    "giant": _vit(*GIANT, image_size=518, patch_size=14, use_swiglu_ffn=True),
}
_GATED: dict[str, Any] = {"use_gated_mlp": True, "hidden_act": "silu"}
_GATED_NO_BIAS = {**_GATED, "query_bias": False, "value_bias": False}
_DINOV3: dict[str, dict[str, Any]] = {
    "vits16-pretrain-lvd1689m": _mlp(*SMALL),
    "vits16plus-pretrain-lvd1689m": _mlp(*SMALL, **_GATED),
    "vitb16-pretrain-lvd1689m": _mlp(*BASE),
    "vitl16-pretrain-lvd1689m": _mlp(*LARGE),
    "vitl16-pretrain-sat493m": _mlp(*LARGE),
    "vith16plus-pretrain-lvd1689m": _mlp(1280, 32, 20, **_GATED),
    "vit7b16-pretrain-lvd1689m": _mlp(4096, 40, 32, 8192, **_GATED_NO_BIAS),
    "vit7b16-pretrain-sat493m": _mlp(4096, 40, 32, 8192, **_GATED_NO_BIAS),
}
_VIT: dict[str, dict[str, Any]] = {
    "base-patch16-224": _mlp(*BASE, image_size=224, patch_size=16),
    "base-patch16-224-in21k": _mlp(*BASE, image_size=224, patch_size=16),
    "base-patch16-384": _mlp(*BASE, image_size=384, patch_size=16),
    "base-patch32-384": _mlp(*BASE, image_size=384, patch_size=32),
    "large-patch16-224": _mlp(*LARGE, image_size=224, patch_size=16),
    "large-patch16-224-in21k": _mlp(*LARGE, image_size=224, patch_size=16),
    "large-patch16-384": _mlp(*LARGE, image_size=384, patch_size=16),
    "large-patch32-384": _mlp(*LARGE, image_size=384, patch_size=32),
    "huge-patch14-224-in21k": _mlp(*HUGE, image_size=224, patch_size=14),
}


def _clip(vision: dict[str, Any], width: int, heads: int) -> dict[str, Any]:
    return {"vision_config": vision, "text_config": _mlp(width, 12, heads), "projection_dim": width}


_CLIP: dict[str, dict[str, Any]] = {
    "base-patch32": _clip(_mlp(*BASE, image_size=224, patch_size=32), 512, 8),
    "base-patch16": _clip(_mlp(*BASE, image_size=224, patch_size=16), 512, 8),
    "large-patch14": _clip(_mlp(*LARGE, image_size=224, patch_size=14), 768, 12),
    "large-patch14-336": _clip(_mlp(*LARGE, image_size=336, patch_size=14), 768, 12),
}


def _siglip(
    size: tuple[int, int, int], image_size: int, patch_size: int, hidden: int = 0
) -> dict[str, Any]:
    vision = _mlp(*size, hidden, image_size=image_size, patch_size=patch_size)
    return {"vision_config": vision, "text_config": _mlp(*size, hidden)}


_SIGLIP: dict[str, dict[str, Any]] = {
    **{f"base-patch16-{pixels}": _siglip(BASE, pixels, 16) for pixels in (224, 256, 384, 512)},
    **{f"large-patch16-{pixels}": _siglip(LARGE, pixels, 16) for pixels in (256, 384)},
    **{f"so400m-patch14-{pixels}": _siglip(SO400M, pixels, 14, 4304) for pixels in (224, 384)},
}
_SAM: dict[str, dict[str, Any]] = {
    "base": {"vision_config": _vit(*BASE, global_attn_indexes=[2, 5, 8, 11])},
    "large": {"vision_config": _vit(*LARGE, global_attn_indexes=[5, 11, 17, 23])},
    "huge": {"vision_config": _vit(*HUGE, global_attn_indexes=[7, 15, 23, 31])},
}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"facebook/dinov2-{name}": ("dinov2", config) for name, config in _DINOV2.items()},
    **{
        f"facebook/dinov2-with-registers-{name}": (
            "dinov2_with_registers",
            {**config, "num_register_tokens": 4},
        )
        for name, config in _DINOV2.items()
    },
    **{
        f"facebook/dinov3-{name}": ("dinov3_vit", {**config, "num_register_tokens": 4})
        for name, config in _DINOV3.items()
    },
    **{f"google/vit-{name}": ("vit", config) for name, config in _VIT.items()},
    **{f"openai/clip-vit-{name}": ("clip", config) for name, config in _CLIP.items()},
    **{f"google/siglip-{name}": ("siglip", config) for name, config in _SIGLIP.items()},
    **{f"facebook/sam-vit-{name}": ("sam", config) for name, config in _SAM.items()},
}
