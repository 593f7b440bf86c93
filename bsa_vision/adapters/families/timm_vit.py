"""timm: every ViT whose blocks hold `Attention`, `AttentionRope` or `EvaAttention`: ViT, DeiT, DINOv2, DINOv3, CLIP, SigLIP, EVA, PE ...

NaFlexVit is one of them. It takes images of one size, or patches of several with their coordinates: these come with an attention mask, and
run the original.
A swapped module runs its own forward; only the call of torch's attention in it is ours (see `intercept`).
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from bsa_vision.adapters.linear_weights import block_weights, outside_weights
from bsa_vision.adapters.swap.adapter import Adapter
from bsa_vision.adapters.swap.class_swap import kind_of
from bsa_vision.adapters.swap.encoder_state import FoundEncoder
from bsa_vision.adapters.swap.sdpa_intercept import Intercepted
from bsa_vision.adapters.swap.sparse_layer import SparseLayer, check_indices
from bsa_vision.adapters.swap.wrappers import Modules, unwrap
from bsa_vision.plans.model_spec import LayerSpec, ModelSpec

NAFLEX_GRID = (16, 16)  # of a NaFlexVit without position embeddings, which has no grid of its own
FAMILIES = (
    "dinov3",
    "dinov2",
    "siglip",
    "clip",
    "eva",
)  # looked for in the name of the architecture; else "vit"


class SparseAttention(Intercepted):
    """(B, N, C) -> (B, N, C)"""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        return self._serve(
            partial(_unsupported, self._layer, x, attn_mask, is_causal),
            x,
            asked=_asked(attn_mask, is_causal),
        )


class SparseRopeAttention(Intercepted):
    """(B, N, C) -> (B, N, C), with the rotary positions of the patches."""

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        asked = _asked(attn_mask, is_causal)
        return self._serve(
            partial(_unsupported, self._layer, x, attn_mask, is_causal), x, rope=rope, asked=asked
        )


ATTENTION: dict[tuple[str, str], type[Intercepted]] = {
    ("timm.layers.attention", "Attention"): SparseAttention,
    ("timm.layers.attention", "AttentionRope"): SparseRopeAttention,
    ("timm.models.eva", "EvaAttention"): SparseRopeAttention,
}


def _asked(attn_mask: Tensor | None, is_causal: bool) -> dict[str, Any]:
    """The arguments that older versions do not take, where they say something."""
    asked: dict[str, Any] = {} if attn_mask is None else {"attn_mask": attn_mask}
    return (
        asked if is_causal is False else {**asked, "is_causal": is_causal}
    )  # torch.fx has something else for a flag


def _unsupported(
    layer: SparseLayer, x: Tensor, attn_mask: Tensor | None, is_causal: bool
) -> str | None:
    if attn_mask is not None:
        return "an attention mask was passed"
    if is_causal:
        return "causal attention was asked for"
    return layer.wrong_grid(x.shape[1])


def serves(module: nn.Module) -> bool:
    """Whether this adapter knows the class of an attention module."""
    return kind_of(module) in ATTENTION


def find(model: nn.Module) -> list[FoundEncoder]:
    """The encoders of this family in `model`: attention is `<encoder>.blocks.<index>.attn`, pixels enter `patch_embed` or `embeds` beside them."""
    modules = Modules(model)
    encoders: dict[str, list[tuple[str, nn.Module]]] = {}
    for name, module in modules:
        if serves(module) and name.endswith(".attn"):
            encoders.setdefault(".".join(name.split(".")[:-3]), []).append((name, module))
    return [
        _found(modules, root, attention)
        for root, attention in encoders.items()
        if _embeddings(modules[root]) is not None
    ]


def _embeddings(encoder: Any) -> Any:
    """Return the module that makes patches of pixels, which NaFlexVit calls otherwise; None where there is none."""
    return unwrap(getattr(encoder, "patch_embed", None) or getattr(encoder, "embeds", None))


def _found(modules: Modules, root: str, attention: list[tuple[str, nn.Module]]) -> FoundEncoder:
    check_indices(attention)
    encoder: Any = modules[root]
    blocks = [modules[name.rpartition(".")[0]] for name, _ in attention]
    layers = tuple(
        LayerSpec(
            modules.path(name), index, attn.num_heads, attn.head_dim, **block_weights(block, attn)
        )
        for index, ((name, attn), block) in enumerate(
            zip(cast(Any, attention), blocks, strict=True)
        )
    )
    embed = _embeddings(encoder)
    ratio = embed.feat_ratio(as_scalar=False)
    spec = ModelSpec(
        family=_family(encoder),
        layers=layers,
        grid=tuple(getattr(embed, "grid_size", None) or embed.pos_embed_grid_size or NAFLEX_GRID),
        patch_size=(ratio, ratio) if isinstance(ratio, int) else tuple(ratio),
        num_prefix_tokens=encoder.num_prefix_tokens,
        **outside_weights(encoder, blocks, embed),  # type: ignore[arg-type]
    )
    return FoundEncoder(spec, tuple(module for _, module in attention), embed, grid_of)


def _family(encoder: Any) -> str:
    config = getattr(encoder, "pretrained_cfg", None) or {}
    name = str(config.get("architecture", "")) or type(encoder).__name__.lower()
    return next((family for family in FAMILIES if family in name), "vit")


def grid_of(embed: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int] | None:
    """(h, w) of the patches that `embed` makes of its input."""
    pixels = args[0] if args else kwargs.get("x")
    if not isinstance(pixels, Tensor) or pixels.dim() != 4:
        return None
    size = (pixels.shape[-2], pixels.shape[-1])
    if hasattr(embed, "dynamic_feat_size"):
        return embed.dynamic_feat_size(size)
    ratio = embed.feat_ratio(as_scalar=False)
    down, across = (ratio, ratio) if isinstance(ratio, int) else ratio
    return size[0] // down, size[1] // across


def mixin_of(module: nn.Module) -> type[Intercepted]:
    return ATTENTION[kind_of(module)]


ADAPTER = Adapter(find, serves, mixin_of)
