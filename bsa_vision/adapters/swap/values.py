"""Dtype, device and values of weights, including quantised, offloaded and meta ones.

The device of a layer is read from plain weights or from accelerate's hooks. The attributes of
quantised weights are used last, and never in computations: tensor subclasses lack operators.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

# Dtypes that attention computes in.
COMPUTE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def like_of(attention: nn.Module, model: nn.Module) -> Tensor:
    """Return an empty tensor with the dtype and device that a layer of `model` computes in.

    The device is the CPU for a model on the meta device. Without floating-point weights, the
    tensor is float32 on the CPU.
    """
    weights = (
        weight
        for module in (attention, model)
        for plain in (True, False)
        for weight in module.parameters()
        if weight.dtype in COMPUTE and _is_plain(weight) is plain
    )
    weight = next(weights, torch.empty(0, device="cpu"))
    device = _execution_device(attention) or weight.device
    return torch.empty(0, dtype=weight.dtype, device="cpu" if device.type == "meta" else device)


def _is_plain(weight: Any) -> bool:
    return type(weight) in (Tensor, nn.Parameter)


def _hooks(module: nn.Module) -> Iterator[Any]:
    """Yield the hooks of accelerate on this module."""
    hook = getattr(module, "_hf_hook", None)
    yield from getattr(hook, "hooks", [hook])


def _execution_device(attention: nn.Module) -> torch.device | None:
    """Return the device that accelerate moves an offloaded layer to; None without such a hook."""
    for module in attention.modules():
        for hook in _hooks(module):
            if getattr(hook, "execution_device", None) is not None:
                return torch.device(hook.execution_device)
    return None


def output_weight(attention: nn.Module, width: int, like: Tensor) -> Tensor | None:
    """Return the weight (C, width) of the projection that follows the heads.

    A quantised or offloaded weight is read by applying the projection to the identity. None if
    there is no projection of a known name with `width` inputs.
    """
    for name in ("proj", "o_proj", "out_proj"):
        projection = getattr(attention, name, None)
        weight: Any = getattr(projection, "weight", None)
        if _is_plain(weight) and weight.dtype in COMPUTE and not weight.is_meta:
            if weight.dim() == 2 and weight.shape[1] == width:
                return weight.detach()
        elif getattr(projection, "in_features", None) == width:
            return _columns(projection, width, like)
    return None


@torch.no_grad()
def _columns(projection: Any, width: int, like: Tensor) -> Tensor | None:
    """Return the weight of an affine map: its value at the identity minus its value at zero."""
    identity = torch.eye(width, dtype=like.dtype, device=like.device)
    weight = (projection(identity) - projection(torch.zeros_like(identity[:1]))).T
    return None if weight.is_meta else weight


def state(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the items of `state_dict`, with the values of offloaded weights."""
    for key, value in model.state_dict().items():
        path, _, name = key.rpartition(".")
        if isinstance(value, Tensor) and value.is_meta:
            maps = (
                getattr(hook, "weights_map", None) for hook in _hooks(model.get_submodule(path))
            )
            value = next((values[name] for values in maps if values is not None), value)
        yield key, value
