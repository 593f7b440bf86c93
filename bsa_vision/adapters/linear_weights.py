"""How many weights a model applies to each token, patch and image: what FLOPs are counted from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


def block_weights(block: nn.Module, attention: nn.Module) -> dict[str, Any]:
    """Elements of the linear layers of a block, by where they are: the two fields of a `LayerSpec`."""
    inside, everywhere = linear_weights(attention), linear_weights(block)
    return {"attention_weights": inside, "mlp_weights": everywhere - inside}


def outside_weights(
    encoder: nn.Module, blocks: Iterable[nn.Module], embeddings: nn.Module
) -> dict[str, float]:
    """Elements of the layers of an encoder that lie in none of its blocks: the two fields of a `ModelSpec`.

    What `embeddings` holds makes the patches. Convolutions after it work on all of them, strides make the grid coarser; linear layers after
    it work once per image, but for the keys and values of a pooling head.
    """
    inside = {module for block in blocks for module in block.modules()}
    making = set(embeddings.modules())
    per_patch, per_image, positions = 0.0, 0, 1.0
    for name, module in encoder.named_modules():
        if module in inside:
            continue
        if isinstance(module, nn.Conv2d):
            positions /= 1 if module in making else module.stride[0] * module.stride[1]
            per_patch += convolution_weights(module) * positions
        elif isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            per_patch += module.embed_dim**2 * 2
            per_image += module.embed_dim**2
        elif weights := _elements(module):
            if module in making or name.endswith(".kv"):
                per_patch += weights
            else:
                per_image += weights
    return {"patch_weights": per_patch, "image_weights": per_image}


def convolution(embedding: Any) -> nn.Conv2d:
    """Return the convolution that makes patches of pixels in `embedding`, whatever wraps it."""
    return next(module for module in embedding.modules() if isinstance(module, nn.Conv2d))


def convolution_weights(module: nn.Conv2d) -> int:
    """Count the elements of a convolution's weight, from its sizes: FSDP, quantisers and offloading take the weight itself away."""
    return (
        module.out_channels
        * module.in_channels
        // module.groups
        * module.kernel_size[0]
        * module.kernel_size[1]
    )


def linear_weights(module: nn.Module) -> int:
    """Elements of the linear layers in `module`."""
    return sum(_elements(inner) for inner in module.modules())


def _elements(module: nn.Module) -> int:
    """Of the weight of a linear layer, quantized ones included; 0 for other modules, and for wrappers around a linear layer."""
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    wraps = any(hasattr(inner, "in_features") for inner in module.modules() if inner is not module)
    is_linear = all(isinstance(size, int) for size in sizes) and not wraps
    return sizes[0] * sizes[1] if is_linear else 0  # type: ignore[operator]
