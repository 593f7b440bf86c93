"""What a model makes of pixels, as one tensor, whichever library it is from."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

TOWERS = ("vision_model", "vision_encoder")  # of models that want texts or clicks as well


def features(model: nn.Module, pixels: Tensor) -> Tensor:
    """The features of `model` for pixels (B, 3, h, w): (B, N, C), (B, C, h, w) or (B, h, w, C), as it returns them.

    Of timm's models before pooling, of models that take more than images those of the vision tower, of a list of stages all of them, flat:
    (B, M). ValueError where what comes back holds no tensor to take.
    """
    tower: Any = next((getattr(model, name) for name in TOWERS if hasattr(model, name)), model)
    forward = getattr(tower, "forward_features", tower)
    try:
        out = forward(pixels, **_options(tower, pixels))
    except TypeError as error:
        raise ValueError(
            f"{type(tower).__name__} was given pixels alone and said: {error}. Expected is a model of images; wrap it, or pass its tower."
        ) from None
    return _tensor(out)


def _options(tower: Any, pixels: Tensor) -> dict[str, Any]:
    """transformers' models take other sizes than their own only when they are told."""
    if "interpolate_pos_encoding" not in inspect.signature(tower.forward).parameters:
        return {}
    size = getattr(getattr(tower, "config", None), "image_size", None)
    own = (size, size) if isinstance(size, int) else tuple(size or ())
    return {} if own == tuple(pixels.shape[-2:]) else {"interpolate_pos_encoding": True}


def _tensor(out: Any) -> Tensor:
    if isinstance(out, Mapping) and "vision_features" in out:  # sam2
        out = out["vision_features"]
    if hasattr(out, "last_hidden_state"):
        out = out.last_hidden_state
    if isinstance(out, tuple) and out:
        out = out[0]
    if isinstance(out, list) and out and all(isinstance(stage, Tensor) for stage in out):
        return torch.cat([stage.flatten(1) for stage in out], dim=1)
    if not isinstance(out, Tensor):
        raise ValueError(
            f"the model returned a {type(out).__name__}: allowed are a tensor, a tuple that starts with one, a list of them, and an output "
            "with last_hidden_state or vision_features; wrap the model."
        )
    return out
