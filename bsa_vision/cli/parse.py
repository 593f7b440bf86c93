"""Parse patterns, grids, sizes and devices as typed.

Every ValueError names the option and the allowed values.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from bsa_vision.errors import nearest
from bsa_vision.masks import PATTERNS, Pattern
from bsa_vision.masks.pattern import GIVEN

SHORT = {"random": "random_blocks", "local": "local_window"}
# Patterns that ignore positions: reordering tokens would take time and change nothing.
PLACELESS = {"dense", "random_blocks", "strided"}


def grid(text: str, option: str = "--tokens") -> tuple[int, int]:
    """Parse a grid of patches: "48x80" (rows x columns), or "4096" for a square of 64 x 64."""
    sides = _sides(text)
    if len(sides) == 1 and math.isqrt(sides[0]) ** 2 == sides[0]:
        sides = [math.isqrt(sides[0])] * 2
    if len(sides) != 2:
        raise ValueError(
            f"{option} {text!r}: allowed are grids such as 48x80, and square numbers such as 4096."
        )
    return sides[0], sides[1]


def image_size(text: str) -> tuple[int, int]:
    """Parse a size in pixels: "1024" or "768x1024" (height x width)."""
    sides = _sides(text)
    if len(sides) not in (1, 2):
        raise ValueError(f"--image-size {text!r}: allowed are pixels such as 1024 and 768x1024.")
    return sides[0], sides[-1]


def patch(text: str) -> tuple[int, int]:
    """Parse the position of a patch: "3x4" is row 3, column 4; both start at 0."""
    sides = _sides(text, least=0)
    if len(sides) != 2:
        raise ValueError(f"--query {text!r}: expected a patch, ROWxCOLUMN, such as 32x32.")
    return sides[0], sides[1]


def _sides(text: str, least: int = 1) -> list[int]:
    """Parse integers joined by "x"; return [] if a part is not an integer >= `least`."""
    sides = text.split("x")
    valid = all(side.isascii() and side.isdecimal() and int(side) >= least for side in sides)
    return [int(side) for side in sides] if valid else []


def one_of(option: str, text: str, allowed: Iterable[str]) -> str:
    """Return `text` if it is one of `allowed`, else raise ValueError."""
    if text not in allowed:
        raise ValueError(f"{option} {text!r}: allowed are {', '.join(allowed)}.")
    return text


def device(text: str) -> str:
    """Return `text` if it is a torch device of this machine, else raise ValueError."""
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return one_of("--device", text, ["cpu", "cuda", *gpus] if gpus else ["cpu"])


def pattern(text: str, option: str = "--pattern") -> Pattern:
    """Parse a pattern: "local:8", "window:14:shift=7" or "region:centers=10x20+40x30".

    A name in `masks.PATTERNS` (or "random", "local") and parameters, separated by colons. A value
    without a name belongs to the first parameter.
    """
    name, *arguments = text.split(":")
    name = SHORT.get(name, name)
    if name not in PATTERNS:
        names = ", ".join([*SHORT, *PATTERNS])
        raise ValueError(
            f"{option} {text!r}: allowed are {names}, with parameters as in local:8 or "
            f"window:14:shift=7{nearest(name, [*SHORT, *PATTERNS])}."
        )
    allowed = [key for key in inspect.signature(PATTERNS[name]).parameters if key not in GIVEN]
    given: dict[str, Any] = {}
    for index, argument in enumerate(arguments):
        key, equals, value = argument.rpartition("=")
        if not equals and (index or not allowed):
            raise ValueError(
                f"{option} {text!r}: {argument!r} has no name, and {name} takes "
                f"{', '.join(allowed) or 'nothing'}; write name=value."
            )
        given[key if equals else allowed[0]] = _value(value)
    return Pattern(name, **given)


def _value(text: str) -> Any:
    """Parse "8" as 8, "0.5" as 0.5, "10x20+40x30" as [(10, 20), (40, 30)]; else return the text."""
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            pass
    pairs = [_sides(part) for part in text.split("+")]
    return [tuple(pair) for pair in pairs] if all(len(pair) == 2 for pair in pairs) else text


def with_density(pattern: Pattern, densities: Sequence[float], seed: int) -> list[Pattern]:
    """Return the pattern once per density; only once if it has a sparsity, or takes none."""
    spec = {"seed": seed, **pattern.spec} if pattern.is_random else pattern.spec
    if not takes_density(pattern):
        return [Pattern.from_spec(spec)]
    sparsities = [round(1 - density, 6) for density in densities]
    return [Pattern.from_spec({**spec, "sparsity": sparsity}) for sparsity in sparsities]


def takes_density(pattern: Pattern) -> bool:
    """Return whether the pattern has a parameter `sparsity` that is not yet set."""
    parameters = inspect.signature(PATTERNS[pattern.spec["pattern"]]).parameters
    return "sparsity" in parameters and "sparsity" not in pattern.spec


def order_for(pattern: Pattern, order: str) -> str:
    """Return the token order; for "auto" raster if the pattern ignores positions, else tile."""
    order = one_of("--order", order, ("auto", "tile", "raster"))
    if order != "auto":
        return order
    return "raster" if pattern.spec["pattern"] in PLACELESS else "tile"
