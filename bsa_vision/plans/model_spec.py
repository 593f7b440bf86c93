"""What a plan needs to know of a model, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bsa_vision.errors import PlanError, nearest


@dataclass(frozen=True)
class LayerSpec:
    """One attention layer: its module path, its place among its kind, and its heads.

    role "self" for attention among the tokens of one image, "mem_self" and "mem_cross" in a video model's memory attention; `key` names the
    layer in plans, whatever library holds it.
    window   patches per side of the windows that attention stays within; 0 = none, attention is global
    rel_pos  whether it adds a relative position
    attention_weights, mlp_weights   elements of the linear layers applied to every token: in attention (to padding as well), and in
             the rest of the block; what `bsa.cost` counts
    frames, pointers   where keys are remembered frames, and pointer tokens after them: how many there are once memory is full. Frames 0:
             keys are the image's own tokens
    key_weights   elements of the linear layers applied to every remembered key
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
    """A block of an encoder whose attention is no layer of the spec, because it is of another size; what `bsa.cost` counts of it.

    stride      tokens per patch of the spec's grid and side: 4 where the grid is four times as fine
    window      tokens per side of its windows, 0 = none; they are padded
    heads, head_dim    of its attention
    q_stride    its queries, and all that follows, are that much coarser per side
    qkv_weights, proj_weights, mlp_weights, shortcut_weights   elements of the linear layers: applied to every token, to every query (both with
                padding), to every query without padding, and to every token without padding
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
    """What a plan needs to know of a model.

    family       of the architecture, the same in every library that holds these weights
    grid         (h, w) patches at the model's own image size
    num_prefix_tokens, num_suffix_tokens   special tokens before and after the patches
    patch_size   (h, w) pixels
    patch_weights, image_weights   elements of the layers outside of blocks: applied to every patch (patch embedding, neck; those on a
                 coarser grid count by its share), and once per image (pooler, head)
    others       blocks that are no layers, because their attention stays dense and is of another size
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
        """What must agree between a plan and a model; depth counts blocks that are no layers as well."""
        first, depth = self.layers[0], len(self.layers) + len(self.others)
        return {
            "family": self.family,
            "depth": depth,
            "heads": first.heads,
            "head_dim": first.head_dim,
        }

    def find(self, name: str) -> LayerSpec:
        """The layer with this key or module path."""
        for layer in self.layers:
            if name in (layer.key, layer.name):
                return layer
        known = [layer.name for layer in self.layers]
        raise PlanError(
            f"no attention layer {name!r} in this model: it has {', '.join(known)}{nearest(str(name), known)}; use one of them."
        )
