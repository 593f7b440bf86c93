"""Choose one candidate per head: a multiple-choice knapsack problem, solved by HiGHS (scipy)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bsa_vision.errors import PlanError

SLACK = 1 + 1e-9  # relative tolerance of limits, for rounding errors


@dataclass(frozen=True)
class Choice:
    """The candidates of one head.

    errors  loss of quality per candidate, additive over heads
    costs   time (or blocks) per candidate, additive over heads
    """

    errors: Sequence[float]
    costs: Sequence[float]


def solve(
    heads: Sequence[Choice], *, budget: float | None = None, max_error: float | None = None
) -> list[int]:
    """Return the index of the candidate of each head; pass either `budget` or `max_error`.

    budget     minimise the error among choices of at most this cost
    max_error  minimise the cost among choices of at most this error

    Optimal up to a relative gap of 1e-4. Raise PlanError if no choice fits.
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
    if least > limit * SLACK:
        what = "cost" if max_error is None else "error"
        raise PlanError(
            f"no plan has a {what} of at most {limit:.4g}: the smallest possible {what} is "
            f"{least:.4g}."
        )
    head_of = np.repeat(np.arange(len(heads)), [len(head.errors) for head in heads])
    one_each = csr_array((np.ones(len(head_of)), (head_of, np.arange(len(head_of)))))
    # The tolerances of HiGHS are absolute, so values are scaled to about 1. Candidates that exceed
    # the limit alone are excluded: values of many times the limit would need finer tolerances.
    scale, unit = max(float(minimised.max()), 1e-300), max(limit, 1e-300)
    allowed = limited <= limit * SLACK
    found = milp(
        minimised / scale,
        integrality=np.ones(len(head_of)),
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
    first = np.searchsorted(head_of, np.arange(len(heads)))
    return [int(index - start) for index, start in zip(chosen, first, strict=True)]
