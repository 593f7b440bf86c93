"""What is measured on the images that a plan is chosen on: additive, shared by processes, saved as it goes.

    order         a first look at a few images: what the best blocks of each order would lose, and which blocks may matter
    blocks        pass 1: where attention goes and what dropping blocks would do (`BlockStatistics`)
    candidates    pass 2: what each candidate does to the output of its head (`CandidateErrors`)
    weights       how much the target feels each layer: the error with half of that layer's blocks skipped, and of all layers together

Two passes because the best blocks must be known before what is left of the output without them can be computed exactly.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bsa_vision import files
from bsa_vision.adapters import Observation, inspect, observe
from bsa_vision.errors import PlanError
from bsa_vision.model_spec import LayerSpec, ModelSpec
from bsa_vision.plan import PatternLike
from bsa_vision.tuning import candidates as table
from bsa_vision.tuning import processes
from bsa_vision.tuning.statistics import BlockStatistics, CandidateErrors, Sums
from bsa_vision.tuning.trial import Target, Tuned, make_plan, target_errors
from masks import Pattern, TokenLayout

FORMAT, VERSION = "bsa-vision/statistics", 1
KEPT = (0.25, 0.5)  # of the blocks, when orders are compared
LOOK = 2  # images of a first look, on which orders are compared
SECONDS = 5.0  # between two savings

OnStep = Callable[[str, int, int], None]  # what is done, how much of it, of how much


@dataclass
class Calibration:
    """Sums over the first images, as many as `done` says, and the weights of the first layers.

    identity  what the sums are of: the model, its weights, the images, the options
    witness   size and length of the target of the first image: functions have no name that tells them apart
    orders    what each order would lose, where orders were compared
    compared  [layer]: (H, R, K) blocks of each row that are compared with each other
    weights   per layer, and of all together at last: the target's error for each of some images
    """

    identity: Mapping[str, Any]
    layout: TokenLayout | None = None
    witness: list[float] = field(default_factory=list)
    orders: list[dict[str, Any]] = field(default_factory=list)
    compared: list[Tensor] = field(default_factory=list)
    blocks: list[BlockStatistics] = field(default_factory=list)
    candidates: list[CandidateErrors] = field(default_factory=list)
    weights: list[list[float]] = field(default_factory=list)
    done: dict[str, int] = field(default_factory=lambda: {"blocks": 0, "candidates": 0})

    def dumps(self) -> bytes:
        """As a safetensors file."""
        from safetensors.torch import save

        tensors = {
            f"{kind}.{index}.{name}": tensor
            for kind, all_sums in (("blocks", self.blocks), ("candidates", self.candidates))
            for index, sums in enumerate(all_sums)
            for name, tensor in sums.tensors().items()
        }
        tensors |= {f"compared.{index}": tensor.contiguous() for index, tensor in enumerate(self.compared)}
        about = {
            "identity": self.identity,
            "layout": None if self.layout is None else asdict(self.layout),
            "witness": self.witness,
            "orders": self.orders,
            "weights": self.weights,
            "done": self.done,
        }
        return save(tensors, {"format": FORMAT, "version": str(VERSION), "about": json.dumps(about)})

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """ValueError for a file that is none, or of another version."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if metadata.get("format") != FORMAT or metadata.get("version") != str(VERSION):
                raise ValueError(f"format {metadata.get('format')!r}, version {metadata.get('version')!r}")
            return cls._of(tensors, json.loads(metadata["about"]))
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} holds no statistics that this bsa-vision reads ({error}): give another file, or delete it to start anew."
            ) from None

    @classmethod
    def _of(cls, tensors: dict[str, Tensor], about: dict[str, Any]) -> Calibration:
        layout = about.pop("layout")
        if layout is not None:
            grid, tile = tuple(layout.pop("grid")), tuple(layout.pop("tile"))
            layout = TokenLayout(grid, tile=tile, **layout)
        compared = [
            tensors.pop(f"compared.{index}") for index in range(sum(x.startswith("compared.") for x in tensors))
        ]
        return cls(
            layout=layout,
            compared=compared,
            blocks=_sums(BlockStatistics, "blocks", tensors),
            candidates=_sums(CandidateErrors, "candidates", tensors),
            **about,
        )


def _sums(kind: Any, prefix: str, tensors: Mapping[str, Tensor]) -> list[Any]:
    """What `Calibration.dumps` wrote of one kind, layer by layer."""
    found: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        own, index, attribute = name.split(".")
        if own == prefix:
            found.setdefault(int(index), {})[attribute] = tensor
    return [kind(**found[index]) for index in sorted(found)]


