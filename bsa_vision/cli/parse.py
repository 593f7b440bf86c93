"""What is typed on the command line -> data. Every ValueError says what was given, what is allowed, and what to do."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from bsa_vision.bench.case import DTYPES, Case
from bsa_vision.bench.ways import WAYS
from bsa_vision.errors import nearest
from bsa_vision.masks import PATTERNS, Pattern
from bsa_vision.masks.patterns import GIVEN

Value = TypeVar("Value")
SHORT = {"random": "random_blocks", "local": "local_window"}
# Patterns that do not look at where patches are: token order would cost time and change nothing.
PLACELESS = {"dense", "random_blocks", "strided"}


def items(text: str, read: Callable[[str], Value]) -> list[Value]:
    """A comma-separated list, each part read by `read`."""
    return [read(part.strip()) for part in text.split(",")]


def grid(text: str) -> tuple[int, int]:
    """ "64x64" or "4096" -> (64, 64)."""
    sides = text.split("x")
    if all(side.isascii() and side.isdecimal() and int(side) > 0 for side in sides):
        if len(sides) == 2:
            return int(sides[0]), int(sides[1])
        root = math.isqrt(int(text)) if len(sides) == 1 else 0
        if root and root * root == int(text):
            return root, root
    raise ValueError(
        f"--tokens {text!r}: allowed are grids of patches such as 64x64 or 48x80, and squares such as 4096; write rows x columns."
    )


def image_size(text: str) -> tuple[int, int]:
    """ "1024" or "768x1024" -> pixels (height, width)."""
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isascii() and side.isdecimal() and int(side) > 0 for side in sides):
        raise ValueError(
            f"--image-size {text!r}: allowed are pixels such as 1024 or 768x1024; write one side, or height x width."
        )
    return int(sides[0]), int(sides[-1])


def fraction(option: str) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 <= value <= 1:
            raise ValueError(f"{option} {text!r}: allowed are fractions of the blocks, 0 to 1; write 0.25 for 25 %.")
        return value

    return read


def count(option: str, minimum: int = 1) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isascii() or not text.isdecimal() or int(text) < minimum:
            raise ValueError(f"{option} {text!r}: allowed are whole numbers from {minimum}; write such a number.")
        return int(text)

    return read


def one_of(option: str, allowed: Sequence[str]) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in allowed:
            raise ValueError(f"{option} {text!r}: allowed are {', '.join(allowed)}; choose among them.")
        return text

    return read


dtype = one_of("--dtype", tuple(DTYPES))
way = one_of("--ways", tuple(WAYS))


def device(text: str) -> str:
    """A torch device that is there."""
    try:
        found = torch.device(text)
    except RuntimeError:
        found = None
    there = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    if found is None or found.type not in there or (found.type == "cuda" and (found.index or 0) >= _num_gpus()):
        raise ValueError(f"--device {text!r}: here there is {' and '.join(there)}; choose among these.")
    return text


def _num_gpus() -> int:
    return torch.cuda.device_count()


def pattern(text: str) -> Pattern:
    """ "local:8", "window:14:shift=7", "region:centers=10x20+40x30" -> Pattern.

    A name of `masks.PATTERNS` (or "random", "local") and its parameters, separated by colons; a value without a name is
    that of the first parameter.
    """
    name, *arguments = text.split(":")
    name = SHORT.get(name, name)
    if name not in PATTERNS:
        raise ValueError(
            f"--pattern {text!r}: allowed are {', '.join([*SHORT, *PATTERNS])}; choose one, with parameters as in local:8 or "
            f"window:14:shift=7{nearest(name, [*SHORT, *PATTERNS])}."
        )
    allowed = [p for p in inspect.signature(PATTERNS[name]).parameters if p not in GIVEN]
    given: dict[str, Any] = {}
    for place, argument in enumerate(arguments):
        key, equals, value = argument.rpartition("=")
        if not equals and (place or not allowed):
            raise ValueError(
                f"--pattern {text!r}: {argument!r} has no name, and {name} takes {', '.join(allowed) or 'nothing'}; write "
                "name=value."
            )
        given[key if equals else allowed[0]] = _value(value)
    return Pattern(name, **given)


def _value(text: str) -> Any:
    """ "8" -> 8, "0.5" -> 0.5, "10x20+40x30" -> [(10, 20), (40, 30)], anything else as it is."""
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            pass
    pairs = [part.split("x") for part in text.split("+")]
    if all(len(pair) == 2 and all(side.isdecimal() for side in pair) for pair in pairs):
        return [(int(row), int(column)) for row, column in pairs]
    return text


def takes_density(one: Pattern) -> bool:
    """Whether the pattern's density is free: it has a sparsity, and none is given."""
    spec = one.spec
    return "sparsity" in inspect.signature(PATTERNS[spec["pattern"]]).parameters and "sparsity" not in spec


def with_density(patterns: Sequence[Pattern], densities: Sequence[float], seed: int) -> list[Pattern]:
    """Patterns with a sparsity of their own once per density; the others once, as their geometry makes them."""
    found = []
    for one in patterns:
        spec = one.spec
        drawn = {"seed": seed, **spec} if one.is_random else spec
        if takes_density(one):
            found += [Pattern.from_spec({**drawn, "sparsity": round(1 - density, 6)}) for density in densities]
        else:
            found.append(Pattern.from_spec(drawn))
    return found


def order_for(one: Pattern, asked: str) -> str:
    """ "auto": tile, except for patterns that do not look at places."""
    if asked != "auto":
        return asked
    return "raster" if one.spec["pattern"] in PLACELESS else "tile"


def sweep(base: Case, axes: dict[str, Sequence[Any]], order: str) -> list[Case]:
    """All combinations of `axes` (field of Case -> its values), the first axis outermost."""
    cases = [base]
    for name, values in axes.items():
        cases = [replace(case, **{name: value}) for case in cases for value in values]
    for case in cases:
        if case.dense_heads > case.heads:
            raise ValueError(f"--dense-heads {case.dense_heads}: there are {case.heads} heads; give at most that many.")
    return [replace(case, order=order_for(case.pattern, order)) for case in cases]
