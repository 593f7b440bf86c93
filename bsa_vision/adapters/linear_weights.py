"""Weights that a model applies to each token, patch and image, for counting FLOPs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


def block_weights(block: nn.Module, attention: nn.Module) -> dict[str, Any]:
    """Count the linear weights of a block inside and outside its attention, for `LayerSpec`."""
    inside, everywhere = linear_weights(attention), linear_weights(block)
    return {"attention_weights": inside, "mlp_weights": everywhere - inside}


def outside_weights(
    encoder: nn.Module, blocks: Iterable[nn.Module], embeddings: nn.Module
) -> dict[str, float]:
    """Count the weights of an encoder outside its blocks, per patch and per image, for `ModelSpec`.

    `embeddings` makes the patches. Later convolutions apply to every patch, and their strides
    make the grid coarser. Later linear layers apply once per image, except the key and value
    projections of a pooling head.
    """
    inside = {module for block in blocks for module in block.modules()}
    embedding = set(embeddings.modules())
    per_patch, per_image, positions = 0.0, 0, 1.0
    for name, module in encoder.named_modules():
        if module in inside:
            continue
        if isinstance(module, nn.Conv2d):
            positions /= 1 if module in embedding else module.stride[0] * module.stride[1]
            per_patch += convolution_weights(module) * positions
        elif isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            per_patch += module.embed_dim**2 * 2
            per_image += module.embed_dim**2
        elif weights := _elements(module):
            if module in embedding or name.endswith(".kv"):
                per_patch += weights
            else:
                per_image += weights
    return {"patch_weights": per_patch, "image_weights": per_image}


def convolution(embedding: Any) -> nn.Conv2d:
    """Return the convolution in `embedding` that makes patches from pixels, also if wrapped."""
    return next(module for module in embedding.modules() if isinstance(module, nn.Conv2d))


def convolution_weights(module: nn.Conv2d) -> int:
    """Count the weights of a convolution from its sizes.

    FSDP, quantisers and offloading may have removed or replaced the weight itself.
    """
    return (
        module.out_channels
        * module.in_channels
        // module.groups
        * module.kernel_size[0]
        * module.kernel_size[1]
    )


def linear_weights(module: nn.Module) -> int:
    """Count the weights of all linear layers in `module`."""
    return sum(_elements(inner) for inner in module.modules())


def _elements(module: nn.Module) -> int:
    """Count the weights of a linear layer, quantised or not.

    Return 0 for other modules, and for wrappers around a linear layer.
    """
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    wraps = any(hasattr(inner, "in_features") for inner in module.modules() if inner is not module)
    is_linear = all(isinstance(size, int) for size in sizes) and not wraps
    return sizes[0] * sizes[1] if is_linear else 0  # type: ignore[operator]
