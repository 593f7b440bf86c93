"""One candidate for every head: a multiple-choice knapsack, solved to optimality by HiGHS (scipy)."""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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


def solve(heads: Sequence[Choice], *, budget: float | None = None, max_error: float | None = None) -> list[int]:
    """The candidate of each head: least error within a budget, or least cost within an error; exactly one of the two is given.

    PlanError with what can be had, where nothing fits.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    errors = np.concatenate([np.asarray(head.errors, dtype=float) for head in heads])
    costs = np.concatenate([np.asarray(head.costs, dtype=float) for head in heads])
    minimised, limited, limit = (errors, costs, budget) if max_error is None else (costs, errors, max_error)
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
    with ONE_AT_A_TIME, _without_the_line():
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


ONE_AT_A_TIME = threading.Lock()  # standard output is one for all threads
LINE = b"HighsMipSolverData::transformNewIntegerFeasibleSolution"


@contextmanager
def _without_the_line() -> Iterator[None]:
    """Inside, standard output loses one line: HiGHS prints it whatever it is told, between somebody's JSON for instance.

    github.com/jump-dev/HiGHS.jl/issues/312. What else is printed meanwhile comes out afterwards.
    """
    try:
        libc = ctypes.CDLL(None)
        sys.stdout.flush()
        caught, kept = tempfile.TemporaryFile(), os.dup(1)  # noqa: SIM115
    except (OSError, TypeError, AttributeError, ValueError):  # no such library, disk or standard output
        yield
        return
    try:
        os.dup2(caught.fileno(), 1)
        yield
    finally:
        libc.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
        with caught:
            caught.seek(0)
            rest = b"".join(line for line in caught if LINE not in line)
        while rest:
            rest = rest[os.write(1, rest) :]
