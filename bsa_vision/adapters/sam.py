"""Segment Anything's image encoder, in every code base it lives in; all layers, windowed ones included.

segment_anything, transformers (SAM, SAM-HQ, DeepSeek-OCR 2), timm (`vision_transformer_sam`, with rope and qk-norm), the code that
DeepSeek-OCR brings along, and our own `bsa_vision.encoder`. The arithmetic is one, `_attend`; the seams differ in names and in what a
forward takes and returns. Nothing of size N x N is built: relative position stays factored. Windowed layers are dense and exact:
padded keys take part in every window, as in the originals.
"""

from __future__ import annotations

import inspect
import re
from typing import Any, cast

from torch import Tensor, nn

from bsa_vision.adapters import class_swap
from bsa_vision.adapters.class_swap import Swapped, check_swapped, kind_of, original_of, prepare, unswap
from bsa_vision.adapters.layer import Found, Layer, check_indices, layer_of
from bsa_vision.adapters.weights import block_weights, outside_weights
from bsa_vision.adapters.wrappers import Modules, unwrap
from bsa_vision.model_spec import LayerSpec, ModelSpec
from bsa_vision.rel_pos import RelPos, decompose, resize_table

EXACT = True  # dense layers run here too: the same result, faster, because the originals build an N x N bias


class SparseAttention(Swapped):
    """segment_anything's seam, timm's and DeepSeek-OCR's: (B, h, w, C) -> (B, h, w, C)."""

    def forward(self, x: Tensor) -> Tensor:
        layer = layer_of(self)
        assert layer is not None
        if layer.runs_original():
            return super().forward(x)
        drop = getattr(self, "attn_drop", None)  # timm only
        return _attend(self, layer, x, self.num_heads, drop.p if self.training and drop is not None else 0.0)  # type: ignore


class SparseTransformersAttention(Swapped):
    """transformers' seam: (B, h, w, C) -> ((B, h, w, C), attention weights or None)."""

    def forward(self, hidden_states: Tensor, output_attentions: bool | None = None) -> tuple[Tensor, Tensor | None]:
        layer = layer_of(self)
        assert layer is not None
        weights_asked_for = output_attentions or _weights_are_collected()
        if weights_asked_for and not layer.runs_original():
            layer.fall_back("attention weights were asked for")
        if weights_asked_for or layer.runs_original():
            return super().forward(hidden_states, output_attentions=output_attentions)
        # Only the eager class drops attention weights while training; the SDPA class ignores its own setting.
        drops = self.training and "Sdpa" not in layer.original.__name__
        heads, dropout = self.num_attention_heads, self.dropout
        return _attend(self, layer, hidden_states, heads, dropout if drops else 0.0), None  # type: ignore[arg-type]


class SparseOwnAttention(Swapped):
    """The seam of `bsa_vision.blocks`, which projects itself and leaves the attention proper to `attend`."""

    OVERRIDES = "attend"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rel_pos: RelPos | None, grid: tuple[int, int]) -> Tensor:
        """(B, H, N, D) -> (B, H, N, D)."""
        layer = layer_of(self)
        assert layer is not None
        if layer.runs_original():
            return cast(Any, super()).attend(q, k, v, rel_pos, grid)
        return layer.attend(q, k, v, None, 0.0, grid=grid, rel_pos=rel_pos)


