"""How many weights a model applies to each token, patch and image: what FLOPs are counted from."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def block_weights(block: nn.Module, attention: nn.Module) -> dict[str, int]:
    """Elements of the linear layers of a block, by where they are: the two fields of a `LayerSpec`."""
    inside, everywhere = _linear(attention), _linear(block)
    return {"attention_weights": inside, "mlp_weights": everywhere - inside}


def outside_weights(encoder: nn.Module, blocks: Iterable[nn.Module]) -> dict[str, float]:
    """Elements of the layers of an encoder that lie in none of its blocks: the two fields of a `ModelSpec`.

    The first convolution makes the patches; strides after it make the grid coarser.
    """
    inside = {module for block in blocks for module in block.modules()}
    per_patch, per_image, positions = 0.0, 0, None
    for module in encoder.modules():
        if module in inside:
            continue
        if isinstance(module, nn.Conv2d):
            positions = 1.0 if positions is None else positions / (module.stride[0] * module.stride[1])
            per_patch += module.weight.numel() * positions
        elif isinstance(module, nn.Linear):
            per_image += module.weight.numel()
    return {"patch_weights": per_patch, "image_weights": per_image}


def _linear(module: nn.Module) -> int:
    return sum(inner.weight.numel() for inner in module.modules() if isinstance(inner, nn.Linear))
