"""Which layout a block mask was made for, as long as that can be told: the tensor itself does not say."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from bsa_vision.masks.layout import TokenLayout

Function = TypeVar("Function", bound=Callable[..., Tensor])
Layouts = tuple[TokenLayout, TokenLayout]  # of the rows, of the columns

# By identity and beside the tensors: an attribute would be written into files by torch.save.
_layouts = WeakTensorKeyDictionary()


def layouts_of(mask: Tensor) -> Layouts | None:
    """The layouts of rows and columns that `mask` was made for; None where that is not known.

    Known of what patterns, generators and `stack_heads` return; not of what torch makes of it.
    """
    found: Layouts | None = _layouts.get(mask)
    return found


def remember(mask: Tensor, layouts: Layouts | None) -> Tensor:
    """`mask`, of which `layouts_of` now knows what it was made for."""
    if layouts is not None:
        _layouts[mask] = layouts
    return mask


def check_layout(name: str, layout: object) -> None:
    """Raise TypeError unless `layout` is a TokenLayout."""
    if not isinstance(layout, TokenLayout):
        raise TypeError(
            f"{name} is a {type(layout).__name__}: expected a TokenLayout; use masks.TokenLayout(grid)."
        )


def laid_out(function: Function) -> Function:
    """Let a function from a layout to a block mask refuse what is none, and remember its masks."""

    @wraps(function)
    def checked(*args: Any, **params: Any) -> Tensor:
        if not args and "layout" not in params:
            return function(**params)  # Python says what is missing
        layout = args[0] if args else params["layout"]
        keys = params.get(
            "keys", next((one for one in args[1:] if isinstance(one, TokenLayout)), None)
        )
        check_layout("layout", layout)
        if keys is not None:
            check_layout("keys", keys)
        return remember(function(*args, **params), (layout, keys or layout))

    return cast(Function, checked)
