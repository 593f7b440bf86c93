"""Gradients that torch cannot differentiate again: a second derivative is refused, and the message names the backend that has one."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor


def refuse_second_derivative(backend: str) -> NoReturn:
    raise RuntimeError(
        f"second derivatives do not reach through {backend!r}, which has first derivatives only: name backend='reference', which "
        "torch differentiates as often as asked."
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
    """Return `gradients`, made of `grad_out` and `q` among others; torch would take them for constants otherwise."""
    if not torch.is_grad_enabled():  # no create_graph=True
        return gradients
    return _Once.apply(backend, grad_out, q, *gradients)
