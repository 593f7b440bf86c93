"""torchvision's VisionTransformer, whose attention is `nn.MultiheadAttention`.

Without gradients, the original runs a fused path that does not call torch's attention function.
So a swapped module computes the projections here. Unsupported calls (masks, attention weights,
cross attention) run the original. Like the original, a swapped module reads the weights of
`out_proj` and does not call it. peft's LoRA wraps the whole module and merges its weights into it
around every call; the module inside is swapped.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from bsa_vision.adapters.linear_weights import linear_weights, outside_weights
from bsa_vision.adapters.swap.adapter import Adapter
from bsa_vision.adapters.swap.class_swap import Swapped, kind_of
from bsa_vision.adapters.swap.encoder_state import FoundEncoder
from bsa_vision.adapters.swap.sparse_layer import SparseLayer, layer_of
from bsa_vision.adapters.swap.wrappers import Modules, unwrap, wrapped
from bsa_vision.errors import PlanError
from bsa_vision.plans.model_spec import LayerSpec, ModelSpec

ENCODER = ("torchvision.models.vision_transformer", "VisionTransformer")


class SparseMultiheadAttention(Swapped):
    """Attention of torchvision: three (B, N, C) -> ((B, N, C), attention weights or None)."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if isinstance(query, Proxy):  # in torch.fx, the original is a leaf as well
            return self._fx_leaf(query, key, value, *args, **kwargs)
        layer = layer_of(self)
        assert layer is not None
        if not layer.runs_original():
            reason = _unsupported(self, layer, query, key, value, args, kwargs)
            if reason is None:
                return _attend(self, layer, query), None
            layer.fall_back(reason)
        return super().forward(query, key, value, *args, **kwargs)


def _unsupported(
    module: Any,
    layer: SparseLayer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> str | None:
    names = ("key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal")
    options = {**dict(zip(names, args)), **kwargs}
    if options.get("key_padding_mask") is not None or options.get("attn_mask") is not None:
        return "an attention mask was passed"
    if options.get("is_causal"):
        return "causal attention was requested"
    if options.get("need_weights", True):
        return "attention weights were requested"
    if not (query is key and key is value):
        return "query, key and value are not the same tensor"
    if query.is_nested or query.dim() != 3:
        return "the query is not a (B, N, C) tensor"
    return layer.wrong_grid(query.shape[1])


def _attend(module: Any, layer: SparseLayer, x: Tensor) -> Tensor:
    qkv = F.linear(x, module.in_proj_weight, module.in_proj_bias)  # (B, N, 3 * C)
    qkv = qkv.unflatten(-1, (3, module.num_heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, D) each
    out = layer.attend(q, k, v, None, module.dropout if module.training else 0.0)
    return F.linear(out.transpose(1, 2).flatten(2), module.out_proj.weight, module.out_proj.bias)


def supports(module: nn.Module) -> bool:
    """Return whether `module` was swapped by this adapter.

    Other `nn.MultiheadAttention` is supported only inside torchvision's encoder.
    """
    return isinstance(module, SparseMultiheadAttention)


def find(model: nn.Module) -> list[FoundEncoder]:
    """Return the encoders of this family in `model`."""
    modules = Modules(model)
    return [
        _found(modules, name, encoder) for name, encoder in modules if kind_of(encoder) == ENCODER
    ]


def _found(modules: Modules, root: str, encoder: Any) -> FoundEncoder:
    layers, attentions = [], []
    prefix = ".".join(filter(None, (root, "encoder.layers")))
    names = [name for name, _ in modules[prefix].named_children()]
    blocks: list[Any] = [modules[f"{prefix}.{name}"] for name in names]
    for index, (name, block) in enumerate(zip(names, blocks, strict=True)):
        if not hasattr(block, "self_attention"):
            raise wrapped(block)
        path = modules.path(f"{prefix}.{name}.self_attention")
        path, attention = _unwrapped(path, unwrap(block.self_attention))
        weights = 4 * attention.embed_dim**2  # of the four projections, which may be wrapped
        options = dict(attention_weights=weights, mlp_weights=linear_weights(block.mlp))
        layers.append(LayerSpec(path, index, attention.num_heads, attention.head_dim, **options))
        attentions.append(attention)
    side, patch = encoder.image_size // encoder.patch_size, encoder.patch_size
    embed = unwrap(encoder.conv_proj)
    outside: dict[str, Any] = outside_weights(encoder, blocks, embed)
    spec = ModelSpec(
        "vit", tuple(layers), (side, side), (patch, patch), num_prefix_tokens=1, **outside
    )
    return FoundEncoder(spec, tuple(attentions), embed)


def _unwrapped(path: str, module: Any) -> tuple[str, Any]:
    """Return the path and module of the `nn.MultiheadAttention` at `path` or in its peft wrapper.

    Raises PlanError if there is none, or if its forward or settings are not torchvision's.
    """
    while not isinstance(module, nn.MultiheadAttention) and hasattr(module, "base_layer"):
        path, module = f"{path}.base_layer", module.base_layer
    kind = type(module)
    if not isinstance(module, nn.MultiheadAttention):
        raise PlanError(
            f"{path} is a {kind.__module__}.{kind.__name__}: expected torch's "
            "nn.MultiheadAttention, alone or in peft's LoRA; call sparsify_ before wrapping, or "
            "unwrap it."
        )
    if kind.forward is not nn.MultiheadAttention.forward and not isinstance(module, Swapped):
        raise PlanError(
            f"{path} is a {kind.__module__}.{kind.__name__} with a custom forward, which a swap "
            "would skip: expected torch's nn.MultiheadAttention; call bsa_vision.sparse_attention "
            "from that forward."
        )
    if (
        not module.batch_first
        or not module._qkv_same_embed_dim
        or module.bias_k is not None
        or module.add_zero_attn
    ):
        raise PlanError(
            f"{path} has other options than in torchvision: expected batch_first=True, the same "
            "width for queries, keys and values, no bias_k and no add_zero_attn; call "
            "bsa_vision.sparse_attention for other models."
        )
    return path, module


def mixin_of(module: nn.Module) -> type[Swapped]:
    return SparseMultiheadAttention


ADAPTER = Adapter(find, supports, mixin_of)
