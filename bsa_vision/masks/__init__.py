"""Block masks from image geometry: token layouts, mask patterns and mask generators.

A block mask is a bool tensor over pairs of token blocks, True = compute. This package depends only
on torch and the standard library.
"""

from bsa_vision.masks.drawing import draw
from bsa_vision.masks.layout import TokenLayout
from bsa_vision.masks.pattern import PATTERNS, Pattern, stack_heads
from bsa_vision.masks.patterns import (
    axial,
    dense,
    local_window,
    nearest,
    prompt_region,
    random_blocks,
    region,
    strided,
    window,
    window_is_exact,
)
from bsa_vision.masks.sam_masks import (
    generate_sam_cross_attention_mask,
    generate_sam_hierarchical_mask,
    generate_sam_hybrid_encoder_mask,
    generate_sam_image_to_prompt_mask,
    generate_sam_region_focused_mask,
)
from bsa_vision.masks.special_tokens import special
from bsa_vision.masks.vit_masks import (
    generate_vit_hybrid_mask,
    generate_vit_multiscale_mask,
    generate_vit_random_sparse_mask,
    generate_vit_spatial_locality_mask,
    generate_vit_strided_mask,
)

__all__ = [
    "PATTERNS",
    "Pattern",
    "TokenLayout",
    "axial",
    "dense",
    "draw",
    "generate_sam_cross_attention_mask",
    "generate_sam_hierarchical_mask",
    "generate_sam_hybrid_encoder_mask",
    "generate_sam_image_to_prompt_mask",
    "generate_sam_region_focused_mask",
    "generate_vit_hybrid_mask",
    "generate_vit_multiscale_mask",
    "generate_vit_random_sparse_mask",
    "generate_vit_spatial_locality_mask",
    "generate_vit_strided_mask",
    "local_window",
    "nearest",
    "prompt_region",
    "random_blocks",
    "region",
    "special",
    "stack_heads",
    "strided",
    "window",
    "window_is_exact",
]
