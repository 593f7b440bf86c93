"""What a model makes of pixels, as one tensor, whichever library it is from."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def features(model: nn.Module, pixels: Tensor) -> Tensor:
    """The features of `model` for pixels (B, 3, h, w), as it returns them: (B, N, C), or (B, C, h, w) where it has a neck.

    Of a model of images and texts, those of its vision tower. ValueError where what comes back holds no tensor to take.
    """
    tower = getattr(model, "vision_model", model)  # CLIP and its kin, which want text as well
    options = {}
    if "interpolate_pos_encoding" in inspect.signature(tower.forward).parameters:
        options["interpolate_pos_encoding"] = True  # sizes other than the model's own
    return _first(tower(pixels, **options))


def _first(out: Any) -> Tensor:
    """The tensor itself, its `last_hidden_state`, sam2's `vision_features`, or the first of a tuple."""
    found = out
    if isinstance(out, Mapping) and "vision_features" in out:
        found = out["vision_features"]
    elif not isinstance(out, Tensor):
        found = getattr(out, "last_hidden_state", out[0] if isinstance(out, (tuple, list)) and out else out)
    if not isinstance(found, Tensor):
        raise ValueError(
            f"the model returned a {type(out).__name__}: allowed are a tensor, a tuple that starts with one, and an output with "
            "last_hidden_state or vision_features; wrap the model."
        )
    return found
