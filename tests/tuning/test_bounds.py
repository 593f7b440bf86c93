"""Bounds on the errors of new images."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from bsa_vision.tuning.bounds import mean_at_most, share_above


class TestCertificate:
    @given(st.integers(1, 400), st.floats(0, 1), st.floats(0.5, 0.999))
    def test_share_is_where_so_few_become_unlikely(self, count, part, confidence):
        """At the bound, `above` images or fewer have a probability of 1 - confidence."""
        above = round(part * count)
        bound = share_above(count, above, confidence)
        if above == count:
            assert bound == 1
        else:
            assert binom.cdf(above, count, bound) == pytest.approx(1 - confidence, abs=1e-6)

    def test_known_figures(self):
        assert share_above(59, 0) == pytest.approx(0.0495, abs=1e-4)
        assert share_above(299, 0) == pytest.approx(0.01, abs=1e-4)

    def test_means_are_below_their_bound(self):
        """The bound holds in at least 95 % of random draws of a few errors; the mean does not."""
        generator = torch.Generator().manual_seed(0)
        draws = 0.1 * torch.exp(0.3 * torch.randn(2000, 8, generator=generator))
        true = 0.1 * torch.exp(torch.tensor(0.3**2 / 2)).item()
        within = sum(mean_at_most(errors) >= true for errors in draws.tolist()) / 2000
        assert within > 0.95
        assert (draws.mean(1) >= true).float().mean() < 0.6

    def test_one_image(self):
        assert mean_at_most([0.25]) == float("inf")
