"""What a model makes of pixels, as one tensor, whichever library it is from."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from bsa_vision.adapters.swap.undo import always

TOWERS = ("vision_model", "vision_encoder")  # of models that want texts or clicks as well


def features(model: nn.Module, pixels: Tensor) -> Tensor:
    """The features of `model` for pixels (B, 3, h, w): (B, N, C), (B, C, h, w) or (B, h, w, C), as it returns them.

    Of timm's models before pooling, of models that take more than images those of the vision tower, of a list of stages all of them, flat:
    (B, M). ValueError where what comes back holds no tensor to take.
    """
    tower: Any = next((getattr(model, name) for name in TOWERS if hasattr(model, name)), model)
    forward = getattr(tower, "forward_features", tower)
    try:
        out = forward(pixels, **_options(tower, pixels))
    except (RuntimeError, ValueError, AssertionError) as error:
        channels = next(
            (module.in_channels for module in tower.modules() if isinstance(module, nn.Conv2d)),
            None,
        )
        if channels is None or pixels.dim() != 4 or pixels.shape[1] == channels:
            raise
        how = "use image.permute(0, 3, 1, 2)" if pixels.shape[-1] == channels else "convert them"
        raise ValueError(
            f"pixels have shape {tuple(pixels.shape)}: expected (B, {channels}, h, w), channels first; {how}."
        ) from error
    except TypeError as error:
        raise ValueError(
            f"{type(tower).__name__} was given pixels alone and said: {error}. Expected is a model of images; wrap it, or pass its tower."
        ) from None
    return _tensor(out)


def check_pixels(images: object) -> list[Tensor]:
    """The images as a list, each of them what `features` takes; TypeError or ValueError says what else they are, and what to do."""
    if (
        isinstance(images, (str, bytes, PathLike))
        or not isinstance(images, Iterable)
        or hasattr(images, "convert")
    ):
        said = repr(images) if isinstance(images, (str, PathLike)) else f"a {type(images).__name__}"
        raise TypeError(
            f"images is {said}: expected a list of tensors (B, 3, h, w); {_how_to_read(images)}."
        )
    if isinstance(images, Tensor) and images.dim() == 4:
        raise ValueError(
            f"images hold Tensor {tuple(images.shape[1:])}: expected a list of tensors (B, 3, h, w); split the batch, "
            "images.split(1)."
        )
    given = list(images)
    wrong = [image for image in given if not isinstance(image, Tensor) or image.dim() != 4]
    if wrong:
        found = sorted(
            {
                f"{type(image).__name__} {tuple(getattr(image, 'shape', ()))}".removesuffix(" ()")
                for image in wrong
            }
        )
        raise ValueError(
            f"images hold {', '.join(found)}: expected a list of tensors (B, 3, h, w); {_how_to_read(wrong[0])}, or pass a "
            "target that takes yours."
        )
    integers = next((image.dtype for image in given if not image.is_floating_point()), None)
    if integers is not None:
        raise ValueError(
            f"images are {integers}: expected floating point pixels, normalised as the model was trained; give e.g. "
            "(image.float() / 255 - mean) / std, or a target that takes yours."
        )
    return given


def _how_to_read(image: object) -> str:
    """What to do with what is no (B, 3, h, w) tensor."""
    if isinstance(image, (str, bytes, PathLike)):
        return "read files with bsa_vision.models.image_files.read(path, (h, w)), as `bsa-vision tune MODEL FOLDER` does"
    if hasattr(image, "convert"):
        return "make normalised tensors of Pillow's images, as the transforms of the model or its processor do"
    if isinstance(image, Mapping):
        return f"take the tensor out{', image[' + repr(next(iter(image))) + ']' if image else ''}"
    if isinstance(image, (list, tuple)):
        return "take the tensors out, [image for image, label in images]"
    if isinstance(image, Tensor) and image.dim() == 3:
        last = image.shape[-1] in (1, 3, 4) and image.shape[0] not in (1, 3, 4)
        return (
            "use image.permute(2, 0, 1)[None]"
            if last
            else "give each an axis of images, image[None]"
        )
    if hasattr(image, "__array_interface__"):
        return "convert them with torch.as_tensor, channels first"
    return "stack them so"


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Run the block in eval mode without gradients; afterwards every module has its own mode again."""
    modes = [(module, module.training) for module in model.modules()]

    def leave() -> None:
        for module, training in modes:
            module.training = training

    with always(leave), torch.no_grad():
        model.eval()
        yield


def _options(tower: Any, pixels: Tensor) -> dict[str, Any]:
    """transformers' models take other sizes than their own only when they are told."""
    if "interpolate_pos_encoding" not in inspect.signature(tower.forward).parameters:
        return {}
    size = getattr(getattr(tower, "config", None), "image_size", None)
    own = (size, size) if isinstance(size, int) else tuple(size or ())
    return {} if own == tuple(pixels.shape[-2:]) else {"interpolate_pos_encoding": True}


def _tensor(out: Any) -> Tensor:
    if isinstance(out, Mapping) and "vision_features" in out:  # sam2
        out = out["vision_features"]
    if hasattr(out, "last_hidden_state"):
        out = out.last_hidden_state
    if isinstance(out, tuple) and out:
        out = out[0]
    if isinstance(out, list) and out and all(isinstance(stage, Tensor) for stage in out):
        return torch.cat([stage.flatten(1) for stage in out], dim=1)
    if not isinstance(out, Tensor):
        raise ValueError(
            f"the model returned a {type(out).__name__}: allowed are a tensor, a tuple that starts with one, a list of them, and an output "
            "with last_hidden_state or vision_features; wrap the model."
        )
    return out
