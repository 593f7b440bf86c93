"""The interface between one model family and the rest of the package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from bsa_vision.adapters.swap.encoder_state import FoundEncoder


def nothing() -> None:
    """Do nothing: most families need no preparation."""


@dataclass(frozen=True)
class Adapter:
    """One model family.

    find             model -> its encoders of this family; imports no model library
    supports         attention module -> whether this adapter supports its class
    mixin_of         attention module -> the class mixed into the module's class; None = the module
                     is swapped by its config
    prepare          prepares a process to run swapped modules
    exact            whether layers with dense heads only are swapped too, because that is faster
    returns_weights  whether the original modules return attention weights besides their output
    """

    find: Callable[[nn.Module], list[FoundEncoder]]
    supports: Callable[[nn.Module], bool]
    mixin_of: Callable[[nn.Module], type | None]
    prepare: Callable[[], None] = nothing
    exact: bool = False
    returns_weights: bool = False
