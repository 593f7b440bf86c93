"""Hugging Face transformers: ViT, DINOv2, DINOv3, CLIP, SigLIP, SigLIP 2 and SAM 3's vision encoder, through its AttentionInterface.

These models look their attention function up by a name in their config. A swapped layer gets a copy of its config with our
name in it; the model's own config, its other layers and its parameters stay as they are.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from math import isqrt
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from bsa_vision.adapters.linear_weights import block_weights, outside_weights
from bsa_vision.adapters.swap.sparse_layer import Found, GridOf, Layer, layer_of
from bsa_vision.adapters.swap.wrappers import Modules, own_class
from bsa_vision.plans.model_spec import LayerSpec, ModelSpec

EXACT = False  # a layer without sparse heads runs its original attention
NAME = "bsa_vision"  # transformers reads meaning into names that contain "sdpa" or "flash"
IMPLEMENTATION = "_attn_implementation_internal"
WEIGHTS_ASKED_FOR = "attention weights were asked for"
WEIGHTS_WATCHED = "a forward hook on the module sees its attention weights"


class Kind(NamedTuple):
    """A family of models: what plans call it, where its patches are made, and how many special tokens come first."""

    family: str
    embeddings: str
    start: Callable[[Any], int]  # of its config
    grid_of: GridOf | None = None  # where pixels alone do not tell


def cls_and_registers(config: Any) -> int:
    return 1 + getattr(config, "num_register_tokens", 0)


def none(config: Any) -> int:
    return 0


def grid_of_patches(
    embeddings: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[int, int] | None:
    """SigLIP 2 is given patches, and the grid of each image beside them; one grid for the batch is what we can use."""
    shapes = args[1] if len(args) > 1 else kwargs.get("spatial_shapes")
    if shapes is None or bool((shapes != shapes[:1]).any()):
        return None
    height, width = shapes[0].tolist()
    return height, width


# module and class of the attention -> kind
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
    ("siglip.modeling_siglip", "SiglipAttention"): Kind("siglip", "SiglipVisionEmbeddings", none),
    ("siglip2.modeling_siglip2", "Siglip2Attention"): Kind(
        "siglip2", "Siglip2VisionEmbeddings", none, grid_of_patches
    ),
    ("sam3.modeling_sam3", "Sam3ViTRoPEAttention"): Kind("sam3", "Sam3ViTEmbeddings", none),
}
EMBEDDINGS = {kind.embeddings for kind in ATTENTION.values()}


def find(model: nn.Module) -> list[Found]:
    """The encoders of this family in `model`, one per patch embedding; looks at names of classes and imports nothing."""
    modules = Modules(model)
    attention = [(name, module) for name, module in modules if serves(module)]
    found = []
    for name, embedding in modules:
        kind = own_class(type(embedding))
        if kind.__name__ not in EMBEDDINGS or not kind.__module__.startswith("transformers."):
            continue
        root = name.rpartition(".")[0]
        inside = [
            (name, module) for name, module in attention if not root or name.startswith(root + ".")
        ]
        inside = [
            (name, module) for name, module in inside if _kind(module).embeddings == kind.__name__
        ]
        if inside:
            spec, grid_of = _spec(modules, root, inside, embedding), _kind(inside[0][1]).grid_of
            found.append(Found(spec, tuple(module for _, module in inside), embedding, grid_of))
    return found


def serves(module: nn.Module) -> bool:
    """Whether this adapter knows the class of an attention module."""
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
        layers.append(
            LayerSpec(
                modules.path(name),
                index,
                config.num_attention_heads,
                int(cast(Any, module).head_dim),
                **options,
            )
        )
    if hasattr(config, "image_size"):
        image_size = _pair(config.image_size)
        grid = (image_size[0] // patch_size[0], image_size[1] // patch_size[1])
    else:  # SigLIP 2: positions for so many patches, resized to any grid
        grid = (isqrt(config.num_patches),) * 2
    return ModelSpec(
        family=kind.family,
        layers=tuple(layers),
        grid=grid,
        patch_size=patch_size,
        start=kind.start(config),
        **outside_weights(modules[root], blocks, embedding),  # type: ignore[arg-type]
    )


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def original_of(module: Any) -> Any:
    """What `unswap` puts back: the module's own config object."""
    return module.config


