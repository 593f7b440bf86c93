"""ViTs of Hugging Face transformers, through its AttentionInterface.

These are ViT, DINOv2, DINOv3, CLIP, SigLIP, SigLIP 2 and SAM 3's vision encoder. They are swapped
by their config, see `config_swap`.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt
from typing import Any, NamedTuple, cast

from torch import nn

from bsa_vision.adapters.linear_weights import block_weights, outside_weights
from bsa_vision.adapters.swap import config_swap
from bsa_vision.adapters.swap.adapter import Adapter
from bsa_vision.adapters.swap.encoder_state import FoundEncoder, GridOf
from bsa_vision.adapters.swap.wrappers import Modules, own_class
from bsa_vision.plans.model_spec import LayerSpec, ModelSpec


class Kind(NamedTuple):
    """A family of models.

    family             its name in plans
    embeddings         class that makes patches from pixels
    num_prefix_tokens  config -> number of prefix tokens
    grid_of            see `FoundEncoder`; None = from the pixels
    """

    family: str
    embeddings: str
    num_prefix_tokens: Callable[[Any], int]
    grid_of: GridOf | None = None


def cls_and_registers(config: Any) -> int:
    return 1 + getattr(config, "num_register_tokens", 0)


def no_prefix_tokens(config: Any) -> int:
    return 0


def grid_of_patches(
    embeddings: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[int, int] | None:
    """Return the grid of SigLIP 2's inputs, patches with `spatial_shapes`; None if they differ."""
    shapes = args[1] if len(args) > 1 else kwargs.get("spatial_shapes")
    if shapes is None or bool((shapes != shapes[:1]).any()):
        return None
    height, width = shapes[0].tolist()
    return height, width


# Module and class of the attention -> kind.
ATTENTION = {
    ("vit.modeling_vit", "ViTAttention"): Kind("vit", "ViTEmbeddings", cls_and_registers),
    ("dinov2.modeling_dinov2", "Dinov2Attention"): Kind(
        "dinov2", "Dinov2Embeddings", cls_and_registers
    ),
    ("dinov2_with_registers.modeling_dinov2_with_registers", "Dinov2WithRegistersAttention"): Kind(
        "dinov2", "Dinov2WithRegistersEmbeddings", cls_and_registers
    ),
    ("dinov3_vit.modeling_dinov3_vit", "DINOv3ViTAttention"): Kind(
        "dinov3", "DINOv3ViTEmbeddings", cls_and_registers
    ),
    ("clip.modeling_clip", "CLIPAttention"): Kind(
        "clip", "CLIPVisionEmbeddings", cls_and_registers
    ),
    ("siglip.modeling_siglip", "SiglipAttention"): Kind(
        "siglip", "SiglipVisionEmbeddings", no_prefix_tokens
    ),
    ("siglip2.modeling_siglip2", "Siglip2Attention"): Kind(
        "siglip2", "Siglip2VisionEmbeddings", no_prefix_tokens, grid_of_patches
    ),
    ("sam3.modeling_sam3", "Sam3ViTRoPEAttention"): Kind(
        "sam3", "Sam3ViTEmbeddings", no_prefix_tokens
    ),
}
EMBEDDINGS = {kind.embeddings for kind in ATTENTION.values()}


def find(model: nn.Module) -> list[FoundEncoder]:
    """Return the encoders of this family in `model`, one per patch embedding.

    Classes are compared by name; transformers is not imported.
    """
    modules = Modules(model)
    attention = [(name, module) for name, module in modules if supports(module)]
    found = []
    for name, embedding in modules:
        kind = own_class(type(embedding))
        if kind.__name__ not in EMBEDDINGS or not kind.__module__.startswith("transformers."):
            continue
        root = name.rpartition(".")[0]
        inside = [
            (name, module)
            for name, module in attention
            if (not root or name.startswith(root + "."))
            and _kind(module).embeddings == kind.__name__
        ]
        if inside:
            spec, grid_of = _spec(modules, root, inside, embedding), _kind(inside[0][1]).grid_of
            layers = tuple(module for _, module in inside)
            found.append(FoundEncoder(spec, layers, embedding, grid_of))
    return found


def supports(module: nn.Module) -> bool:
    """Return whether this adapter supports the class of an attention module."""
    return _name(module) in ATTENTION


def _name(module: nn.Module) -> tuple[str, str]:
    kind = own_class(type(module))
    return kind.__module__.removeprefix("transformers.models."), kind.__name__


def _kind(module: nn.Module) -> Kind:
    return ATTENTION[_name(module)]


def _spec(
    modules: Modules, root: str, attention: list[tuple[str, nn.Module]], embedding: nn.Module
) -> ModelSpec:
    config: Any = attention[0][1].config
    kind, patch_size = _kind(attention[0][1]), _pair(config.patch_size)
    blocks: list[Any] = [modules[name.rpartition(".")[0]] for name, _ in attention]
    layers = []
    for index, ((name, module), block) in enumerate(zip(attention, blocks, strict=True)):
        options = dict(window=getattr(block, "window_size", 0), **block_weights(block, module))
        heads, head_dim = config.num_attention_heads, int(cast(Any, module).head_dim)
        layers.append(LayerSpec(modules.path(name), index, heads, head_dim, **options))
    if hasattr(config, "image_size"):
        image_size = _pair(config.image_size)
        grid = (image_size[0] // patch_size[0], image_size[1] // patch_size[1])
    else:  # SigLIP 2: positions of num_patches patches, resized to any grid
        grid = (isqrt(config.num_patches),) * 2
    return ModelSpec(
        family=kind.family,
        layers=tuple(layers),
        grid=grid,
        patch_size=patch_size,
        num_prefix_tokens=kind.num_prefix_tokens(config),
        **outside_weights(modules[root], blocks, embedding),  # type: ignore[arg-type]
    )


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def mixin_of(module: nn.Module) -> None:
    """Return None: these modules are swapped by their config."""


ADAPTER = Adapter(find, supports, mixin_of, config_swap.prepare, returns_weights=True)
