"""Where a model's attention is torch's `scaled_dot_product_attention`: its own forward runs, and only that call is ours.

Projections, norms, rotary positions, gates, biases and grouped heads stay the model's own code, whatever a version of it does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy
from torch.overrides import TorchFunctionMode

from bsa_vision.adapters.swap.class_swap import Swapped

Attend = Callable[[Tensor, Tensor, Tensor, float | None, float], Tensor]


class Interception(TorchFunctionMode):
    """Inside, `scaled_dot_product_attention(q, k, v, ...)` is `attend(q, k, v, scale, dropout_p)`, in this thread only.

    The caller has made sure that neither a mask nor causality is asked for.
    """

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend
        self.calls = 0

    def check(self, name: str) -> None:
        """Raise RuntimeError unless there was exactly one such call: a module that attends otherwise was not served."""
        if self.calls != 1:
            raise RuntimeError(
                f"layer {name!r} called torch's attention {self.calls} times where one call was expected: this version of its library "
                "works otherwise; restore_ the model, and report it."
            )

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        return self._serve(*args, **(kwargs or {}))

    def _serve(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        assert attn_mask is None
        assert not is_causal
        return self.attend(query, key, value, scale, dropout_p)


def dropout_watched(drop: nn.Module) -> str | None:
    """Why a module that is handed attention weights must be called: a hook sees them, or it is no plain dropout."""
    if drop._forward_hooks or drop._forward_pre_hooks:
        return "a hook on attn_drop sees the attention weights"
    if type(drop) not in (nn.Dropout, nn.Identity):
        return f"attn_drop is a {type(drop).__name__}, which sees the attention weights"
    return None


_answering = (
    threading.local()
)  # .layer: whose call of torch's attention this thread answers at the moment


class Intercepted(Swapped):
    """What the mixins of adapters have in common whose swapped modules run their own forward, with our attention in it."""

    COVERS = ("fused_attn",)

    @property
    def fused_attn(self) -> bool:
        """timm's switch to torch's attention: on where we answer that call, the module's own otherwise."""
        layer = self._layer
        if "fused_attn" not in layer.covered:
            raise AttributeError(f"{type(self).__name__} has no attribute 'fused_attn'")
        if torch.compiler.is_compiling():
            return layer.covered["fused_attn"] or not layer.runs_original()
        return layer.covered["fused_attn"] or getattr(_answering, "layer", None) is layer

    @fused_attn.setter
    def fused_attn(self, value: bool) -> None:
        layer = self._layer
        layer.covered["fused_attn"] = self.__dict__["fused_attn"] = (
            value  # what `restore_` uncovers
        )

    def _weights_watched(self) -> str | None:
        """Why the original must run: with timm's own arithmetic, `attn_drop` is handed the attention weights."""
        drop = getattr(self, "attn_drop", None)
        if self._layer.covered.get("fused_attn", True) or not isinstance(drop, nn.Module):
            return None
        return dropout_watched(drop)

    def _serve(
        self,
        unsupported: Callable[[], str | None],
        *args: Any,
        grid: tuple[int, int] | None = None,
        asked: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The module's own forward. Torch's attention in it is the layer's, unless that runs its original, or must, for a reason.

        grid   of the tokens; None = that of the last image
        asked  further arguments for the original, which a call without a reason does not have
        """
        layer, original = self._layer, super().forward
        if isinstance(args[0], Proxy):
            trace = original if layer.untouched else self._fx_leaf
            return trace(*args, **kwargs, **(asked or {}))
        reason = None if layer.runs_original() else unsupported() or self._weights_watched()
        if reason is not None:
            layer.fall_back(reason)
        if reason is not None or layer.runs_original():
            return original(*args, **kwargs, **(asked or {}))
        interception = Interception(partial(layer.attend, grid=grid))
        if torch.compiler.is_compiling():
            with interception:
                out = original(*args, **kwargs)
        else:
            _answering.layer = layer
            try:
                with interception:
                    out = original(*args, **kwargs)
            finally:
                _answering.layer = None
        interception.check(layer.spec.name)
        return out
