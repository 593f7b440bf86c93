"""For families that live in transformers and elsewhere: the seam is the module's config there, and its class in all other code bases."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from bsa_vision.adapters import class_swap, transformers_vit
from bsa_vision.adapters.class_swap import Swapped
from bsa_vision.adapters.layer import Layer, layer_of


def kind_of(module: nn.Module) -> tuple[str, str]:
    """Module and name of the class of an attention module, as it was before a swap."""
    layer = layer_of(module)
    kind = layer.original if layer is not None and isinstance(module, Swapped) else type(module)
    return kind.__module__, kind.__name__


def by_config(module: nn.Module) -> bool:
    return type(module).__module__.startswith("transformers.")


def original_of(module: Any) -> Any:
    """What `unswap` puts back: the module's own class, or its own config object."""
    return transformers_vit.original_of(module) if by_config(module) else class_swap.original_of(module)


def swap(module: Any, layer: Layer, mixin: type[Swapped]) -> None:
    if by_config(module):
        transformers_vit.swap(module, layer)
    else:
        class_swap.swap(module, layer, mixin)


def check_swapped(module: Any) -> None:
    """Raise ValueError where something else changed the module's class since."""
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