class Store:
    """The file of a calibration, written by the first process; None = it is kept in memory only."""

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self.path = None if path is None else Path(path)
        if self.path is not None and (self.path.is_dir() or not self.path.resolve().parent.is_dir()):
            raise ValueError(f"statistics={str(path)!r}: expected a file in a folder that is there; give such a path.")
        self.saved = time.monotonic()

    def open(self, identity: Mapping[str, Any], resume: bool) -> Calibration:
        """What is in the first process's file, where one may go on from it; otherwise nothing yet.

        FileExistsError for a file and no `resume`, ValueError for one made of something else.
        """
        found: Calibration | Exception | None = None
        if processes.place()[0] == 0:
            try:
                found = self._open(identity, resume)
            except (ValueError, OSError) as error:
                found = error
        found = processes.of_the_first(found)
        if isinstance(found, Exception):
            raise found
        assert found is not None
        return found

    def _open(self, identity: Mapping[str, Any], resume: bool) -> Calibration:
        if self.path is None or not self.path.exists():
            return Calibration(identity)
        if not resume:
            raise FileExistsError(
                f"{self.path} holds statistics already: resume=True (--resume) goes on from them, for any budget; or delete the file."
            )
        found = Calibration.load(self.path)
        other = [name for name, value in identity.items() if found.identity.get(name) != value]
        if other:
            was = ", ".join(f"{name} {found.identity.get(name)!r} instead of {identity[name]!r}" for name in other)
            raise ValueError(f"{self.path} holds statistics of something else: {was}; give another file or delete it.")
        return found

    def save(self, calibration: Calibration, now: bool = False) -> None:
        """Every few seconds, or now. A file that cannot be written costs a warning, and not what was measured."""
        if self.path is None or processes.place()[0] or (not now and time.monotonic() - self.saved < SECONDS):
            return
        try:
            files.write(self.path, calibration.dumps())
        except OSError as error:
            warnings.warn(
                f"statistics could not be saved to {self.path} ({error}): tuning goes on without; what was saved before is still there.",
                RuntimeWarning,
                stacklevel=2,
            )
            self.path = None
        self.saved = time.monotonic()


