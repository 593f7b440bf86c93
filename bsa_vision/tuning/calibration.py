"""Measure on the calibration images what candidates cost and how much each layer matters.

    order       compare token orders on a few images, and select the blocks that may matter
    blocks      pass 1: where attention goes and what dropping blocks would do (`BlockStatistics`)
    candidates  pass 2: how each candidate changes the output of its head (`CandidateErrors`)
    weights     how much the target depends on each layer: its error with half of that layer's
                blocks skipped, and with half of the blocks of all layers skipped

The passes are sums over images, shared among processes and saved to a file. There are two, because
the exact error of a candidate can be computed only once its blocks are known. Best blocks are found
from all images, for the plan, and from each half of the images, to be evaluated on the other half
(cross-fitting). On the images that they were found on they look better than they are.
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

ORDER_DENSITIES = (0.25, 0.5)  # shares of the blocks kept when token orders are compared
ORDER_IMAGES = 2  # images on which token orders are compared

OnStep = Callable[[str, int, int], None]  # (name of the step, amount done, total amount)
Layouts = Mapping[TokenLayout, Mapping[str, BlockStatistics]]  # statistics by layout and layer key


@dataclass(frozen=True)
class Options:
    """Options of a calibration.

    names   of candidates
    layout  `order` ("auto" compares orders), `tile` and `block_size` of `TokenLayout`
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
    on_step: OnStep = lambda step, done, total: None,
) -> Tuned:
    """Complete `calibration` and return its results.

    Every process is given all images and runs its share of them.
    """
    spec = inspect(model)
    _check_witness(calibration, options.target(model, images[0]))
    passes = _Passes(model, images, calibration, store, options.layers, options.target, on_step)
    if calibration.layout is None:
        passes.choose_layout(spec, options.layout)
    passes.find_blocks()
    passes.measure_candidates(options.names)
    layout = calibration.layout
    assert layout is not None
    alone = tuple(
        sums.error / total.clamp(min=1e-300)
        for sums, total in zip(calibration.candidates, calibration.totals, strict=True)
    )
    kept = tuple(sums.kept for sums in calibration.candidates)

    def tuned(which: int) -> Tuned:
        dropping = [of_layer[which] for of_layer in calibration.dropping]
        table = candidates.options(options.names, dropping, layout)
        return Tuned(spec, layout, options.layers, table, alone, alone, kept)

    of_all, *of_halves = [tuned(which) for which in range(len(calibration.dropping[0]))]
    return replace(of_all, errors=passes.predict_errors(of_halves))


