"""Hugging Face transformers: the SAM image encoder, in SAM, SAM-HQ and DeepSeek-OCR 2, all layers, windowed ones included.

These attention classes are not reached by AttentionInterface, so a swapped module becomes an instance of a subclass of its own
class: parameters, keys, hooks and `isinstance` stay. Nothing of size N x N is built: relative position stays factored.
Windowed layers are dense and exact: padded keys take part in every window, as in the original.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from bsa_vision.adapters.layer import ATTRIBUTE, Found, Layer, layer_of
from bsa_vision.model_spec import LayerSpec, ModelSpec
from bsa_vision.rel_pos import RelPos, decompose, resize_table

EXACT = True  # dense layers run here too: the same result, faster, because the original builds an N x N bias

# Module and class of the attention; each module has an eager and an SDPA class.
PREFIXES = {
    "transformers.models.sam.modeling_sam": "Sam",
    "transformers.models.sam_hq.modeling_sam_hq": "SamHQ",
    "transformers.models.deepseek_ocr2.modeling_deepseek_ocr2": "DeepseekOcr2Sam",
}
ATTENTION = {
    (module, f"{prefix}{name}")
    for module, prefix in PREFIXES.items()
    for name in ("VisionAttention", "VisionSdpaAttention")
}
EMBEDDINGS = {(module, f"{prefix}PatchEmbeddings") for module, prefix in PREFIXES.items()}


def find(model: nn.Module) -> list[Found]:
    """The encoders of this family in `model`, one per patch embedding."""
    found = []
    for path, embeddings in model.named_modules():
        if (type(embeddings).__module__, type(embeddings).__name__) not in EMBEDDINGS:
            continue
        root = path.rpartition(".")[0]
        inside = [
            (name, module)
            for name, module in model.named_modules()
            if serves(module) and (not root or name.startswith(root + "."))
        ]
        if inside:
            found.append(Found(_spec(model, inside, embeddings), tuple(module for _, module in inside), embeddings))
    return found


def serves(module: nn.Module) -> bool:
    """Whether this adapter knows the class of an attention module."""
    return isinstance(module, SparseAttention) or (type(module).__module__, type(module).__name__) in ATTENTION


def _spec(model: nn.Module, attention: list[tuple[str, nn.Module]], embeddings: Any) -> ModelSpec:
    layers = []
    for index, (name, module) in enumerate(attention):
        attn, block = cast(Any, module), cast(Any, model.get_submodule(name.rpartition(".")[0]))
        heads = attn.num_attention_heads
        head_dim = attn.qkv.out_features // 3 // heads
        layers.append(LayerSpec(name, index, heads, head_dim, window=block.window_size, rel_pos=bool(attn.use_rel_pos)))
    (height, width), patch = embeddings.image_size, tuple(embeddings.patch_size)
    return ModelSpec("sam", tuple(layers), (height // patch[0], width // patch[1]), patch)


class SparseAttention(nn.Module):
    """What a swapped attention module is as well as its own class."""

    def forward(self, hidden_states: Tensor, output_attentions: bool | None = None) -> tuple[Tensor, Tensor | None]:
        """(B, h, w, C) -> ((B, h, w, C), attention weights or None)."""
        layer = layer_of(self)
        assert layer is not None
        weights_asked_for = output_attentions or _weights_are_collected()
        if weights_asked_for and not layer.runs_original():
            layer.fall_back("attention weights were asked for")
        if weights_asked_for or layer.runs_original():
            return super().forward(hidden_states, output_attentions=output_attentions)
        return _attention(self, layer, hidden_states), None

    def __reduce_ex__(self, protocol: Any) -> Any:
        function, arguments, *state = cast(tuple[Any, ...], super().__reduce_ex__(protocol))
        layer = layer_of(self)
        assert layer is not None
        return _new, (layer.original, function, arguments[1:]), *state


def _attention(module: Any, layer: Layer, hidden_states: Tensor) -> Tensor:
    batch, height, width, _ = hidden_states.shape
    qkv = module.qkv(hidden_states).unflatten(-1, (3, module.num_attention_heads, -1)).flatten(1, 2)  # (B, N, 3, H, D)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, N, D) each
    rel_pos = None
    if module.use_rel_pos:
        tables = (resize_table(module.rel_pos_h, height), resize_table(module.rel_pos_w, width))
        rel_pos = RelPos(*(term.to(q.dtype) for term in decompose(q, *tables, (height, width))))
    # Only the eager class drops attention weights while training; the SDPA class ignores its own setting.
    drops = module.training and "Sdpa" not in layer.original.__name__
    out = layer.attend(
        q, k, v, module.scale, module.dropout if drops else 0.0, grid=(height, width), rel_pos=rel_pos
    )  # (B, H, N, D)
    return module.proj(out.transpose(1, 2).reshape(batch, height, width, -1))


def _weights_are_collected() -> bool:
    """Whether the model was called with output_attentions=True, which transformers serves through hooks."""
    if torch.compiler.is_compiling():
        return False
    try:
        from transformers.utils.output_capturing import _active_collector
    except ImportError:  # another version of transformers, which passes output_attentions
        return False
    return "attentions" in (_active_collector.get() or {})


@cache
def _swapped(original: type) -> type:
    """The subclass whose instances run our attention."""
    return type(f"Sparse{original.__name__}", (SparseAttention, original), {"__module__": __name__})


def _new(original: type, function: Any, arguments: tuple[Any, ...]) -> Any:
    """Unpickling and copying: subclasses are made at run time, so pickles name the original class."""
    return function(_swapped(original), *arguments)


def original_of(module: Any) -> Any:
    """What `unswap` puts back: the module's own class."""
    return type(module)


def swap(module: Any, layer: Layer) -> None:
    setattr(module, ATTRIBUTE, layer)
    module.__class__ = _swapped(layer.original)


def check_swapped(module: Any) -> None:
    """Raise ValueError where something else changed the module's class since: putting back the original would undo that too."""
    layer = layer_of(module)
    assert layer is not None
    if type(module) is not _swapped(layer.original):
        raise ValueError(
            f"{layer.spec.name} became a {type(module).__name__} since sparsify_ (a parametrization, a wrapper): restore_ would undo "
            "that as well; remove it first, then restore_."
        )


def unswap(module: Any) -> None:
    layer = layer_of(module)
    assert layer is not None
    module.__class__ = layer.original
    delattr(module, ATTRIBUTE)


def prepare() -> None:
    """Nothing: the subclass is all there is."""
