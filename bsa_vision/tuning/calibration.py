"""What is measured on the images that a plan is chosen on: additive, shared by processes, saved as it goes.

    order         a first look at a few images: what the best blocks of each order would lose, and which blocks may matter
    blocks        pass 1: where attention goes and what dropping blocks would do (`BlockStatistics`)
    candidates    pass 2: what each candidate does to the output of its head (`CandidateErrors`)
    weights       how much the target feels each layer: the error with half of that layer's blocks skipped, and of all layers together

Two passes because the best blocks must be known before what is left of the output without them can be computed exactly. Best blocks are
found once from all images, for the plan, and once from each half of them, to be judged on the other half: on images that they were
found on they look better than they are (cross-fitting).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bsa_vision.adapters import Observation, inspect, observe
from bsa_vision.masks import Pattern, TokenLayout
from bsa_vision.plans.model_spec import LayerSpec, ModelSpec
from bsa_vision.tuning import candidates, distributed
from bsa_vision.tuning.statistics import BlockStatistics, CandidateErrors, Sums
from bsa_vision.tuning.store import Calibration, Store
from bsa_vision.tuning.trial import Target, Tuned, make_plan, target_errors

KEPT = (0.25, 0.5)  # of the blocks, when orders are compared
LOOK = 2  # images of a first look, on which orders are compared

OnStep = Callable[[str, int, int], None]  # what is done, how much of it, of how much


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
    passes.find_blocks()
    passes.judge(options.names)
    dropping, where = calibration.dropping, calibration.layout
    assert where is not None
    alone = tuple(
        own.error / total.clamp(min=1e-300)
        for own, total in zip(calibration.candidates, calibration.totals, strict=True)
    )
    kept = tuple(own.kept for own in calibration.candidates)
    found, *halves = [
        Tuned(
            spec,
            where,
            options.layers,
            candidates.options(options.names, [own[which] for own in dropping], where),
            alone,
            alone,
            kept,
        )
        for which in range(len(dropping[0]))
    ]
    return replace(found, errors=passes.weigh(halves))


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

    @property
    def halves(self) -> int:
        """Image i is of half i modulo this; a single image is all there is to find blocks on and to be judged on."""
        return min(2, len(self.images))

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
                layout = TokenLayout(
                    seen.grid,
                    num_prefix_tokens=spec.num_prefix_tokens,
                    num_suffix_tokens=spec.num_suffix_tokens,
                    **one,
                )
                _same_size(layout, next(iter(found), layout), seen)
                own = found.setdefault(layout, {})
                sums = own.setdefault(
                    seen.layer.key, BlockStatistics.empty(seen.layer.heads, layout)
                )
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
                {"order": x.order, "tile": list(x.tile), "lost": loss / len(self.layers)}
                for x, loss in losses.items()
            ]
        compared = [candidates.compared(found[best][layer.key], best) for layer in self.layers]
        self.calibration.layout, self.calibration.compared = distributed.of_the_first(
            (best, compared)
        )

    def find_blocks(self) -> None:
        """Pass 1, and in which order each head would drop its blocks."""
        where, compared, state = (
            self.calibration.layout,
            self.calibration.compared,
            self.calibration,
        )
        assert where is not None
        if state.dropping:
            return
        layers = len(self.layers)
        if not state.blocks:
            state.blocks = [
                BlockStatistics.empty(own.shape[0], where, own.shape[-1])
                for _ in range(self.halves)
                for own in compared
            ]
        self.run(
            "blocks",
            state.blocks,
            lambda sums, half, index, seen: sums[half * layers + index].add(
                seen, where, compared[index]
            ),
        )
        for index, among in enumerate(compared):
            of_half = state.blocks[index::layers]
            together = sum(of_half[1:], of_half[0])
            found_on = [
                together,
                *reversed(of_half),
            ]  # each half is judged by what the other one shows
            state.dropping.append(
                torch.stack(
                    [candidates.order_of_dropping(own, where, among).float() for own in found_on]
                )
            )
            state.totals.append(together.total)
        state.blocks = []
        self.store.save(state, now=True)

    def judge(self, names: Sequence[str]) -> None:
        """Pass 2."""
        where, state = self.calibration.layout, self.calibration
        assert where is not None
        masks = [
            [
                torch.stack(
                    [
                        torch.stack([mask for _, mask in head])
                        for head in candidates.layer_options(names, own[1 + half], where)
                    ]
                )
                for own in state.dropping
            ]
            for half in range(self.halves)
        ]
        if not state.candidates:
            state.candidates = [CandidateErrors.empty(*mask.shape[:2]) for mask in masks[0]]
        self.run(
            "candidates",
            state.candidates,
            lambda sums, half, index, seen: sums[index].add(
                seen, where, masks[half][index].to(seen.q.device)
            ),
        )

    def run(
        self,
        name: str,
        sums: Sequence[Any],
        add: Callable[[Sequence[Any], int, int, Observation], None],
    ) -> None:
        """Every image from the first that is not done on, one for each process at a time; add(sums, half, layer, what was seen)."""
        own, count = distributed.rank_and_size()
        index_of = {layer.key: index for index, layer in enumerate(self.layers)}
        done, layout = self.calibration.done, self.calibration.layout
        assert layout is not None
        what = {"blocks": "where attention goes", "candidates": "what candidates cost"}[name]
        fresh = [
            type(one)(**{key: torch.zeros_like(x) for key, x in one.tensors().items()})
            for one in sums
        ]

        def see(seen: Observation) -> None:
            index = index_of.get(seen.layer.key)
            if index is not None:
                _same_size(replace(layout, grid=seen.grid), layout, seen)
                add(fresh, (done[name] + own) % self.halves, index, seen)

        with observe(self.model, see):
            while done[name] < len(self.images):
                here = self.images[done[name] + own : done[name] + own + 1]  # nothing, at the end
                distributed.together(partial(self._look_at, here))
                # One by one: all of them once more would be gigabytes.
                for total, one in zip(sums, fresh, strict=True):
                    news = list(one.tensors().values())
                    distributed.add_up(news)
                    for to, new in zip(total.tensors().values(), news, strict=True):
                        to += new
                        new.zero_()
                done[name] = min(done[name] + count, len(self.images))
                _check_finite(sums)
                self.store.save(self.calibration, now=done[name] == len(self.images))
                self.on_step(what, done[name], len(self.images))

    def _look_at(self, images: Sequence[Any]) -> list[Tensor]:
        return [self.target(self.model, image) for image in images]

    def weigh(self, halves: Sequence[Tuned]) -> tuple[Tensor, ...]:
        """Errors of candidates as shares of the target's squared length: those of layers times what the target feels of each.

        That is measured with half of a layer's blocks skipped, and scaled so that it is right for all layers together. `halves` have the
        candidates that each half of the images is judged by.
        """
        layers, alone = len(self.layers), halves[0].alone
        images = self.images[: max(1, 2 * len(self.images) // (layers + 1))]
        own = [distributed.share(images[half :: len(halves)]) for half in range(len(halves))]
        picks = [[candidates.nearest_half(head) for head in heads] for heads in halves[0].options]
        expected = [
            sum(float(error[head, pick]) for head, pick in enumerate(picked))
            for error, picked in zip(alone, picks, strict=True)
        ]
        weights = self.calibration.weights
        references = (
            [distributed.together(partial(self._look_at, some)) for some in own]
            if len(weights) <= layers
            else []
        )
        while len(weights) <= layers:
            now = len(weights)  # the last one is for all layers
            tried = [
                picked if now in (index, layers) else [0] * len(picked)
                for index, picked in enumerate(picks)
            ]
            weights.append(
                [
                    error
                    for half, some, dense in zip(halves, own, references, strict=True)
                    for error in target_errors(
                        self.model, make_plan(half, tried), some, dense, self.target
                    )
                ]
            )
            self.store.save(self.calibration, now=now == layers)
            self.on_step("how much each layer matters", len(weights), layers + 1)
        felt = [sum(error**2 for error in errors) / len(errors) for errors in weights]
        together = felt[-1] / max(sum(felt[:-1]), 1e-300)
        return tuple(
            error * (together * here / max(share, 1e-300))
            for error, here, share in zip(alone, felt, expected, strict=False)
        )


def _check_witness(calibration: Calibration, found: Any) -> None:
    if not isinstance(found, Tensor) or not found.is_floating_point() or not found.numel():
        raise ValueError(
            f"target returned a {type(found).__name__}: expected a tensor of floating-point features; return one."
        )
    if found.is_meta:
        raise ValueError(
            "target returned features on the meta device: this model has no weights; load them first."
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
    if not all(
        bool(tensor.isfinite().all()) for sums in all_sums for tensor in sums.tensors().values()
    ):
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
    return sum(float(one[one.isfinite()].sum() / total.clamp(min=1e-300)) for one in lost) / len(
        KEPT
    )


def _same_size(layout: TokenLayout, first: TokenLayout, seen: Observation) -> None:
    if layout.grid != first.grid or seen.k.shape[2] != layout.num_tokens:
        raise ValueError(
            f"images of {first.grid} and {layout.grid} patches: one plan is tuned for one size; resize or crop the images."
        )
