"""Choose the backend that runs a call.

The choice, errors and reports all use `why_not` of each backend. Backends never import each other.
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
GPU_ONLY = ("kernel", "cudnn", "flex")  # self-tested before their first use


def why_not(name: str, problem: Problem) -> str | None:
    """Return why a backend does not run `problem`; None if it does.

    The reason is the backend's own `why_not`, or the failure of its self-test on a GPU.
    """
    reason = BACKENDS[name].why_not(problem)
    if reason is not None or name not in GPU_ONLY or problem.q.device.type != "cuda":
        return reason
    return self_test.failure(BACKENDS[name], reference, self_test.CallKind.of(problem))


def choose(problem: Problem, backend: str = "auto") -> str:
    """Return the name of the backend that runs `problem`.

    backend  a name, which raises BackendUnavailable if it cannot run the problem; or "auto", the
             first backend that can, on GPUs the one with the lowest expected time

    Every backend applies the mask, so the choice changes the time of a call, and its result by
    rounding only.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(
            f"backend={backend!r}: allowed are 'auto', {', '.join(map(repr, BACKENDS))}."
        )
    if problem.q.device.type != "cuda":
        return _choose(problem, backend)
    # Cached: asking every backend takes longer than some calls on a GPU.
    key = ("choice", backend, *_relevant(problem))
    return problem.masks.remember(key, lambda: _choose(problem, backend))


def _relevant(problem: Problem) -> tuple[Hashable, ...]:
    """Return everything that `why_not` and `measured_costs` use, besides the masks."""
    q, k, v, terms = problem.q, problem.k, problem.v, problem.rel_pos
    return (
        *(q.shape, k.shape, v.shape, q.dtype, q.device, problem.ragged, problem.num_images),
        *(problem.is_causal, problem.exact_streaming, bool(problem.dropout_p)),
        *(problem.return_lse, problem.return_probs, problem.needs_gradient),
        None if terms is None else tuple(term.shape[-1] for term in terms),
        bool(problem.scale),
        *(problem.max_seqlen_q, problem.max_seqlen_k),
        measured_costs.generation(),
    )


def _choose(problem: Problem, backend: str) -> str:
    if backend == "auto":
        return _fastest(problem)
    reason = why_not(backend, problem)
    if reason is not None:
        able = [name for name in BACKENDS if why_not(name, problem) is None]
        raise BackendUnavailable(
            f"backend={backend!r} cannot run this call: {reason}. Backends that can: "
            f"{', '.join(able)}."
        )
    return backend


def _fastest(problem: Problem) -> str:
    on_gpu = problem.q.device.type == "cuda"
    # Without blocks to skip, torch's own attention is usually the fastest.
    dense = problem.masks.all_dense and problem.rel_pos is None
    dense = dense and not cpu_kernel.outruns_dense(problem)
    able = []
    for name in ("sdpa",) * dense + (tuple(BACKENDS) if on_gpu else ON_ANY_DEVICE):
        if why_not(name, problem) is None:
            able.append(name)
            if dense or not on_gpu:
                return name
    return measured_costs.cheapest(tuple(able), problem)


def reasons(problem: Problem) -> dict[str, str | None]:
    """Return every backend's `why_not` for this problem, in order of preference."""
    return {name: why_not(name, problem) for name in BACKENDS}
