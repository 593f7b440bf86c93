"""Describe one attention call.

`Call` has the flat arguments of torch's operators; `Problem` is what every backend receives.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from bsa_vision.attention.head_masks import HeadMasks
from bsa_vision.attention.mask_tensors import STREAMING
from bsa_vision.attention.rel_pos import RelPos


class Result(NamedTuple):
    """The results of a backend.

    out    shaped like q, with the head dim of v
    lse    (images, H, max_seqlen_q) natural log of the softmax denominators; +inf for queries
           without keys and past the end of short sequences; None if the backend returns none
    probs  (images, H, max_seqlen_q, max_seqlen_k), rounded up to blocks, negated where dropped;
           None unless `return_probs` is set
    """

    out: Tensor
    lse: Tensor | None = None
    probs: Tensor | None = None


class Span(NamedTuple):
    """The part of the tensors that belongs to one image of the batch."""

    image: int
    row: int  # index into the first axis of q, k, v
    q: slice  # its queries
    k: slice  # its keys


@dataclass(frozen=True, eq=False)
class Problem:
    """Attention of all images and heads in one call, with tokens in packed order.

    q        (B, H, Nq, D), any strides; a ragged batch is (1, H, Tq, D) with cu_seqlens and
             max_seqlens
    k, v     (B, G, Nk, D) and (B, G, Nk, Dv) with H a multiple of G (grouped queries)
    masks    the block masks of the heads, in packed order
    scale    multiplies q . k
    rel_pos  factored relative position; `key_row` and `key_column` (Nk,) are the patch coordinates
             of the keys
    order_q, order_k
             (Nq,), (Nk,) model-order index of each packed token. For `cpu_kernel` only: all tensors
             and the results are in model order. For `flex`, order_q only: rel_pos is in model
             order, the rest in packed order
    """

    q: Tensor
    k: Tensor
    v: Tensor
    masks: HeadMasks
    scale: float
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlens: tuple[int, int] | None = None
    is_causal: bool = False
    exact_streaming: bool = False
    dropout_p: float = 0.0
    seed: Tensor | None = None
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
    def max_seqlen_q(self) -> int:
        return self.q.shape[2] if self.max_seqlens is None else self.max_seqlens[0]

    @property
    def max_seqlen_k(self) -> int:
        return self.k.shape[2] if self.max_seqlens is None else self.max_seqlens[1]

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the arithmetic: float64 for float64, else float32."""
        return torch.promote_types(self.q.dtype, torch.float32)

    @property
    def not_on_nvidia(self) -> str | None:
        """Why this is no call on an NVIDIA GPU, or None; torch calls AMD's GPUs "cuda" as well."""
        if self.q.device.type != "cuda":
            return f"the tensors are on {self.q.device.type}"
        return "this torch is built for ROCm" if torch.version.hip else None

    @property
    def needs_gradient(self) -> bool:
        """Whether torch would differentiate this call."""
        if not torch.is_grad_enabled():
            return False
        terms = self.rel_pos or (self.q,)
        inputs = (self.q, self.k, self.v, *terms)
        return True in [x.requires_grad for x in inputs]

    def spans(self) -> Iterator[Span]:
        """Yield the images one by one."""
        if self.cu_seqlens_q is None or self.cu_seqlens_k is None:
            for image in range(self.q.shape[0]):
                yield Span(image, image, slice(0, self.q.shape[2]), slice(0, self.k.shape[2]))
            return
        # Check again: on other devices and under a compiler, values have not been read before.
        bounds_q = check_bounds("q", self.cu_seqlens_q, self.q.shape[2], self.max_seqlen_q)
        bounds_k = check_bounds("k", self.cu_seqlens_k, self.k.shape[2], self.max_seqlen_k)
        for image in range(self.num_images):
            q, k = (slice(*bounds[image : image + 2]) for bounds in (bounds_q, bounds_k))
            yield Span(image, 0, q, k)

    def mask_image(self, image: int) -> int:
        """Return the index into the images of `masks` for an image of the batch."""
        base = self.masks.base_blockmask
        return 0 if base is None or base.shape[0] == 1 else image

    def empty_out(self) -> Tensor:
        """Allocate the output, (B, H, Nq, Dv).

        Memory is token-major, as the output projection reads it.
        """
        batch, heads, tokens, _ = self.q.shape
        return self.q.new_empty(batch, tokens, heads, self.v.shape[-1]).transpose(1, 2)

    def empty_lse(self) -> Tensor:
        """Allocate the log-sum-exp, (images, H, max_seqlen_q), filled with +inf."""
        shape = (self.num_images, self.num_heads, self.max_seqlen_q)
        return torch.full(shape, torch.inf, dtype=self.compute_dtype, device=self.q.device)

    def token_mask(self, span: Span) -> Tensor | None:
        """Return the mask per token, (H, n_q, n_k) bool, True = attend; None if all attend.

        It combines block masks, causality and exact streaming.
        """
        num_q, num_k = span.q.stop - span.q.start, span.k.stop - span.k.start
        if self.masks.all_dense and not self.is_causal:
            return None
        size, device = self.masks.block_size, self.q.device
        images = self.masks.block_mask(num_q, num_k, causal=self.is_causal)
        blocks = images[self.mask_image(span.image)].to(device)
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
        """Draw a dropout mask, True = keep.

        The same `place` in the same call always gives the same mask.
        """
        seed = 0 if self.seed is None else int(self.seed)
        for number in place:
            seed = (seed * 1_000_003 + number + 1) % 2**63
        generator = torch.Generator(device=self.q.device).manual_seed(seed)
        return torch.rand(shape, generator=generator, device=self.q.device) >= self.dropout_p


