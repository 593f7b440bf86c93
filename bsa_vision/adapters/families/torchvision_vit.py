"""torchvision's VisionTransformer, whose attention is `nn.MultiheadAttention`: without gradients that calls no attention of torch's at all.

A swapped module projects with its own weights and attends here; what it does not do (masks, weights, cross attention) the original does.
Like the original it reads the weights of `out_proj` and does not call that module. peft's LoRA wraps the whole module, and merges its weights
into it around every call: the module inside is swapped.
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
    """(B, N, C) three times over -> ((B, N, C), attention weights or None)."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if isinstance(query, Proxy):  # torch.fx, for which the original is a leaf as well
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
    asked = {**dict(zip(names, args)), **kwargs}
    if asked.get("key_padding_mask") is not None or asked.get("attn_mask") is not None:
        return "an attention mask was passed"
    if asked.get("is_causal"):
        return "causal attention was asked for"
    if asked.get("need_weights", True):
        return "attention weights were asked for"
    if not (query is key and key is value):
        return "keys are not the queries' own"
    if query.is_nested or query.dim() != 3:
        return "queries are no (B, N, C) tensor"
    return layer.wrong_grid(query.shape[1])


def _attend(module: Any, layer: SparseLayer, x: Tensor) -> Tensor:
    qkv = F.linear(x, module.in_proj_weight, module.in_proj_bias)  # (B, N, 3 * C)
    q, k, v = (
        qkv.unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    )  # (B, H, N, D) each
    out = layer.attend(q, k, v, None, module.dropout if module.training else 0.0)
    return F.linear(out.transpose(1, 2).flatten(2), module.out_proj.weight, module.out_proj.bias)


def serves(module: nn.Module) -> bool:
    """Whether this is a swapped module of this adapter; others are served as part of their encoder only."""
    return isinstance(module, SparseMultiheadAttention)


def find(model: nn.Module) -> list[FoundEncoder]:
    """The encoders of this family in `model`: `nn.MultiheadAttention` is served inside torchvision's ViT and nowhere else."""
    modules = Modules(model)
    return [
        _found(modules, name, encoder) for name, encoder in modules if kind_of(encoder) == ENCODER
    ]


def _found(modules: Modules, root: str, encoder: Any) -> FoundEncoder:
    layers, attentions = [], []
    inside = ".".join(filter(None, (root, "encoder.layers")))
    names = [name for name, _ in modules[inside].named_children()]
    blocks: list[Any] = [modules[f"{inside}.{name}"] for name in names]
    for index, (name, block) in enumerate(zip(names, blocks, strict=True)):
        if not hasattr(block, "self_attention"):
            raise wrapped(block)
        path = modules.path(f"{inside}.{name}.self_attention")
        path, attention = _unwrapped(path, unwrap(block.self_attention))
        weights = 4 * attention.embed_dim**2  # of the projections in and out, whatever holds them
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
    """Return the `nn.MultiheadAttention` at `path`, or inside peft's wrapper there, and its path; PlanError where there is none."""
    while not isinstance(module, nn.MultiheadAttention) and hasattr(module, "base_layer"):
        path, module = f"{path}.base_layer", module.base_layer
    kind = type(module)
    if not isinstance(module, nn.MultiheadAttention):
        raise PlanError(
            f"{path} is a {kind.__module__}.{kind.__name__}: expected torch's nn.MultiheadAttention, itself or inside peft's LoRA; "
            "sparsify_ the model before it is wrapped, or unwrap it."
        )
    if kind.forward is not nn.MultiheadAttention.forward and not isinstance(module, Swapped):
        raise PlanError(
            f"{path} is a {kind.__module__}.{kind.__name__} with a forward of its own, which a swap would leave out: expected "
            "torch's nn.MultiheadAttention; call bsa_vision.sparse_attention from that forward."
        )
    if (
        not module.batch_first
        or not module._qkv_same_embed_dim
        or module.bias_k is not None
        or module.add_zero_attn
    ):
        raise PlanError(
            f"{path} is not as torchvision makes it: expected batch_first=True, one width of queries, keys and values, and neither "
            "bias_k nor add_zero_attn; call bsa_vision.sparse_attention for other models."
        )
    return path, module


def mixin_of(module: nn.Module) -> type[Swapped]:
    return SparseMultiheadAttention


ADAPTER = Adapter(find, serves, mixin_of)
