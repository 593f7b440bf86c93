"""Describe one model family to the rest of the package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from bsa_vision.adapters.swap.encoder_state import FoundEncoder


def nothing() -> None:
    """Do nothing: what most families need before their swapped modules run."""


@dataclass(frozen=True)
class Adapter:
    """One model family.

    find             model -> its encoders of this family; imports no model library
    serves           attention module -> whether this adapter knows its class
    mixin_of         attention module -> the class that is mixed into its own; None: swap its config
    prepare          makes a process ready to run swapped modules
    exact            whether layers without a sparse head run here too, because that is faster
    returns_weights  whether the originals return attention weights beside their output
    """

    find: Callable[[nn.Module], list[FoundEncoder]]
    serves: Callable[[nn.Module], bool]
    mixin_of: Callable[[nn.Module], type | None]
    prepare: Callable[[], None] = nothing
    exact: bool = False
    returns_weights: bool = False
