"""Clicks and boxes in image pixels, converted to patches of the model's input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor
from numbers import Real
from typing import Any

from bsa_vision.masks.layout import whole_pair
from bsa_vision.masks.patterns import Box


@dataclass(frozen=True)
class Prompts:
    """Prompts of one image in pixels, x before y as in Segment Anything.

    points      clicks (x, y)
    boxes       (x0, y0, x1, y1), the top left corner first
    image_size  (height, width) of the image in whose pixels points and boxes are given; None =
                pixels of the model's input. The image is resized to fit the input and padded at
                the bottom and the right, as by `SamPredictor` and transformers' `SamProcessor`

    Raises ValueError for prompts outside the image, and if there is neither a point nor a box.

        >>> Prompts(points=[(620, 310)], image_size=(1080, 1920))
    """

    points: Sequence[tuple[float, float]] = ()
    boxes: Sequence[tuple[float, float, float, float]] = ()
    image_size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "points", _numbers("points", self.points, 2, "(x, y)"))
        object.__setattr__(self, "boxes", _numbers("boxes", self.boxes, 4, "(x0, y0, x1, y1)"))
        if not self.points and not self.boxes:
            raise ValueError(
                "Prompts without points and boxes: at least one is needed, e.g. points=[(x, y)]."
            )
        for box in self.boxes:
            if box[0] >= box[2] or box[1] >= box[3]:
                raise ValueError(
                    f"box {box} is empty: expected (x0, y0, x1, y1) in pixels, x first, with "
                    "x0 < x1 and y0 < y1."
                )
        if self.image_size is not None:
            height, width = whole_pair("image_size", _plain(self.image_size), 1)
            object.__setattr__(self, "image_size", (height, width))
            self.check_inside(height, width)

    def check_inside(self, height: int, width: int) -> None:
        """Raise ValueError unless every prompt lies in an image of this size, in pixels."""
        for x, y in self.points:
            if not (0 <= x < width and 0 <= y < height):
                raise ValueError(
                    f"point ({x}, {y}) lies outside the image of {width} x {height} pixels: "
                    f"expected 0 <= x < {width}, 0 <= y < {height}; give (x, y), x first, in the "
                    "pixels of image_size=(height, width)."
                )
        for box in self.boxes:
            if not (box[0] >= 0 and box[2] <= width and box[1] >= 0 and box[3] <= height):
                raise ValueError(
                    f"box {box} lies outside the image of {width} x {height} pixels: expected "
                    f"0 <= x <= {width}, 0 <= y <= {height}; give (x0, y0, x1, y1), x first, in "
                    "the pixels of image_size=(height, width)."
                )

    def on_patches(self, grid: tuple[int, int], patch_size: tuple[int, int]) -> tuple[Box, ...]:
        """Return each prompt as (top, left, bottom, right) in patches, both ends included.

        grid        (h, w) patches of the model's input
        patch_size  (h, w) pixels
        """
        height, width = grid[0] * patch_size[0], grid[1] * patch_size[1]
        down = across = 1.0
        if self.image_size is None:
            self.check_inside(height, width)
        else:
            resized = resized_to_fit(self.image_size, (height, width))
            down, across = resized[0] / self.image_size[0], resized[1] / self.image_size[1]
        rectangles = [(x, y, x, y) for x, y in self.points] + list(self.boxes)
        found = []
        for x0, y0, x1, y1 in rectangles:
            top, bottom = _patches(y0 * down, y1 * down, patch_size[0], grid[0])
            left, right = _patches(x0 * across, x1 * across, patch_size[1], grid[1])
            found.append((top, left, bottom, right))
        return tuple(found)


def resized_to_fit(image_size: tuple[int, int], input_size: tuple[int, int]) -> tuple[int, int]:
    """Return the (height, width) of an image after resizing it to fit the input.

    The longer side fills the input. Source: segment_anything, `ResizeLongestSide`.
    """
    scale = min(input_size[0] / image_size[0], input_size[1] / image_size[1])
    return int(image_size[0] * scale + 0.5), int(image_size[1] * scale + 0.5)


def _patches(first: float, last: float, patch: int, count: int) -> tuple[int, int]:
    """Return the first and last of `count` patches that overlap pixels `first` to `last`."""
    # Scaling may move a patch border by a rounding error.
    first, last = round(first, 6), round(last, 6)
    start = min(floor(first / patch), count - 1)
    return start, min(max(start, ceil(last / patch) - 1), count - 1)


def _numbers(name: str, values: Any, length: int, shape: str) -> tuple[tuple[float, ...], ...]:
    values = _plain(values)
    try:
        entries = tuple(tuple(entry) for entry in values)
    except TypeError:
        entries = None
    if entries is None or any(
        len(e) != length or not all(isinstance(v, Real) for v in e) for e in entries
    ):
        raise ValueError(
            f"{name}={values!r}: expected a list of {shape} in pixels; put a single one in a list."
        )
    return entries


def _plain(values: Any) -> Any:
    return values.tolist() if hasattr(values, "tolist") else values  # tensors and arrays
