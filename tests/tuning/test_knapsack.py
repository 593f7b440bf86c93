"""The solver against enumeration."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bsa_vision as bsa
from bsa_vision.tuning.knapsack import Choice, solve

choices = st.lists(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), min_size=1, max_size=4),
    min_size=1,
    max_size=4,
)


class TestSolver:
    @settings(max_examples=80, deadline=None)
    @given(choices, st.integers(0, 60), st.sampled_from(["budget", "max_error"]))
    def test_equals_enumeration(self, heads, limit, kind):
        problem = [Choice([e for e, _ in head], [c for _, c in head]) for head in heads]
        every = [
            (
                sum(head.errors[pick] for head, pick in zip(problem, picks)),
                sum(head.costs[pick] for head, pick in zip(problem, picks)),
            )
            for picks in itertools.product(*(range(len(head)) for head in heads))
        ]
        if kind == "max_error":
            fitting = [(cost, error) for error, cost in every if error <= limit]
        else:
            fitting = [(error, cost) for error, cost in every if cost <= limit]
        if not fitting:
            with pytest.raises(bsa.PlanError, match=r"the smallest possible (cost|error) is \d"):
                solve(problem, **{kind: limit})
            return
        picks = solve(problem, **{kind: limit})
        error = sum(head.errors[pick] for head, pick in zip(problem, picks, strict=True))
        cost = sum(head.costs[pick] for head, pick in zip(problem, picks, strict=True))
        assert (cost if kind == "budget" else error) <= limit
        assert (error if kind == "budget" else cost) == pytest.approx(min(fitting)[0], abs=1e-6)
