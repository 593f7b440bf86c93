"""Shapes (signed distances) and textures (functions on the plane) of the testbed's scenes.

To add one, write a function and append it to its table. Do not reorder the tables: trained models
use the indices.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

REACH = 1.12  # largest extent of a shape, in radii


# Shapes: signed distance, up to a factor, of a point (x, y) in radii; negative inside


def _disc(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 0.9


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.76).abs() - 0.24


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.78


def _cross(x: Tensor, y: Tensor) -> Tensor:
    long, short = torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
    return torch.maximum(long - 1, short - 0.34)


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(math.sqrt(0.75) * x.abs() + 0.5 * y, -y) - 0.56


def _star(x: Tensor, y: Tensor) -> Tensor:
    """Return the distance to a star with five tips at radius 1.1 and notches at radius 0.5.

    By symmetry, this is the distance to one edge from a notch to a tip.
    """
    distance, fold = torch.hypot(x, y), 2 * math.pi / 5
    # 0 at a notch, fold / 2 at a tip
    angle = (torch.remainder(torch.atan2(x, y), fold) - fold / 2).abs()
    tip = (1.1 * math.cos(fold / 2), 1.1 * math.sin(fold / 2))
    normal = (tip[1], 0.5 - tip[0])
    along = normal[0] * (distance * angle.cos() - 0.5) + normal[1] * distance * angle.sin()
    return along / math.hypot(*normal)


SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross": _cross,
    "disc": _disc,
    "triangle": _triangle,
    "ring": _ring,
    "square": _square,
    "star": _star,
}


# Textures: value from 0 to 1 at a point (u, v) of the object, in periods


def edge(wave: Tensor) -> Tensor:
    """Map a wave around 0 to 0 or 1, with a soft edge that avoids aliasing in small images."""
    return (0.5 + 1.5 * wave).clamp(0, 1)


def _stripes(u: Tensor, v: Tensor) -> Tensor:
    return edge(torch.sin(2 * math.pi * u))


def _checker(u: Tensor, v: Tensor) -> Tensor:
    return edge(2 * torch.sin(math.pi * u * 1.2) * torch.sin(math.pi * v * 1.2))


def _dots(u: Tensor, v: Tensor) -> Tensor:
    return edge(3 * (0.31 - torch.hypot(torch.remainder(u, 1) - 0.5, torch.remainder(v, 1) - 0.5)))


def _plain(u: Tensor, v: Tensor) -> Tensor:
    return torch.zeros_like(u)


def _grid(u: Tensor, v: Tensor) -> Tensor:
    return edge(torch.maximum(torch.sin(2 * math.pi * u), torch.sin(2 * math.pi * v)) - 0.75)


def _waves(u: Tensor, v: Tensor) -> Tensor:
    return edge(torch.sin(2 * math.pi * (u + 0.35 * torch.sin(math.pi * v))))


def _scales(u: Tensor, v: Tensor) -> Tensor:
    row = torch.floor(v)
    return torch.hypot(torch.remainder(u + 0.5 * row, 1) - 0.5, v - row).clamp(0, 1)


TEXTURES: dict[str, Callable[[Tensor, Tensor], Tensor] | None] = {
    "stripes": _stripes,
    "plain": _plain,
    "checker": _checker,
    "dots": _dots,
    "noise": None,  # value noise from the lattice of the scene
    "grid": _grid,
    "waves": _waves,
    "scales": _scales,
}
