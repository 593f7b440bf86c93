"""Tuning: choose a pattern for every head from a few images and one budget."""

from __future__ import annotations

from bsa_vision.tuning.html_report import report
from bsa_vision.tuning.tune import tune

__all__ = ["report", "tune"]
