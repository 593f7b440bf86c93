"""Run attention with every option that some backend has, below the public functions' checks."""

import torch

from bsa_vision.attention.backends.problem import Call
from bsa_vision.attention.functional import _run


def attend(
    source,
    q,
    k,
    v,
    *,
    rel_pos=None,
    scale=None,
    dropout_p=0.0,
    backend="auto",
    cu_seqlens=(None, None),
    max_seqlens=(0, 0),
    is_causal=False,
    exact_streaming=False,
    return_lse=False,
    return_probs=False,
):
    """Return the `Result`; `source` is HeadMasks, or the kernel's three tensors."""
    raw = source if isinstance(source, tuple) else (None, None, None)
    call = Call(q, k, v, *(rel_pos or (None, None)), *cu_seqlens, *raw)._replace(
        max_seqlen_q=max_seqlens[0],
        max_seqlen_k=max_seqlens[1],
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        is_causal=is_causal,
        exact_streaming=exact_streaming,
        return_lse=return_lse,
        dropout_p=dropout_p,
        seed=torch.randint(2**62, (1,)) if dropout_p else None,
        backend=backend,
    )
    return _run(call, None if isinstance(source, tuple) else source, return_probs=return_probs)
