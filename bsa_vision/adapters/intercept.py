"""Where a model's attention is torch's `scaled_dot_product_attention`: its own forward runs, and only that call is ours.

Projections, norms, rotary positions, gates, biases and grouped heads stay the model's own code, whatever a version of it does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

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
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
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
