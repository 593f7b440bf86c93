"""Procedural scenes with an answer: a click on an instance, and the mask of every instance of the same shape and the same texture.

    scenes = make(seeds, size=128, difficulty=HARD)     # images (B, 3, 128, 128), click (B, 2), mask (B, 128, 128)

A scene follows from its seed and the difficulty alone: neither the batch it is part of nor the resolution changes it. `draw` gives
resolution-free parameters, `render` paints them at any size, on the device they are on. Lengths are shares of the image's side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.testbed.shapes import REACH, SHAPES, TEXTURES, edge

SLOTS = 16  # objects a scene has room for
TRIES = 8  # places tried for each object; the one farthest from the others is taken
LATTICE = 32  # random numbers per side, for value noise
DEBRIS = 9  # cells per side of the ground, each with one small blot
LOOKS = 48  # pixels per side of the raster on which clicks are chosen
PER_OBJECT = 2 * TRIES + 16  # random numbers
PER_SCENE = 24 + SLOTS * PER_OBJECT + LATTICE**2 + 6 * DEBRIS**2


HELD_OUT = 2**40  # seeds from here on are never trained on


def held_out(count: int, seed: int = 0) -> range:
    """Seeds of scenes to measure on; those of different `seed` are different scenes."""
    first = HELD_OUT + seed * 2**20
    return range(first, first + count)


@dataclass(frozen=True)
class Difficulty:
    """What makes scenes hard.

    objects   fewest and most in a scene; at least 4 and at most `SLOTS`
    matches   most instances that answer one click, itself among them; two objects always share only one of the two properties
    shapes, textures   names, see `SHAPES` and `TEXTURES`
    radius, period     smallest and largest, of an object and of its texture's repetition
    clutter   0 to 1: how much goes on on the ground
    """

    objects: tuple[int, int]
    matches: int
    shapes: tuple[str, ...]
    textures: tuple[str, ...]
    radius: tuple[float, float]
    period: tuple[float, float] = (0.045, 0.075)
    clutter: float = 0.0


@dataclass(frozen=True)
class Layout:
    """What a batch of scenes consists of, resolution-free. N objects each, the last ones on top; one of radius 0 is not there.

    shape, texture         (B, N) indices into `shapes` and `textures`
    centre (B, N, 2) as (x, y), radius, angle, period, grain (B, N), shift (B, N, 2): where an object is, and its texture on it
    colours                (B, N, 2, 3): what its texture alternates between
    ground                 (B, 3, 3): colours of the ground
    lattice (B, L, L), debris (B, 6, d, d): random numbers for noise, and for the blots on the ground
    clicked (B,)           the object that is clicked on, and where: click (B, 2) as (x, y), 0 to 1
    """

    shapes: tuple[str, ...]
    textures: tuple[str, ...]
    clutter: float
    shape: Tensor
    texture: Tensor
    centre: Tensor
    radius: Tensor
    angle: Tensor
    period: Tensor
    grain: Tensor
    shift: Tensor
    colours: Tensor
    ground: Tensor
    lattice: Tensor
    debris: Tensor
    clicked: Tensor
    click: Tensor

    @property
    def answers(self) -> Tensor:
        """(B, N) bool: the objects of the clicked one's shape and texture."""
        shape, texture = (
            kind.gather(1, self.clicked[:, None]) for kind in (self.shape, self.texture)
        )
        return (self.shape == shape) & (self.texture == texture) & (self.radius > 0)

    def to(self, device: torch.device | str) -> Layout:
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {
            name: x.to(device) for name, x in held.items() if isinstance(x, Tensor)
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes at one size.

    images    (B, 3, H, W), 0 to 1
    click     (B, 2) as (x, y), 0 to 1
    mask      (B, H, W) bool: the answer
    instance  (B, H, W): the object seen at each pixel, -1 = ground
    layout    what they were painted from
    """

    images: Tensor
    click: Tensor
    mask: Tensor
    instance: Tensor
    layout: Layout

    def kinds(self) -> tuple[Tensor, Tensor]:
        """(B, H, W) twice: the shape and the texture seen at each pixel, as indices; -1 = ground."""
        return tuple(
            _of_pixels(kind, self.instance) for kind in (self.layout.shape, self.layout.texture)
        )  # type: ignore[return-value]


def make(
    seeds: Sequence[int], size: int, difficulty: Difficulty, device: torch.device | str = "cpu"
) -> Scenes:
    """Scenes of `size` x `size` pixels, one for each seed."""
    return render(draw(seeds, difficulty).to(device), size)


# From the first scenes a model is trained on to those it is measured on.
EASY = Difficulty((4, 4), 2, ("cross", "disc"), ("stripes", "plain"), (0.17, 0.22))
HARD = Difficulty(
    objects=(6, 8),
    matches=3,
    shapes=("cross", "disc", "triangle", "ring"),
    textures=("stripes", "plain", "checker", "dots"),
    radius=(0.10, 0.17),
    clutter=0.5,
)
# For honesty: more objects, and textures that training never shows.
SHIFTED = replace(
    HARD, objects=(9, 11), textures=("stripes", "dots", "grid", "waves"), radius=(0.09, 0.15)
)


# Drawing


class _Numbers:
    """Uniform random numbers (B, PER_SCENE), handed out in a fixed order."""

    def __init__(self, seeds: Sequence[int]) -> None:
        generator = torch.Generator(device="cpu")
        rows = [torch.rand(PER_SCENE, generator=generator.manual_seed(int(seed))) for seed in seeds]
        self._rows, self._used = torch.stack(rows), 0

    def take(self, *shape: int) -> Tensor:
        """(B, *shape)"""
        first, self._used = self._used, self._used + math.prod(shape)
        return self._rows[:, first : self._used].reshape(-1, *shape)


def draw(seeds: Sequence[int], difficulty: Difficulty) -> Layout:
    """The parameters of one scene for each seed, on the CPU."""
    numbers, slots = _Numbers(seeds), difficulty.objects[1]
    lattice, debris = numbers.take(LATTICE, LATTICE), numbers.take(6, DEBRIS, DEBRIS)
    ground, counts = numbers.take(3, 3), numbers.take(2)
    fewest = difficulty.objects[0]
    count = fewest + (counts[:, 0] * (slots - fewest + 1)).long()  # (B,)
    matches = 1 + (counts[:, 1] * difficulty.matches).long().clamp(max=difficulty.matches - 1)
    matches = torch.minimum(matches, count - 2)
    shape, texture = _kinds(numbers.take(4), numbers.take(slots), matches, slots, difficulty)
    low, high = difficulty.radius
    radius = (low + (high - low) * numbers.take(slots)) * (torch.arange(slots) < count[:, None])
    layout = Layout(
        difficulty.shapes,
        difficulty.textures,
        difficulty.clutter,
        shape,
        texture,
        centre=_places(numbers.take(slots, TRIES, 2), radius),
        radius=radius,
        angle=2 * math.pi * numbers.take(slots),
        period=difficulty.period[0]
        + (difficulty.period[1] - difficulty.period[0]) * numbers.take(slots),
        grain=2 * math.pi * numbers.take(slots),
        shift=numbers.take(slots, 2),
        colours=_pairs_of_colours(numbers.take(slots, 3)),
        ground=ground,
        lattice=lattice,
        debris=debris,
        clicked=torch.zeros(len(radius), dtype=torch.long),
        click=torch.zeros(len(radius), 2),
    )
    return _clicked(layout, numbers.take(slots), numbers.take(1))


def _kinds(
    chosen: Tensor, others: Tensor, matches: Tensor, slots: int, difficulty: Difficulty
) -> tuple[Tensor, Tensor]:
    """(B, N) shapes and textures. First those that match, then one of another texture, one of another shape, then anything else."""
    shapes, textures = len(difficulty.shapes), len(difficulty.textures)
    shape, texture = (chosen[:, 0] * shapes).long(), (chosen[:, 1] * textures).long()
    other_texture = (texture + 1 + (chosen[:, 2] * (textures - 1)).long()) % textures
    other_shape = (shape + 1 + (chosen[:, 3] * (shapes - 1)).long()) % shapes
    pair = shape * textures + texture
    pairs = (pair[:, None] + 1 + (others * (shapes * textures - 1)).long()) % (
        shapes * textures
    )  # never `pair`
    slot, matches = torch.arange(slots), matches[:, None]
    pairs = torch.where(slot < matches, pair[:, None], pairs)
    pairs = torch.where(slot == matches, (shape * textures + other_texture)[:, None], pairs)
    pairs = torch.where(slot == matches + 1, (other_shape * textures + texture)[:, None], pairs)
    return pairs // textures, pairs % textures


def _places(tries: Tensor, radius: Tensor) -> Tensor:
    """(B, N, 2) centres: each object in turn where, of its tries, the gap to the ones before is widest. Matches come first: far apart."""
    margin = 0.75 * radius[:, :, None, None]
    tries = margin + (1 - 2 * margin) * tries  # (B, N, TRIES, 2)
    placed = tries[:, :1, 0]
    for slot in range(1, tries.shape[1]):
        gaps = torch.cdist(tries[:, slot], placed) - radius[:, None, :slot]  # (B, TRIES, slot)
        best = gaps.amin(-1).argmax(-1)
        placed = torch.cat([placed, tries[torch.arange(len(best)), slot, best][:, None]], dim=1)
    return placed


def _pairs_of_colours(first: Tensor) -> Tensor:
    """(B, N, 3) -> (B, N, 2, 3): a colour, and one that differs from it by half in every channel."""
    return torch.stack([first, (first + 0.5) % 1], dim=2)


def _clicked(layout: Layout, depths: Tensor, where: Tensor) -> Layout:
    """The layout with its objects in order of depth, and a click on a visible part of what was the first of them."""
    inside = _distances(layout, LOOKS) < 0  # (B, N, L, L)
    depths = depths.clone()
    share = _seen(inside, depths, 0).sum((1, 2)) / inside[:, 0].sum((1, 2)).clamp(min=1)
    depths[share < 0.4, 0] = 2.0  # hidden by others: to the front
    seen = _seen(inside, depths, 0)
    inner = F.avg_pool2d(seen[:, None].float(), 3, 1, 1, count_include_pad=True)[:, 0] > 0.99
    weight = torch.where(inner.any((1, 2), keepdim=True), inner, seen).flatten(1).double()
    running = weight.cumsum(1)
    at = (running > where.double() * running[:, -1:]).int().argmax(1)
    click = (torch.stack([at % LOOKS, at // LOOKS], dim=1) + 0.5) / LOOKS
    order = depths.argsort(1)
    names = ("shape", "texture", "centre", "radius", "angle", "period", "grain", "shift", "colours")
    sorted_: dict[str, Any] = {
        name: torch.stack([x[o] for x, o in zip(getattr(layout, name), order)]) for name in names
    }
    return replace(layout, clicked=(order == 0).int().argmax(1), click=click, **sorted_)


def _seen(inside: Tensor, depths: Tensor, which: int) -> Tensor:
    """(B, L, L) bool: where object `which` is the uppermost."""
    height = inside * (1 + depths[:, :, None, None])
    return inside[:, which] & (height.argmax(1) == which)


# Painting


def render(layout: Layout, size: int) -> Scenes:
    """The scenes at `size` x `size` pixels."""
    images = _ground(layout, *_pixels(size, layout.radius.device)).flatten(2)  # (B, 3, H * W)
    instance = torch.full((len(images), size * size), -1, dtype=torch.long, device=images.device)
    side = min(size, math.ceil(REACH * 2 * layout.radius.max().item() * size) + 2)
    for slot in range(layout.radius.shape[1]):
        x, y, pixels = _window(layout.centre[:, slot], side, size)
        distance = _distance(layout, slot, x, y).flatten(1)  # (B, side * side)
        alpha = (0.5 - distance * size).clamp(0, 1)[:, None]  # one pixel of soft edge
        colours = pixels[:, None].expand(-1, 3, -1)
        painted = torch.lerp(
            images.gather(2, colours), _paint(layout, slot, x, y).flatten(2), alpha
        )
        images.scatter_(2, colours, painted)
        instance.scatter_(1, pixels, torch.where(distance < 0, slot, instance.gather(1, pixels)))
    images, instance = images.unflatten(2, (size, size)), instance.unflatten(1, (size, size))
    mask = _of_pixels(layout.answers.long(), instance) == 1
    return Scenes(images, layout.click, mask, instance, layout)


def _window(centre: Tensor, side: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, 1, side) and y (B, side, 1) of the pixels around centres (B, 2), and their indices among all, (B, side * side)."""
    corner = (centre * size - side / 2).round().long().clamp(0, size - side)
    steps = torch.arange(side, device=centre.device)
    columns, rows = (
        corner[:, :1, None] + steps,
        corner[:, 1:, None] + steps[:, None],
    )  # (B, 1, side), (B, side, 1)
    return (columns + 0.5) / size, (rows + 0.5) / size, (rows * size + columns).flatten(1)


def _of_pixels(values: Tensor, instance: Tensor) -> Tensor:
    """(B, N) values of objects -> (B, H, W) those of what is seen; -1 on the ground."""
    padded = F.pad(values, (1, 0), value=-1)
    return padded.gather(1, (instance + 1).flatten(1)).view_as(instance)


def _pixels(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """x (1, 1, W) and y (1, H, 1) of pixel centres, 0 to 1."""
    line = (torch.arange(size, device=device, dtype=torch.float32) + 0.5) / size
    return line[None, None], line[None, :, None]


def _turned(
    layout: Layout, slot: int, x: Tensor, y: Tensor, angle: Tensor, unit: Tensor
) -> tuple[Tensor, Tensor]:
    """(B, H, W) twice: pixels seen from the object's centre, turned, in units of `unit`; all of these (B, N)."""
    centre = layout.centre[:, slot, :, None, None]  # (B, 2, 1, 1)
    x, y = x - centre[:, 0], y - centre[:, 1]
    cos, sin = ((f(angle[:, slot]) / unit[:, slot])[:, None, None] for f in (torch.cos, torch.sin))
    return cos * x + sin * y, cos * y - sin * x


def _distance(layout: Layout, slot: int, x: Tensor, y: Tensor) -> Tensor:
    """(B, H, W) signed distance to one object of each scene, in shares of the image's side."""
    there = layout.radius[:, slot] > 0
    radius = torch.where(there, layout.radius[:, slot], 1.0)
    x, y = _turned(
        layout, slot, x, y, layout.angle, torch.where(layout.radius > 0, layout.radius, 1.0)
    )
    distance = torch.ones_like(x)
    for index, name in enumerate(layout.shapes):
        of_it = there & (layout.shape[:, slot] == index)
        if of_it.any():
            distance[of_it] = SHAPES[name](x[of_it], y[of_it]) * radius[of_it, None, None]
    return distance


def _distances(layout: Layout, size: int) -> Tensor:
    """(B, N, H, W)"""
    x, y = _pixels(size, layout.radius.device)
    return torch.stack(
        [_distance(layout, slot, x, y) for slot in range(layout.radius.shape[1])], dim=1
    )


def _paint(layout: Layout, slot: int, x: Tensor, y: Tensor) -> Tensor:
    """(B, 3, H, W) the texture of one object of each scene, as if it went on everywhere."""
    u, v = _turned(layout, slot, x, y, layout.grain, layout.period)
    u, v = u + layout.shift[:, slot, :1, None], v + layout.shift[:, slot, 1:, None]
    value = torch.zeros_like(u)
    for index, name in enumerate(layout.textures):
        of_it = layout.texture[:, slot] == index
        if of_it.any():
            texture = TEXTURES[name]
            at = u[of_it], v[of_it]
            value[of_it] = (
                texture(*at) if texture else edge(2 * _noise(layout.lattice[of_it], *at) - 1)
            )
    colours = layout.colours[:, slot, :, :, None, None]  # (B, 2, 3, 1, 1)
    return torch.lerp(colours[:, 0], colours[:, 1], value[:, None])


def _noise(lattice: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """(B, H, W) value noise, 0 to 1: random numbers on whole (u, v), interpolated between."""
    half = LATTICE / 2
    # Reflected at its borders: the lattice need not be as large as the image.
    at = torch.stack([u, v], dim=-1) / half
    return F.grid_sample(
        lattice[:, None], at, mode="bilinear", padding_mode="reflection", align_corners=False
    )[:, 0]


def _ground(layout: Layout, x: Tensor, y: Tensor) -> Tensor:
    """(B, 3, H, W): one colour, with clouds, grain and blots of two others as far as `clutter` goes."""
    batch = len(layout.ground)
    colours = 0.25 + 0.5 * layout.ground[..., None, None]  # (B, 3, 3, 1, 1)
    u, v = (line.expand(batch, y.shape[1], x.shape[2]) for line in (x, y))
    if not layout.clutter:
        return colours[:, 0].expand(-1, -1, *u.shape[1:]).clone()
    clouds = 0.6 * _noise(layout.lattice, 5 * u - 3, 5 * v - 3) + 0.4 * _noise(
        layout.lattice, 22 * u - 9, 22 * v - 9
    )
    ground = torch.lerp(
        colours[:, 0], colours[:, 1], layout.clutter * edge(2 * clouds - 1)[:, None]
    )
    return torch.lerp(ground, colours[:, 2], _blots(layout, u, v)[:, None])


def _blots(layout: Layout, u: Tensor, v: Tensor) -> Tensor:
    """(B, H, W) 0 to 1: one small ellipse in each of `DEBRIS` x `DEBRIS` cells, some of them too small to be seen."""
    cells = [(line * DEBRIS).long().clamp(0, DEBRIS - 1) for line in (u, v)]
    which = (cells[1] * DEBRIS + cells[0]).flatten(1)  # (B, H * W)
    own = (
        layout.debris.flatten(2)
        .gather(2, which[:, None].expand(-1, 6, -1))
        .unflatten(2, u.shape[1:])
    )
    x, y = (
        line * DEBRIS - cell - 0.3 - 0.4 * own[:, i]
        for i, (line, cell) in enumerate(zip((u, v), cells))
    )
    cos, sin = torch.cos(math.pi * own[:, 2]), torch.sin(math.pi * own[:, 2])
    radius = 0.3 * own[:, 3] * layout.clutter + 1e-3
    distance = torch.hypot(
        (cos * x + sin * y) / radius, (cos * y - sin * x) / (radius * (0.4 + 0.6 * own[:, 4]))
    )
    return (3 * (1 - distance)).clamp(0, 1) * own[:, 5]
