"""Find the encoder of a model that one of the adapters supports."""

from __future__ import annotations

from dataclasses import replace

from torch import nn
from torch.fx import GraphModule

from bsa_vision.adapters.families import (
    sam2_encoder,
    sam2_memory_attention,
    sam_encoder,
    timm_vit,
    torchvision_vit,
    transformers_vit,
)
from bsa_vision.adapters.swap.adapter import Adapter
from bsa_vision.adapters.swap.encoder_state import FoundEncoder, check_model
from bsa_vision.adapters.swap.wrappers import Modules, wrapped
from bsa_vision.adapters.unsupported import ELSEWHERE, common_path, left_dense
from bsa_vision.errors import PlanError
from bsa_vision.plans.model_spec import ModelSpec

ADAPTERS: tuple[Adapter, ...] = (
    transformers_vit.ADAPTER,
    timm_vit.ADAPTER,
    torchvision_vit.ADAPTER,
    sam_encoder.ADAPTER,
    sam2_encoder.ADAPTER,
    sam2_memory_attention.ADAPTER,
)


def inspect(model: nn.Module, image_size: int | tuple[int, int] | None = None) -> ModelSpec:
    """What a plan needs to know of `model`: its attention layers, heads, grid and special tokens.

    image_size  pixels, an int or (height, width), for a grid other than the model's own
    """
    return at_size(find_encoder(model)[1].spec, image_size)


def at_size(spec: ModelSpec, image_size: int | tuple[int, int] | None) -> ModelSpec:
    if image_size is None:
        return spec
    pixels = (image_size, image_size) if isinstance(image_size, int) else image_size
    if (
        not isinstance(pixels, (tuple, list))
        or len(pixels) != 2
        or not all(isinstance(side, int) for side in pixels)
    ):
        raise ValueError(
            f"image_size={image_size!r}: expected pixels, an int or (height, width); give whole numbers."
        )
    if any(
        side < patch or side % patch for side, patch in zip(pixels, spec.patch_size, strict=True)
    ):
        raise ValueError(
            f"image_size={image_size}: both sides must be whole numbers of {spec.patch_size} pixel patches; resize or pad."
        )
    return replace(spec, grid=(pixels[0] // spec.patch_size[0], pixels[1] // spec.patch_size[1]))


def find_encoder(model: nn.Module) -> tuple[Adapter, FoundEncoder]:
    check_model(model)
    found = [(adapter, encoder) for adapter in ADAPTERS for encoder in adapter.find(model)]
    if not found and any(isinstance(module, GraphModule) for module in model.modules()):
        raise PlanError(
            f"this {type(model).__name__} is a graph that torch.fx traced (a feature extractor): expected the model it was made "
            "from; sparsify_ that one first, then extract."
        )
    if not found:
        modules = Modules(model)
        for name, module in modules:
            if is_supported(module) and (around := modules.unknown_wrapper(name)) is not None:
                raise wrapped(around)
        has = [
            f"{left.count} x {left.kind} ({left.reason})"
            for left in left_dense(model, (), is_supported, ELSEWHERE)
        ]
        raise PlanError(
            f"{type(model).__name__} has no supported attention layer (found: "
            f"{', '.join(has) or 'none'}). Supported: the ViTs of timm, torchvision and "
            "transformers, SAM and SAM 2, see docs/models.md; in other models call "
            "bsa_vision.sparse_attention directly."
        )
    if len(found) > 1:
        held = [
            f"{one.spec.family} ({common_path([layer.name for layer in one.spec.layers])})"
            for _, one in found
        ]
        raise PlanError(
            f"{type(model).__name__} holds {len(found)} encoders: {', '.join(held)}; each takes a plan of its own: pass the module you mean, "
            "or one after the other."
        )
    return found[0]


def is_supported(module: nn.Module) -> bool:
    return any(adapter.serves(module) for adapter in ADAPTERS)
