"""Segment Anything's image encoder in all its implementations; all layers, windowed or not.

The implementations are segment_anything, transformers (SAM, SAM-HQ, DeepSeek-OCR 2), timm
(`vision_transformer_sam`, with rope and qk-norm), DeepSeek-OCR's own code, and
`bsa_vision.models.encoder`. They share the computation `_attend`, and differ in names and in the
arguments and results of their forward. No N x N tensor is built: relative position stays factored.
Windowed layers are dense and exact: padded keys take part in every window, as in the originals.
"""

from __future__ import annotations

import inspect
import re
from typing import Any, cast

from torch import Tensor, nn
from torch.fx import Proxy

from bsa_vision.adapters.linear_weights import block_weights, convolution, outside_weights
from bsa_vision.adapters.swap.adapter import Adapter
from bsa_vision.adapters.swap.class_swap import Swapped, kind_of
from bsa_vision.adapters.swap.config_swap import (
    WEIGHTS_HOOKED,
    WEIGHTS_REQUESTED,
    attentions_are_collected,
    has_user_hooks,
)
from bsa_vision.adapters.swap.encoder_state import FoundEncoder
from bsa_vision.adapters.swap.sdpa_intercept import dropout_reads_weights
from bsa_vision.adapters.swap.sparse_layer import SparseLayer, check_indices, layer_of
from bsa_vision.adapters.swap.wrappers import Modules, unwrap
from bsa_vision.attention.carried_masks import plain_sizes
from bsa_vision.attention.rel_pos import RelPos, decompose, resize_table
from bsa_vision.plans.model_spec import LayerSpec, ModelSpec


class SparseAttention(Swapped):
    """Attention of segment_anything, timm and DeepSeek-OCR: (B, h, w, C) -> (B, h, w, C)."""

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return self._fx_leaf(x)
        layer = layer_of(self)
        assert layer is not None
        drop: Any = getattr(self, "attn_drop", None)  # timm only
        fused = drop is None or getattr(self, "fused_attn", True)
        reason = None if fused else dropout_reads_weights(drop)
        if reason is not None and not layer.runs_original():
            layer.fall_back(reason)
        if reason is not None or layer.runs_original():
            return super().forward(x)
        dropout_p = drop.p if self.training and drop is not None else 0.0
        return _attend(self, layer, x, cast(int, self.num_heads), dropout_p)


class SparseTransformersAttention(Swapped):
    """Attention of transformers: (B, h, w, C) -> ((B, h, w, C), attention weights or None)."""

    def forward(
        self, hidden_states: Tensor, output_attentions: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        if isinstance(hidden_states, Proxy):
            return self._fx_leaf(hidden_states, output_attentions=output_attentions)
        layer = layer_of(self)
        assert layer is not None
        # Only the eager class returns attention weights and applies dropout to them; the SDPA class
        # ignores both settings.
        eager, reason = "Sdpa" not in layer.original.__name__, None
        if output_attentions or attentions_are_collected(self):
            reason = WEIGHTS_REQUESTED
        elif eager and has_user_hooks(self):
            reason = WEIGHTS_HOOKED
        if reason is not None and not layer.runs_original():
            layer.fall_back(reason)
        if reason is not None or layer.runs_original():
            return super().forward(hidden_states, output_attentions=output_attentions)
        heads = cast(int, self.num_attention_heads)
        dropout_p = cast(float, self.dropout) if self.training and eager else 0.0
        return _attend(self, layer, hidden_states, heads, dropout_p), None


class SparseOwnAttention(Swapped):
    """Attention of `bsa_vision.models.blocks`, which calls `attend` between its projections."""

    OVERRIDES = "attend"

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, rel_pos: RelPos | None, grid: tuple[int, int]
    ) -> Tensor:
        """Attend: (B, H, N, D) -> (B, H, N, D)."""
        layer = layer_of(self)
        assert layer is not None
        if layer.runs_original():
            return cast(Any, super()).attend(q, k, v, rel_pos, grid)
        return layer.attend(q, k, v, None, 0.0, grid=grid, rel_pos=rel_pos)


# Module and class of the attention -> mixin.
MIXINS: dict[tuple[str, str], type[Swapped]] = {
    ("bsa_vision.models.blocks", "Attention"): SparseOwnAttention,
    ("segment_anything.modeling.image_encoder", "Attention"): SparseAttention,
    ("timm.models.vision_transformer_sam", "Attention"): SparseAttention,
    **{
        (f"transformers.models.{module}", f"{prefix}{name}"): SparseTransformersAttention
        for module, prefix in (
            ("sam.modeling_sam", "Sam"),
            ("sam_hq.modeling_sam_hq", "SamHQ"),
            ("deepseek_ocr2.modeling_deepseek_ocr2", "DeepseekOcr2Sam"),
        )
        for name in ("VisionAttention", "VisionSdpaAttention")
    },
}
# DeepSeek-OCR's own code has no fixed package: transformers loads it from a downloaded file, and
# vLLM's tree has another name for that file.
DEEPSEEK_MODULE = re.compile(r"(^|\.)(deepencoder|sam_vary_sdpa)$")


