"""The ways to run a `Problem`, in the order `auto` prefers them, and the one place that chooses.

A backend is a module with `why_not(problem) -> str | None`, the single source for choosing, for errors and for reports,
and `run(problem) -> Result`. Backends never import each other.
"""

from __future__ import annotations

from collections.abc import Hashable
from types import ModuleType

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
from bsa_vision.attention.backends.problem import Problem
from bsa_vision.errors import BackendUnavailable

BACKENDS: dict[str, ModuleType] = {
    "kernel": kernel,
    "cudnn": cudnn,
    "flex": flex,
    "gather": gather,
    "sdpa": sdpa,
    "reference": reference,
}
ON_TRIAL = ("kernel", "cudnn", "flex")  # taken on GPUs once they have proved themselves there


def why_not(name: str, problem: Problem) -> str | None:
    """Why this backend does not run `problem`: what it says itself, or what was found when it was tried."""
    reason = BACKENDS[name].why_not(problem)
    if reason is not None or name not in ON_TRIAL or problem.q.device.type != "cuda":
        return reason
    return self_test.objection(BACKENDS[name], reference, self_test.Kind.of(problem))


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
    lengths = (problem.longest_q, problem.longest_k)
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
        # With nothing to skip, torch's own attention is mostly the fastest way to the same result.
        dense = (
            problem.masks.all_dense
            and problem.rel_pos is None
            and not cpu_kernel.outruns_dense(problem)
        )
        order = ("sdpa", *BACKENDS) if dense else tuple(BACKENDS)
        can = (name for name in order if why_not(name, problem) is None)
        return (
            next(can)
            if dense or problem.q.device.type != "cuda"
            else measured_costs.cheapest(tuple(can), problem)
        )
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
