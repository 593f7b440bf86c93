"""Build small transformers models, with random weights that give non-uniform attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

SMALL = dict(
    hidden_size=48, num_hidden_layers=3, num_attention_heads=4, patch_size=8, image_size=64
)


def vit(**changes) -> nn.Module:
    from transformers import ViTConfig, ViTModel

    return ViTModel(
        ViTConfig(**{**SMALL, "intermediate_size": 96, **changes}), add_pooling_layer=False
    )


def dinov2(**changes) -> nn.Module:
    from transformers import Dinov2Config, Dinov2Model

    return Dinov2Model(Dinov2Config(**{**SMALL, "mlp_ratio": 2, **changes}))


def dinov2_with_registers(**changes) -> nn.Module:
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    return Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(**{**SMALL, "mlp_ratio": 2, **changes})
    )


def dinov3(**changes) -> nn.Module:
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    return DINOv3ViTModel(
        DINOv3ViTConfig(**{**SMALL, "intermediate_size": 96, "num_register_tokens": 4, **changes})
    )


def clip(**changes) -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return CLIPVisionModel(CLIPVisionConfig(**{**SMALL, "intermediate_size": 96, **changes}))


def siglip(**changes) -> nn.Module:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    return SiglipVisionModel(SiglipVisionConfig(**{**SMALL, "intermediate_size": 96, **changes}))


def siglip2(**changes) -> nn.Module:
    from transformers import Siglip2VisionConfig, Siglip2VisionModel

    sizes = {key: value for key, value in SMALL.items() if key != "image_size"}
    return Siglip2VisionModel(
        Siglip2VisionConfig(**{**sizes, "intermediate_size": 96, "num_patches": 64, **changes})
    )


def sam3(**changes) -> nn.Module:
    """Build SAM 3's encoder; not in `MODELS`, because it has windows and one image size."""
    from transformers import Sam3ViTConfig, Sam3ViTModel

    more = dict(
        intermediate_size=96,
        pretrain_image_size=32,
        window_size=3,
        global_attn_indexes=[1, 2],
        layer_scale_init_value=1.0,
    )
    return Sam3ViTModel(Sam3ViTConfig(**{**SMALL, **more, **changes}))


MODELS: dict[str, Callable[..., nn.Module]] = {
    "vit": vit,
    "dinov2": dinov2,
    "dinov2_with_registers": dinov2_with_registers,
    "dinov3": dinov3,
    "clip": clip,
    "siglip": siglip,
    "siglip2": siglip2,
}
START = {
    "vit": 1,
    "dinov2": 1,
    "dinov2_with_registers": 5,
    "dinov3": 5,
    "clip": 1,
    "siglip": 0,
    "siglip2": 0,
}


def make(name: str, seed: int = 0, **changes) -> nn.Module:
    """Build the model in eval mode with new weights; logits have std >= 1, which is tested."""
    torch.manual_seed(seed)
    model = {**MODELS, "sam3": sam3}[name](**changes).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "embeddings" not in parameter_name:
                parameter.copy_(torch.randn_like(parameter) * 1.3 * parameter.shape[-1] ** -0.5)
            elif "bias" in parameter_name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model


def image(height: int = 64, width: int = 64, batch: int = 1, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def features(model: nn.Module, pixels: torch.Tensor, **options) -> torch.Tensor:
    kind = type(getattr(model, "_orig_mod", model)).__name__  # compiled or not
    resizable = kind in ("ViTModel", "CLIPVisionModel", "SiglipVisionModel")
    if resizable and pixels.shape[-2:] != (64, 64):
        options["interpolate_pos_encoding"] = True
    if kind == "Siglip2VisionModel":
        batch, _, height, width = pixels.shape
        options = {"pixel_attention_mask": None, **options}
        options["spatial_shapes"] = torch.tensor([[height // 8, width // 8]] * batch)
        pixels = nn.functional.unfold(pixels, 8, stride=8).mT  # (B, patches, channels * 8 * 8)
    out = model(pixels, **options)
    return out if isinstance(out, torch.Tensor) else out.last_hidden_state


def attention_logits(model: nn.Module, pixels: torch.Tensor) -> list[torch.Tensor]:
    """Return the scaled logits of every layer, recorded by a registered attention function."""
    from transformers import AttentionInterface

    recorded = []

    def record(module, query, key, value, attention_mask, scaling=None, **kwargs):
        recorded.append(query @ key.transpose(-1, -2) * (scaling or query.shape[-1] ** -0.5))
        out = nn.functional.scaled_dot_product_attention(query, key, value)
        return out.transpose(1, 2), None

    AttentionInterface.register("record_logits", record)
    before = model.config._attn_implementation
    model.set_attn_implementation("record_logits")
    with torch.no_grad():
        features(model, pixels)
    model.set_attn_implementation(before)
    return recorded
