"""One candidate for every head: a multiple-choice knapsack, solved to optimality by HiGHS (scipy)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bsa_vision.errors import PlanError


@dataclass(frozen=True)
class Choice:
    """What one head may do.

    errors  what each candidate costs in quality, additive over heads
    costs   what each candidate costs in time (or blocks), additive over heads
    """

    errors: Sequence[float]
    costs: Sequence[float]


def solve(
    heads: Sequence[Choice], *, budget: float | None = None, max_error: float | None = None
) -> list[int]:
    """The candidate of each head: least error within a budget, or least cost within an error; exactly one of the two is given.

    PlanError with what can be had, where nothing fits.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    errors = np.concatenate([np.asarray(head.errors, dtype=float) for head in heads])
    costs = np.concatenate([np.asarray(head.costs, dtype=float) for head in heads])
    minimised, limited, limit = (
        (errors, costs, budget) if max_error is None else (costs, errors, max_error)
    )
    assert limit is not None
    least = sum(min(head.costs if max_error is None else head.errors) for head in heads)
    if least > limit * (1 + 1e-9):
        what = "cost" if max_error is None else "error"
        raise PlanError(
            f"no choice of candidates has a {what} of at most {limit:.4g}: the least there is is {least:.4g}."
        )
    owner = np.repeat(np.arange(len(heads)), [len(head.errors) for head in heads])
    one_each = csr_array((np.ones(len(owner)), (owner, np.arange(len(owner)))))
    # HiGHS's tolerances are absolute.
    scale, unit = max(float(minimised.max()), 1e-300), max(limit, 1e-300)
    allowed = limited <= limit * (
        1 + 1e-9
    )  # alone; beside what exceeds the limit a thousand times, tolerances would swallow it
    found = milp(
        minimised / scale,
        integrality=np.ones(len(owner)),
        bounds=Bounds(0, allowed.astype(float)),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(np.where(allowed, limited, 0)[None] / unit, -np.inf, limit / unit),
        ],
        options={"mip_rel_gap": 1e-4, "time_limit": 60},
    )
    if found.x is None:
        raise PlanError(f"HiGHS found no choice of candidates: {found.message}")
    chosen = np.flatnonzero(found.x > 0.5)
    first = np.searchsorted(owner, np.arange(len(heads)))
    return [int(index - start) for index, start in zip(chosen, first, strict=True)]
