"""Procedural scenes with a click on an object and the expected answer.

The answer is the mask of every object with the shape and the texture of the clicked one.

    scenes = make(seeds, size=128, difficulty=HARD)
    # images (B, 3, 128, 128), click (B, 2), mask (B, 128, 128)

A scene depends only on its seed and difficulty, not on the batch or the resolution. `draw` returns
parameters without a resolution; `render` paints them at any size, on their device. Lengths are
relative to the side of the image.
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

SLOTS = 16  # maximum number of objects in a scene
TRIES = 8  # candidate positions per object; the one farthest from the other objects is used
LATTICE = 32  # random numbers per side, for value noise
DEBRIS = 9  # cells per side of the ground, with one small blot each
LOOKS = 48  # pixels per side of the raster on which clicks are chosen
PER_OBJECT = 2 * TRIES + 16  # random numbers
PER_SCENE = 24 + SLOTS * PER_OBJECT + LATTICE**2 + 6 * DEBRIS**2
HELD_OUT = 2**40  # first seed that is never used for training


def held_out(count: int, seed: int = 0) -> range:
    """Return seeds of held-out scenes; different `seed` values give different scenes."""
    first = HELD_OUT + seed * 2**20
    return range(first, first + count)


@dataclass(frozen=True)
class Difficulty:
    """Parameters of random scenes.

    objects   smallest and largest number in a scene, 4 to `SLOTS`
    matches   largest number of objects in an answer, with the clicked one; one more object shares
              only its shape, and one only its texture
    shapes    names of `SHAPES`
    textures  names of `TEXTURES`
    radius    smallest and largest radius of an object
    period    smallest and largest period of a texture
    clutter   amount of detail on the ground, 0 to 1
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
    """Parameters of a batch of scenes, without a resolution.

    Each scene has N objects; later ones hide earlier ones, and those of radius 0 do not exist.

    shape, texture  (B, N) indices into `shapes` and `textures`
    centre          (B, N, 2) as (x, y)
    radius, angle   (B, N) of the object
    period, grain   (B, N) period and angle of its texture
    shift           (B, N, 2) offset of its texture
    colours         (B, N, 2, 3), between which its texture alternates
    ground          (B, 3, 3) colours of the ground
    lattice         (B, LATTICE, LATTICE) random numbers for noise
    debris          (B, 6, DEBRIS, DEBRIS) random numbers for the blots on the ground
    clicked         (B,) index of the clicked object
    click           (B, 2) position of the click as (x, y), 0 to 1
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
        """(B, N) bool: objects with the shape and the texture of the clicked one."""
        clicked = self.clicked[:, None]
        same_shape = self.shape == self.shape.gather(1, clicked)
        same_texture = self.texture == self.texture.gather(1, clicked)
        return same_shape & same_texture & (self.radius > 0)

    def to(self, device: torch.device | str) -> Layout:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {name: x.to(device) for name, x in values.items() if isinstance(x, Tensor)}
        return replace(self, **moved)


@dataclass(frozen=True)
class Scenes:
    """A batch of rendered scenes.

    images    (B, 3, H, W), 0 to 1
    click     (B, 2) as (x, y), 0 to 1
    mask      (B, H, W) bool, the answer
    instance  (B, H, W) index of the visible object, -1 = ground
    layout    parameters of the scenes
    """

    images: Tensor
    click: Tensor
    mask: Tensor
    instance: Tensor
    layout: Layout

    def kinds(self) -> tuple[Tensor, Tensor]:
        """Return the indices of the visible shapes and textures, (B, H, W) each; -1 = ground."""
        layout, instance = self.layout, self.instance
        return _per_pixel(layout.shape, instance), _per_pixel(layout.texture, instance)


def make(
    seeds: Sequence[int], size: int, difficulty: Difficulty, device: torch.device | str = "cpu"
) -> Scenes:
    """Return one scene of `size` x `size` pixels for each seed."""
    return render(draw(seeds, difficulty).to(device), size)


# EASY scenes start the training; results are measured on HARD ones.
EASY = Difficulty((4, 4), 2, ("cross", "disc"), ("stripes", "plain"), (0.17, 0.22))
HARD = Difficulty(
    objects=(6, 8),
    matches=3,
    shapes=("cross", "disc", "triangle", "ring"),
    textures=("stripes", "plain", "checker", "dots"),
    radius=(0.10, 0.17),
    clutter=0.5,
)
# Out-of-distribution scenes: more objects, and textures that do not occur in training.
SHIFTED = replace(
    HARD, objects=(9, 11), textures=("stripes", "dots", "grid", "waves"), radius=(0.09, 0.15)
)


class _Numbers:
    """Uniform random numbers (B, PER_SCENE), which `take` returns in a fixed order."""

    def __init__(self, seeds: Sequence[int]) -> None:
        generator = torch.Generator(device="cpu")
        rows = [torch.rand(PER_SCENE, generator=generator.manual_seed(int(seed))) for seed in seeds]
        self._rows, self._used = torch.stack(rows), 0

    def take(self, *shape: int) -> Tensor:
        """Return the next numbers, (B, *shape)."""
        first, self._used = self._used, self._used + math.prod(shape)
        return self._rows[:, first : self._used].reshape(-1, *shape)


def draw(seeds: Sequence[int], difficulty: Difficulty) -> Layout:
    """Return the parameters of one scene for each seed, on the CPU."""
    numbers, (fewest, slots) = _Numbers(seeds), difficulty.objects
    lattice, debris = numbers.take(LATTICE, LATTICE), numbers.take(6, DEBRIS, DEBRIS)
    ground, counts = numbers.take(3, 3), numbers.take(2)
    count = fewest + (counts[:, 0] * (slots - fewest + 1)).long()  # (B,)
    matches = 1 + (counts[:, 1] * difficulty.matches).long().clamp(max=difficulty.matches - 1)
    matches = torch.minimum(matches, count - 2)
    shape, texture = _kinds(numbers.take(4), numbers.take(slots), matches, slots, difficulty)
    exists = torch.arange(slots) < count[:, None]
    radius = _between(difficulty.radius, numbers.take(slots)) * exists
    layout = Layout(
        difficulty.shapes,
        difficulty.textures,
        difficulty.clutter,
        shape,
        texture,
        centre=_centres(numbers.take(slots, TRIES, 2), radius),
        radius=radius,
        angle=2 * math.pi * numbers.take(slots),
        period=_between(difficulty.period, numbers.take(slots)),
        grain=2 * math.pi * numbers.take(slots),
        shift=numbers.take(slots, 2),
        colours=_colour_pairs(numbers.take(slots, 3)),
        ground=ground,
        lattice=lattice,
        debris=debris,
        clicked=torch.zeros(len(radius), dtype=torch.long),
        click=torch.zeros(len(radius), 2),
    )
    return _with_click(layout, numbers.take(slots), numbers.take(1))


def _between(limits: tuple[float, float], numbers: Tensor) -> Tensor:
    return limits[0] + (limits[1] - limits[0]) * numbers


def _kinds(
    chosen: Tensor, others: Tensor, matches: Tensor, slots: int, difficulty: Difficulty
) -> tuple[Tensor, Tensor]:
    """Return the shapes and textures of objects, (B, N) each.

    Matches come first, then one with another texture, one with another shape, and others.
    """
    shapes, textures = len(difficulty.shapes), len(difficulty.textures)
    shape, texture = (chosen[:, 0] * shapes).long(), (chosen[:, 1] * textures).long()
    other_texture = (texture + 1 + (chosen[:, 2] * (textures - 1)).long()) % textures
    other_shape = (shape + 1 + (chosen[:, 3] * (shapes - 1)).long()) % shapes
    pair = shape * textures + texture
    number = shapes * textures
    pairs = (pair[:, None] + 1 + (others * (number - 1)).long()) % number  # never `pair`
    slot, matches = torch.arange(slots), matches[:, None]
    pairs = torch.where(slot < matches, pair[:, None], pairs)
    pairs = torch.where(slot == matches, (shape * textures + other_texture)[:, None], pairs)
    pairs = torch.where(slot == matches + 1, (other_shape * textures + texture)[:, None], pairs)
    return pairs // textures, pairs % textures


def _centres(tries: Tensor, radius: Tensor) -> Tensor:
    """Return the centres of objects, (B, N, 2).

    Each object uses the candidate farthest from the objects before it. Matches come first.
    """
    margin = 0.75 * radius[:, :, None, None]
    tries = margin + (1 - 2 * margin) * tries  # (B, N, TRIES, 2)
    placed = tries[:, :1, 0]
    for slot in range(1, tries.shape[1]):
        gaps = torch.cdist(tries[:, slot], placed) - radius[:, None, :slot]  # (B, TRIES, slot)
        best = gaps.amin(-1).argmax(-1)
        placed = torch.cat([placed, tries[torch.arange(len(best)), slot, best][:, None]], dim=1)
    return placed


def _colour_pairs(first: Tensor) -> Tensor:
    """Add a second colour that differs by 0.5 in every channel: (B, N, 3) -> (B, N, 2, 3)."""
    return torch.stack([first, (first + 0.5) % 1], dim=2)


def _with_click(layout: Layout, depths: Tensor, position: Tensor) -> Layout:
    """Sort the objects by depth, and click on a visible part of the object that was the first."""
    inside = _distances(layout, LOOKS) < 0  # (B, N, L, L)
    depths = depths.clone()
    share = _seen(inside, depths, 0).sum((1, 2)) / inside[:, 0].sum((1, 2)).clamp(min=1)
    depths[share < 0.4, 0] = 2.0  # mostly hidden: move to the front
    seen = _seen(inside, depths, 0)
    inner = F.avg_pool2d(seen[:, None].float(), 3, 1, 1, count_include_pad=True)[:, 0] > 0.99
    weight = torch.where(inner.any((1, 2), keepdim=True), inner, seen).flatten(1).double()
    running = weight.cumsum(1)
    pixel = (running > position.double() * running[:, -1:]).int().argmax(1)
    click = (torch.stack([pixel % LOOKS, pixel // LOOKS], dim=1) + 0.5) / LOOKS
    order = depths.argsort(1)
    names = ("shape", "texture", "centre", "radius", "angle", "period", "grain", "shift", "colours")
    ordered: dict[str, Any] = {
        name: torch.stack([x[o] for x, o in zip(getattr(layout, name), order)]) for name in names
    }
    return replace(layout, clicked=(order == 0).int().argmax(1), click=click, **ordered)


def _seen(inside: Tensor, depths: Tensor, index: int) -> Tensor:
    """Return where an object is visible, (B, LOOKS, LOOKS) bool."""
    height = inside * (1 + depths[:, :, None, None])
    return inside[:, index] & (height.argmax(1) == index)


def render(layout: Layout, size: int) -> Scenes:
    """Paint scenes at `size` x `size` pixels."""
    images = _ground(layout, *_pixels(size, layout.radius.device)).flatten(2)  # (B, 3, H * W)
    instance = torch.full((len(images), size * size), -1, dtype=torch.long, device=images.device)
    side = min(size, math.ceil(REACH * 2 * layout.radius.max().item() * size) + 2)
    for slot in range(layout.radius.shape[1]):
        x, y, pixels = _window(layout.centre[:, slot], side, size)
        distance = _distance(layout, slot, x, y).flatten(1)  # (B, side * side)
        alpha = (0.5 - distance * size).clamp(0, 1)[:, None]  # one pixel of soft edge
        index = pixels[:, None].expand(-1, 3, -1)
        texture = _paint(layout, slot, x, y).flatten(2)
        images.scatter_(2, index, torch.lerp(images.gather(2, index), texture, alpha))
        instance.scatter_(1, pixels, torch.where(distance < 0, slot, instance.gather(1, pixels)))
    images, instance = images.unflatten(2, (size, size)), instance.unflatten(1, (size, size))
    mask = _per_pixel(layout.answers.long(), instance) == 1
    return Scenes(images, layout.click, mask, instance, layout)


def _window(centre: Tensor, side: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return x (B, 1, side), y (B, side, 1) and flat indices of the pixels around a centre."""
    corner = (centre * size - side / 2).round().long().clamp(0, size - side)
    steps = torch.arange(side, device=centre.device)
    columns = corner[:, :1, None] + steps  # (B, 1, side)
    rows = corner[:, 1:, None] + steps[:, None]  # (B, side, 1)
    return (columns + 0.5) / size, (rows + 0.5) / size, (rows * size + columns).flatten(1)


