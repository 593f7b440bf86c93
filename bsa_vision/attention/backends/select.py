"""Choose the backend that runs a call.

`why_not` of each backend is the only source for the choice, for errors and for reports. Backends
never import each other.
"""

from __future__ import annotations

from collections.abc import Hashable

from bsa_vision.attention.backends import (
    cpu_kernel,
    cudnn,
    flex,
    gather,
    kernel,
    measured_costs,
    reference,
    sdpa,
    self_test,
)
from bsa_vision.attention.backends.problem import Backend, Problem
from bsa_vision.errors import BackendUnavailable

BACKENDS: dict[str, Backend] = {
    "kernel": kernel,
    "cudnn": cudnn,
    "flex": flex,
    "gather": gather,
    "sdpa": sdpa,
    "reference": reference,
}
ON_ANY_DEVICE = ("gather", "sdpa", "reference")
GPU_ONLY = ("kernel", "cudnn", "flex")  # chosen after their self-test on this machine


def why_not(name: str, problem: Problem) -> str | None:
    """Why this backend does not run `problem`: what it says itself, or what was found when it was tried."""
    reason = BACKENDS[name].why_not(problem)
    if reason is not None or name not in GPU_ONLY or problem.q.device.type != "cuda":
        return reason
    return self_test.failure(BACKENDS[name], reference, self_test.CallKind.of(problem))


def choose(problem: Problem, backend: str = "auto") -> str:
    """The name of the backend that runs `problem`: the named one or an error; with "auto" the first that can, on GPUs the cheapest by `costs`.

    Every one of them applies the mask, so the choice changes the time a call takes, and the result by rounding.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(
            f"backend={backend!r}: allowed are 'auto', {', '.join(map(repr, BACKENDS))}; choose one of them."
        )
    if problem.q.device.type != "cuda":
        return _choose(problem, backend)
    # Asking every backend takes longer than some calls do on a GPU.
    return problem.masks.remember(
        ("choice", backend, *_what_matters(problem)), lambda: _choose(problem, backend)
    )


def _what_matters(problem: Problem) -> tuple[Hashable, ...]:
    """Whatever `why_not` and `costs` look at, besides the masks."""
    q, k, v = problem.q, problem.k, problem.v
    tensors = (q.shape, k.shape, v.shape, q.dtype, q.device, problem.ragged, problem.num_images)
    flags = (
        problem.is_causal,
        problem.exact_streaming,
        bool(problem.dropout_p),
        problem.return_lse,
        problem.return_probs,
    )
    terms = (
        None
        if problem.rel_pos is None
        else (problem.rel_pos[0].shape[-1], problem.rel_pos[1].shape[-1])
    )
    lengths = (problem.max_seqlen_q, problem.max_seqlen_k)
    return (
        *tensors,
        *flags,
        terms,
        bool(problem.scale),
        *lengths,
        problem.needs_gradient,
        measured_costs.generation(),
    )


def _choose(problem: Problem, backend: str) -> str:
    if backend == "auto":
        on_gpu = problem.q.device.type == "cuda"
        # Without blocks to skip, torch's own attention is mostly the fastest.
        dense = problem.masks.all_dense and problem.rel_pos is None
        dense = dense and not cpu_kernel.outruns_dense(problem)
        can = []
        for name in ("sdpa",) * dense + (tuple(BACKENDS) if on_gpu else ON_ANY_DEVICE):
            if why_not(name, problem) is None:
                can.append(name)
                if dense or not on_gpu:
                    return name
        return measured_costs.cheapest(tuple(can), problem)
    reason = why_not(backend, problem)
    if reason is not None:
        able = [name for name in BACKENDS if why_not(name, problem) is None]
        raise BackendUnavailable(
            f"backend={backend!r} cannot run this call: {reason}. Able here: {', '.join(able)}; name one of them, or 'auto'."
        )
    return backend


def reasons(problem: Problem) -> dict[str, str | None]:
    """Every backend's `why_not` for this problem, in order of preference."""
    return {name: why_not(name, problem) for name in BACKENDS}