def swap(module: Any, layer: Layer) -> None:
    layer.swapped = copy.copy(layer.original)
    setattr(layer.swapped, IMPLEMENTATION, NAME)
    layer.attach(module)
    module.config = layer.swapped


def check_swapped(module: Any) -> None:
    """Nothing: `unswap` undoes the swap of the config, whatever was done to the module's class and forward."""


def unswap(module: Any) -> None:
    """Undo `swap`, also one that was interrupted; to be called again where it was interrupted itself."""
    layer = layer_of(module)
    assert layer is not None
    if module.config is layer.swapped:
        module.config = layer.original
    elif (
        getattr(module.config, IMPLEMENTATION, None) == NAME and module.config is not layer.original
    ):
        # Another config since, made from ours: it stays, without our name in it.
        setattr(module.config, IMPLEMENTATION, getattr(layer.original, IMPLEMENTATION))
    layer.detach(module)


def prepare() -> None:
    """Make our name known to transformers. Both registries are needed: without a mask function, padding masks vanish."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention function: q, k, v (B, H, N, D) -> (out (B, N, H, D), attention weights or None)."""
    layer = layer_of(module)
    if layer is None:  # loaded with attn_implementation="bsa_vision" and no plan: dense
        return _original("sdpa", module)(module, query, key, value, attention_mask, **kwargs)
    reason = (
        None
        if layer.runs_original()
        else _unsupported(layer, module, query, key, attention_mask, kwargs)
    )
    if reason is not None:
        layer.fall_back(reason)
    if reason is not None or layer.runs_original():
        name = getattr(layer.original, IMPLEMENTATION)
        return _original(name, module)(module, query, key, value, attention_mask, **kwargs)
    grid = layer.grid_of(layer.tower.current_grid(query.shape[2]))
    out = layer.attend(
        query, key, value, kwargs.get("scaling"), kwargs.get("dropout") or 0.0, grid=grid
    )
    return out.transpose(1, 2), None


def _unsupported(
    layer: Layer,
    module: Any,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    kwargs: dict[str, Any],
) -> str | None:
    if attention_mask is not None:
        return "an attention mask was passed"
    if kwargs.get("is_causal"):
        return "causal attention was asked for"
    asked = kwargs.get("output_attentions") or getattr(layer.original, "output_attentions", False)
    if asked or attentions_are_collected(module):
        return WEIGHTS_ASKED_FOR
    if _returns_weights(layer, module) and is_watched(module):
        return WEIGHTS_WATCHED
    return layer.wrong_grid(query.shape[2], key.shape[2])


def attentions_are_collected(module: nn.Module) -> bool:
    """Return whether the model was called for its attentions, which transformers takes from a hook on `module`."""
    if not module._forward_hooks:  # and torch.compile cannot look up what is collected
        return False
    try:
        from transformers.utils.output_capturing import _active_collector
    except ImportError:  # another version of transformers, which passes output_attentions
        return False
    return "attentions" in (_active_collector.get() or {})


def is_watched(module: nn.Module) -> bool:
    """Return whether a forward hook sees what `module` returns, other than those of transformers."""
    hooks = module._forward_hooks.values()
    return any(
        getattr(hook, "__module__", "") != "transformers.utils.output_capturing" for hook in hooks
    )


def _returns_weights(layer: Layer, module: nn.Module) -> bool:
    """Return whether the original module would return attention weights beside its output."""
    name = str(getattr(layer.original, IMPLEMENTATION))
    without = "sdpa" in name or "flash" in name
    return not without and (serves(module) or layer.spec.role != "self")


def _original(name: str | None, module: Any) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """transformers' own function of that name; "eager" lives in the file of each model."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager = sys.modules[own_class(type(module)).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
