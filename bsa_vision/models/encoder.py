"""Image encoders to train and to read: ViT and Segment Anything, optionally with sparse heads.

    encoder = create_encoder(**SAM["vit_b"], patterns="local_window")
    features = encoder(pixels)  # (B, 256, h, w)

Parameters have segment_anything's names and shapes, so `load_checkpoint("sam_vit_b_01ec64.pth")`
loads its weights. The blocks are in `bsa_vision.models.blocks`.

Architecture: ViT, arXiv 2010.11929; windows, global layers and decomposed relative position,
arXiv 2203.16527 and 2304.02643.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bsa_vision.adapters import dense_plan, sparsify_, uniform_plan
from bsa_vision.attention.carried_masks import plain_sizes
from bsa_vision.errors import PlanError
from bsa_vision.models.blocks import (
    Block,
    Grid,
    PatchEmbed,
    Rotation,
    neck,
    resize_positions,
    rotary_angles,
)
from bsa_vision.models.checkpoint import fitting_state
from bsa_vision.models.encoder_config import EncoderConfig
from bsa_vision.plans.plan import PatternLike, SparsityPlan

# The published sizes of Segment Anything: `create_encoder(**SAM["vit_b"])`.
SAM: dict[str, dict[str, Any]] = {
    "vit_b": {"depth": 12, "dim": 768, "heads": 12, "global_attn_indexes": (2, 5, 8, 11)},
    "vit_l": {"depth": 24, "dim": 1024, "heads": 16, "global_attn_indexes": (5, 11, 17, 23)},
    "vit_h": {"depth": 32, "dim": 1280, "heads": 16, "global_attn_indexes": (7, 15, 23, 31)},
}


def create_encoder(
    depth: int,
    dim: int,
    heads: int,
    global_attn_indexes: Iterable[int] | None = None,
    window_size: int = 14,
    *,
    rel_pos: bool = True,
    rope: bool | tuple[float, float] = False,
    patterns: SparsityPlan | str | PatternLike | Mapping[int, Any] | None = None,
    image_size: int | Grid = 1024,
    patch_size: int = 16,
    in_channels: int = 3,
    out_channels: int | None = 256,
    mlp_ratio: float = 4.0,
    num_special: int = 0,
    gradient_checkpointing: bool = False,
) -> ImageEncoder:
    """Create an image encoder with random weights.

    global_attn_indexes  layers that attend to the whole image; the others attend within
                         windows; None = all layers
    window_size          patches per side of a window; padding of the last windows takes
                         part in attention, as in SAM
    rel_pos              use decomposed relative position in every layer
    rope                 use rotary positions of the patches in every layer instead of
                         `pos_embed`; True = DINOv3's periods, or (shortest, longest)
                         period in coordinates from -1 to 1; not with windows or rel_pos
    patterns             patterns of the heads, see below; None = all heads dense
    image_size           int or (height, width) in pixels, for `pos_embed`, which is
                         interpolated for other sizes
    out_channels         channels of SAM's neck; None = no neck
    num_special          learned tokens before the patches (class token, registers); not
                         with windows or rel_pos
    gradient_checkpointing
                         recompute each block in backward: less memory, more time; can be
                         changed later by `encoder.gradient_checkpointing`

    `patterns` is a SparsityPlan, one pattern for all heads of all global layers, or {layer: pattern
    or list of one pattern per head}. A pattern is a name in `masks.PATTERNS`, a `masks.Pattern`, or
    a function layout -> (R, C) bool. The heads are made sparse by `sparsify_`, so `describe`,
    `dense` and `restore_` work on the encoder.

    Raises ValueError for sizes that do not fit together, and PlanError for patterns that do not
    fit the encoder.
    """
    config = EncoderConfig(
        depth,
        dim,
        heads,
        global_attn_indexes,
        window_size,
        rel_pos,
        rope,
        image_size,
        patch_size,
        in_channels,
        out_channels,
        mlp_ratio,
        num_special,
        gradient_checkpointing,
    )
    encoder = ImageEncoder(config)
    if patterns is None:
        return encoder
    return sparsify_(encoder, _plan(encoder, patterns, config.heads))


def _plan(encoder: ImageEncoder, patterns: Any, heads: int) -> SparsityPlan:
    if isinstance(patterns, SparsityPlan):
        return patterns
    if not isinstance(patterns, Mapping):
        return uniform_plan(encoder, patterns)
    plan = dense_plan(encoder)
    for layer, chosen in patterns.items():
        per_head = chosen if isinstance(chosen, (list, tuple)) else [chosen] * heads
        if len(per_head) != heads:
            raise PlanError(
                f"patterns[{layer}] has {len(per_head)} entries, the encoder {heads} heads: give "
                "one pattern per head, or one for all."
            )
        for head, pattern in enumerate(per_head):
            plan = plan.replace(layers=layer, heads=head, pattern=pattern)
    return plan


class ImageEncoder(nn.Module):
    """Patch embedding, positions, blocks and neck; see `create_encoder`."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        dim, num_special = config.dim, config.num_special
        self.img_size, self.patch_size = config.pixels, config.patch_size
        self.rope, self.num_special = config.periods, num_special
        self.gradient_checkpointing = config.gradient_checkpointing
        self.family = "sam" if config.rel_pos else "vit"  # its name in plans
        self.patch_embed = PatchEmbed(config.in_channels, dim, config.patch_size)
        positions = nn.Parameter(torch.zeros(1, *config.grid, dim))
        self.pos_embed = None if self.rope else positions
        special = nn.Parameter(torch.zeros(1, num_special, dim))
        self.special_tokens = special if num_special else None
        windows = [
            0 if index in config.global_layers else config.window_size
            for index in range(config.depth)
        ]
        self.blocks = nn.ModuleList(
            Block(dim, config.heads, config.mlp_ratio, size, config.grid, config.rel_pos)
            for size in windows
        )
        self.neck = None if config.out_channels is None else neck(dim, config.out_channels)
        self.apply(_initialise)
        for parameter in (self.pos_embed, self.special_tokens):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, pixels: Tensor, special: Tensor | None = None) -> Tensor:
        """Encode images: (B, channels, H, W) -> (B, out_channels, h, w).

        special  (B, num_special, dim), added to the learned special tokens, for
                 inputs such as an encoded click

        Without a neck, the result is (B, num_special + h * w, dim), special tokens first. H and W
        may be any multiples of the patch size: position embeddings and tables are interpolated.
        """
        sides = pixels.shape[-2:]
        if pixels.dim() != 4 or any(side < 1 or side % self.patch_size for side in sides):
            raise ValueError(
                f"pixels have shape {tuple(pixels.shape)}: expected (B, channels, H, W) with H and "
                f"W multiples of the patch size, {self.patch_size} pixels; resize or pad them."
            )
        x = self.patch_embed(pixels)  # (B, h, w, C)
        height, width = plain_sizes(x.shape[1], x.shape[2])
        grid = (height, width)
        if self.pos_embed is not None:
            x = x + resize_positions(self.pos_embed, grid)
        x = self._with_special(x.flatten(1, 2), special)  # (B, N, C)
        rotation = self._rotation(grid, x.device)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, grid, rotation, use_reentrant=False)
            else:
                x = block(x, grid, rotation)
        if self.neck is None:
            return x
        return self.neck(x[:, self.num_special :].transpose(1, 2).unflatten(2, grid))

    def _with_special(self, patches: Tensor, special: Tensor | None) -> Tensor:
        """Prepend the special tokens: (B, h * w, C) -> (B, num_special + h * w, C)."""
        wanted = (len(patches), self.num_special, patches.shape[-1])
        if special is not None and (self.special_tokens is None or tuple(special.shape) != wanted):
            raise ValueError(
                f"special has shape {tuple(special.shape)}: expected {wanted}, (images, "
                "num_special, dim), and an encoder created with num_special >= 1."
            )
        if self.special_tokens is None:
            return patches
        tokens = self.special_tokens.expand(len(patches), -1, -1)
        return torch.cat([tokens if special is None else tokens + special, patches], dim=1)

    def _rotation(self, grid: Grid, device: torch.device) -> Rotation | None:
        """Compute the rotation that all layers share; too cheap to be cached."""
        if self.rope is None:
            return None
        attention: Any = self.blocks[0].attn
        head_dim = attention.qkv.in_features // attention.num_heads
        return rotary_angles(grid, head_dim, self.rope, self.num_special, device)

    def load_checkpoint(
        self, source: str | Path | Mapping[str, Tensor], resize: bool = False
    ) -> ImageEncoder:
        """Load weights of segment_anything or of this encoder, and return the encoder.

        source  .pth file (read with weights_only=True), .safetensors file, or state
                dict; of a whole SAM, only the `image_encoder.` part is used
        resize  if the checkpoint is for another image size, interpolate what depends
                on it, and warn: the position embedding bicubically and antialiased, as
                timm's `resample_abs_pos_embed`, relative tables linearly, as
                segment_anything's `get_rel_pos`

        Raises ValueError unless names and shapes of all parameters agree; the encoder is then
        unchanged. Checkpoints do not hold rotary periods: create the encoder with those it was
        trained with.
        """
        self.load_state_dict(fitting_state(source, self.state_dict(), resize))
        return self


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


__all__ = ["SAM", "ImageEncoder", "create_encoder"]
