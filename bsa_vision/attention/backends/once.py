"""Reject second derivatives of backends that have first derivatives only."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor


def refuse_second_derivative(backend: str) -> NoReturn:
    """Raise the error that names the backend with second derivatives."""
    raise RuntimeError(
        f"backend {backend!r} has no second derivatives: use backend='reference', which torch "
        "differentiates any number of times."
    )


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, backend: str, grad_out: Tensor, q: Tensor, *gradients: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.backend = backend
        return tuple(x.view_as(x) for x in gradients)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> NoReturn:
        refuse_second_derivative(ctx.backend)


def once(
    backend: str, grad_out: Tensor, q: Tensor, gradients: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Return `gradients`, such that differentiating them again is an error.

    They depend on `grad_out` and `q`; without this, torch would treat them as constants.
    """
    if not torch.is_grad_enabled():  # no create_graph=True
        return gradients
    return _Once.apply(backend, grad_out, q, *gradients)
