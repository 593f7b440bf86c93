"""The commands of `bsa-vision` that are no benchmarks. Needs typer and rich."""

from __future__ import annotations

from bsa_vision.cli.show import show_comparison, show_doctor, show_masks, show_model
from bsa_vision.cli.tune import tune_model

__all__ = ["show_comparison", "show_doctor", "show_masks", "show_model", "tune_model"]
