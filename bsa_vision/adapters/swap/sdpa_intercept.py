"""Replace only the call of `scaled_dot_product_attention` in a module's original forward.

Projections, norms, rotary positions, gates, biases and grouped heads remain the model's code,
whatever version of it is installed.
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
    """Context that replaces `scaled_dot_product_attention` by `attend` in this thread.

    `attend` is called as attend(q, k, v, scale, dropout_p). The caller has checked that there is
    neither an attention mask nor a causal mask.
    """

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend
        self.calls = 0

    def check(self, name: str) -> None:
        """Raise RuntimeError unless the layer called the function exactly once."""
        if self.calls != 1:
            raise RuntimeError(
                f"layer {name!r} called torch's attention {self.calls} times, expected 1: this "
                "version of its library is not supported; call restore_ on the model, and report "
                "the problem."
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
        return self._attend(*args, **(kwargs or {}))

    def _attend(
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


def dropout_reads_weights(drop: nn.Module) -> str | None:
    """Return why `drop` must get the attention weights (hooks, another class), or None."""
    if drop._forward_hooks or drop._forward_pre_hooks:
        return "a hook on attn_drop reads the attention weights"
    if type(drop) not in (nn.Dropout, nn.Identity):
        return f"attn_drop is a {type(drop).__name__}, which reads the attention weights"
    return None


_intercepting = threading.local()  # .layer: the layer whose attention call this thread replaces


class Intercepted(Swapped):
    """Base class of the mixins whose modules run their original forward with replaced attention."""

    COVERS = ("fused_attn",)

    @property
    def fused_attn(self) -> bool:
        """timm's switch to torch's attention: on while that call is replaced, else as set."""
        layer = self._layer
        if "fused_attn" not in layer.covered:
            raise AttributeError(f"{type(self).__name__} has no attribute 'fused_attn'")
        if torch.compiler.is_compiling():
            return layer.covered["fused_attn"] or not layer.runs_original()
        return layer.covered["fused_attn"] or getattr(_intercepting, "layer", None) is layer

    @fused_attn.setter
    def fused_attn(self, value: bool) -> None:
        layer = self._layer
        # `restore_` removes the property, and the attribute is visible again.
        layer.covered["fused_attn"] = self.__dict__["fused_attn"] = value

    def _weights_used(self) -> str | None:
        """Return why `attn_drop`, which gets the weights without fused attention, needs them."""
        drop = getattr(self, "attn_drop", None)
        if self._layer.covered.get("fused_attn", True) or not isinstance(drop, nn.Module):
            return None
        return dropout_reads_weights(drop)

    def _run_forward(
        self,
        unsupported: Callable[[], str | None],
        *args: Any,
        grid: tuple[int, int] | None = None,
        unsupported_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Run the original forward, with the sparse attention if the call is supported.

        unsupported         returns why the call must run the original attention, or None
        grid                grid of the tokens; None = that of the last input
        unsupported_kwargs  arguments that only calls of the original attention may have
        """
        layer, original = self._layer, super().forward
        if isinstance(args[0], Proxy):
            trace = original if layer.untouched else self._fx_leaf
            return trace(*args, **kwargs, **(unsupported_kwargs or {}))
        reason = None if layer.runs_original() else unsupported() or self._weights_used()
        if reason is not None:
            layer.fall_back(reason)
        if reason is not None or layer.runs_original():
            return original(*args, **kwargs, **(unsupported_kwargs or {}))
        interception = Interception(partial(layer.attend, grid=grid))
        if torch.compiler.is_compiling():
            with interception:
                out = original(*args, **kwargs)
        else:
            _intercepting.layer = layer
            try:
                with interception:
                    out = original(*args, **kwargs)
            finally:
                _intercepting.layer = None
        interception.check(layer.spec.name)
        return out