def _per_pixel(values: Tensor, instance: Tensor) -> Tensor:
    """Map values of objects (B, N) to those of the visible objects (B, H, W); -1 = ground."""
    padded = F.pad(values, (1, 0), value=-1)
    return padded.gather(1, (instance + 1).flatten(1)).view_as(instance)


def _pixels(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return x (1, 1, W) and y (1, H, 1) of pixel centres, 0 to 1."""
    line = (torch.arange(size, device=device, dtype=torch.float32) + 0.5) / size
    return line[None, None], line[None, :, None]


def _rotated(
    layout: Layout, slot: int, x: Tensor, y: Tensor, angle: Tensor, unit: Tensor
) -> tuple[Tensor, Tensor]:
    """Return pixels relative to an object, rotated by `angle`, in units of `unit`, both (B, N)."""
    centre = layout.centre[:, slot, :, None, None]  # (B, 2, 1, 1)
    x, y = x - centre[:, 0], y - centre[:, 1]
    cos, sin = ((f(angle[:, slot]) / unit[:, slot])[:, None, None] for f in (torch.cos, torch.sin))
    return cos * x + sin * y, cos * y - sin * x


def _distance(layout: Layout, slot: int, x: Tensor, y: Tensor) -> Tensor:
    """Return the signed distance to one object of each scene, (B, H, W)."""
    radius = torch.where(layout.radius > 0, layout.radius, 1.0)  # (B, N)
    x, y = _rotated(layout, slot, x, y, layout.angle, radius)
    distance = torch.ones_like(x)
    for index, name in enumerate(layout.shapes):
        has_it = (layout.radius[:, slot] > 0) & (layout.shape[:, slot] == index)
        if has_it.any():
            distance[has_it] = SHAPES[name](x[has_it], y[has_it]) * radius[has_it, slot, None, None]
    return distance


def _distances(layout: Layout, size: int) -> Tensor:
    """Return the signed distances to all objects, (B, N, H, W)."""
    x, y = _pixels(size, layout.radius.device)
    slots = range(layout.radius.shape[1])
    return torch.stack([_distance(layout, slot, x, y) for slot in slots], dim=1)


def _paint(layout: Layout, slot: int, x: Tensor, y: Tensor) -> Tensor:
    """Return the texture of one object of each scene, on all pixels, (B, 3, H, W)."""
    u, v = _rotated(layout, slot, x, y, layout.grain, layout.period)
    u, v = u + layout.shift[:, slot, :1, None], v + layout.shift[:, slot, 1:, None]
    value = torch.zeros_like(u)
    for index, name in enumerate(layout.textures):
        has_it = layout.texture[:, slot] == index
        if has_it.any():
            texture, at = TEXTURES[name], (u[has_it], v[has_it])
            if texture is None:
                value[has_it] = edge(2 * _noise(layout.lattice[has_it], *at) - 1)
            else:
                value[has_it] = texture(*at)
    colours = layout.colours[:, slot, :, :, None, None]  # (B, 2, 3, 1, 1)
    return torch.lerp(colours[:, 0], colours[:, 1], value[:, None])


def _noise(lattice: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Return value noise, 0 to 1, (B, H, W): random numbers at integer (u, v), interpolated."""
    # Reflection at the borders allows a lattice smaller than the image.
    at = torch.stack([u, v], dim=-1) / (LATTICE / 2)
    return F.grid_sample(lattice[:, None], at, padding_mode="reflection", align_corners=False)[:, 0]


def _ground(layout: Layout, x: Tensor, y: Tensor) -> Tensor:
    """Return the ground, (B, 3, H, W): one colour, with clouds and blots in two others."""
    batch = len(layout.ground)
    colours = 0.25 + 0.5 * layout.ground[..., None, None]  # (B, 3, 3, 1, 1)
    u, v = (line.expand(batch, y.shape[1], x.shape[2]) for line in (x, y))
    if not layout.clutter:
        return colours[:, 0].expand(-1, -1, *u.shape[1:]).clone()
    coarse = _noise(layout.lattice, 5 * u - 3, 5 * v - 3)
    fine = _noise(layout.lattice, 22 * u - 9, 22 * v - 9)
    clouds = layout.clutter * edge(2 * (0.6 * coarse + 0.4 * fine) - 1)
    ground = torch.lerp(colours[:, 0], colours[:, 1], clouds[:, None])
    return torch.lerp(ground, colours[:, 2], _blots(layout, u, v)[:, None])


def _blots(layout: Layout, u: Tensor, v: Tensor) -> Tensor:
    """Return the opacity of the blots, 0 to 1, (B, H, W): one ellipse per cell, some too small."""
    cells = [(line * DEBRIS).long().clamp(0, DEBRIS - 1) for line in (u, v)]
    index = (cells[1] * DEBRIS + cells[0]).flatten(1)[:, None].expand(-1, 6, -1)  # (B, 6, H * W)
    blot = layout.debris.flatten(2).gather(2, index).unflatten(2, u.shape[1:])  # (B, 6, H, W)
    x = u * DEBRIS - cells[0] - 0.3 - 0.4 * blot[:, 0]
    y = v * DEBRIS - cells[1] - 0.3 - 0.4 * blot[:, 1]
    cos, sin = torch.cos(math.pi * blot[:, 2]), torch.sin(math.pi * blot[:, 2])
    radius = 0.3 * blot[:, 3] * layout.clutter + 1e-3
    distance = torch.hypot(
        (cos * x + sin * y) / radius, (cos * y - sin * x) / (radius * (0.4 + 0.6 * blot[:, 4]))
    )
    return (3 * (1 - distance)).clamp(0, 1) * blot[:, 5]
