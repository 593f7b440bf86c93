"""Build small SAM image encoders of every code base, with wide logits and relative terms."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bsa_vision.models.encoder import create_encoder

# 12 x 12 patches: windows of 5 need padding. Layers 1 and 3 are global.
SIZE, PATCH, DIM, DEPTH, HEADS, WINDOW, GLOBAL, OUT, MLP = 96, 8, 32, 4, 2, 5, (1, 3), 16, 48


def _transformers(size: int, attention: str, depth: int, more: dict[str, Any]) -> dict[str, Any]:
    layers = dict(hidden_size=DIM, num_hidden_layers=depth, num_attention_heads=HEADS, mlp_dim=MLP)
    sizes = dict(image_size=size, patch_size=PATCH, output_channels=OUT)
    windows = dict(window_size=WINDOW, global_attn_indexes=list(GLOBAL))
    return {**layers, **sizes, **windows, "attn_implementation": attention, **more}


def sam(size: int = SIZE, attention: str = "sdpa", depth: int = DEPTH, **more: Any) -> nn.Module:
    from transformers import SamVisionConfig, SamVisionModel

    return SamVisionModel(SamVisionConfig(**_transformers(size, attention, depth, more)))


def sam_hq(size: int = SIZE, attention: str = "sdpa", depth: int = DEPTH, **more: Any) -> nn.Module:
    from transformers import SamHQVisionConfig, SamHQVisionModel

    return SamHQVisionModel(SamHQVisionConfig(**_transformers(size, attention, depth, more)))


def deepseek_ocr2(
    size: int = SIZE, attention: str = "sdpa", depth: int = DEPTH, **more: Any
) -> nn.Module:
    from transformers.models.deepseek_ocr2 import modeling_deepseek_ocr2 as module
    from transformers.models.deepseek_ocr2.configuration_deepseek_ocr2 import (
        DeepseekOcr2SamVisionConfig,
    )

    config = DeepseekOcr2SamVisionConfig(**_transformers(size, attention, depth, more))
    return module.DeepseekOcr2SamVisionEncoder(config)


def segment_anything(
    size: int = SIZE,
    depth: int = DEPTH,
    use_rel_pos: bool = True,
    kind: type[nn.Module] | None = None,
) -> nn.Module:
    from segment_anything.modeling.image_encoder import ImageEncoderViT

    return (kind or ImageEncoderViT)(
        img_size=size,
        patch_size=PATCH,
        embed_dim=DIM,
        depth=depth,
        num_heads=HEADS,
        mlp_ratio=MLP / DIM,
        out_chans=OUT,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=use_rel_pos,
        window_size=WINDOW,
        global_attn_indexes=GLOBAL,
    )


def deepseek_ocr(**changes: Any) -> nn.Module:
    """Build the stand-in for the code that DeepSeek-OCR ships."""
    from tests.helpers.deepencoder import ImageEncoderViT

    return segment_anything(kind=ImageEncoderViT, **changes)


def timm(
    size: int | tuple[int, int] = SIZE, depth: int = DEPTH, use_rel_pos: bool = True, **more: Any
) -> nn.Module:
    from timm.models.vision_transformer_sam import VisionTransformerSAM

    return VisionTransformerSAM(
        img_size=size,
        patch_size=PATCH,
        embed_dim=DIM,
        depth=depth,
        num_heads=HEADS,
        mlp_ratio=MLP / DIM,
        neck_chans=OUT,
        num_classes=0,
        global_pool="",
        norm_layer=partial(nn.LayerNorm, eps=1e-6),  # timm's own default is 1e-5
        use_rel_pos=use_rel_pos and not more.get("use_rope"),
        window_size=WINDOW,
        global_attn_indexes=GLOBAL,
        **more,
    )


def timm_unfused(**more: Any) -> nn.Module:
    model = timm(**more)
    for block in model.blocks:
        block.attn.fused_attn = False
    return model


def own(
    size: int | tuple[int, int] = SIZE, depth: int = DEPTH, use_rel_pos: bool = True, **more: Any
) -> nn.Module:
    return create_encoder(
        depth,
        DIM,
        HEADS,
        GLOBAL,
        WINDOW,
        rel_pos=use_rel_pos,
        image_size=size,
        patch_size=PATCH,
        out_channels=OUT,
        mlp_ratio=MLP / DIM,
        **more,
    )


MODELS: dict[str, Callable[..., nn.Module]] = {
    "segment_anything": segment_anything,
    "transformers sam": sam,
    "transformers sam, eager": partial(sam, attention="eager"),
    "transformers sam_hq": sam_hq,
    "transformers sam_hq, eager": partial(sam_hq, attention="eager"),
    "transformers deepseek_ocr2": deepseek_ocr2,
    "transformers deepseek_ocr2, eager": partial(deepseek_ocr2, attention="eager"),
    "timm": timm,
    "timm, not fused": timm_unfused,
    "timm, qk-norm": partial(timm, qk_norm=True),
    "timm, rope": partial(timm, use_rope=True),
    "deepseek-ocr": deepseek_ocr,
    "create_encoder": own,
}
# These interpolate to other image sizes; the others reject them.
ANY_SIZE = {name for name in MODELS if "deepseek" in name or "timm" in name} - {"timm, rope"}
ANY_SIZE |= {"create_encoder"}


def redraw(model: nn.Module) -> nn.Module:
    """Redraw every weight; by default relative tables are zero, and most weights nearly so."""
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "rel_pos" in key or "pos_embed" in key:
                parameter.copy_(torch.randn_like(parameter) * 0.5)
            elif parameter.dim() >= 2:
                gain = 1.6 if "qkv" in key else 0.7
                parameter.copy_(torch.randn_like(parameter) * gain * parameter[0].numel() ** -0.5)
            elif "bias" in key:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
            elif "q_norm" in key or "k_norm" in key:
                parameter.copy_(1.3 + 0.2 * torch.randn_like(parameter))
    return model.eval()


def make(name: str = "transformers sam", seed: int = 0, **changes: Any) -> nn.Module:
    torch.manual_seed(seed)
    return redraw(MODELS[name](**changes))


def image(height: int = SIZE, width: int = SIZE, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def features(model: nn.Module, pixels: Tensor, **options: Any) -> Tensor:
    out = model(pixels, **options)
    return out if isinstance(out, Tensor) else out.last_hidden_state


def attention_of(model: nn.Module) -> list[Any]:
    """Return the attention modules of the encoder, in order."""
    return [module for name, module in model.named_modules() if name.endswith(".attn")]


def from_segment_anything(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Rename segment_anything's encoder weights for another code base."""
    renames: dict[str, str] = {}
    if "transformers" in name:
        renames = {
            "patch_embed.proj": "patch_embed.projection",
            "blocks.": "layers.",
            ".norm": ".layer_norm",
        }
        renames |= {"neck.0.": "neck.conv1.", "neck.1.": "neck.layer_norm1."}
        renames |= {"neck.2.": "neck.conv2.", "neck.3.": "neck.layer_norm2."}
    elif "timm" in name:
        renames = {"mlp.lin": "mlp.fc"}
    prefix = "vision_encoder." if "transformers sam" in name else ""
    renamed = {}
    for key, value in state.items():
        for old, new in renames.items():
            key = key.replace(old, new)
        renamed[prefix + key] = value
    return renamed
