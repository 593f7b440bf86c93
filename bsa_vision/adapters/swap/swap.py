"""For families that live in transformers and elsewhere: the seam is the module's config there, and its class in all other code bases."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from bsa_vision.adapters.families import transformers_vit
from bsa_vision.adapters.swap import class_swap
from bsa_vision.adapters.swap.class_swap import Swapped, kind_of
from bsa_vision.adapters.swap.sparse_layer import Layer


def by_config(module: nn.Module) -> bool:
    return kind_of(module)[0].startswith("transformers.")


def original_of(module: Any) -> Any:
    """What `unswap` puts back: the module's own class, or its own config object."""
    return (
        transformers_vit.original_of(module)
        if by_config(module)
        else class_swap.original_of(module)
    )


def swap(module: Any, layer: Layer, mixin: type[Swapped]) -> None:
    if by_config(module):
        transformers_vit.swap(module, layer)
    else:
        class_swap.swap(module, layer, mixin)


def check_swapped(module: Any) -> None:
    """Raise ValueError where putting back the original would undo or break what was done since."""
    if not by_config(module):
        class_swap.check_swapped(module)


def unswap(module: Any) -> None:
    if by_config(module):
        transformers_vit.unswap(module)
    else:
        class_swap.unswap(module)


def prepare() -> None:
    """Make our name known to transformers, where that is loaded."""
    if "transformers.modeling_utils" in sys.modules:
        transformers_vit.prepare()
