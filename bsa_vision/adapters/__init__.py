"""Sparse heads inside the models people load: find the attention layers, swap them for a plan, put them back."""

from bsa_vision.adapters.api import (
    context,
    dense,
    dense_plan,
    describe,
    inspect,
    observe,
    restore_,
    sparsify_,
    uniform_plan,
)
from bsa_vision.adapters.describe import LayerReport, ModelReport
from bsa_vision.adapters.swap.encoder_state import Observation
from bsa_vision.adapters.unsupported import LeftDense

__all__ = [
    "LayerReport",
    "LeftDense",
    "ModelReport",
    "Observation",
    "context",
    "dense",
    "dense_plan",
    "describe",
    "inspect",
    "observe",
    "restore_",
    "sparsify_",
    "uniform_plan",
]
