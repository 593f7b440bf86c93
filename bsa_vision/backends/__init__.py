"""The ways to run a `Problem`, in the order `auto` prefers them, and the one place that chooses.

A backend is a module with `why_not(problem) -> str | None`, the single source for choosing, for errors and for reports,
and `run(problem) -> Result`. Backends never import each other.
"""

from __future__ import annotations

from types import ModuleType

from bsa_vision.backends import compiled, costs, cudnn, flex, gather, kernel, proof, reference, sdpa
from bsa_vision.backends.problem import Problem, Result
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
    return proof.objection(BACKENDS[name], reference, problem.q.dtype, problem.q.device, problem.rel_pos is not None)


def choose(problem: Problem, backend: str = "auto") -> str:
    """The name of the backend that runs `problem`: the named one or an error; with "auto" the first that can, on GPUs the cheapest by `costs`.

    Every one of them applies the mask, so the choice changes the time a call takes, and the result by rounding.
    """
    if backend == "auto":
        # With nothing to skip, torch's own attention is mostly the fastest way to the same result.
        dense = problem.masks.all_dense and problem.rel_pos is None and not compiled.outruns_dense(problem)
        order = ("sdpa", *BACKENDS) if dense else tuple(BACKENDS)
        can = (name for name in order if why_not(name, problem) is None)
        return next(can) if dense or problem.q.device.type != "cuda" else costs.cheapest(tuple(can), problem)
    if backend not in BACKENDS:
        raise ValueError(
            f"backend={backend!r}: allowed are 'auto', {', '.join(map(repr, BACKENDS))}; choose one of them."
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


__all__ = ["BACKENDS", "Problem", "Result", "choose", "reasons", "why_not"]
