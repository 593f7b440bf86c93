"""Memory attention of video models, in sam2 and transformers (Sam2Video, Sam3TrackerVideo).

Each layer attends within the current frame (role "mem_self"), then to the memory (role
"mem_cross"): the tokens of earlier frames, followed by object pointers. A pattern selects the same
keys in every remembered frame; pointers are always kept. There is one head of 256 channels. The
number of keys grows over the first frames, and masks are computed for each number.
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
FRAMES, POINTERS, TOKENS_PER_POINTER = 7, 16, 4  # SAM 2's, for models without these settings
PIXELS = 16  # per side of a token, if the image size is unknown


class SparseAttention(Intercepted):
    """Attention of sam2: (B, N, C), (B, M, c), (B, M, c) -> (B, N, C)."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, num_k_exclude_rope: int = 0) -> Tensor:
        layer = self._layer
        return self._run_forward(
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


def supports(module: nn.Module) -> bool:
    """Return whether this adapter supports the class of an attention module."""
    return kind_of(module) in ATTENTION


def find(model: nn.Module) -> list[FoundEncoder]:
    """Return the memory attentions in `model`.

    These are modules whose `layers` all have a supported `self_attn` and `cross_attn_image`.
    """
    modules = Modules(model)
    return [_found(modules, root, module) for root, module in modules if _is_memory(module)]


def _is_memory(module: Any) -> bool:
    layers = unwrap(getattr(module, "layers", nn.Identity()))
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        return False
    return all(
        supports(unwrap(getattr(unwrap(layer), name, nn.Identity())))
        for layer in layers
        for name in ("self_attn", "cross_attn_image")
    )


def _found(names: Modules, root: str, memory: Any) -> FoundEncoder:
    config, model = getattr(memory, "config", None), names[""]
    frames = _setting("num_maskmem", config, model) or FRAMES
    pointers = (
        _setting("max_object_pointers_in_encoder", config)
        or _setting("max_obj_ptrs_in_encoder", model)
        or POINTERS
    )
    layers, modules = [], []
    for index, layer in enumerate(unwrap(memory.layers)):
        name = ".".join(filter(None, (root, "layers", str(index))))
        paths = names.path(f"{name}.self_attn"), names.path(f"{name}.cross_attn_image")
        layers += _layers(paths, index, unwrap(layer), frames, pointers * TOKENS_PER_POINTER)
        modules += [unwrap(unwrap(layer).self_attn), unwrap(unwrap(layer).cross_attn_image)]
    grid, image_size = _default_grid(memory, modules[0]), _setting("image_size", config, model)
    patch = image_size // grid[0] if isinstance(image_size, int) else PIXELS
    spec = ModelSpec(FAMILY, tuple(layers), grid, (patch, patch))
    return FoundEncoder(spec, tuple(modules), memory, partial(grid_of, grid))


def _setting(name: str, *places: Any) -> Any:
    """Return the attribute of the first of `places` (a config, a model) that has it, else None."""
    values = (getattr(place, name, None) for place in places)
    return next((value for value in values if value is not None), None)


def _layers(
    paths: tuple[str, str], index: int, layer: Any, frames: int, pointers: int
) -> list[LayerSpec]:
    """Return the specs of a layer's attention within the frame and to the memory."""
    self_attn, cross_attn = unwrap(layer.self_attn), unwrap(layer.cross_attn_image)
    heads = getattr(self_attn, "num_attention_heads", None) or self_attn.num_heads
    head_dim = self_attn.internal_dim // heads
    self_weights, cross_weights = linear_weights(self_attn), linear_weights(cross_attn)
    key_weights = linear_weights(cross_attn.k_proj) + linear_weights(cross_attn.v_proj)
    return [
        LayerSpec(
            paths[0],
            index,
            heads,
            head_dim,
            role="mem_self",
            attention_weights=self_weights,
            mlp_weights=linear_weights(layer) - self_weights - cross_weights,
        ),
        LayerSpec(
            paths[1],
            index,
            heads,
            head_dim,
            role="mem_cross",
            attention_weights=cross_weights - key_weights,
            frames=frames,
            pointers=pointers,
            key_weights=key_weights,
        ),
    ]


def _default_grid(memory: Any, attention: Any) -> tuple[int, int]:
    """Return the grid (h, w) that the rotary positions were computed for."""
    config = getattr(memory, "config", None)
    if config is not None:
        width, height = config.memory_attention_rope_feat_sizes
        return height, width
    # sam2 keeps only the rotations. Those of the first channel depend on the column, so they
    # repeat in every row.
    rotations = attention.freqs_cis[:, 0]
    if rotations.is_meta:
        return isqrt(len(rotations)), isqrt(len(rotations))
    starts = (rotations == rotations[0]).nonzero().flatten().tolist()
    return len(starts), len(rotations) // len(starts)


def grid_of(
    default: tuple[int, int], memory: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[int, int] | None:
    """Return the grid (h, w) of the current frame, the first argument (N, B, C); None = unknown.

    It is unknown if the pointers could be mistaken for a frame.

    default  grid of the rotary positions; sam2 assumes a square for other numbers of tokens
    """
    current = args[0] if args else kwargs.get("curr", kwargs.get("current_vision_features"))
    current = current[0] if isinstance(current, (list, tuple)) else current
    pointers = kwargs.get("num_obj_ptr_tokens", kwargs.get("num_object_pointer_tokens", 0))
    pointers = args[4] if len(args) > 4 else pointers
    if not isinstance(current, Tensor):
        return None
    tokens = current.shape[0]
    grid = default if default[0] * default[1] == tokens else (isqrt(tokens), isqrt(tokens))
    return grid if grid[0] * grid[1] == tokens and pointers < tokens else None


def mixin_of(module: nn.Module) -> type[Intercepted] | None:
    return None if is_of_transformers(module) else SparseAttention


ADAPTER = Adapter(find, supports, mixin_of, config_swap.prepare)
