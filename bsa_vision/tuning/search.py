"""Search for the plan that meets a budget: choose one, run it on held-out images, choose again."""

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

ROUNDS = 6  # trials until the measured value must meet the budget
TIMED = 5  # rounds of a measured speed-up


@dataclass
class Search:
    """The search for a plan with the budget `name` = `wanted`, and its trials."""

    tuned: Tuned
    model: nn.Module
    name: str
    wanted: float
    images: Sequence[Any]  # held-out images of this process
    timed: Any  # image on which speed-ups are measured
    target: Target
    latency: Latency | None
    on_step: OnStep
    tried: list[Trial] = field(default_factory=list)

    def search(self) -> Trial:
        """Return the best plan whose measured value meets the budget."""
        self.references = distributed.run_together(
            lambda: [self.target(self.model, image) for image in self.images]
        )
        if self.name == "sparsity":
            return self._at_sparsity()
        return self._within_error() if self.name == "max_error" else self._fast_enough()

    def curve(self) -> list[tuple[float, float]]:
        """Return (sparsity, predicted error) of the best plans for sparsities from 0.1 to 0.9."""
        found = []
        for tenth in range(1, 10):
            try:
                picks = solve_for(self.tuned, share=1 - tenth / 10)
            except PlanError:
                break
            found.append((1 - self.tuned.density(picks), self.tuned.predicted(picks)))
        return found

    def _try(self, asked: float, picks: list[list[int]]) -> Trial:
        """Run the plan with these candidates on the held-out images."""
        picks = distributed.broadcast(picks)
        plan = make_plan(self.tuned, picks)
        errors = target_errors(self.model, plan, self.images, self.references, self.target)
        faster = self._speedup(plan, picks, TIMED) if self.name == "speedup" else None
        self.tried.append(Trial(asked, picks, plan, tuple(errors), faster))
        self.on_step("checking on held-out images", len(self.tried), ROUNDS)
        return self.tried[-1]

    def _speedup(self, plan: SparsityPlan, picks: Picks, rounds: int) -> float:
        """Measure the speed-up; it is exactly 1 for a plan that skips nothing."""
        if self.tuned.density(picks) == 1:
            return 1.0
        return time_plan(self.model, plan, self.timed, self.target, rounds)[0]

    def _dense(self) -> list[list[int]]:
        return [[0] * len(heads) for heads in self.tuned.options]

    def _at_sparsity(self) -> Trial:
        try:
            picks = solve_for(self.tuned, share=1 - self.wanted)
        except PlanError:
            raise PlanError(
                f"sparsity={self.wanted:g} cannot be met with these candidates: at most "
                f"{1 - least_share(self.tuned):.3g} is possible; ask for less, or allow more "
                "candidates."
            ) from None
        return self._try(self.wanted, picks)

    def _within_error(self) -> Trial:
        """Bisect the predicted error until the bound on the measured error just meets the limit."""
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
            # The measured error is nearly proportional to the predicted one. If that leaves the
            # interval, take the geometric mean of its ends.
            step = asked * min(0.97 * self.wanted / max(trial.bound, 1e-12), 10.0)
            if best is None:
                asked = min(step, 0.9 * asked) if len(self.tried) < ROUNDS else asked / 2
            else:
                asked = step if low < step < high else math.sqrt(low * high)
        return best if best is not None else self._try(0.0, self._dense())

    def _fast_enough(self) -> Trial:
        """Bisect the share of dense attention until the measured speed-up is just met.

        The first share is the one that is expected to meet it. The plan chosen is timed again.
        """
        dense = make_plan(self.tuned, self._dense())
        _, seconds = time_plan(self.model, dense, self.timed, self.target, TIMED)
        least = least_share(self.tuned, self.latency)
        expected = attention_seconds(self.model, self.tuned, self.timed, self.target, self.latency)
        share = 1 - (1 - 1 / self.wanted) * seconds / min(expected, 0.95 * seconds)
        slow, fast = 1.0, least  # the smallest share too slow, the largest one assumed fast enough
        for _ in range(ROUNDS):
            share = min(max(share, least), 1.0)
            picks = solve_for(self.tuned, share=share * (1 + 1e-9), latency=self.latency)
            trial = self._try(share, picks)
            assert trial.speedup is not None
            if trial.speedup >= self.wanted:
                fast = max(fast, share)
            else:
                slow = min(slow, share)
            if share == (1.0 if trial.speedup >= self.wanted else least) or slow - fast < 0.03:
                break
            share = (slow + fast) / 2 if len(self.tried) > 1 or fast > least else least
        for best in sorted(self.tried, key=lambda trial: -trial.asked):
            if best.speedup is not None and best.speedup >= self.wanted:
                again = self._speedup(best.plan, best.picks, 2 * TIMED)
                if again >= self.wanted:
                    return replace(best, speedup=again)
        raise self._too_slow()

    def _too_slow(self) -> PlanError:
        """Return the error for a speed-up that no trial reached."""
        most, last = max(trial.speedup or 0 for trial in self.tried), self.tried[-1].asked
        attention = (1 - 1 / most) / (1 - last) if most > 1 and last < 1 else 0.0
        return PlanError(
            f"speedup={self.wanted:g} cannot be met: the largest measured speed-up is {most:.3g}, "
            f"and attention of these layers takes about {attention:.0%} of the time; ask for less, "
            "or tune at a higher resolution, where attention takes more."
        )


# Choosing candidates


def solve_for(
    tuned: Tuned,
    *,
    share: float | None = None,
    max_error: float | None = None,
    latency: Latency | None = None,
) -> list[list[int]]:
    """Return the index of the candidate of each head, [layer][head].

    share      minimise the error with at most this share of the dense cost; or
    max_error  minimise the cost within this predicted error
    latency    costs are expected seconds; None = blocks

    Raise PlanError if no choice fits.
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
    """Return the cost of the cheapest plan as a share of the dense cost."""
    choices = _choices(tuned, latency)
    return sum(min(choice.costs) for choice in choices) / sum(choice.costs[0] for choice in choices)


def _choices(tuned: Tuned, latency: Latency | None) -> list[Choice]:
    return [
        Choice(
            errors[head].tolist(),
            [_cost(mask, index, tuned.layout, latency) for index, (_, mask) in enumerate(options)],
        )
        for errors, heads in zip(tuned.errors, tuned.options, strict=True)
        for head, options in enumerate(heads)
    ]


def _cost(mask: Tensor, index: int, layout: TokenLayout, latency: Latency | None) -> float:
    """Return the blocks, or the expected seconds, of one head and image; index 0 is dense."""
    if latency is None:
        return float(mask.sum())
    rows = layout.num_blocks if index else 0
    dense = latency.sparse_pair if latency.dense_in_loop else latency.dense_pair
    pairs = float(mask.float().mean()) * layout.num_tokens**2
    return latency.sparse_row * rows + (latency.sparse_pair if index else dense) * pairs


def attention_seconds(
    model: nn.Module, tuned: Tuned, image: Any, target: Target, latency: Latency | None
) -> float:
    """Return the expected seconds of dense attention in the tuned layers, for one image."""
    assert latency is not None
    sizes: list[int] = []
    with observe(
        model, lambda call: sizes.append(call.q.shape[0]) if call.layer in tuned.layers else None
    ):
        target(model, image)
    tokens = tuned.layout.num_tokens
    return sum(latency.dense(layer.heads, tokens, max(sizes)) for layer in tuned.layers)
