"""`tune`: a plan for a budget, from statistics, candidates and a solver, checked on images that none of these saw."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bsa_vision.adapters import inspect, observe
from bsa_vision.adapters.swap.values import state
from bsa_vision.errors import PlanError
from bsa_vision.masks import TokenLayout
from bsa_vision.masks.layout import ORDERS
from bsa_vision.measure.latency import Latency
from bsa_vision.measure.latency import latency as latency_here
from bsa_vision.models.features import eval_mode, features
from bsa_vision.plans.model_spec import LayerSpec
from bsa_vision.plans.plan import SparsityPlan
from bsa_vision.tuning import candidates as table
from bsa_vision.tuning import distributed
from bsa_vision.tuning.bounds import mean_at_most
from bsa_vision.tuning.calibration import OnStep, Options, calibrate, layers_to_tune
from bsa_vision.tuning.images import VERIFY, check_images, split
from bsa_vision.tuning.knapsack import Choice, solve
from bsa_vision.tuning.report_data import describe
from bsa_vision.tuning.store import Store, digest
from bsa_vision.tuning.trial import (
    Picks,
    Target,
    Tuned,
    layer_errors,
    make_plan,
    target_errors,
    time_plan,
)

ROUNDS = 6  # of adjusting a plan until what was asked for holds where it is measured
TIMED = 5  # rounds of a measured speed-up


def tune(
    model: nn.Module,
    images: Iterable[Any],
    *,
    sparsity: float | None = None,
    max_error: float | None = None,
    speedup: float | None = None,
    layers: Iterable[int | str] | None = None,
    candidates: Sequence[str] = table.NAMES,
    order: str = "auto",
    tile: tuple[int, int] = (8, 16),
    block_size: int = 128,
    verify: float = VERIFY,
    target: Target = features,
    seed: int = 0,
    latency: Latency | None = None,
    statistics: str | os.PathLike[str] | None = None,
    resume: bool = False,
    on_step: OnStep = lambda what, done, of: None,
) -> SparsityPlan:
    """A plan for `model`, chosen on some of `images` and checked on the others.

    images      what `target` takes with the model, all of one size: by default pixels (B, 3, h, w). At least two; 24 are good
    sparsity    fraction of the blocks of all tuned layers to skip, 0 to 1: least error among those plans; or
    max_error   relative L2 error of the target, mean over images: as sparse as it gets while the mean over images like those kept back
                stays below it, at 99 % confidence; or
    speedup     of the target, how many times as fast as dense: least error among those plans; measured here, and adjusted until it holds
    layers      indices, keys or module paths; None = all that attend to the whole image
    candidates  among "static" (best blocks of the mean map), "local_window", "axial", "strided", "special"
    order       of tokens: "tile", "raster", or "auto", whichever loses least on a few of the images
    tile        (rows, columns) in patches, and half as high and twice as wide when orders are compared
    verify      share of the images that is kept back
    target      (model, image) -> the features that are used; their error is what counts
    seed        of which images are kept back
    latency     what attention costs, for `speedup`; None = `bsa.latency`, measured here
    statistics  a file that keeps what was measured, so that another budget needs no new pass over the images
    resume      go on from that file, whether it is complete or not
    on_step     (what is done, how much of it, of how much), for progress bars

    The model must have no sparse heads, and has none afterwards. `plan.report` holds what was predicted and measured, `bsa.report` makes a
    page of it. Where `torch.distributed` has a process group, its processes share the images: all must be given all of them, and all get
    the plan. After Ctrl-C the KeyboardInterrupt says what is saved. ValueError or PlanError for budgets that cannot be met (with what can), too few images, images of several sizes, and
    results that are not finite; FileExistsError for statistics that would be overwritten.
    """
    _check_installed()
    name, wanted = _asked({"sparsity": sparsity, "max_error": max_error, "speedup": speedup})
    spec = inspect(model)
    images = check_images(images, target)
    chosen, kept_back = split(images, verify, seed)
    if name == "max_error" and len(kept_back) < 2:
        raise ValueError(
            f"{len(images)} images, of which 1 is kept back: one image says nothing about how far others are from it; give max_error more images "
            "(24 are good), or a larger verify=."
        )
    candidates = (candidates,) if isinstance(candidates, str) else tuple(candidates)
    unknown = [one for one in candidates if one not in table.NAMES]
    if unknown or not candidates:
        raise ValueError(
            f"candidates={list(candidates)}: allowed are {', '.join(table.NAMES)}; choose among them."
        )
    tuned_layers = layers_to_tune(spec, layers)
    if order not in ("auto", *ORDERS):
        raise ValueError(
            f"order={order!r}: allowed are 'auto', {', '.join(map(repr, ORDERS))}; choose one of them."
        )
    layout = dict(order=order, tile=tile, block_size=block_size)
    TokenLayout((1, 1), **{**layout, "order": "tile" if order == "auto" else order})  # type: ignore[arg-type]
    store = Store(statistics)
    identity = {
        **{
            "model": spec.fingerprint,
            "layers": [layer.key for layer in tuned_layers],
            "candidates": list(candidates),
        },
        **{"table": digest([repr(table.GEOMETRIC), table.DENSITIES, table.COMPARED])},
        **{
            "order": order,
            "tile": list(tile),
            "block_size": block_size,
            "target": _name_of(target),
        },
        **{
            "images": digest(chosen),
            "kept back": digest(kept_back),
            "weights": digest(state(model)),
        },
    }
    _check_processes(identity)
    calibration = store.open(identity, resume)
    try:
        with eval_mode(model):
            options = Options(tuned_layers, tuple(candidates), target, layout)
            tuned = calibrate(model, chosen, calibration, store, options, on_step)
            mine = distributed.share(kept_back)
            if name == "speedup":
                latency = (
                    _latency(model, chosen[0], target, tuned_layers[0])
                    if latency is None
                    else latency
                )
            trials = _Trials(
                tuned, model, name, wanted, mine, kept_back[0], target, latency, on_step
            )
            best = trials.search()
            measured = layer_errors(model, best.plan, mine, target, tuned_layers)
            curve = trials.curve()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"tune was interrupted: {store.interrupted}") from None
    about = {"chosen on": len(chosen), "kept back": len(kept_back), "seed": seed}
    notes = describe(
        tuned, best, trials.tried, {name: wanted}, about, calibration.orders, measured, curve
    )
    return replace(best.plan, notes={"tuned": notes})


def _check_installed() -> None:
    """Before minutes are spent."""
    try:
        import safetensors.torch  # noqa: F401
        import scipy.optimize  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"tuning needs scipy and safetensors ({error}): plans that exist, and everything else, work without; pip install 'bsa-vision[tune]'."
        ) from None


def _asked(asked: dict[str, float | None]) -> tuple[str, float]:
    given = {name: value for name, value in asked.items() if value is not None}
    if len(given) != 1:
        raise ValueError(
            f"tune got {', '.join(given) or 'no budget'}: exactly one of {', '.join(asked)} is needed; give e.g. sparsity=0.5."
        )
    ((name, value),) = given.items()
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits = number and (
        0 <= value < 1
        if name == "sparsity"
        else 0 < value < math.inf
        if name == "max_error"
        else 1 <= value < math.inf
    )
    if not fits:
        allowed = {
            "sparsity": "a fraction from 0 to below 1",
            "max_error": "an error above 0",
            "speedup": "at least 1",
        }
        percent = number and name == "sparsity" and 1 < value < 100
        example = f"{value / 100:g} for {value:g} %" if percent else "such a number"
        raise ValueError(f"{name}={value!r}: expected {allowed[name]}; give {example}.")
    if name == "max_error" and value > 1:
        warnings.warn(
            f"max_error={value!r} allows errors larger than the features themselves: it is relative, 0.05 is 5 %.",
            stacklevel=3,
        )
    return name, float(value)


def _name_of(target: Target) -> str:
    inner = target.func if isinstance(target, partial) else target
    given = f"({digest([*target.args, target.keywords])})" if isinstance(target, partial) else ""
    return f"{getattr(inner, '__module__', '')}.{getattr(inner, '__qualname__', type(inner).__qualname__)}{given}"


def _latency(model: nn.Module, image: Any, target: Target, layer: LayerSpec) -> Latency:
    """Of this layer's head dim, dtype and device, measured by the first process."""
    kinds: list[tuple[torch.dtype, torch.device]] = []
    with observe(
        model,
        lambda seen: kinds.append((seen.q.dtype, seen.q.device)) if seen.layer == layer else None,
    ):
        target(model, image)
    return distributed.of_the_first(
        None if distributed.place()[0] else latency_here(layer.head_dim, *kinds[0])
    )  # type: ignore[return-value]


