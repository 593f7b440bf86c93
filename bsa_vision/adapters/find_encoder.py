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
from bsa_vision.adapters.swap.encoder_state import EncoderState, FoundEncoder, check_model
from bsa_vision.adapters.swap.method import method_of
from bsa_vision.adapters.swap.sparse_layer import SparseLayer
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
    """Return the properties of `model` that a plan depends on.

    These are its attention layers, heads, grid of patches, and prefix and suffix tokens.

    image_size  pixels, an int or (height, width); None = the model's default
    """
    return at_size(find_encoder(model)[1].spec, image_size)


def at_size(spec: ModelSpec, image_size: int | tuple[int, int] | None) -> ModelSpec:
    """Return `spec` with the grid of an image of `image_size` pixels."""
    if image_size is None:
        return spec
    pixels = (image_size, image_size) if isinstance(image_size, int) else image_size
    if (
        not isinstance(pixels, (tuple, list))
        or len(pixels) != 2
        or not all(isinstance(side, int) for side in pixels)
    ):
        raise ValueError(f"image_size={image_size!r}: expected pixels, an int or (height, width).")
    if any(
        side < patch or side % patch for side, patch in zip(pixels, spec.patch_size, strict=True)
    ):
        raise ValueError(
            f"image_size={image_size}: both sides must be multiples of the patch size "
            f"{spec.patch_size}; resize or pad."
        )
    return replace(spec, grid=(pixels[0] // spec.patch_size[0], pixels[1] // spec.patch_size[1]))


def find_encoder(model: nn.Module) -> tuple[Adapter, FoundEncoder]:
    """Return the one supported encoder in `model`, and its adapter.

    Raises PlanError if there is none, or more than one.
    """
    check_model(model)
    found = [(adapter, encoder) for adapter in ADAPTERS for encoder in adapter.find(model)]
    if not found and any(isinstance(module, GraphModule) for module in model.modules()):
        raise PlanError(
            f"this {type(model).__name__} is a graph traced by torch.fx (a feature extractor): "
            "expected the original model; sparsify_ the original first, then extract features."
        )
    if not found:
        modules = Modules(model)
        for name, module in modules:
            if is_supported(module) and (wrapper := modules.unknown_wrapper(name)) is not None:
                raise wrapped(wrapper)
        layers = [
            f"{left.count} x {left.kind} ({left.reason})"
            for left in left_dense(model, (), is_supported, ELSEWHERE)
        ]
        raise PlanError(
            f"{type(model).__name__} has no supported attention layer (found: "
            f"{', '.join(layers) or 'none'}). Supported: the ViTs of timm, torchvision and "
            "transformers, SAM and SAM 2, see docs/models.md; in other models call "
            "bsa_vision.sparse_attention directly."
        )
    if len(found) > 1:
        encoders = [
            f"{encoder.spec.family} ({common_path([layer.name for layer in encoder.spec.layers])})"
            for _, encoder in found
        ]
        raise PlanError(
            f"{type(model).__name__} holds {len(found)} encoders: {', '.join(encoders)}; each "
            "needs its own plan; pass these modules one at a time."
        )
    return found[0]


def is_supported(module: nn.Module) -> bool:
    """Return whether any adapter supports the class of this attention module."""
    return any(adapter.supports(module) for adapter in ADAPTERS)


def sparse_layers(
    encoder: EncoderState, adapter: Adapter, found: FoundEncoder
) -> list[tuple[nn.Module, SparseLayer]]:
    """Pair each attention module of an encoder with a new `SparseLayer`."""
    return [
        (
            module,
            SparseLayer(encoder, spec, adapter, method_of(adapter, module).original_of(module)),
        )
        for module, spec in zip(found.modules, found.spec.layers, strict=True)
    ]
