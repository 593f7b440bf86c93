"""Choose how an attention module is swapped: by its class, or by its config."""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn

from bsa_vision.adapters.swap import class_swap, config_swap
from bsa_vision.adapters.swap.adapter import Adapter
from bsa_vision.adapters.swap.sparse_layer import SparseLayer


class SwapMethod(Protocol):
    """How an attention module is swapped and put back.

    An interruption (Ctrl-C) may come at any line. So `swap` first says on the module what is needed
    to put it back, and `unswap` takes that away last; `unswap` can be called again.
    """

    def original_of(self, module: Any) -> Any:
        """Return what `unswap` puts back."""

    def swap(self, module: Any, layer: SparseLayer, mixin: type | None) -> None:
        """Make `module` compute with `layer`."""

    def check_swapped(self, module: Any) -> None:
        """Raise ValueError if `unswap` would break what was done to the module since."""

    def unswap(self, module: Any) -> None:
        """Undo `swap`, also an interrupted one."""


def method_of(adapter: Adapter, module: nn.Module) -> SwapMethod:
    return config_swap if adapter.mixin_of(module) is None else class_swap
