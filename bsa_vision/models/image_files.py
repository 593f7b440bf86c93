"""Read image files as model inputs: resized, cropped and normalised. Needs Pillow."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]
IMAGENET: Normalisation = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # also of SAM and DINO
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


def normalisation(model: nn.Module) -> Normalisation:
    """Return mean and standard deviation per channel, for pixel values from 0 to 1.

    They come from the configuration of timm's models; ImageNet's are used for others.
    """
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    return tuple(config.get("mean", IMAGENET[0])), tuple(config.get("std", IMAGENET[1]))


def find(paths: Iterable[str | Path]) -> list[Path]:
    """Return the image files among `paths`.

    Files are returned as given. Folders are searched recursively, sorted, and without hidden
    files. Raises ValueError if there are no images, and for an empty path.
    """
    paths = list(paths)
    if not all(map(str, paths)):
        raise ValueError(
            "an image path is empty: expected image files or folders; '.' is the current folder."
        )
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found += sorted(x for x in path.rglob("*") if _is_image(x, path))
        elif path.is_file():
            found.append(path)
        else:
            raise ValueError(
                f"image {str(path)!r}: no such file or folder; give image files or folders."
            )
    if not found:
        places = ", ".join(map(str, paths)) or "nothing"
        raise ValueError(f"no images in {places}: allowed suffixes are {', '.join(SUFFIXES)}.")
    return found


def _is_image(path: Path, folder: Path) -> bool:
    """Return whether a file is an image and not hidden; macOS may add `._x.jpg` to `x.jpg`."""
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return not hidden and path.suffix.lower() in SUFFIXES and path.is_file()


def read_all(
    paths: Iterable[Path], size: tuple[int, int], how: Normalisation = IMAGENET
) -> tuple[dict[Path, Tensor], list[str]]:
    """Return the readable images, and the errors of the others; raise ValueError if none is."""
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
    """Read an image as a normalised (1, 3, h, w) float32 tensor of `size` (h, w) pixels.

    The image is scaled bicubically until it covers `size`, and its centre is cropped.
    """
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
                    f"image {str(path)!r} has mode {image.mode}, more than 8 bits per channel: its "
                    "white level is unknown; save it as an 8-bit image."
                )
            rgb = ImageOps.exif_transpose(image).convert("RGB")
            fitted = ImageOps.fit(rgb, size[::-1], Image.Resampling.BICUBIC)
    # Broken PNGs raise SyntaxError.
    except (OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"image {str(path)!r} cannot be read ({error}): give an image in a common format."
        ) from None
    values = torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8)
    mean, std = (torch.tensor(channel) for channel in how)
    return ((values.reshape(*size, 3).float() / 255 - mean) / std).permute(2, 0, 1)[None]
