"""bsa-vision: vision transformers with block-sparse heads."""

from pathlib import Path as _Path

import masks as _masks

if getattr(_masks, "__distribution__", None) != "bsa-vision":
    raise ImportError(
        f"the package `masks` found at {getattr(_masks, '__file__', None) or list(_masks.__path__)} is not the one that belongs to "
        f"bsa_vision, which lies beside {_Path(__file__).parent}: bsa_vision cannot work with another; rename or uninstall that "
        "package, or put bsa-vision's folder earlier on sys.path."
    )

import masks
from bsa_vision.attention import (
    block_sparse_attn_func,
    block_streaming_attn_func,
    sparse_attention,
    token_streaming_attn_func,
)
from bsa_vision.errors import BackendUnavailable, PlanError
from bsa_vision.head_masks import HeadMasks
from bsa_vision.rel_pos import RelPos
