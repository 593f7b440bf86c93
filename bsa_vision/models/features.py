"""Features of images as one tensor, for models of every library."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from bsa_vision.adapters.swap.cleanup import always

TOWERS = ("vision_model", "vision_encoder")  # of models that also take texts or clicks


def features(model: nn.Module, pixels: Tensor) -> Tensor:
    """Return the features of pixels (B, 3, h, w): (B, N, C), (B, C, h, w) or (B, h, w, C).

    The shape is the one the model returns. timm's models return features before pooling, models
    that take more than images those of their vision tower. A list of stages is flattened and
    concatenated: (B, M). Raises ValueError if the output holds no such tensor.
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
            f"pixels have shape {tuple(pixels.shape)}: expected (B, {channels}, h, w), channels "
            f"first; {how}."
        ) from error
    except TypeError as error:
        raise ValueError(
            f"{type(tower).__name__} was called with pixels only and raised TypeError: {error}. "
            "Expected a model of images; wrap it, or pass its vision tower."
        ) from None
    return _tensor(out)


def check_pixels(images: object) -> list[Tensor]:
    """Return images as a list of tensors that `features` accepts.

    Raises TypeError or ValueError for anything else; the message says how to convert it.
    """
    is_path = isinstance(images, (str, bytes, PathLike))
    if is_path or not isinstance(images, Iterable) or hasattr(images, "convert"):
        text = repr(images) if isinstance(images, (str, PathLike)) else f"a {type(images).__name__}"
        raise TypeError(
            f"images is {text}: expected a list of tensors (B, 3, h, w); {_how_to_convert(images)}."
        )
    if isinstance(images, Tensor) and images.dim() == 4:
        raise ValueError(
            f"images hold Tensor {tuple(images.shape[1:])}: expected a list of tensors "
            "(B, 3, h, w); split the batch, images.split(1)."
        )
    given = list(images)
    wrong = [image for image in given if not isinstance(image, Tensor) or image.dim() != 4]
    if wrong:
        types = {f"{type(x).__name__} {tuple(getattr(x, 'shape', ()))}" for x in wrong}
        found = ", ".join(sorted(name.removesuffix(" ()") for name in types))
        raise ValueError(
            f"images hold {found}: expected a list of tensors (B, 3, h, w); "
            f"{_how_to_convert(wrong[0])}, or pass a target that accepts them."
        )
    integers = next((image.dtype for image in given if not image.is_floating_point()), None)
    if integers is not None:
        raise ValueError(
            f"images are {integers}: expected floating-point pixels, normalised as in training; "
            "pass e.g. (image.float() / 255 - mean) / std, or a target that accepts them."
        )
    return given


def _how_to_convert(image: object) -> str:
    """Say how to make a (B, 3, h, w) tensor of an image of another type or shape."""
    if isinstance(image, (str, bytes, PathLike)):
        return (
            "read files with bsa_vision.models.image_files.read(path, (h, w)), or use "
            "`bsa-vision tune MODEL FOLDER`"
        )
    if hasattr(image, "convert"):
        return "convert Pillow's images to normalised tensors with the model's transforms"
    if isinstance(image, Mapping):
        return "pass the tensors" + "".join(f", image[{key!r}]" for key in list(image)[:1])
    if isinstance(image, (list, tuple)):
        return "pass the tensors, [image for image, label in images]"
    if isinstance(image, Tensor) and image.dim() == 3:
        last = image.shape[-1] in (1, 3, 4) and image.shape[0] not in (1, 3, 4)
        return "use image.permute(2, 0, 1)[None]" if last else "add a batch axis, image[None]"
    if hasattr(image, "__array_interface__"):
        return "convert them with torch.as_tensor, channels first"
    return "stack them"


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Run the block in eval mode and without gradients, then restore each module's mode."""
    modes = [(module, module.training) for module in model.modules()]

    def leave() -> None:
        for module, training in modes:
            module.training = training

    with always(leave), torch.no_grad():
        model.eval()
        yield


def _options(tower: Any, pixels: Tensor) -> dict[str, Any]:
    """Return the option without which transformers' models reject other image sizes."""
    if "interpolate_pos_encoding" not in inspect.signature(tower.forward).parameters:
        return {}
    size = getattr(getattr(tower, "config", None), "image_size", None)
    expected = (size, size) if isinstance(size, int) else tuple(size or ())
    return {} if expected == tuple(pixels.shape[-2:]) else {"interpolate_pos_encoding": True}


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
            f"the model returned a {type(out).__name__}: allowed are a tensor, a tuple that starts "
            "with one, a list of tensors, and an output with last_hidden_state or "
            "vision_features; wrap the model."
        )
    return out
