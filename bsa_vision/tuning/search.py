"""Search the plan that meets a budget: choose, run it on held-out images, choose again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from bsa_vision.adapters import observe
from bsa_vision.errors import PlanError
from bsa_vision.masks import TokenLayout
from bsa_vision.measure.latency import Latency
from bsa_vision.plans.plan import SparsityPlan
from bsa_vision.tuning import distributed
from bsa_vision.tuning.calibration import OnStep
from bsa_vision.tuning.knapsack import Choice, solve
from bsa_vision.tuning.trial import (
    Picks,
    Target,
    Trial,
    Tuned,
    make_plan,
    target_errors,
    time_plan,
)

ROUNDS = 6  # of adjusting a plan until what was asked for holds where it is measured
TIMED = 5  # rounds of a measured speed-up


@dataclass
class Search:
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
