"""Swap a module's config: for transformers, whose models look their attention function up by name.

A swapped layer gets a copy of its config with our name in it; the model's own config, its other
layers and its parameters stay as they are.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from bsa_vision.adapters.swap.sparse_layer import SparseLayer, layer_of
from bsa_vision.adapters.swap.wrappers import own_class

NAME = "bsa_vision"  # transformers reads meaning into names that contain "sdpa" or "flash"
IMPLEMENTATION = "_attn_implementation_internal"
WEIGHTS_ASKED_FOR = "attention weights were asked for"
WEIGHTS_WATCHED = "a forward hook on the module sees its attention weights"


def original_of(module: Any) -> Any:
    """Return what `unswap` puts back: the module's own config object."""
    return module.config


def swap(module: Any, layer: SparseLayer, mixin: type | None = None) -> None:
    """Give `module` a copy of its config that names our attention function."""
    layer.swapped = copy.copy(layer.original)
    setattr(layer.swapped, IMPLEMENTATION, NAME)
    layer.attach(module)
    module.config = layer.swapped


def check_swapped(module: Any) -> None:
    """Do nothing: `unswap` restores the config whatever was done to the module's class."""


def unswap(module: Any) -> None:
    """Undo `swap`, also an interrupted one; call it again if it was interrupted itself."""
    layer = layer_of(module)
    assert layer is not None
    if module.config is layer.swapped:
        module.config = layer.original
    elif (
        getattr(module.config, IMPLEMENTATION, None) == NAME and module.config is not layer.original
    ):
        # Another config since, made from ours: it stays, without our name in it.
        setattr(module.config, IMPLEMENTATION, getattr(layer.original, IMPLEMENTATION))
    layer.detach(module)


def prepare() -> None:
    """Register our name with transformers, if that is loaded.

    Both registries are needed: without a mask function, padding masks vanish.
    """
    if "transformers.modeling_utils" not in sys.modules:
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention function: q, k, v (B, H, N, D) -> (out (B, N, H, D), attention weights or None)."""
    layer = layer_of(module)
    if layer is None:  # loaded with attn_implementation="bsa_vision" and no plan: dense
        return _original("sdpa", module)(module, query, key, value, attention_mask, **kwargs)
    reason = (
        None
        if layer.runs_original()
        else _unsupported(layer, module, query, key, attention_mask, kwargs)
    )
    if reason is not None:
        layer.fall_back(reason)
    if reason is not None or layer.runs_original():
        name = getattr(layer.original, IMPLEMENTATION)
        return _original(name, module)(module, query, key, value, attention_mask, **kwargs)
    grid = layer.grid_of(layer.encoder.current_grid(query.shape[2]))
    out = layer.attend(
        query, key, value, kwargs.get("scaling"), kwargs.get("dropout") or 0.0, grid=grid
    )
    return out.transpose(1, 2), None


def _unsupported(
    layer: SparseLayer,
    module: Any,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    kwargs: dict[str, Any],
) -> str | None:
    if attention_mask is not None:
        return "an attention mask was passed"
    if kwargs.get("is_causal"):
        return "causal attention was asked for"
    asked = kwargs.get("output_attentions") or getattr(layer.original, "output_attentions", False)
    if asked or attentions_are_collected(module):
        return WEIGHTS_ASKED_FOR
    if _returns_weights(layer, module) and is_watched(module):
        return WEIGHTS_WATCHED
    return layer.wrong_grid(query.shape[2], key.shape[2])


def attentions_are_collected(module: nn.Module) -> bool:
    """Return whether the model was called for its attentions, which transformers takes from a hook on `module`."""
    if not module._forward_hooks:  # and torch.compile cannot look up what is collected
        return False
    try:
        from transformers.utils.output_capturing import _active_collector
    except ImportError:  # another version of transformers, which passes output_attentions
        return False
    return "attentions" in (_active_collector.get() or {})


def is_watched(module: nn.Module) -> bool:
    """Return whether a forward hook sees what `module` returns, other than those of transformers."""
    hooks = module._forward_hooks.values()
    return any(
        getattr(hook, "__module__", "") != "transformers.utils.output_capturing" for hook in hooks
    )


def _returns_weights(layer: SparseLayer, module: nn.Module) -> bool:
    """Return whether the original module would return attention weights beside its output."""
    name = str(getattr(layer.original, IMPLEMENTATION))
    without = "sdpa" in name or "flash" in name
    return not without and (layer.adapter.returns_weights or layer.spec.role != "self")


def _original(name: str | None, module: Any) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """transformers' own function of that name; "eager" lives in the file of each model."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager = sys.modules[own_class(type(module)).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
