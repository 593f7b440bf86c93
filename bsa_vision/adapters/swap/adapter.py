"""Describe one model family to the rest of the package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from bsa_vision.adapters.swap import class_swap, config_swap
from bsa_vision.adapters.swap.class_swap import Swapped, kind_of
from bsa_vision.adapters.swap.sparse_layer import Found, Layer


class SwapMethod(Protocol):
    """How an attention module is swapped and put back.

    An interruption (Ctrl-C) may come at any line. So `swap` first says on the module what is needed
    to put it back, and `unswap` takes that away last; `unswap` can be called again.
    """

    def original_of(self, module: Any) -> Any:
        """Return what `unswap` puts back."""

    def swap(self, module: Any, layer: Layer, mixin: type[Swapped] | None) -> None:
        """Make `module` compute with `layer`."""

    def check_swapped(self, module: Any) -> None:
        """Raise ValueError if `unswap` would break what was done to the module since."""

    def unswap(self, module: Any) -> None:
        """Undo `swap`, also an interrupted one."""

    def prepare(self) -> None:
        """Make this process ready to run swapped modules."""


@dataclass(frozen=True)
class Adapter:
    """One model family.

    find             model -> its encoders of this family; imports no model library
    serves           attention module -> whether this adapter knows its class
    mixin_of         attention module -> the class that is mixed into its own; None: swap its config
    exact            whether layers without a sparse head run here too, because that is faster
    returns_weights  whether the originals return attention weights beside their output
    """

    find: Callable[[nn.Module], list[Found]]
    serves: Callable[[nn.Module], bool]
    mixin_of: Callable[[nn.Module], type[Swapped] | None]
    exact: bool = False
    returns_weights: bool = False

    def method(self, module: nn.Module) -> SwapMethod:
        return config_swap if self.mixin_of(module) is None else class_swap

    def swap(self, module: nn.Module, layer: Layer) -> None:
        """Make `module` compute with `layer`."""
        self.method(module).swap(module, layer, self.mixin_of(module))

    def prepare(self) -> None:
        """Make this process ready to run swapped modules of this family."""
        config_swap.prepare()


def by_config(module: nn.Module) -> None:
    """Return None, the mixin of modules that are swapped by their config."""
    return


def is_of_transformers(module: nn.Module) -> bool:
    """Return whether a module's own class lives in transformers."""
    return kind_of(module)[0].startswith("transformers.")
