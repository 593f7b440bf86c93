"""Image files as a model wants them: cut to its size, normalised. Needs Pillow."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]
IMAGENET: Normalisation = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # SAM's and DINO's as well
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


def normalisation(model: nn.Module) -> Normalisation:
    """Mean and standard deviation per channel, of values from 0 to 1: timm's models say theirs; ImageNet's for others."""
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    return tuple(config.get("mean", IMAGENET[0])), tuple(config.get("std", IMAGENET[1]))


def find(paths: Iterable[str | Path]) -> list[Path]:
    """The image files among `paths`, folders searched through; sorted within a folder. ValueError where there is none."""
    paths = list(paths)
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found += sorted(x for x in path.rglob("*") if x.is_file() and x.suffix.lower() in SUFFIXES)
        elif path.is_file():
            found.append(path)
        else:
            raise ValueError(f"image {str(path)!r}: no such file or folder; give image files, or a folder of them.")
    if not found:
        raise ValueError(
            f"no images in {', '.join(map(str, paths)) or 'nothing'}: files that end with {', '.join(SUFFIXES)} are looked for; give others."
        )
    return found


def read(path: Path, size: tuple[int, int], how: Normalisation = IMAGENET) -> Tensor:
    """(1, 3, h, w) float32 of `size` (h, w) pixels: scaled so that it covers that, bicubic, and the middle cut out; normalised."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ValueError(
            f"images are read with Pillow, which cannot be imported ({error}): pip install pillow."
        ) from None
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(
                    f"image {str(path)!r} has mode {image.mode}, more than 8 bits per channel: what is white in it is not known; save it as an "
                    "8-bit image."
                )
            fitted = ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), size[::-1], Image.Resampling.BICUBIC)
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"image {str(path)!r} cannot be read ({error}): give a photograph in a common format."
        ) from None
    values = torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8).reshape(*size, 3).permute(2, 0, 1)
    mean, std = (torch.tensor(channel)[:, None, None] for channel in how)
    return ((values.float() / 255 - mean) / std)[None]
