"""Check the images of a tuning run and split them into calibration and held-out images."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bsa_vision.models.features import check_pixels, features
from bsa_vision.tuning.trial import Target

VERIFY = 1 / 3  # default share of held-out images


def check_images(images: Any, target: Target) -> list[Any]:
    """Return the images as a list; raise TypeError or ValueError if `target` cannot take them.

    Only the images are checked. No model is run.
    """
    if target is features:
        given: list[Any] = list(check_pixels(images))
    elif not isinstance(images, Iterable) or isinstance(images, (str, bytes)):
        text = repr(images) if isinstance(images, str) else f"a {type(images).__name__}"
        raise TypeError(f"images is {text}: expected a list of inputs of target.")
    else:
        given = list(images)
    pixels = [
        [x for x in tree_leaves(image) if isinstance(x, Tensor) and x.dim() == 4] for image in given
    ]
    sizes = {tuple(tensors[0].shape[-2:]) for tensors in pixels if tensors}
    if len(sizes) > 1:
        text = " and ".join(f"{h} x {w}" for h, w in sorted(sizes))
        raise ValueError(
            f"images of {text} pixels: a plan is tuned for one image size; resize or crop them."
        )
    return given


def split(images: list[Any], verify: float, seed: int) -> tuple[list[Any], list[Any]]:
    """Return the calibration images and the held-out images, both in their given order."""
    count = len(images)
    if count < 2:
        raise ValueError(
            f"{count} images: at least 2 are needed, one for calibration and one held out; "
            "24 are better."
        )
    if not 0 < verify < 1:
        raise ValueError(
            f"verify={verify!r}: expected the share of held-out images, between 0 and 1, e.g. 0.33."
        )
    generator = torch.Generator(device="cpu").manual_seed(seed)
    order = torch.randperm(count, generator=generator, device="cpu").tolist()
    held_out = min(max(1, round(verify * count)), count - 1)
    return (
        [images[i] for i in sorted(order[held_out:])],
        [images[i] for i in sorted(order[:held_out])],
    )
