"""SAM 2's image encoder, Hiera, in sam2, timm (`hieradet_sam2`) and transformers (Sam2, Sam2Video): the blocks that attend to the whole image.

There are three of them, all in the stage with 16 pixels per token. The others attend within windows, or pool their queries, and stay as
they are. Attention is plain: positions are added before the first block.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bsa_vision.adapters.linear_weights import convolution, convolution_weights, linear_weights
from bsa_vision.adapters.swap import config_swap
from bsa_vision.adapters.swap.adapter import Adapter
from bsa_vision.adapters.swap.class_swap import is_of_transformers, kind_of
from bsa_vision.adapters.swap.encoder_state import FoundEncoder
from bsa_vision.adapters.swap.sdpa_intercept import Intercepted
from bsa_vision.adapters.swap.wrappers import Modules, unwrap, wrapped
from bsa_vision.errors import PlanError
from bsa_vision.plans.model_spec import LayerSpec, ModelSpec, OtherBlock

FAMILY = "sam2"


class SparseAttention(Intercepted):
    """The seam of sam2 and timm: (B, h, w, C) -> (B, h, w, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return self._serve(lambda: None, x, grid=(x.shape[1], x.shape[2]))


ATTENTION = {
    ("sam2.modeling.backbones.hieradet", "MultiScaleAttention"),
    ("timm.models.hieradet_sam2", "MultiScaleAttention"),
    ("transformers.models.sam2.modeling_sam2", "Sam2MultiScaleAttention"),
}


def serves(module: nn.Module) -> bool:
    """Whether this adapter knows the class of an attention module."""
    return kind_of(module) in ATTENTION


def find(model: nn.Module) -> list[FoundEncoder]:
    """The encoders of this family in `model`: attention is `<encoder>.blocks.<index>.attn`, pixels enter `<encoder>.patch_embed`."""
    # A dot before each name, so that an encoder that is the model itself has the name "".
    modules = Modules(model)
    names = ["." + name for name, module in modules if serves(module)]
    roots = dict.fromkeys(name.rpartition(".blocks.")[0].removeprefix(".") for name in names)
    found = [_found(modules, root) for root in roots if hasattr(modules[root], "patch_embed")]
    return [one for one in found if one is not None]


def _found(modules: Modules, root: str) -> FoundEncoder | None:
    encoder: Any = modules[root]
    blocks = _blocks(encoder)
    chosen = [
        (index, block) for index, block in blocks if not _window(block) and _q_stride(block) == 1
    ]
    if not chosen:
        return None
    pixels = _pixels(encoder)
    scales, heads = (
        {pixels[index] for index, _ in chosen},
        {_heads(block.attn) for _, block in chosen},
    )
    if len(scales) != 1 or len(heads) != 1:
        raise PlanError(
            f"{root or type(encoder).__name__} has blocks that attend to the whole image at {sorted(scales)} pixels per token: all of them in "
            "one stage are served, as in SAM 2; call bsa_vision.sparse_attention from them."
        )
    (patch,) = scales
    prefix = f"{root}." if root else ""
    height, width = _image_size(modules[""], encoder)
    spec = ModelSpec(
        FAMILY,
        tuple(
            _layer(modules.path(f"{prefix}blocks.{index}.attn"), index, block)
            for index, block in chosen
        ),
        grid=(height // patch, width // patch),
        patch_size=(patch, patch),
        patch_weights=_outside(modules, root, pixels, patch),
        others=tuple(
            _other(block, patch / pixels[index])
            for index, block in blocks
            if (index, block) not in chosen
        ),
    )
    return FoundEncoder(
        spec, tuple(unwrap(block.attn) for _, block in chosen), unwrap(encoder.patch_embed)
    )


def _blocks(encoder: Any) -> list[tuple[int, Any]]:
    blocks = [(index, unwrap(block)) for index, block in enumerate(unwrap(encoder.blocks))]
    strange = next((block for _, block in blocks if not hasattr(block, "attn")), None)
    if strange is not None:
        raise wrapped(strange)
    return blocks


def _pixels(encoder: Any) -> list[int]:
    """Per side of a token, of what enters each block, and of what leaves the last one."""
    pixels = [convolution(encoder.patch_embed).stride[0]]
    for _, block in _blocks(encoder):
        pixels.append(pixels[-1] * _q_stride(block))
    return pixels


def _layer(name: str, index: int, block: Any) -> LayerSpec:
    attn, heads = block.attn, _heads(block.attn)
    inside = linear_weights(attn.qkv) + linear_weights(attn.proj)
    weights = dict(attention_weights=inside, mlp_weights=linear_weights(block.mlp))
    return LayerSpec(name, index, heads, attn.dim_out // heads, **weights)  # type: ignore[arg-type]


def _other(block: Any, stride: float) -> OtherBlock:
    attn, heads = block.attn, _heads(block.attn)
    return OtherBlock(
        stride,
        _window(block),
        heads,
        attn.dim_out // heads,
        _q_stride(block),
        qkv_weights=linear_weights(attn.qkv),
        proj_weights=linear_weights(attn.proj),
        mlp_weights=linear_weights(block.mlp),
        shortcut_weights=linear_weights(block.proj) if hasattr(block, "proj") else 0,
    )


def _window(block: Any) -> int:
    """Tokens per side of a block's windows, 0 = none; timm has a pair of them."""
    return block.window_size if isinstance(block.window_size, int) else block.window_size[0]


def _q_stride(block: Any) -> int:
    """How much coarser a block leaves the grid, per side; transformers calls it otherwise."""
    stride = getattr(block, "q_stride", None) or getattr(block, "query_stride", None) or 1
    return stride if isinstance(stride, int) else stride[0]


def _heads(attn: Any) -> int:
    return getattr(attn, "num_attention_heads", None) or attn.num_heads


def _image_size(model: nn.Module, encoder: Any) -> tuple[int, int]:
    """Pixels (h, w): of the model or of its configuration; the encoder itself takes any, SAM 2's is 1024."""
    config = getattr(encoder, "config", None)
    timm = (getattr(encoder, "pretrained_cfg", None) or {}).get("input_size", (None,))[-1]
    size = getattr(model, "image_size", None) or getattr(config, "image_size", None) or timm or 1024
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _outside(modules: Modules, root: str, pixels: list[int], patch: int) -> float:
    """Elements applied to each patch by the stem, and by the neck beside the encoder: a convolution per stage, on the stage's own grid."""
    encoder: Any = modules[root]
    at = {
        block.dim_out: after for (_, block), after in zip(_blocks(encoder), pixels[1:], strict=True)
    }
    neck = (
        getattr(modules[root.rpartition(".")[0]], "neck", nn.Identity()) if root else nn.Identity()
    )
    convolutions = [x for x in neck.modules() if isinstance(x, nn.Conv2d)]
    stem = convolution_weights(convolution(encoder.patch_embed)) * (patch / pixels[0]) ** 2
    return stem + sum(
        convolution_weights(x) * (patch / at.get(x.in_channels, patch)) ** 2 for x in convolutions
    )


def mixin_of(module: nn.Module) -> type[Intercepted] | None:
    return None if is_of_transformers(module) else SparseAttention


ADAPTER = Adapter(find, serves, mixin_of, config_swap.prepare)
