"""One attention call, fully described: what every backend receives, and what all of them agree on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from bsa_vision.attention.head_masks import STREAMING, HeadMasks
from bsa_vision.attention.rel_pos import RelPos


class Result(NamedTuple):
    """What a backend returns.

    out    shaped like q, except for the head dim of v
    lse    (images, H, longest) natural log of the softmax denominators; +inf where a query sees nothing and past the end
           of short sequences; None where the backend has none
    probs  (images, H, longest q, longest k), rounded up to blocks, negative where dropout struck; None unless asked for
    """

    out: Tensor
    lse: Tensor | None = None
    probs: Tensor | None = None


class Span(NamedTuple):
    """One image of the batch: its place in the tensors, and its tokens there."""

    image: int
    row: int  # index into the first axis of q, k, v
    q: slice
    k: slice


@dataclass(frozen=True, eq=False)
class Problem:
    """Attention of all images and heads in one call. Tokens are in packed order, unless `order_q`, `order_k` are given.

    q        (B, H, Nq, D), any strides; a ragged batch is (1, H, Tq, D) with cu_seqlens and the longest lengths
    k, v     (B, G, Nk, D) and (B, G, Nk, Dv) with H a multiple of G (grouped queries)
    masks    the heads' block masks; their layouts were applied already
    scale    multiplies q . k
    rel_pos  factored relative position; `key_row` and `key_column` (Nk,) are the keys' patch coordinates
    order_q, order_k   (Nq,), (Nk,) model-order index of each packed token, when tokens are in model order; only for
                       `compiled`, which finds tokens anywhere and then also returns model order. For `flex`, order_q alone:
                       rel_pos is in model order, everything else is not
    """

    q: Tensor
    k: Tensor
    v: Tensor
    masks: HeadMasks
    scale: float
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_q: int | None = None
    max_k: int | None = None
    is_causal: bool = False
    exact_streaming: bool = False
    dropout_p: float = 0.0
    seed: int = 0
    deterministic: bool = False
    rel_pos: RelPos | None = None
    key_row: Tensor | None = None
    key_column: Tensor | None = None
    order_q: Tensor | None = None
    order_k: Tensor | None = None
    return_lse: bool = False
    return_probs: bool = False

    @property
    def num_heads(self) -> int:
        return self.q.shape[1]

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def ragged(self) -> bool:
        return self.cu_seqlens_q is not None

    @property
    def num_images(self) -> int:
        return self.q.shape[0] if self.cu_seqlens_q is None else self.cu_seqlens_q.shape[0] - 1

    @property
    def longest_q(self) -> int:
        return self.q.shape[2] if self.max_q is None else self.max_q

    @property
    def longest_k(self) -> int:
        return self.k.shape[2] if self.max_k is None else self.max_k

    @property
    def compute_dtype(self) -> torch.dtype:
        """float64 stays; everything else accumulates in float32."""
        return torch.promote_types(self.q.dtype, torch.float32)

    @property
    def not_on_nvidia(self) -> str | None:
        """Where the tensors are instead, in words; torch calls AMD's GPUs "cuda" as well."""
        if self.q.device.type != "cuda":
            return f"the tensors are on {self.q.device.type}"
        return "this torch is built for ROCm" if torch.version.hip else None

    @property
    def needs_gradient(self) -> bool:
        """Whether torch would differentiate this call."""
        tensors = (self.q, self.k, self.v, *(self.rel_pos or ()))
        return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)

    def spans(self) -> Iterator[Span]:
        """The images, one by one."""
        if self.cu_seqlens_q is None or self.cu_seqlens_k is None:
            for image in range(self.q.shape[0]):
                yield Span(image, image, slice(0, self.q.shape[2]), slice(0, self.k.shape[2]))
            return
        # Here too, where values are read anyway: on other devices and under a compiler nobody looked at them before.
        bounds_q = check_bounds("q", self.cu_seqlens_q, self.q.shape[2], self.longest_q)
        bounds_k = check_bounds("k", self.cu_seqlens_k, self.k.shape[2], self.longest_k)
        for image in range(self.num_images):
            yield Span(
                image, 0, slice(*bounds_q[image : image + 2]), slice(*bounds_k[image : image + 2])
            )

    def mask_image(self, image: int) -> int:
        """Which image of `masks` serves this image of the batch."""
        return (
            0
            if self.masks.base_blockmask is None or self.masks.base_blockmask.shape[0] == 1
            else image
        )

    def empty_out(self) -> Tensor:
        """(B, H, Nq, Dv) laid out token by token in memory, as the output projections that follow read it."""
        batch, heads, tokens, _ = self.q.shape
        return self.q.new_empty(batch, tokens, heads, self.v.shape[-1]).transpose(1, 2)

    def empty_lse(self) -> Tensor:
        """(images, H, longest), filled with +inf."""
        shape = (self.num_images, self.num_heads, self.longest_q)
        return torch.full(shape, torch.inf, dtype=self.compute_dtype, device=self.q.device)

    def token_mask(self, span: Span) -> Tensor | None:
        """(H, n_q, n_k) bool, True = attend: block masks, causality and exact streaming spelled out; None = all."""
        num_q, num_k = span.q.stop - span.q.start, span.k.stop - span.k.start
        if self.masks.all_dense and not self.is_causal:
            return None
        size, device = self.masks.block_size, self.q.device
        blocks = self.masks.block_mask(num_q, num_k, causal=self.is_causal)[
            self.mask_image(span.image)
        ].to(device)
        mask = blocks.repeat_interleave(size, 1)[:, :num_q].repeat_interleave(size, 2)[:, :, :num_k]
        if not self.is_causal:
            return mask
        query = torch.arange(num_q, device=device)[:, None] + num_k - num_q  # bottom-right aligned
        key = torch.arange(num_k, device=device)[None]
        if self.exact_streaming:
            for head, kind in enumerate(self.masks.slices):
                if kind == STREAMING:
                    sink, local = self.masks.streaming[head]
                    mask[head] = (key < sink) | (key > query - local)
        return mask & (key <= query)

    def keep(self, shape: tuple[int, ...], *place: int) -> Tensor:
        """A dropout mask, True = keep: the same bits whenever the same `place` of the same call is asked for."""
        seed = self.seed
        for number in place:
            seed = (seed * 1_000_003 + number + 1) % 2**63
        generator = torch.Generator(device=self.q.device).manual_seed(seed)
        return torch.rand(shape, generator=generator, device=self.q.device) >= self.dropout_p


def all_finite(*tensors: Tensor) -> bool:
    """Whether there is neither NaN nor infinity; False where values cannot be asked for, as under vmap."""
    if torch.jit.is_tracing():
        return True  # a trace is made for values of any kind
    try:
        return all(bool(x.isfinite().all()) for x in tensors)
    except RuntimeError:
        return False


def check_bounds(name: str, bounds: Tensor, total: int, longest: int) -> list[int]:
    """The values of cu_seqlens, or a ValueError that names what is wrong with them."""
    values = bounds.tolist()
    lengths = [b - a for a, b in pairwise(values)]
    if values[0] != 0 or values[-1] != total or min(lengths) < 0:
        raise ValueError(
            f"cu_seqlens_{name}={values}: sequence boundaries must start at 0, never fall, and end at {total}, the tokens of "
            f"{name}; use the cumulative sum of the sequence lengths with a 0 in front."
        )
    if max(lengths) > longest:
        raise ValueError(
            f"max_seqlen_{name}_={longest} is less than the longest sequence of cu_seqlens_{name}, {max(lengths)} tokens: pass "
            "at least that."
        )
    return values
