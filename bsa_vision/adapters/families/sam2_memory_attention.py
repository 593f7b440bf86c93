"""Memory attention of video models, in sam2 and transformers (Sam2Video, Sam3TrackerVideo): how a frame looks at those before it.

Each layer attends within the frame (role "mem_self"), then to what is remembered (role "mem_cross"): frame after frame, and object
pointers last. A pattern says where the keys of every remembered frame are kept; pointers always are. There is one head, of 256
channels, and the number of keys grows over the first frames: masks are laid out for the number that is there.
"""

from __future__ import annotations

from functools import partial
from math import isqrt
from typing import Any

from torch import Tensor, nn

from bsa_vision.adapters.linear_weights import linear_weights
from bsa_vision.adapters.swap import config_swap
from bsa_vision.adapters.swap.adapter import Adapter
from bsa_vision.adapters.swap.class_swap import is_of_transformers, kind_of
from bsa_vision.adapters.swap.encoder_state import FoundEncoder
from bsa_vision.adapters.swap.sdpa_intercept import Intercepted
from bsa_vision.adapters.swap.wrappers import Modules, unwrap
from bsa_vision.plans.model_spec import LayerSpec, ModelSpec

FAMILY = "sam2_memory"
FRAMES, POINTERS, TOKENS_PER_POINTER = 7, 16, 4  # of SAM 2, where a model does not say
PIXELS = 16  # per side of a token, where the image size is not known


class SparseAttention(Intercepted):
    """The seam of sam2: (B, N, C), (B, M, c), (B, M, c) -> (B, N, C)."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, num_k_exclude_rope: int = 0) -> Tensor:
        layer = self._layer
        return self._serve(
            lambda: layer.wrong_grid(q.shape[1], k.shape[1]),
            q,
            k,
            v,
            num_k_exclude_rope=num_k_exclude_rope,
        )


ATTENTION = {
    ("sam2.modeling.sam.transformer", "RoPEAttention"),
    ("transformers.models.sam2_video.modeling_sam2_video", "Sam2VideoRoPEAttention"),
    (
        "transformers.models.sam3_tracker_video.modeling_sam3_tracker_video",
        "Sam3TrackerVideoRoPEAttention",
    ),
}


def serves(module: nn.Module) -> bool:
    """Whether this adapter knows the class of an attention module."""
    return kind_of(module) in ATTENTION


def find(model: nn.Module) -> list[FoundEncoder]:
    """The memory attentions in `model`: modules whose `layers` hold a `self_attn` and a `cross_attn_image` that are served."""
    modules = Modules(model)
    return [_found(modules, root, module) for root, module in modules if _is_memory(module)]


def _is_memory(module: Any) -> bool:
    layers = unwrap(getattr(module, "layers", nn.Identity()))
    return (
        isinstance(layers, nn.ModuleList)
        and len(layers) > 0
        and all(
            serves(unwrap(getattr(unwrap(layer), name, nn.Identity())))
            for layer in layers
            for name in ("self_attn", "cross_attn_image")
        )
    )


def _found(names: Modules, root: str, memory: Any) -> FoundEncoder:
    config, model = getattr(memory, "config", None), names[""]
    frames = _said("num_maskmem", config, model) or FRAMES
    pointers = (
        _said("max_object_pointers_in_encoder", config)
        or _said("max_obj_ptrs_in_encoder", model)
        or POINTERS
    )
    layers, modules = [], []
    for index, layer in enumerate(unwrap(memory.layers)):
        name = ".".join(filter(None, (root, "layers", str(index))))
        paths = names.path(f"{name}.self_attn"), names.path(f"{name}.cross_attn_image")
        layers += _layers(paths, index, unwrap(layer), frames, pointers * TOKENS_PER_POINTER)
        modules += [unwrap(unwrap(layer).self_attn), unwrap(unwrap(layer).cross_attn_image)]
    grid, image = _own_grid(memory, modules[0]), _said("image_size", config, model)
    patch = image // grid[0] if isinstance(image, int) else PIXELS
    spec = ModelSpec(FAMILY, tuple(layers), grid, (patch, patch))
    return FoundEncoder(spec, tuple(modules), memory, partial(grid_of, grid))


def _said(name: str, *places: Any) -> Any:
    """The first of `places` (a config, a model) that has an attribute of that name says it; else None."""
    return next(
        (value for place in places if (value := getattr(place, name, None)) is not None), None
    )


def _layers(
    paths: tuple[str, str], index: int, layer: Any, frames: int, pointers: int
) -> list[LayerSpec]:
    """Attention within the frame, and to what is remembered."""
    within, across = unwrap(layer.self_attn), unwrap(layer.cross_attn_image)
    heads = getattr(within, "num_attention_heads", None) or within.num_heads
    in_both, of_keys = (
        linear_weights(within),
        linear_weights(across.k_proj) + linear_weights(across.v_proj),
    )
    outside = linear_weights(layer) - in_both - linear_weights(across)
    return [
        LayerSpec(
            paths[0],
            index,
            heads,
            within.internal_dim // heads,
            role="mem_self",
            attention_weights=in_both,
            mlp_weights=outside,
        ),
        LayerSpec(
            paths[1],
            index,
            heads,
            within.internal_dim // heads,
            role="mem_cross",
            attention_weights=linear_weights(across) - of_keys,
            frames=frames,
            pointers=pointers,
            key_weights=of_keys,
        ),
    ]


def _own_grid(memory: Any, attention: Any) -> tuple[int, int]:
    """(h, w) of the tokens its rotary positions were made for."""
    config = getattr(memory, "config", None)
    if config is not None:
        across, down = config.memory_attention_rope_feat_sizes
        return down, across
    # sam2 keeps nothing but the rotations: the first channel's are those of the column, which start again with every row.
    rotations = attention.freqs_cis[:, 0]
    if rotations.is_meta:
        return isqrt(len(rotations)), isqrt(len(rotations))
    starts = (rotations == rotations[0]).nonzero().flatten().tolist()
    return len(starts), len(rotations) // len(starts)


def grid_of(
    own: tuple[int, int], memory: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[int, int] | None:
    """(h, w) of the current frame, whose tokens come first (N, B, C); None where pointers would be taken for a frame.

    own  the grid its rotary positions are for; sam2 makes those of a square for any other number of tokens
    """
    current = args[0] if args else kwargs.get("curr", kwargs.get("current_vision_features"))
    current = current[0] if isinstance(current, (list, tuple)) else current
    named = kwargs.get("num_obj_ptr_tokens", kwargs.get("num_object_pointer_tokens", 0))
    pointers = args[4] if len(args) > 4 else named
    if not isinstance(current, Tensor):
        return None
    tokens = current.shape[0]
    grid = own if own[0] * own[1] == tokens else (isqrt(tokens), isqrt(tokens))
    return grid if grid[0] * grid[1] == tokens and pointers < tokens else None


def mixin_of(module: nn.Module) -> type[Intercepted] | None:
    return None if is_of_transformers(module) else SparseAttention


ADAPTER = Adapter(find, serves, mixin_of, config_swap.prepare)