def _check_processes(identity: Mapping[str, Any]) -> None:
    all_of_them = distributed.collect([dict(identity)])
    other = [
        name for name in identity if any(one[name] != all_of_them[0][name] for one in all_of_them)
    ]
    if other:
        raise ValueError(
            f"processes were given different {', '.join(other)}: every process needs the same model and all images; tune deals them out itself."
        )


# From a budget to a plan


@dataclass(frozen=True)
class Trial:
    """A plan that was run on the images kept back.

    asked      of the solver
    errors     of the target, one per image
    speedup    measured, where it was asked for
    """

    asked: float
    picks: Picks
    plan: SparsityPlan
    errors: tuple[float, ...]
    speedup: float | None

    @property
    def measured(self) -> float:
        """Mean error."""
        return sum(self.errors) / len(self.errors)

    @property
    def bound(self) -> float:
        """What the mean over all such images is at most, at 99 % confidence."""
        return mean_at_most(self.errors)


@dataclass
class _Trials:
    """Plans that were tried for one budget, `name` = `wanted`."""

    tuned: Tuned
    model: nn.Module
    name: str
    wanted: float
    images: Sequence[Any]  # of those kept back, this process's share
    timed: Any  # the image that speed-ups are measured on
    target: Target
    latency: Latency | None
    on_step: OnStep
    tried: list[Trial] = field(default_factory=list)

    def search(self) -> Trial:
        """The plan, adjusted until what was asked for holds where it is measured."""
        self.references = distributed.together(
            lambda: [self.target(self.model, image) for image in self.images]
        )
        if self.name == "sparsity":
            return self._at_sparsity()
        return self._within_error() if self.name == "max_error" else self._fast_enough()

    def curve(self) -> list[tuple[float, float]]:
        """(sparsity, predicted error) of the best choices, as far as candidates allow."""
        found = []
        for tenth in range(1, 10):
            try:
                picks = solve_for(self.tuned, share=1 - tenth / 10)
            except PlanError:
                break
            found.append((1 - self.tuned.density(picks), self.tuned.predicted(picks)))
        return found

    def _try(self, asked: float, picks: list[list[int]]) -> Trial:
        """These candidates, run on the images kept back."""
        picks = distributed.of_the_first(picks)
        plan = make_plan(self.tuned, picks)
        errors = target_errors(self.model, plan, self.images, self.references, self.target)
        faster = self._speedup(plan, picks, TIMED) if self.name == "speedup" else None
        self.tried.append(Trial(asked, picks, plan, tuple(errors), faster))
        self.on_step("checking on images kept back", len(self.tried), ROUNDS)
        return self.tried[-1]

    def _speedup(self, plan: SparsityPlan, picks: Picks, rounds: int) -> float:
        """Measured; of a plan that skips nothing it is 1, whatever a noisy machine would say."""
        if self.tuned.density(picks) == 1:
            return 1.0
        return time_plan(self.model, plan, self.timed, self.target, rounds)[0]

    def _at_sparsity(self) -> Trial:
        try:
            picks = solve_for(self.tuned, share=1 - self.wanted)
        except PlanError:
            raise PlanError(
                f"sparsity={self.wanted:g} cannot be met with these candidates: at most {1 - least_share(self.tuned):.3g} can; ask for less, or "
                "allow more candidates."
            ) from None
        return self._try(self.wanted, picks)

    def _within_error(self) -> Trial:
        """Bisect on the predicted error until the bound on the measured one is just within what is wanted."""
        low, high, asked = 0.0, math.inf, self.wanted
        best: Trial | None = None
        while len(self.tried) < ROUNDS or (best is None and asked > 1e-3 * self.wanted):
            trial = self._try(asked, solve_for(self.tuned, max_error=asked))
            if trial.bound <= self.wanted:
                low = asked
                best = trial if best is None or trial.asked > best.asked else best
            else:
                high = asked
            same = len(self.tried) > 1 and trial.picks == self.tried[-2].picks
            if (same and high == math.inf) or (
                best is not None and best.bound > 0.95 * self.wanted
            ):
                break
            # Error is nearly proportional to what is asked for; between known ends, take the middle of their logarithms.
            step = asked * min(0.97 * self.wanted / max(trial.bound, 1e-12), 10.0)
            if best is None:
                asked = min(step, 0.9 * asked) if len(self.tried) < ROUNDS else asked / 2
            else:
                asked = step if low < step < high else math.sqrt(low * high)
        return (
            best
            if best is not None
            else self._try(0.0, [[0] * len(heads) for heads in self.tuned.options])
        )

    def _fast_enough(self) -> Trial:
        """As much attention as fits: bisected by what is measured, from what is expected; the plan chosen is timed again."""
        dense = make_plan(self.tuned, [[0] * len(heads) for heads in self.tuned.options])
        _, seconds = time_plan(self.model, dense, self.timed, self.target, TIMED)
        least = least_share(self.tuned, self.latency)
        expected = attention_seconds(self.model, self.tuned, self.timed, self.target, self.latency)
        share = 1 - (1 - 1 / self.wanted) * seconds / min(expected, 0.95 * seconds)
        slow, fast = (
            1.0,
            least,
        )  # shares of dense attention: too slow, fast enough as far as is known
        for _ in range(ROUNDS):
            share = min(max(share, least), 1.0)
            trial = self._try(
                share, solve_for(self.tuned, share=share * (1 + 1e-9), latency=self.latency)
            )
            assert trial.speedup is not None
            if trial.speedup >= self.wanted:
                fast = max(fast, share)
            else:
                slow = min(slow, share)
            if share == (1.0 if trial.speedup >= self.wanted else least) or slow - fast < 0.03:
                break
            share = (slow + fast) / 2 if len(self.tried) > 1 or fast > least else least
        for best in sorted(self.tried, key=lambda one: -one.asked):
            if best.speedup is not None and best.speedup >= self.wanted:
                again = self._speedup(best.plan, best.picks, 2 * TIMED)
                if again >= self.wanted:
                    return replace(best, speedup=again)
        most = max(one.speedup or 0 for one in self.tried)
        attention = (
            (1 - 1 / most) / (1 - self.tried[-1].asked)
            if most > 1 and self.tried[-1].asked < 1
            else 0.0
        )
        raise PlanError(
            f"speedup={self.wanted:g} cannot be met: {most:.3g} is the most that was measured, and attention of these layers takes about "
            f"{attention:.0%} of the time; ask for less, or tune at a higher resolution, where attention takes more."
        )


