"""Description of a model as plain data, as far as plans need it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bsa_vision.errors import PlanError, nearest


@dataclass(frozen=True)
class LayerSpec:
    """One attention layer: its module path, its index among layers of its role, and its heads.

    role               "self": attention among the tokens of one image; "mem_self", "mem_cross":
                       memory attention of a video model. `key`, role and index, names the layer in
                       plans, whichever library implements it
    window             patches per side of the attention windows; 0 = global attention
    rel_pos            True if the layer adds a relative position
    attention_weights  elements of attention's linear layers, applied to all tokens and to padding
    mlp_weights        elements of the block's other linear layers, applied to all tokens
    frames, pointers   number of remembered frames and of pointer tokens after them, which are the
                       keys once memory is full; frames 0: the keys are the image's own tokens
    key_weights        elements of the linear layers applied to every remembered key

    `bsa.cost` counts the weights.
    """

    name: str
    index: int
    heads: int
    head_dim: int
    role: str = "self"
    window: int = 0
    rel_pos: bool = False
    attention_weights: int = 0
    mlp_weights: int = 0
    frames: int = 0
    pointers: int = 0
    key_weights: int = 0

    @property
    def key(self) -> str:
        return f"{self.role}.{self.index}"


@dataclass(frozen=True)
class OtherBlock:
    """A block whose attention is not in the spec's layers because its size differs from theirs.

    `bsa.cost` counts its FLOPs; its attention stays dense.

    stride            tokens per patch of the spec's grid, per side: 4 for a grid four times as fine
    window            tokens per side of its windows, which are padded; 0 = none
    heads, head_dim   of its attention
    q_stride          factor per side by which queries and the block's output are coarser
    qkv_weights       elements of the linear layers applied to every token, padding included
    proj_weights      the same, applied to every query, padding included
    mlp_weights       the same, applied to every query without padding
    shortcut_weights  the same, applied to every token without padding
    """

    stride: float
    window: int
    heads: int
    head_dim: int
    q_stride: int = 1
    qkv_weights: int = 0
    proj_weights: int = 0
    mlp_weights: int = 0
    shortcut_weights: int = 0


@dataclass(frozen=True)
class ModelSpec:
    """Description of a model: its layers, grid and special tokens.

    family         name of the architecture, the same in every library that loads these weights
    grid           (h, w) patches at the model's own image size
    patch_size     (h, w) pixels
    num_prefix_tokens, num_suffix_tokens  special tokens before and after the patches
    patch_weights  elements of the layers outside of blocks that are applied to every patch (patch
                   embedding, neck); a layer on a coarser grid counts in proportion
    image_weights  elements of the layers applied once per image (pooler, head)
    others         blocks whose attention stays dense because its size differs
    """

    family: str
    layers: tuple[LayerSpec, ...]
    grid: tuple[int, int]
    patch_size: tuple[int, int]
    num_prefix_tokens: int = 0
    num_suffix_tokens: int = 0
    patch_weights: float = 0
    image_weights: int = 0
    others: tuple[OtherBlock, ...] = ()

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The values that a plan and a model must share; depth counts `layers` and `others`."""
        first, depth = self.layers[0], len(self.layers) + len(self.others)
        return {
            "family": self.family,
            "depth": depth,
            "heads": first.heads,
            "head_dim": first.head_dim,
        }

    def find(self, name: str) -> LayerSpec:
        """Return the layer with this key or module path; PlanError for an unknown name."""
        for layer in self.layers:
            if name in (layer.key, layer.name):
                return layer
        known = [layer.name for layer in self.layers]
        raise PlanError(
            f"no attention layer {name!r} in this model: it has {', '.join(known)}"
            f"{nearest(str(name), known)}."
        )
