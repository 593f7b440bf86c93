"""Swap the config of an attention module, for models of transformers.

These models look up their attention function by a name in the config. A swapped layer gets a copy
of its config with the name of this package. The model's config, other layers and parameters do
not change.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from bsa_vision.adapters.swap.sparse_layer import SparseLayer, layer_of
from bsa_vision.adapters.swap.wrappers import own_class

NAME = "bsa_vision"  # must not contain "sdpa" or "flash", which transformers interprets
IMPLEMENTATION = "_attn_implementation_internal"
WEIGHTS_REQUESTED = "attention weights were requested"
WEIGHTS_HOOKED = "a forward hook on the module reads its attention weights"


def original_of(module: Any) -> Any:
    """Return what `unswap` restores: the module's config object."""
    return module.config


def swap(module: Any, layer: SparseLayer, mixin: type | None = None) -> None:
    """Give `module` a copy of its config that names the sparse attention function."""
    layer.swapped = copy.copy(layer.original)
    setattr(layer.swapped, IMPLEMENTATION, NAME)
    layer.attach(module)
    module.config = layer.swapped


def check_swapped(module: Any) -> None:
    """Do nothing: `unswap` restores the config even if the module's class has changed."""


def unswap(module: Any) -> None:
    """Undo `swap`, complete or interrupted; call it again if this call is interrupted."""
    layer = layer_of(module)
    assert layer is not None
    if module.config is layer.swapped:
        module.config = layer.original
    elif (
        getattr(module.config, IMPLEMENTATION, None) == NAME and module.config is not layer.original
    ):
        # The config was replaced by a copy of the swapped one: keep it, but without NAME.
        setattr(module.config, IMPLEMENTATION, getattr(layer.original, IMPLEMENTATION))
    layer.detach(module)


def prepare() -> None:
    """Register the attention function with transformers, if that is loaded.

    The mask function is needed as well: without it, transformers drops padding masks.
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
    """Attend, with the signature of an attention function of transformers.

    q, k, v (B, H, N, D) -> (out (B, N, H, D), attention weights or None).
    """
    layer = layer_of(module)
    if layer is None:  # attn_implementation="bsa_vision" without a plan: dense
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
        return "causal attention was requested"
    requested = kwargs.get("output_attentions") or getattr(
        layer.original, "output_attentions", False
    )
    if requested or attentions_are_collected(module):
        return WEIGHTS_REQUESTED
    if _returns_weights(layer, module) and has_user_hooks(module):
        return WEIGHTS_HOOKED
    return layer.wrong_grid(query.shape[2], key.shape[2])


def attentions_are_collected(module: nn.Module) -> bool:
    """Return whether the caller requested attentions, which transformers reads by a hook."""
    if not module._forward_hooks:  # torch.compile cannot trace the lookup below
        return False
    try:
        from transformers.utils.output_capturing import _active_collector
    except ImportError:  # a version of transformers that passes output_attentions instead
        return False
    return "attentions" in (_active_collector.get() or {})


def has_user_hooks(module: nn.Module) -> bool:
    """Return whether `module` has forward hooks other than transformers' and bsa_vision's own."""
    hooks = (getattr(hook, "func", hook) for hook in module._forward_hooks.values())  # of a partial
    homes = [getattr(hook, "__module__", None) or "" for hook in hooks]
    return not all(
        home == "transformers.utils.output_capturing" or home.startswith("bsa_vision.")
        for home in homes
    )


def _returns_weights(layer: SparseLayer, module: nn.Module) -> bool:
    """Return whether the original module returns attention weights besides its output."""
    name = str(getattr(layer.original, IMPLEMENTATION))
    without = "sdpa" in name or "flash" in name
    return not without and (layer.adapter.returns_weights or layer.spec.role != "self")


def _original(name: str | None, module: Any) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Return transformers' attention function of this name; each model file has its "eager" one."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager = sys.modules[own_class(type(module)).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
