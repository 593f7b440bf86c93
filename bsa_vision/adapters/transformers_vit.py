"""Hugging Face transformers: ViT, DINOv2 (with and without registers), DINOv3, through its AttentionInterface.

These models look their attention function up by a name in their config. A swapped layer gets a copy of its config with our
name in it; the model's own config, its other layers and its parameters stay as they are.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from bsa_vision.adapters.layer import ATTRIBUTE, Found, Layer, layer_of
from bsa_vision.adapters.weights import block_weights, outside_weights
from bsa_vision.model_spec import LayerSpec, ModelSpec

EXACT = False  # a layer without sparse heads runs its original attention
NAME = "bsa_vision"  # transformers reads meaning into names that contain "sdpa" or "flash"
IMPLEMENTATION = "_attn_implementation_internal"

# module and class of the attention -> family
ATTENTION = {
    ("transformers.models.vit.modeling_vit", "ViTAttention"): "vit",
    ("transformers.models.dinov2.modeling_dinov2", "Dinov2Attention"): "dinov2",
    (
        "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers",
        "Dinov2WithRegistersAttention",
    ): "dinov2",
    ("transformers.models.dinov3_vit.modeling_dinov3_vit", "DINOv3ViTAttention"): "dinov3",
}
EMBEDDINGS = {"ViTEmbeddings", "Dinov2Embeddings", "Dinov2WithRegistersEmbeddings", "DINOv3ViTEmbeddings"}


def find(model: nn.Module) -> list[Found]:
    """The encoders of this family in `model`, one per patch embedding; looks at names of classes and imports nothing."""
    attention = [(name, module) for name, module in model.named_modules() if serves(module)]
    embeddings = [
        (name, module)
        for name, module in model.named_modules()
        if type(module).__name__ in EMBEDDINGS and type(module).__module__.startswith("transformers.")
    ]
    found = []
    for path, embedding in embeddings:
        root = path.rpartition(".")[0]
        inside = [(name, module) for name, module in attention if not root or name.startswith(root + ".")]
        if inside:
            found.append(Found(_spec(model, root, inside), tuple(module for _, module in inside), embedding))
    return found


def serves(module: nn.Module) -> bool:
    """Whether this adapter knows the class of an attention module."""
    return _kind(module) in ATTENTION


def _kind(module: nn.Module) -> tuple[str, str]:
    return type(module).__module__, type(module).__name__


def _spec(model: nn.Module, root: str, attention: list[tuple[str, nn.Module]]) -> ModelSpec:
    config: Any = attention[0][1].config
    patch_size, image_size = _pair(config.patch_size), _pair(config.image_size)
    heads = config.num_attention_heads
    blocks = [model.get_submodule(name.rpartition(".")[0]) for name, _ in attention]
    layers = [
        LayerSpec(name, index, heads, int(module.head_dim), **block_weights(block, module))  # type: ignore[arg-type]
        for index, ((name, module), block) in enumerate(zip(attention, blocks, strict=True))
    ]
    return ModelSpec(
        family=ATTENTION[_kind(attention[0][1])],
        layers=tuple(layers),
        grid=(image_size[0] // patch_size[0], image_size[1] // patch_size[1]),
        patch_size=patch_size,
        start=1 + getattr(config, "num_register_tokens", 0),
        **outside_weights(model.get_submodule(root), blocks),  # type: ignore[arg-type]
    )


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def original_of(module: Any) -> Any:
    """What `unswap` puts back: the module's own config object."""
    return module.config


def swap(module: Any, layer: Layer) -> None:
    module.config = copy.copy(layer.original)
    setattr(module.config, IMPLEMENTATION, NAME)
    setattr(module, ATTRIBUTE, layer)


def check_swapped(module: Any) -> None:
    """Nothing: what `unswap` puts back is a config that only a swap replaces."""


def unswap(module: Any) -> None:
    layer = layer_of(module)
    assert layer is not None
    module.config = layer.original
    delattr(module, ATTRIBUTE)


def prepare() -> None:
    """Make our name known to transformers. Both registries are needed: without a mask function, padding masks vanish."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention function: q, k, v (B, H, N, D) -> (out (B, N, H, D), attention weights or None)."""
    layer = layer_of(module)
    if layer is None:  # loaded with attn_implementation="bsa_vision" and no plan: dense
        return _original("sdpa", module)(module, query, key, value, attention_mask, **kwargs)
    reason = None if layer.runs_original() else _unsupported(layer, query, attention_mask, kwargs)
    if reason is not None:
        layer.fall_back(reason)
    if reason is not None or layer.runs_original():
        name = getattr(layer.original, IMPLEMENTATION)
        return _original(name, module)(module, query, key, value, attention_mask, **kwargs)
    out = layer.attend(query, key, value, kwargs.get("scaling"), kwargs.get("dropout") or 0.0)
    return out.transpose(1, 2), None


def _unsupported(layer: Layer, query: Tensor, attention_mask: Tensor | None, kwargs: dict[str, Any]) -> str | None:
    if attention_mask is not None:
        return "an attention mask was passed"
    if kwargs.get("is_causal"):
        return "causal attention was asked for"
    if kwargs.get("output_attentions") or getattr(layer.original, "output_attentions", False):
        return "attention weights were asked for"
    return layer.wrong_grid(query.shape[2])


def _original(name: str | None, module: Any) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """transformers' own function of that name; "eager" lives in the file of each model."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager = sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
