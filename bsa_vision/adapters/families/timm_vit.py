"""timm's ViTs whose blocks have an `Attention`, `AttentionRope` or `EvaAttention`.

Among them are ViT, DeiT, DINOv2, DINOv3, CLIP, SigLIP, EVA, PE and NaFlexVit. NaFlexVit takes
images of one size, or patches of several images with their coordinates; patches come with an
attention mask, and run the original attention. A swapped module runs its original forward, with
only the call of torch's attention replaced (see `sdpa_intercept`).
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

NAFLEX_GRID = (16, 16)  # for a NaFlexVit without position embeddings, which has no default grid
# Searched in the name of the architecture; other models are "vit".
FAMILIES = ("dinov3", "dinov2", "siglip", "clip", "eva")


class SparseAttention(Intercepted):
    """Attention of ViTs: (B, N, C) -> (B, N, C)."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        unsupported = partial(_unsupported, self._layer, x, attn_mask, is_causal)
        mask_kwargs = _mask_kwargs(attn_mask, is_causal)
        return self._run_forward(unsupported, x, unsupported_kwargs=mask_kwargs)


class SparseRopeAttention(Intercepted):
    """Attention with rotary positions of the patches: (B, N, C) -> (B, N, C)."""

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        unsupported = partial(_unsupported, self._layer, x, attn_mask, is_causal)
        mask_kwargs = _mask_kwargs(attn_mask, is_causal)
        return self._run_forward(unsupported, x, rope=rope, unsupported_kwargs=mask_kwargs)


ATTENTION: dict[tuple[str, str], type[Intercepted]] = {
    ("timm.layers.attention", "Attention"): SparseAttention,
    ("timm.layers.attention", "AttentionRope"): SparseRopeAttention,
    ("timm.models.eva", "EvaAttention"): SparseRopeAttention,
}


def _mask_kwargs(attn_mask: Tensor | None, is_causal: bool) -> dict[str, Any]:
    """Return the mask arguments that are not at their defaults; older versions do not take them."""
    kwargs: dict[str, Any] = {} if attn_mask is None else {"attn_mask": attn_mask}
    if is_causal is not False:  # torch.fx may pass a proxy, which has no truth value
        kwargs["is_causal"] = is_causal
    return kwargs


def _unsupported(
    layer: SparseLayer, x: Tensor, attn_mask: Tensor | None, is_causal: bool
) -> str | None:
    if attn_mask is not None:
        return "an attention mask was passed"
    if is_causal:
        return "causal attention was requested"
    return layer.wrong_grid(x.shape[1])


def supports(module: nn.Module) -> bool:
    """Return whether this adapter supports the class of an attention module."""
    return kind_of(module) in ATTENTION


def find(model: nn.Module) -> list[FoundEncoder]:
    """Return the encoders of this family in `model`.

    Attention is `<encoder>.blocks.<index>.attn`, and pixels enter `<encoder>.patch_embed` or
    `<encoder>.embeds`.
    """
    modules = Modules(model)
    encoders: dict[str, list[tuple[str, nn.Module]]] = {}
    for name, module in modules:
        if supports(module) and name.endswith(".attn"):
            encoders.setdefault(".".join(name.split(".")[:-3]), []).append((name, module))
    return [
        _found(modules, root, attention)
        for root, attention in encoders.items()
        if _embeddings(modules[root]) is not None
    ]


def _embeddings(encoder: Any) -> Any:
    """Return the module that makes patches from pixels (NaFlexVit: `embeds`), None if missing."""
    return unwrap(getattr(encoder, "patch_embed", None) or getattr(encoder, "embeds", None))


def _found(modules: Modules, root: str, attention: list[tuple[str, nn.Module]]) -> FoundEncoder:
    check_indices(attention)
    encoder: Any = modules[root]
    blocks = [modules[name.rpartition(".")[0]] for name, _ in attention]
    layers = []
    for index, ((name, module), block) in enumerate(zip(attention, blocks, strict=True)):
        attn, weights = cast(Any, module), block_weights(block, module)
        path = modules.path(name)
        layers.append(LayerSpec(path, index, attn.num_heads, attn.head_dim, **weights))
    embed = _embeddings(encoder)
    ratio = embed.feat_ratio(as_scalar=False)
    spec = ModelSpec(
        family=_family(encoder),
        layers=tuple(layers),
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
    """Return the grid (h, w) of the patches that `embed` makes from its input, None = unknown."""
    pixels = args[0] if args else kwargs.get("x")
    if not isinstance(pixels, Tensor) or pixels.dim() != 4:
        return None
    size = (pixels.shape[-2], pixels.shape[-1])
    if hasattr(embed, "dynamic_feat_size"):
        return embed.dynamic_feat_size(size)
    ratio = embed.feat_ratio(as_scalar=False)
    patch_height, patch_width = (ratio, ratio) if isinstance(ratio, int) else ratio
    return size[0] // patch_height, size[1] // patch_width


def mixin_of(module: nn.Module) -> type[Intercepted]:
    return ATTENTION[kind_of(module)]


ADAPTER = Adapter(find, supports, mixin_of)