def mixin_of(module: nn.Module) -> type[Swapped] | None:
    library, name = kind_of(module)
    if DEEPSEEK_MODULE.search(library) and name == "Attention":
        return SparseAttention if _is_deepseek_sam(module) else None
    return MIXINS.get((library, name))


def _is_deepseek_sam(module: nn.Module) -> bool:
    """Return whether the attributes of an attention of that file are those that `_attend` uses."""
    parameters = list(inspect.signature(type(module).forward).parameters)
    attributes = ("num_heads", "scale", "qkv", "proj", "use_rel_pos")
    return parameters == ["self", "x"] and all(hasattr(module, name) for name in attributes)


def supports(module: nn.Module) -> bool:
    """Return whether this adapter supports the class of an attention module."""
    return mixin_of(module) is not None


def find(model: nn.Module) -> list[FoundEncoder]:
    """Return the encoders of this family in `model`.

    In all implementations, attention is `<encoder>.<blocks>.<index>.attn`.
    """
    modules = Modules(model)
    encoders: dict[str, list[tuple[str, nn.Module]]] = {}
    for name, module in modules:
        if supports(module):
            root = ".".join(name.split(".")[:-3])
            encoders.setdefault(root, []).append((name, module))
    return [
        _found(modules, root, attention)
        for root, attention in encoders.items()
        if hasattr(modules[root], "patch_embed")
    ]


def _found(modules: Modules, root: str, attention: list[tuple[str, nn.Module]]) -> FoundEncoder:
    encoder: Any = modules[root]
    layers, blocks = [], []
    check_indices(attention)
    for index, (name, module) in enumerate(attention):
        attn, block = cast(Any, module), cast(Any, modules[name.rpartition(".")[0]])
        blocks.append(block)
        heads = getattr(attn, "num_attention_heads", None) or attn.num_heads
        head_dim = round(attn.scale**-2)  # the projections may be wrapped
        options = dict(
            window=block.window_size, rel_pos=bool(attn.use_rel_pos), **block_weights(block, attn)
        )
        layers.append(LayerSpec(modules.path(name), index, heads, head_dim, **options))
    embed = unwrap(encoder.patch_embed)
    grid, patch = _grid_and_patch(encoder, embed)
    spec = ModelSpec(
        getattr(encoder, "family", "sam"),
        tuple(layers),
        grid,
        patch,
        num_prefix_tokens=int(getattr(encoder, "num_special", 0)),
        **outside_weights(encoder, blocks, embed),  # type: ignore[arg-type]
    )
    return FoundEncoder(spec, tuple(module for _, module in attention), embed)


def _grid_and_patch(encoder: Any, embed: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the encoder's default grid in patches, and its patch size in pixels."""
    patch = _pair(convolution(embed).kernel_size)
    size = getattr(embed, "image_size", None) or getattr(embed, "img_size", None)
    height, width = _pair(size or encoder.img_size)
    return (height // patch[0], width // patch[1]), patch


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _attend(module: Any, layer: SparseLayer, x: Tensor, heads: int, dropout_p: float) -> Tensor:
    """Project, attend and project: (B, h, w, C) -> (B, h, w, C)."""
    height, width = plain_sizes(x.shape[1], x.shape[2])
    is_timm = hasattr(module, "proj_drop")  # its projections take (B, N, C), others (B, h, w, C)
    qkv = module.qkv(x.flatten(1, 2) if is_timm else x).unflatten(-1, (3, heads, -1))
    qkv = qkv if is_timm else qkv.flatten(1, 2)  # (B, N, 3, H, D)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, D) each
    if is_timm:
        q, k = _normed(module.q_norm, q), _normed(module.k_norm, k)
    rel_pos = None
    if module.use_rel_pos:
        tables = (resize_table(module.rel_pos_h, height), resize_table(module.rel_pos_w, width))
        rel_pos = RelPos(*(term.to(q.dtype) for term in decompose(q, *tables, (height, width))))
    elif getattr(module, "rope", None) is not None:  # timm
        q, k = (_rotate(module.rope, tokens).type_as(v) for tokens in (q, k))
    out = layer.attend(q, k, v, module.scale, dropout_p, grid=(height, width), rel_pos=rel_pos)
    out = out.transpose(1, 2).flatten(2)  # (B, H, N, D) -> (B, N, C)
    if is_timm:
        return module.proj_drop(module.proj(out)).unflatten(1, (height, width))
    return module.proj(out.unflatten(1, (height, width)))


def _normed(norm: nn.Module, tokens: Tensor) -> Tensor:
    """Normalise (B, H, N, D) with a norm that timm calls with (B * H, N, D)."""
    if isinstance(norm, nn.Identity) and not norm._forward_hooks and not norm._forward_pre_hooks:
        return tokens
    return norm(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])


def _rotate(rope: Any, tokens: Tensor) -> Tensor:
    from timm.layers import apply_rot_embed_cat

    return apply_rot_embed_cat(tokens, rope.get_embed())


ADAPTER = Adapter(find, supports, mixin_of, exact=True)  # the originals build an N x N bias
