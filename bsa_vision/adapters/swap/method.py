"""Choose how to swap an attention module: by its class, or by its config."""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn

from bsa_vision.adapters.swap import class_swap, config_swap
from bsa_vision.adapters.swap.adapter import Adapter
from bsa_vision.adapters.swap.sparse_layer import SparseLayer


class SwapMethod(Protocol):
    """How to swap an attention module and restore it.

    An interruption (Ctrl-C) may come at any line. Therefore `swap` first stores on the module what
    is needed to restore it, and `unswap` deletes this last; `unswap` can be called again.
    """

    def original_of(self, module: Any) -> Any:
        """Return what `unswap` restores."""

    def swap(self, module: Any, layer: SparseLayer, mixin: type | None) -> None:
        """Make `module` compute with `layer`."""

    def check_swapped(self, module: Any) -> None:
        """Raise ValueError if `unswap` would break a later change of the module."""

    def unswap(self, module: Any) -> None:
        """Undo `swap`, complete or interrupted."""


def method_of(adapter: Adapter, module: nn.Module) -> SwapMethod:
    """Return the way to swap `module`: `config_swap` if the adapter has no mixin for it."""
    return config_swap if adapter.mixin_of(module) is None else class_swap
