"""Read patterns, grids, sizes and devices as typed; ValueError names what is allowed."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from bsa_vision.errors import nearest
from bsa_vision.masks import PATTERNS, Pattern
from bsa_vision.masks.patterns import GIVEN

SHORT = {"random": "random_blocks", "local": "local_window"}
# These patterns do not look at places: token order would cost time and change nothing.
PLACELESS = {"dense", "random_blocks", "strided"}


def grid(text: str, option: str = "--tokens") -> tuple[int, int]:
    """Read "48x80", rows x columns, or "4096", a square."""
    sides = _sides(text)
    if len(sides) == 1 and math.isqrt(sides[0]) ** 2 == sides[0]:
        sides = [math.isqrt(sides[0])] * 2
    if len(sides) != 2:
        raise ValueError(f"{option} {text!r}: allowed are grids such as 48x80 and squares: 4096.")
    return sides[0], sides[1]


def image_size(text: str) -> tuple[int, int]:
    """Read pixels: "1024" or "768x1024", height x width."""
    sides = _sides(text)
    if len(sides) not in (1, 2):
        raise ValueError(f"--image-size {text!r}: allowed are pixels such as 1024 and 768x1024.")
    return sides[0], sides[-1]


def _sides(text: str) -> list[int]:
    """Read positive numbers joined by x; nothing where something else is among them."""
    sides = text.split("x")
    good = all(side.isascii() and side.isdecimal() and int(side) > 0 for side in sides)
    return [int(side) for side in sides] if good else []


def one_of(option: str, text: str, allowed: Iterable[str]) -> str:
    """Return `text` where it is among `allowed`."""
    if text not in allowed:
        raise ValueError(f"{option} {text!r}: allowed are {', '.join(allowed)}.")
    return text


def device(text: str) -> str:
    """Read a torch device that this machine has."""
    gpus = torch.cuda.device_count()
    there = ["cpu", *(["cuda"] if gpus else []), *(f"cuda:{index}" for index in range(gpus))]
    return one_of("--device", text, there)


def pattern(text: str) -> Pattern:
    """Read "local:8", "window:14:shift=7" or "region:centers=10x20+40x30".

    A name of `masks.PATTERNS` (or "random", "local") and its parameters, separated by colons; a
    value without a name is that of the first parameter.
    """
    name, *arguments = text.split(":")
    name = SHORT.get(name, name)
    if name not in PATTERNS:
        names = ", ".join([*SHORT, *PATTERNS])
        raise ValueError(
            f"--pattern {text!r}: allowed are {names}, with parameters as in local:8 or "
            f"window:14:shift=7{nearest(name, [*SHORT, *PATTERNS])}."
        )
    allowed = [one for one in inspect.signature(PATTERNS[name]).parameters if one not in GIVEN]
    given: dict[str, Any] = {}
    for place, argument in enumerate(arguments):
        key, equals, value = argument.rpartition("=")
        if not equals and (place or not allowed):
            raise ValueError(
                f"--pattern {text!r}: {argument!r} has no name, and {name} takes "
                f"{', '.join(allowed) or 'nothing'}; write name=value."
            )
        given[key if equals else allowed[0]] = _value(value)
    return Pattern(name, **given)


def _value(text: str) -> Any:
    """Read "8" as 8, "0.5" as 0.5, "10x20+40x30" as [(10, 20), (40, 30)], the rest as text."""
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            pass
    pairs = [_sides(part) for part in text.split("+")]
    return [tuple(pair) for pair in pairs] if all(len(pair) == 2 for pair in pairs) else text


def with_density(one: Pattern, densities: Sequence[float], seed: int) -> list[Pattern]:
    """Repeat a pattern that lacks a sparsity once per density; any other stands once."""
    spec = {"seed": seed, **one.spec} if one.is_random else one.spec
    if not takes_density(one):
        return [Pattern.from_spec(spec)]
    return [Pattern.from_spec({**spec, "sparsity": round(1 - one, 6)}) for one in densities]


def takes_density(one: Pattern) -> bool:
    """Return whether the pattern has a sparsity, and none is given."""
    parameters = inspect.signature(PATTERNS[one.spec["pattern"]]).parameters
    return "sparsity" in parameters and "sparsity" not in one.spec


def order_for(one: Pattern, asked: str) -> str:
    """Choose the order for "auto": tile, or raster for patterns that do not look at places."""
    asked = one_of("--order", asked, ("auto", "tile", "raster"))
    placeless = one.spec["pattern"] in PLACELESS
    return asked if asked != "auto" else "raster" if placeless else "tile"