# From what was measured to candidates


def solve_for(
    tuned: Tuned,
    *,
    share: float | None = None,
    max_error: float | None = None,
    latency: Latency | None = None,
) -> list[list[int]]:
    """[layer][head] candidates: least error with this share of the dense cost, or least cost within this error.

    Costs are blocks, or expected seconds where `latency` is given. PlanError where no choice fits.
    """
    choices = _choices(tuned, latency)
    if max_error is not None:
        found = solve(choices, max_error=max_error**2)
    else:
        assert share is not None
        found = solve(choices, budget=share * sum(choice.costs[0] for choice in choices))
    each = iter(found)
    return [[next(each) for _ in heads] for heads in tuned.options]


def least_share(tuned: Tuned, latency: Latency | None = None) -> float:
    """Of the dense cost, what the cheapest candidates take."""
    choices = _choices(tuned, latency)
    return sum(min(choice.costs) for choice in choices) / sum(choice.costs[0] for choice in choices)


def _choices(tuned: Tuned, latency: Latency | None) -> list[Choice]:
    return [
        Choice(
            errors[head].tolist(),
            [_cost(mask, index, tuned.layout, latency) for index, (_, mask) in enumerate(own)],
        )
        for errors, heads in zip(tuned.errors, tuned.options, strict=True)
        for head, own in enumerate(heads)
    ]


def _cost(mask: Tensor, index: int, layout: TokenLayout, latency: Latency | None) -> float:
    """Blocks, or expected seconds of a head and an image; the first candidate is dense."""
    if latency is None:
        return float(mask.sum())
    rows = layout.num_blocks if index else 0
    dense = latency.sparse_pair if latency.dense_in_loop else latency.dense_pair
    pairs = float(mask.float().mean()) * layout.num_tokens**2
    return latency.sparse_row * rows + (latency.sparse_pair if index else dense) * pairs


def attention_seconds(
    model: nn.Module, tuned: Tuned, image: Any, target: Target, latency: Latency | None
) -> float:
    """What the tuned layers' dense attention is expected to take for this image (or batch)."""
    assert latency is not None
    sizes: list[int] = []
    with observe(
        model, lambda seen: sizes.append(seen.q.shape[0]) if seen.layer in tuned.layers else None
    ):
        target(model, image)
    tokens = tuned.layout.num_tokens
    return sum(latency.dense(layer.heads, tokens, max(sizes)) for layer in tuned.layers)
