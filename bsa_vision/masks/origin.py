"""Track which token layouts a block mask was made for."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from bsa_vision.masks.layout import TokenLayout

Function = TypeVar("Function", bound=Callable[..., Tensor])
Layouts = tuple[TokenLayout, TokenLayout]  # of the rows, of the columns

# Keyed by tensor identity. An attribute of the tensor would be written to files by torch.save.
_layouts = WeakTensorKeyDictionary()


def layouts_of(mask: Tensor) -> Layouts | None:
    """Return the layouts of rows and columns that `mask` was made for; None if unknown.

    Known for the results of patterns, generators and `stack_heads`, but not for tensors that torch
    operations derive from them.
    """
    found: Layouts | None = _layouts.get(mask)
    return found


def remember(mask: Tensor, layouts: Layouts | None) -> Tensor:
    """Return `mask` after recording its layouts for `layouts_of`."""
    if layouts is not None:
        _layouts[mask] = layouts
    return mask


def check_layout(name: str, layout: object) -> None:
    """Raise TypeError unless `layout` is a TokenLayout."""
    if not isinstance(layout, TokenLayout):
        raise TypeError(
            f"{name} is a {type(layout).__name__}: expected a TokenLayout; use "
            "masks.TokenLayout(grid)."
        )


def laid_out(function: Function) -> Function:
    """Decorate a function from layout to block mask: check its layouts and record them."""

    @wraps(function)
    def checked(*args: Any, **params: Any) -> Tensor:
        if not args and "layout" not in params:
            return function(**params)  # raises Python's error for the missing argument
        layout = args[0] if args else params["layout"]
        positional = next((arg for arg in args[1:] if isinstance(arg, TokenLayout)), None)
        keys = params.get("keys", positional)
        check_layout("layout", layout)
        if keys is not None:
            check_layout("keys", keys)
        return remember(function(*args, **params), (layout, keys or layout))

    return cast(Function, checked)
