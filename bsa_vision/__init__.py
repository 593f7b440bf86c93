"""bsa-vision: vision transformers with block-sparse heads.

    import bsa_vision as bsa

    plan = bsa.uniform_plan(model, "local_window", radius=8, dense_heads=4)
    bsa.sparsify_(model, plan)

Terms are explained in docs/concepts.md. Block masks are in `bsa_vision.masks`; use
`bsa_vision.sparse_attention` for tensors.
"""

from importlib.metadata import PackageNotFoundError as _PackageNotFoundError
from importlib.metadata import version as _version

from bsa_vision import masks
from bsa_vision.adapters import (
    LayerReport,
    LeftDense,
    ModelReport,
    Observation,
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
from bsa_vision.attention.check import CheckReport, Finding, check
from bsa_vision.attention.functional import (
    block_sparse_attn_func,
    block_streaming_attn_func,
    sparse_attention,
    token_streaming_attn_func,
)
from bsa_vision.attention.head_masks import HeadMasks
from bsa_vision.attention.packing import Packed, pack, pack_head_masks, unpack
from bsa_vision.attention.rel_pos import RelPos
from bsa_vision.compare import compare
from bsa_vision.errors import BackendUnavailable, PlanError
from bsa_vision.measure.latency import Latency, latency
from bsa_vision.models.encoder import create_encoder
from bsa_vision.plans.flops import LayerCost, ModelCost, cost
from bsa_vision.plans.model_spec import LayerSpec, ModelSpec
from bsa_vision.plans.plan import SparsityPlan
from bsa_vision.plans.prompts import Prompts
from bsa_vision.plans.prune import prune
from bsa_vision.tuning import report, tune

try:
    __version__ = _version("bsa-vision")
except _PackageNotFoundError:  # run from a clone that was never installed
    __version__ = "0+unknown"

__all__ = [
    "BackendUnavailable",
    "CheckReport",
    "Finding",
    "HeadMasks",
    "Latency",
    "LayerCost",
    "LayerReport",
    "LayerSpec",
    "LeftDense",
    "ModelCost",
    "ModelReport",
    "ModelSpec",
    "Observation",
    "Packed",
    "PlanError",
    "Prompts",
    "RelPos",
    "SparsityPlan",
    "block_sparse_attn_func",
    "block_streaming_attn_func",
    "check",
    "compare",
    "context",
    "cost",
    "create_encoder",
    "dense",
    "dense_plan",
    "describe",
    "inspect",
    "latency",
    "masks",
    "observe",
    "pack",
    "pack_head_masks",
    "prune",
    "report",
    "restore_",
    "sparse_attention",
    "sparsify_",
    "token_streaming_attn_func",
    "tune",
    "uniform_plan",
    "unpack",
]
