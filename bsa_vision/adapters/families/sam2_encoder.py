"""SAM 2's image encoder, Hiera, in sam2, timm (`hieradet_sam2`) and transformers.

Only the blocks that attend to the whole image are swapped: three blocks in the stage with 16 pixels
per token. The others attend within windows, or pool their queries, and do not change. Positions
are added before the first block, so the attention itself is plain. The transformers models are
Sam2 and Sam2Video.
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
    """Attention of sam2 and timm: (B, h, w, C) -> (B, h, w, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return self._run_forward(lambda: None, x, grid=(x.shape[1], x.shape[2]))


ATTENTION = {
    ("sam2.modeling.backbones.hieradet", "MultiScaleAttention"),
    ("timm.models.hieradet_sam2", "MultiScaleAttention"),
    ("transformers.models.sam2.modeling_sam2", "Sam2MultiScaleAttention"),
}


def supports(module: nn.Module) -> bool:
    """Return whether this adapter supports the class of an attention module."""
    return kind_of(module) in ATTENTION


def find(model: nn.Module) -> list[FoundEncoder]:
    """Return the encoders of this family in `model`.

    Attention is `<encoder>.blocks.<index>.attn`, and pixels enter `<encoder>.patch_embed`.
    """
    modules = Modules(model)
    # The leading dot gives an encoder that is the model itself the name "".
    names = ["." + name for name, module in modules if supports(module)]
    roots = dict.fromkeys(name.rpartition(".blocks.")[0].removeprefix(".") for name in names)
    found = [_found(modules, root) for root in roots if hasattr(modules[root], "patch_embed")]
    return [encoder for encoder in found if encoder is not None]


def _found(modules: Modules, root: str) -> FoundEncoder | None:
    encoder: Any = modules[root]
    blocks = _blocks(encoder)
    is_global = [not _window(block) and _q_stride(block) == 1 for block in blocks]
    indices = [index for index, flag in enumerate(is_global) if flag]
    if not indices:
        return None
    pixels = _pixels(encoder)
    scales = {pixels[index] for index in indices}
    if len(scales) != 1 or len({_heads(blocks[index].attn) for index in indices}) != 1:
        raise PlanError(
            f"{root or type(encoder).__name__} has blocks that attend to the whole image at "
            f"{sorted(scales)} pixels per token: expected all of them in one stage, as in SAM 2; "
            "call bsa_vision.sparse_attention from them."
        )
    (patch,) = scales
    prefix = f"{root}." if root else ""
    height, width = _image_size(modules[""], encoder)
    layers = tuple(
        _layer(modules.path(f"{prefix}blocks.{index}.attn"), index, blocks[index])
        for index in indices
    )
    others = tuple(
        _other(block, patch / pixels[index])
        for index, block in enumerate(blocks)
        if not is_global[index]
    )
    spec = ModelSpec(
        FAMILY,
        layers,
        grid=(height // patch, width // patch),
        patch_size=(patch, patch),
        patch_weights=_weights_per_patch(modules, root, pixels, patch),
        others=others,
    )
    attention = tuple(unwrap(blocks[index].attn) for index in indices)
    return FoundEncoder(spec, attention, unwrap(encoder.patch_embed))


def _blocks(encoder: Any) -> list[Any]:
    blocks = [unwrap(block) for block in unwrap(encoder.blocks)]
    for block in blocks:
        if not hasattr(block, "attn"):
            raise wrapped(block)
    return blocks


def _pixels(encoder: Any) -> list[int]:
    """Return the pixels per side of a token at the input of each block, and after the last one."""
    pixels = [convolution(encoder.patch_embed).stride[0]]
    for block in _blocks(encoder):
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
    """Return the tokens per side of a block's windows, 0 = no windows."""
    # timm has a pair of sizes.
    return block.window_size if isinstance(block.window_size, int) else block.window_size[0]


def _q_stride(block: Any) -> int:
    """Return the factor by which a block makes the grid coarser, per side."""
    # transformers calls it query_stride.
    stride = getattr(block, "q_stride", None) or getattr(block, "query_stride", None) or 1
    return stride if isinstance(stride, int) else stride[0]


def _heads(attn: Any) -> int:
    return getattr(attn, "num_attention_heads", None) or attn.num_heads


def _image_size(model: nn.Module, encoder: Any) -> tuple[int, int]:
    """Return the image size (h, w) in pixels of the model or its config, else SAM 2's 1024.

    The encoder itself takes any size.
    """
    config = getattr(encoder, "config", None)
    timm_size = (getattr(encoder, "pretrained_cfg", None) or {}).get("input_size", (None,))[-1]
    size = getattr(model, "image_size", None) or getattr(config, "image_size", None)
    size = size or timm_size or 1024
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _weights_per_patch(modules: Modules, root: str, pixels: list[int], patch: int) -> float:
    """Count the weights that the stem and the neck apply to each patch.

    The neck, next to the encoder, has a convolution per stage that runs on the grid of that stage.
    """
    encoder: Any = modules[root]
    stages = zip(_blocks(encoder), pixels[1:], strict=True)
    pixels_of = {block.dim_out: after for block, after in stages}  # channels -> pixels per token
    parent = modules[root.rpartition(".")[0]] if root else None
    neck = getattr(parent, "neck", nn.Identity())
    weights = convolution_weights(convolution(encoder.patch_embed)) * (patch / pixels[0]) ** 2
    for conv in neck.modules():
        if isinstance(conv, nn.Conv2d):
            scale = patch / pixels_of.get(conv.in_channels, patch)
            weights += convolution_weights(conv) * scale**2
    return weights


def mixin_of(module: nn.Module) -> type[Intercepted] | None:
    return None if is_of_transformers(module) else SparseAttention


ADAPTER = Adapter(find, supports, mixin_of, config_swap.prepare)