def digest(items: Iterable[Any]) -> str:
    """Of the contents of tensors, wherever they are in these items."""
    found = hashlib.sha256()
    for item in items:
        if isinstance(item, Tensor):
            found.update(f"{tuple(item.shape)} {item.dtype}".encode())
            found.update(item.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        elif hasattr(item, "__array_interface__"):  # arrays, photographs
            found.update(digest([torch.from_numpy(np.array(item))]).encode())
        elif isinstance(item, Mapping):
            found.update(digest(x for pair in item.items() for x in pair).encode())
        elif isinstance(item, (list, tuple)):
            found.update(digest(item).encode())
        else:
            found.update(repr(item).encode())
    return found.hexdigest()[:16]


# The passes


@dataclass(frozen=True)
class Options:
    """How to calibrate.

    names   of candidates
    layout  `TokenLayout`'s order ("auto" compares), tile and block_size
    """

    layers: tuple[LayerSpec, ...]
    names: tuple[str, ...]
    target: Target
    layout: Mapping[str, Any]


@torch.no_grad()
def calibrate(
    model: nn.Module,
    images: Sequence[Any],
    calibration: Calibration,
    store: Store,
    options: Options,
    on_step: OnStep = lambda what, done, of: None,
) -> Tuned:
    """Whatever of the passes `calibration` does not hold yet; every process gets all images, and looks at its share."""
    spec = inspect(model)
    _check_witness(calibration, options.target(model, images[0]))
    passes = _Passes(model, images, calibration, store, options.layers, options.target, on_step)
    if calibration.layout is None:
        passes.choose_layout(spec, options.layout)
    assert calibration.layout is not None
    where = calibration.layout
    if not calibration.blocks:
        calibration.blocks = [BlockStatistics.empty(x.shape[0], where, x.shape[-1]) for x in calibration.compared]
    passes.run(
        "blocks", calibration.blocks, lambda sums, index, seen: sums.add(seen, where, calibration.compared[index])
    )
    found = [
        _options(options.names, own, where, among)
        for own, among in zip(calibration.blocks, calibration.compared, strict=True)
    ]
    masks = [torch.stack([torch.stack([mask for _, mask in head]) for head in layer]) for layer in found]
    if not calibration.candidates:
        calibration.candidates = [CandidateErrors.empty(*mask.shape[:2]) for mask in masks]
    passes.run(
        "candidates",
        calibration.candidates,
        lambda sums, index, seen: sums.add(seen, where, masks[index].to(seen.q.device)),
    )
    alone = tuple(
        own.error / blocks.total.clamp(min=1e-300)
        for own, blocks in zip(calibration.candidates, calibration.blocks, strict=True)
    )
    tuned = Tuned(
        spec, where, options.layers, tuple(found), alone, alone, tuple(x.kept for x in calibration.candidates)
    )
    return replace(tuned, errors=passes.weigh(tuned))


@dataclass(frozen=True)
class _Passes:
    """What the passes have in common."""

    model: nn.Module
    images: Sequence[Any]
    calibration: Calibration
    store: Store
    layers: tuple[LayerSpec, ...]
    target: Target
    on_step: OnStep

    def choose_layout(self, spec: ModelSpec, options: Mapping[str, Any]) -> None:
        """The layout of these images, with order="auto" the one that loses least, and the blocks to compare.

        By `drop`, not by mass: on heads that matter little, attention that spreads over the image can outvote those that must be local.
        """
        auto = options["order"] == "auto"
        given = [options] if not auto else _orders(options)
        found: dict[TokenLayout, dict[str, BlockStatistics]] = {}

        def see(seen: Observation) -> None:
            if seen.layer not in self.layers:
                return
            for one in given:
                layout = TokenLayout(seen.grid, start=spec.start, end=spec.end, **one)
                _same_size(layout, next(iter(found), layout), seen)
                own = found.setdefault(layout, {})
                sums = own.setdefault(seen.layer.key, BlockStatistics.empty(seen.layer.heads, layout))
                sums.add(seen, layout, total=one is given[0])

        some = self.images[:LOOK]
        with observe(self.model, see):
            for number, image in enumerate(some):
                self.target(self.model, image)
                self.on_step("order of tokens", number + 1, len(some))
        ran = next(iter(found.values()), {})
        missing = [layer for layer in self.layers if layer.key not in ran]
        if missing:
            raise ValueError(
                f"target ran no attention of {', '.join(layer.name for layer in missing)}: all layers to tune must run, inside the model that is "
                "given; check target, or choose among the others with layers=."
            )
        _check_finite(own for sums in found.values() for own in sums.values())
        first = next(iter(found.values()))  # its totals are those of all
        losses = {
            layout: sum(_loss(own, layout, first[key].total) for key, own in sums.items())
            for layout, sums in found.items()
        }
        best = min(losses, key=lambda layout: losses[layout])
        if auto:
            self.calibration.orders = [
                {"order": x.order, "tile": list(x.tile), "lost": loss / len(self.layers)} for x, loss in losses.items()
            ]
        compared = [table.compared(found[best][layer.key], best) for layer in self.layers]
        self.calibration.layout, self.calibration.compared = processes.of_the_first((best, compared))

    def run(self, name: str, sums: Sequence[Sums], add: Callable[[Any, int, Observation], None]) -> None:
        """Every image from the first that is not done on, one for each process at a time."""
        own, count = processes.place()
        index_of = {layer.key: index for index, layer in enumerate(self.layers)}
        done, layout = self.calibration.done, self.calibration.layout
        assert layout is not None
        what = {"blocks": "where attention goes", "candidates": "what candidates cost"}[name]
        fresh = [type(one)(**{key: torch.zeros_like(x) for key, x in one.tensors().items()}) for one in sums]

        def see(seen: Observation) -> None:
            index = index_of.get(seen.layer.key)
            if index is not None:
                _same_size(replace(layout, grid=seen.grid), layout, seen)
                add(fresh[index], index, seen)

        with observe(self.model, see):
            while done[name] < len(self.images):
                here = self.images[done[name] + own : done[name] + own + 1]  # nothing, at the end
                processes.together(partial(self._look_at, here))
                news = [x for one in fresh for x in one.tensors().values()]
                processes.add_up(news)
                for total, new in zip((x for one in sums for x in one.tensors().values()), news, strict=True):
                    total += new
                    new.zero_()
                done[name] = min(done[name] + count, len(self.images))
                _check_finite(sums)
                self.store.save(self.calibration, now=done[name] == len(self.images))
                self.on_step(what, done[name], len(self.images))

    def _look_at(self, images: Sequence[Any]) -> list[Tensor]:
        return [self.target(self.model, image) for image in images]

    def weigh(self, tuned: Tuned) -> tuple[Tensor, ...]:
        """Errors of candidates as shares of the target's squared length: those of layers times what the target feels of each.

        That is measured with half of a layer's blocks skipped, and scaled so that it is right for all layers together.
        """
        layers = len(self.layers)
        some = self.images[: max(1, 2 * len(self.images) // (layers + 1))]
        halves = [[_nearest_half(head) for head in own] for own in tuned.options]
        expected = [
            sum(float(error[head, pick]) for head, pick in enumerate(picks))
            for error, picks in zip(tuned.alone, halves, strict=True)
        ]
        weights, own = self.calibration.weights, processes.share(some)
        references = processes.together(partial(self._look_at, own)) if len(weights) <= layers else []
        while len(weights) <= layers:
            now = len(weights)  # the last one is for all layers
            picks = [half if now in (index, layers) else [0] * len(half) for index, half in enumerate(halves)]
            weights.append(target_errors(self.model, make_plan(tuned, picks), own, references, self.target))
            self.store.save(self.calibration, now=now == layers)
            self.on_step("how much each layer matters", len(weights), layers + 1)
        felt = [sum(error**2 for error in errors) / len(errors) for errors in weights]
        together = felt[-1] / max(sum(felt[:-1]), 1e-300)
        return tuple(
            error * (together * here / max(share, 1e-300))
            for error, here, share in zip(tuned.alone, felt, expected, strict=False)
        )


def _check_witness(calibration: Calibration, found: Any) -> None:
    if not isinstance(found, Tensor) or not found.is_floating_point() or not found.numel():
        raise ValueError(
            f"target returned a {type(found).__name__}: expected a tensor of floating-point features; return one."
        )
    length = float(found.double().norm())
    if not 0 < length < torch.inf:
        raise ValueError(
            f"target returned features of length {length}, of these images: they must be finite and not all zero; check images, weights and target."
        )
    known = calibration.witness or [found.numel(), length]
    if known[0] != found.numel() or abs(known[1] - length) > 1e-2 * length:
        raise ValueError(
            f"statistics were made for another target: {known[0]:.0f} numbers of length {known[1]:.6g}, now {found.numel()} of {length:.6g}; "
            "pass the same target, or another file."
        )
    calibration.witness = known


def _check_finite(all_sums: Iterable[Sums]) -> None:
    if not all(bool(tensor.isfinite().all()) for sums in all_sums for tensor in sums.tensors().values()):
        raise ValueError(
            "attention of these images is not finite: check the images (NaN, infinite values) and the model's weights."
        )


def _orders(options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Those that "auto" compares: rows, tiles, and tiles half as high and twice as wide."""
    high, wide = options["tile"]
    orders = [("raster", (high, wide)), ("tile", (high, wide))]
    if high % 2 == 0:
        orders.append(("tile", (high // 2, 2 * wide)))
    return [{**options, "order": order, "tile": tile} for order, tile in orders]


def _loss(statistics: BlockStatistics, layout: TokenLayout, total: Tensor) -> float:
    """Squared change of a layer's output, as a share of its squared length, by all blocks but each head's best; mean over `KEPT`."""
    score = statistics.drop.masked_fill(Pattern("special")(layout), torch.inf).flatten(1)
    worst_first = score.sort(-1).values
    lost = [worst_first[:, : round((1 - keep) * score.shape[1])] for keep in KEPT]
    return sum(float(one[one.isfinite()].sum() / total.clamp(min=1e-300)) for one in lost) / len(KEPT)


def _same_size(layout: TokenLayout, first: TokenLayout, seen: Observation) -> None:
    if layout.grid != first.grid or seen.k.shape[2] != layout.num_tokens:
        raise ValueError(
            f"images of {first.grid} and {layout.grid} patches: one plan is tuned for one size; resize or crop the images."
        )


def _options(names: Sequence[str], statistics: BlockStatistics, layout: TokenLayout, among: Tensor) -> Any:
    """[head]: (pattern, mask) of every candidate, dense first; as many for each head."""
    dense = (None, torch.ones(layout.num_blocks, layout.num_blocks, dtype=torch.bool, device="cpu"))
    shared = table.geometric(names, layout)
    own: list[list[tuple[PatternLike | None, Tensor]]] = [[] for _ in statistics.mass]
    if "static" in names:
        own = [
            [dense if mask.all() else (pattern, mask) for pattern, mask in head]
            for head in table.static(statistics, layout, among)
        ]
    return tuple((dense, *shared, *head) for head in own)


def _nearest_half(head: Sequence[tuple[Any, Tensor]]) -> int:
    """The candidate that skips about half of the blocks, best blocks before geometry."""
    return min(range(len(head)), key=lambda i: (abs(head[i][1].float().mean().item() - 0.5), -i))


def layers_to_tune(spec: ModelSpec, layers: Iterable[int | str] | None) -> tuple[LayerSpec, ...]:
    """Those asked for (indices, keys or module paths), or all that attend to the whole image. PlanError for others."""
    able = [layer for layer in spec.layers if not layer.window and not layer.frames]
    if layers is None:
        if not able:
            raise PlanError("no layer of this model attends to the whole image: there is nothing to tune.")
        return tuple(able)
    wanted = [layers] if isinstance(layers, (int, str)) else list(layers)
    found = [
        next((layer for layer in able if layer.index == one), None) if isinstance(one, int) else spec.find(one)
        for one in wanted
    ]
    if not wanted or any(layer not in able for layer in found):
        raise PlanError(
            f"layers={wanted}: allowed are those that attend to the whole image, {', '.join(layer.name for layer in able)}; choose among them."
        )
    return tuple(layer for layer in able if layer in found)