@dataclass(frozen=True)
class _Passes:
    """The passes over the calibration images, and what they share."""

    model: nn.Module
    images: Sequence[Any]
    calibration: Calibration
    store: Store
    layers: tuple[LayerSpec, ...]
    target: Target
    on_step: OnStep

    @property
    def halves(self) -> int:
        """Number of halves; image i belongs to half i modulo it. A single image is its own half."""
        return min(2, len(self.images))

    def choose_layout(self, spec: ModelSpec, options: Mapping[str, Any]) -> None:
        """Choose the layout, and the blocks of each row that are compared with each other.

        With order="auto" the layout of least loss is chosen. Losses are those of `drop`, not of
        attention mass: by mass, heads that matter little and attend everywhere would outvote heads
        that need their neighbourhood.
        """
        found = self._statistics_by_layout(spec, _orders(options))
        first = next(iter(found.values()), {})
        missing = [layer.name for layer in self.layers if layer.key not in first]
        if missing:
            raise ValueError(
                f"target ran no attention of {', '.join(missing)}: every tuned layer must run "
                "inside model; check target, or pass the other layers as layers=."
            )
        _check_finite(sums for by_layer in found.values() for sums in by_layer.values())
        losses = {  # `total` is the same for all layouts and computed for the first only
            layout: sum(_loss(sums, layout, first[key].total) for key, sums in by_layer.items())
            for layout, by_layer in found.items()
        }
        best = min(losses, key=lambda layout: losses[layout])
        if options["order"] == "auto":
            self.calibration.orders = [
                {"order": x.order, "tile": list(x.tile), "lost": loss / len(self.layers)}
                for x, loss in losses.items()
            ]
        compared = [candidates.compared(found[best][layer.key], best) for layer in self.layers]
        self.calibration.layout, self.calibration.compared = distributed.broadcast((best, compared))

    def _statistics_by_layout(
        self, spec: ModelSpec, orders: Sequence[Mapping[str, Any]]
    ) -> Layouts:
        """Return the statistics of `ORDER_IMAGES` images, by layout and layer key."""
        found: dict[TokenLayout, dict[str, BlockStatistics]] = {}
        prefix, suffix = spec.num_prefix_tokens, spec.num_suffix_tokens

        def add(call: Observation) -> None:
            layer = call.layer
            if layer not in self.layers:
                return
            for order in orders:
                layout = TokenLayout(
                    call.grid, num_prefix_tokens=prefix, num_suffix_tokens=suffix, **order
                )
                _check_size(layout, next(iter(found), layout), call)
                by_layer = found.setdefault(layout, {})
                if layer.key not in by_layer:
                    by_layer[layer.key] = BlockStatistics.empty(layer.heads, layout)
                by_layer[layer.key].add(call, layout, total=order is orders[0])

        images = self.images[:ORDER_IMAGES]
        with observe(self.model, add):
            for done, image in enumerate(images, 1):
                self.target(self.model, image)
                self.on_step("comparing token orders", done, len(images))
        return found

    def find_blocks(self) -> None:
        """Run pass 1, and find the order in which each head drops its blocks."""
        state = self.calibration
        layout, compared = state.layout, state.compared
        assert layout is not None
        if state.dropping:
            return
        layers = len(self.layers)
        if not state.blocks:
            state.blocks = [
                BlockStatistics.empty(among.shape[0], layout, among.shape[-1])
                for _ in range(self.halves)
                for among in compared
            ]

        def add(sums: Sequence[Any], half: int, index: int, call: Observation) -> None:
            sums[half * layers + index].add(call, layout, compared[index])

        self.run_pass("blocks", state.blocks, add)
        for index, among in enumerate(compared):
            of_halves = state.blocks[index::layers]
            of_all = sum(of_halves[1:], of_halves[0])
            # Reversed: each half is evaluated with the blocks that were found on the other half.
            found = [
                candidates.order_of_dropping(sums, layout, among).float()
                for sums in (of_all, *reversed(of_halves))
            ]
            state.dropping.append(torch.stack(found))
            state.totals.append(of_all.total)
        state.blocks = []
        self.store.save(state, now=True)

    def measure_candidates(self, names: Sequence[str]) -> None:
        """Run pass 2."""
        state, layout = self.calibration, self.calibration.layout
        assert layout is not None
        masks = [
            [_masks(names, dropping[1 + half], layout) for dropping in state.dropping]
            for half in range(self.halves)
        ]
        if not state.candidates:
            state.candidates = [CandidateErrors.empty(*mask.shape[:2]) for mask in masks[0]]

        def add(sums: Sequence[Any], half: int, index: int, call: Observation) -> None:
            sums[index].add(call, layout, masks[half][index].to(call.q.device))

        self.run_pass("candidates", state.candidates, add)

    def run_pass(
        self,
        name: str,
        sums: Sequence[Any],
        add: Callable[[Sequence[Any], int, int, Observation], None],
    ) -> None:
        """Run the target on all images that are not done yet, one per process at a time.

        Each attention call of a tuned layer is passed to add(sums, half, index of layer, call).
        """
        rank, size = distributed.rank_and_size()
        index_of = {layer.key: index for index, layer in enumerate(self.layers)}
        done, layout = self.calibration.done, self.calibration.layout
        assert layout is not None
        step = {"blocks": "pass 1: block statistics", "candidates": "pass 2: candidates"}[name]
        fresh = [
            type(one)(**{key: torch.zeros_like(x) for key, x in one.tensors().items()})
            for one in sums
        ]

        def add_call(call: Observation) -> None:
            index = index_of.get(call.layer.key)
            if index is not None:
                _check_size(replace(layout, grid=call.grid), layout, call)
                add(fresh, (done[name] + rank) % self.halves, index, call)

        with observe(self.model, add_call):
            while done[name] < len(self.images):
                next_image = done[name] + rank
                images = self.images[next_image : next_image + 1]  # may be none in the last round
                distributed.run_together(partial(self._run_target, images))
                # Tensor by tensor: a copy of all sums could take gigabytes.
                for total, one in zip(sums, fresh, strict=True):
                    news = list(one.tensors().values())
                    distributed.add_up(news)
                    for to, new in zip(total.tensors().values(), news, strict=True):
                        to += new
                        new.zero_()
                done[name] = min(done[name] + size, len(self.images))
                _check_finite(sums)
                self.store.save(self.calibration, now=done[name] == len(self.images))
                self.on_step(step, done[name], len(self.images))

    def _run_target(self, images: Sequence[Any]) -> list[Tensor]:
        return [self.target(self.model, image) for image in images]

    def predict_errors(self, halves: Sequence[Tuned]) -> tuple[Tensor, ...]:
        """Return the predicted squared errors of the target, (H, K) per layer.

        halves  candidates with which each half of the images is evaluated

        They are shares of the target's squared norm: the layer's errors times its weight. The
        weight is the error of the target with half of the layer's blocks skipped, divided by the
        error of the layer. Weights are scaled so that the prediction is right if half of the blocks
        of all layers are skipped.
        """
        alone = halves[0].alone
        picks = [[candidates.nearest_half(head) for head in heads] for heads in halves[0].options]
        expected = [
            sum(float(error[head, pick]) for head, pick in enumerate(chosen))
            for error, chosen in zip(alone, picks, strict=True)
        ]
        self._measure_weights(halves, picks)
        measured = [sum(e**2 for e in errors) / len(errors) for errors in self.calibration.weights]
        scale = measured[-1] / max(sum(measured[:-1]), 1e-300)
        return tuple(
            error * (scale * of_layer / max(share, 1e-300))
            for error, of_layer, share in zip(alone, measured, expected, strict=False)
        )

    def _measure_weights(self, halves: Sequence[Tuned], picks: Sequence[Sequence[int]]) -> None:
        """Complete `calibration.weights`, with about two runs of the target per image."""
        layers, weights = len(self.layers), self.calibration.weights
        if len(weights) > layers:
            return
        images = self.images[: max(1, 2 * len(self.images) // (layers + 1))]
        shares = [distributed.share(images[half :: len(halves)]) for half in range(len(halves))]
        references = [distributed.run_together(partial(self._run_target, mine)) for mine in shares]
        while len(weights) <= layers:
            current = len(weights)  # `layers` stands for all layers together
            chosen = [
                picked if current in (index, layers) else [0] * len(picked)
                for index, picked in enumerate(picks)
            ]
            errors: list[float] = []
            for half, mine, dense in zip(halves, shares, references, strict=True):
                plan = make_plan(half, chosen)
                errors += target_errors(self.model, plan, mine, dense, self.target)
            weights.append(errors)
            self.store.save(self.calibration, now=current == layers)
            self.on_step("weights of the layers", len(weights), layers + 1)


def _masks(names: Sequence[str], dropping: Tensor, layout: TokenLayout) -> Tensor:
    """Return (H, K, R, C) bool, the masks of all candidates of one layer."""
    heads = candidates.layer_options(names, dropping, layout)
    return torch.stack([torch.stack([mask for _, mask in head]) for head in heads])


def _check_witness(calibration: Calibration, output: Any) -> None:
    """Raise ValueError if the target's output is unusable, or not that of the saved statistics."""
    if not isinstance(output, Tensor) or not output.is_floating_point() or not output.numel():
        raise ValueError(
            f"target returned a {type(output).__name__}: expected a tensor of floating-point "
            "features."
        )
    if output.is_meta:
        raise ValueError(
            "target returned features on the meta device: the model has no weights; load them "
            "first."
        )
    norm = float(output.double().norm())
    if not 0 < norm < torch.inf:
        raise ValueError(
            f"target returned features of norm {norm} for these images: they must be finite and "
            "not all zero; check images, weights and target."
        )
    known = calibration.witness or [output.numel(), norm]
    if known[0] != output.numel() or abs(known[1] - norm) > 1e-2 * norm:
        raise ValueError(
            f"statistics were made for another target: {known[0]:.0f} numbers of norm "
            f"{known[1]:.6g}, now {output.numel()} of {norm:.6g}; pass the same target, or another "
            "file."
        )
    calibration.witness = known


def _check_finite(all_sums: Iterable[Sums]) -> None:
    tensors = (tensor for sums in all_sums for tensor in sums.tensors().values())
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise ValueError(
            "attention of these images is not finite: check the images (NaN, infinite values) and "
            "the model's weights."
        )


def _orders(options: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the layout options to compare; several for order="auto".

    These are rows (raster), tiles, and tiles half as high and twice as wide.
    """
    if options["order"] != "auto":
        return [options]
    height, width = options["tile"]
    orders = [("raster", (height, width)), ("tile", (height, width))]
    if height % 2 == 0:
        orders.append(("tile", (height // 2, 2 * width)))
    return [{**options, "order": order, "tile": tile} for order, tile in orders]


def _loss(statistics: BlockStatistics, layout: TokenLayout, total: Tensor) -> float:
    """Return the squared change of a layer's output if each head keeps only its best blocks.

    As a share of the output's squared norm, mean over `ORDER_DENSITIES`. Changes by blocks are
    added up.
    """
    score = statistics.drop.masked_fill(Pattern("special")(layout), torch.inf).flatten(1)
    ascending = score.sort(-1).values
    loss = 0.0
    for density in ORDER_DENSITIES:
        lost = ascending[:, : round((1 - density) * score.shape[1])]
        loss += float(lost[lost.isfinite()].sum() / total.clamp(min=1e-300))
    return loss / len(ORDER_DENSITIES)


def _check_size(layout: TokenLayout, first: TokenLayout, call: Observation) -> None:
    if layout.grid != first.grid or call.k.shape[2] != layout.num_tokens:
        raise ValueError(
            f"images of {first.grid} and {layout.grid} patches: a plan is tuned for one image "
            "size; resize or crop them."
        )
