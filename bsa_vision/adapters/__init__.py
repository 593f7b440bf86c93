"""Sparse heads in existing models: find the attention layers, swap them, restore them."""

from bsa_vision.adapters.describe import LayerReport, ModelReport, describe
from bsa_vision.adapters.find_encoder import inspect
from bsa_vision.adapters.restore import dense, restore_
from bsa_vision.adapters.sparsify import (
    context,
    dense_plan,
    observe,
    sparsify_,
    uniform_plan,
)
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
