"""What a plan needs to know of a model, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bsa_vision.errors import PlanError


@dataclass(frozen=True)
class LayerSpec:
    """One attention layer: its module path, its place among its kind, and its heads.

    role "self" for attention among the tokens of one image; `key` names the layer in plans, whatever library holds it.
    window   patches per side of the windows that attention stays within; 0 = none, attention is global
    rel_pos  whether it adds a relative position
    attention_weights, mlp_weights   elements of the linear layers applied to every token: in attention (to padding as well), and in
             the rest of the block; what `bsa.cost` counts
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

    @property
    def key(self) -> str:
        return f"{self.role}.{self.index}"


@dataclass(frozen=True)
class ModelSpec:
    """What a plan needs to know of a model.

    family       of the architecture, the same in every library that holds these weights
    grid         (h, w) patches at the model's own image size
    start, end   special tokens before and after the patches
    patch_size   (h, w) pixels
    patch_weights, image_weights   elements of the layers outside of blocks: applied to every patch (patch embedding, neck; those on a
                 coarser grid count by its share), and once per image (pooler, head)
    """

    family: str
    layers: tuple[LayerSpec, ...]
    grid: tuple[int, int]
    patch_size: tuple[int, int]
    start: int = 0
    end: int = 0
    patch_weights: float = 0
    image_weights: int = 0

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What must agree between a plan and a model."""
        first = self.layers[0]
        return {"family": self.family, "depth": len(self.layers), "heads": first.heads, "head_dim": first.head_dim}

    def find(self, name: str) -> LayerSpec:
        """The layer with this key or module path."""
        for layer in self.layers:
            if name in (layer.key, layer.name):
                return layer
        raise PlanError(
            f"no attention layer {name!r} in this model: it has {', '.join(layer.name for layer in self.layers)}; use one of them."
        )