# Module and class of the attention -> seam.
SEAMS: dict[tuple[str, str], type[Swapped]] = {
    ("bsa_vision.blocks", "Attention"): SparseOwnAttention,
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
# DeepSeek-OCR's own code has no fixed package: transformers loads it from a downloaded file, vLLM's tree calls that file otherwise.
DEEPSEEK_MODULE = re.compile(r"(^|\.)(deepencoder|sam_vary_sdpa)$")


def _seam(module: nn.Module) -> type[Swapped] | None:
    library, name = kind_of(module)
    if DEEPSEEK_MODULE.search(library) and name == "Attention":
        return SparseAttention if _is_deepseek_sam(module) else None
    return SEAMS.get((library, name))


def _is_deepseek_sam(module: nn.Module) -> bool:
    """Whether an attention from a file of that name computes what `_attend` does, as far as its members tell."""
    takes = list(inspect.signature(type(module).forward).parameters)
    return takes == ["self", "x"] and all(
        hasattr(module, n) for n in ("num_heads", "scale", "qkv", "proj", "use_rel_pos")
    )


def serves(module: nn.Module) -> bool:
    """Whether this adapter knows the class of an attention module."""
    return _seam(module) is not None


def find(model: nn.Module) -> list[Found]:
    """The encoders of this family in `model`. In every code base, attention is `<encoder>.<blocks>.<index>.attn`."""
    modules = Modules(model)
    encoders: dict[str, list[tuple[str, nn.Module]]] = {}
    for name, module in modules:
        if serves(module):
            root = ".".join(name.split(".")[:-3])
            encoders.setdefault(root, []).append((name, module))
    return [
        _found(modules, root, attention)
        for root, attention in encoders.items()
        if hasattr(modules[root], "patch_embed")
    ]


def _found(modules: Modules, root: str, attention: list[tuple[str, nn.Module]]) -> Found:
    encoder: Any = modules[root]
    layers, blocks = [], []
    check_indices(attention)
    for index, (name, module) in enumerate(attention):
        attn, block = cast(Any, module), cast(Any, modules[name.rpartition(".")[0]])
        blocks.append(block)
        heads = getattr(attn, "num_attention_heads", None) or attn.num_heads
        head_dim = round(attn.scale**-2)  # whatever the projections are wrapped in
        options = dict(window=block.window_size, rel_pos=bool(attn.use_rel_pos), **block_weights(block, attn))
        layers.append(LayerSpec(modules.path(name), index, heads, head_dim, **options))
    embed = unwrap(encoder.patch_embed)
    grid, patch = _grid_and_patch(encoder, embed)
    spec = ModelSpec(
        getattr(encoder, "family", "sam"),
        tuple(layers),
        grid,
        patch,
        start=int(getattr(encoder, "num_special", 0)),
        **outside_weights(encoder, blocks, embed),  # type: ignore[arg-type]
    )
    return Found(spec, tuple(module for _, module in attention), embed)


def _grid_and_patch(encoder: Any, embed: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    """The encoder's own grid in patches, and its patch size in pixels, from where each code base keeps the image size."""
    projection = unwrap(getattr(embed, "proj", None) or embed.projection)
    patch = _pair(projection.kernel_size)
    size = getattr(embed, "image_size", None) or getattr(embed, "img_size", None) or encoder.img_size
    height, width = _pair(size)
    return (height // patch[0], width // patch[1]), patch


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _attend(module: Any, layer: Layer, x: Tensor, heads: int, dropout_p: float) -> Tensor:
    """(B, h, w, C) -> (B, h, w, C): project, attend, project."""
    batch, height, width, _ = x.shape
    qkv = module.qkv(x).unflatten(-1, (3, heads, -1)).flatten(1, 2)  # (B, N, 3, H, D)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, N, D) each
    if hasattr(module, "q_norm"):  # timm
        q, k = module.q_norm(q), module.k_norm(k)
    rel_pos = None
    if module.use_rel_pos:
        tables = (resize_table(module.rel_pos_h, height), resize_table(module.rel_pos_w, width))
        rel_pos = RelPos(*(term.to(q.dtype) for term in decompose(q, *tables, (height, width))))
    elif getattr(module, "rope", None) is not None:  # timm
        q, k = (_rotate(module.rope, tokens).type_as(v) for tokens in (q, k))
    out = layer.attend(q, k, v, module.scale, dropout_p, grid=(height, width), rel_pos=rel_pos)  # (B, H, N, D)
    out = module.proj(out.transpose(1, 2).reshape(batch, height, width, -1))
    return module.proj_drop(out) if hasattr(module, "proj_drop") else out


def _rotate(rope: Any, tokens: Tensor) -> Tensor:
    from timm.layers import apply_rot_embed_cat

    return apply_rot_embed_cat(tokens, rope.get_embed())


def _weights_are_collected() -> bool:
    """Whether the model was called with output_attentions=True, which transformers serves through hooks."""
    try:
        from transformers.utils.output_capturing import _active_collector
    except ImportError:  # another version of transformers, which passes output_attentions
        return False
    return "attentions" in (_active_collector.get() or {})


def swap(module: Any, layer: Layer) -> None:
    seam = _seam(module)
    assert seam is not None
    class_swap.swap(module, layer, seam)


__all__ = ["EXACT", "check_swapped", "find", "original_of", "prepare", "serves", "swap", "unswap"]
