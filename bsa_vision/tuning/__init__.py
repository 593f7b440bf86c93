"""A plan for a model, from a few images and a budget: which head uses which pattern, and what it costs, measured on images not used for choosing."""

from __future__ import annotations

from bsa_vision.tuning.html_report import report
from bsa_vision.tuning.tune import tune

__all__ = ["report", "tune"]
