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
    """Return the image files among `paths`: files as given, folders with all below them, sorted, without hidden files.

    ValueError where there is none, and for an empty path.
    """
    paths = list(paths)
    if not all(map(str, paths)):
        raise ValueError(
            "an image path is empty: expected image files, or a folder of them; give '.' for this folder."
        )
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found += sorted(x for x in path.rglob("*") if _is_image(x, path))
        elif path.is_file():
            found.append(path)
        else:
            raise ValueError(
                f"image {str(path)!r}: no such file or folder; give image files, or a folder of them."
            )
    if not found:
        raise ValueError(
            f"no images in {', '.join(map(str, paths)) or 'nothing'}: files that end with {', '.join(SUFFIXES)} are looked for; give others."
        )
    return found


def _is_image(path: Path, folder: Path) -> bool:
    """Whether a file below `folder` is meant: macOS puts a hidden `._x.jpg` beside `x.jpg` on other file systems."""
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return not hidden and path.suffix.lower() in SUFFIXES and path.is_file()


def read_all(
    paths: Iterable[Path], size: tuple[int, int], how: Normalisation = IMAGENET
) -> tuple[dict[Path, Tensor], list[str]]:
    """Return the images that can be read, and why each of the others cannot; ValueError where none can."""
    images: dict[Path, Tensor] = {}
    unreadable = []
    for path in paths:
        try:
            images[path] = read(path, size, how)
        except ValueError as error:
            unreadable.append(str(error))
    if not images:
        raise ValueError(
            f"none of {len(unreadable)} images can be read; the first: {unreadable[0]}"
        )
    return images, unreadable


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
            fitted = ImageOps.fit(
                ImageOps.exif_transpose(image).convert("RGB"), size[::-1], Image.Resampling.BICUBIC
            )
    except (
        OSError,
        SyntaxError,
        EOFError,
        Image.DecompressionBombError,
    ) as error:  # broken PNGs are SyntaxErrors
        raise ValueError(
            f"image {str(path)!r} cannot be read ({error}): give a photograph in a common format."
        ) from None
    values = (
        torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8)
        .reshape(*size, 3)
        .permute(2, 0, 1)
    )
    mean, std = (torch.tensor(channel)[:, None, None] for channel in how)
    return ((values.float() / 255 - mean) / std)[None]