class Backend(Protocol):
    """One implementation of block-sparse attention."""

    def why_not(self, problem: Problem) -> str | None:
        """Return why this backend cannot run `problem`, in one sentence; None if it can."""

    def run(self, problem: Problem) -> Result:
        """Compute `problem`, whose tokens are in packed order."""

    def __hash__(self) -> int:
        """Return a hash: self-tests are remembered per backend."""


def all_finite(*tensors: Tensor) -> bool:
    """Return whether no tensor holds NaN or infinity; False if values cannot be read (vmap)."""
    if torch.jit.is_tracing():
        return True  # a trace must not depend on values
    try:
        return all(bool(x.isfinite().all()) for x in tensors)
    except RuntimeError:
        return False


def check_bounds(name: str, bounds: Tensor, total: int, max_seqlen: int) -> list[int]:
    """Return the values of `cu_seqlens_{name}`; raise ValueError if they are invalid."""
    values = bounds.tolist()
    lengths = [b - a for a, b in pairwise(values)]
    if values[0] != 0 or values[-1] != total or min(lengths) < 0:
        raise ValueError(
            f"cu_seqlens_{name}={values}: sequence boundaries must start at 0, never decrease, and "
            f"end at {total}, the number of tokens of {name}; use the cumulative sum of the "
            "sequence lengths with a 0 in front."
        )
    if max(lengths) > max_seqlen:
        raise ValueError(
            f"max_seqlen_{name}_={max_seqlen} is less than the longest sequence of "
            f"cu_seqlens_{name}, {max(lengths)} tokens."
        )
    return values


class Call(NamedTuple):
    """The arguments of one attention call, tokens in model order.

    q                (B, H, N, D); a ragged batch is (1, H, T, D) with cu_seqlens and max_seqlens
    k, v             (B, G, M, D) and (B, G, M, Dv), H a multiple of G
    rel_h, rel_w     factored relative position
    cu_seqlens_*     (images + 1,) int32; None is a uniform batch
    head_mask_type, streaming_info, base_blockmask
                     the kernel's tensors, if the masks are given as such
    carried          the masks in a saved program (`carried_masks`)
    seed             (1,) int64 for dropout; an input, so that compilers do not merge two calls
    handle           for other masks, the `Handle` of the object with `masks_for(grid, keys)`
    max_seqlen_*     tokens of the longest image of a ragged batch, 0 if uniform
    """

    q: Tensor
    k: Tensor
    v: Tensor
    rel_h: Tensor | None = None
    rel_w: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    head_mask_type: Tensor | None = None
    streaming_info: Tensor | None = None
    base_blockmask: Tensor | None = None
    carried: Tensor | None = None
    seed: Tensor | None = None
    handle: int = 0
    grid_h: int = 0
    grid_w: int = 0
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    scale: float = 1.0
    is_causal: bool = False
    exact_streaming: bool = False
    dropout_p: float = 0.0
    return_lse: bool = False
    backend: str = "auto"

    @property
    def tensors(self) -> tuple[Any, ...]:
        return self[: self._fields.index("handle")]

    @property
    def numbers(self) -> tuple[Any, ...]:
        return self[self._fields.index("handle") :]

    def problem(
        self, masks: HeadMasks, *, deterministic: bool = False, return_probs: bool = False
    ) -> Problem:
        """Return the call as backends receive it."""
        ragged = self.cu_seqlens_q is not None
        rel_pos = None
        if self.rel_h is not None and self.rel_w is not None:
            rel_pos = RelPos(self.rel_h, self.rel_w)
        return Problem(
            self.q,
            self.k,
            self.v,
            masks,
            self.scale,
            cu_seqlens_q=self.cu_seqlens_q,
            cu_seqlens_k=self.cu_seqlens_k,
            max_seqlens=(self.max_seqlen_q, self.max_seqlen_k) if ragged else None,
            is_causal=self.is_causal,
            exact_streaming=self.exact_streaming,
            dropout_p=self.dropout_p,
            seed=self.seed,
            deterministic=deterministic,
            rel_pos=rel_pos,
            return_lse=self.return_lse,
            return_probs=return_probs,
        )


SCHEMA_TYPES = {type(None): "Tensor?", int: "SymInt", float: "float", bool: "bool", str: "str"}


def schema() -> str:
    """Return the arguments of `Call` as a torch operator schema."""
    kinds = {name: SCHEMA_TYPES[type(value)] for name, value in Call._field_defaults.items()}
    return ", ".join(f"{kinds.get(name, 'Tensor')} {name}" for name in Call._fields)
