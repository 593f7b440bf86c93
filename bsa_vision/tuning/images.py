"""The images of a tuning run: whether they fit, which are kept back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bsa_vision.models.features import check_pixels, features
from bsa_vision.tuning.trial import Target

VERIFY = 1 / 3  # share of the images that is kept back, unless told


def check_images(images: Any, target: Target) -> list[Any]:
    """The images as a list; TypeError or ValueError for what can be seen of them before anything runs."""
    if target is features:
        given: list[Any] = list(check_pixels(images))
    elif not isinstance(images, Iterable) or isinstance(images, (str, bytes)):
        said = repr(images) if isinstance(images, str) else f"a {type(images).__name__}"
        raise TypeError(f"images is {said}: expected a list of what the target takes; give one.")
    else:
        given = list(images)
    pixels = [
        [x for x in tree_leaves(image) if isinstance(x, Tensor) and x.dim() == 4] for image in given
    ]
    sizes = {tuple(tensors[0].shape[-2:]) for tensors in pixels if tensors}
    if len(sizes) > 1:
        raise ValueError(
            f"images of {' and '.join(f'{h} x {w}' for h, w in sorted(sizes))} pixels: one plan is tuned for one size; resize or crop them."
        )
    return given


def split(images: list[Any], verify: float, seed: int) -> tuple[list[Any], list[Any]]:
    """Those to choose on, those kept back."""
    if len(images) < 2:
        raise ValueError(
            f"{len(images)} images: at least 2 are needed, one to choose on and one kept back to check; 24 are better."
        )
    if not 0 < verify < 1:
        raise ValueError(
            f"verify={verify!r}: expected the share of the images to keep back, between 0 and 1; give e.g. 0.33."
        )
    order = torch.randperm(
        len(images), generator=torch.Generator(device="cpu").manual_seed(seed), device="cpu"
    ).tolist()
    back = min(max(1, round(verify * len(images))), len(images) - 1)
    return [images[i] for i in sorted(order[back:])], [images[i] for i in sorted(order[:back])]
