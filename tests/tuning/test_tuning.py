"""Tuning: what statistics say against brute force, the solver against enumeration, plans against what was asked for."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import bsa_vision as bsa
from benchmarks import tuning_cost
from bsa_vision.adapters import Observation
from bsa_vision.attention.rel_pos import RelPos
from bsa_vision.masks import Pattern, TokenLayout
from bsa_vision.models.features import features
from bsa_vision.plans.model_spec import LayerSpec
from bsa_vision.tuning import candidates, tune
from bsa_vision.tuning.bounds import mean_at_most
from bsa_vision.tuning.calibration import Options, calibrate
from bsa_vision.tuning.knapsack import Choice, solve
from bsa_vision.tuning.search import solve_for
from bsa_vision.tuning.statistics import BlockStatistics, CandidateErrors
from bsa_vision.tuning.store import Calibration, Store
from bsa_vision.tuning.trial import make_plan
from bsa_vision.tuning.tune import layers_to_tune
from tests.cli.test_commands import run
from tests.helpers import models, sam2_models, sam_models, timm_models

SMALL = dict(tile=(4, 4), block_size=16)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@st.composite
def calls(draw):
    """An observed call of a small layer, its layout, and masks of three candidates per head."""
    grid = (draw(st.integers(2, 7)), draw(st.integers(2, 7)))
    order = draw(st.sampled_from(["raster", "tile"]))
    layout = TokenLayout(
        grid,
        num_prefix_tokens=draw(st.integers(0, 3)),
        num_suffix_tokens=draw(st.integers(0, 2)),
        order=order,
        tile=(draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        block_size=draw(st.integers(3, 9)),
    )
    heads, group = draw(st.sampled_from([(2, 1), (4, 2)]))
    dim, images = draw(st.integers(2, 5)), draw(st.integers(1, 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))

    def random(*shape):
        return torch.randn(shape, generator=generator)

    tokens = layout.num_tokens
    q, k, v = (
        random(images, heads, tokens, dim),
        *(random(images, heads // group, tokens, dim) for _ in range(2)),
    )
    rel_pos = (
        RelPos(*(random(images, heads, tokens, side) for side in grid))
        if layout.num_tokens == layout.num_patches
        else None
    )
    weight = random(7, heads * dim) if draw(st.booleans()) else None
    seen = Observation(LayerSpec("a", 0, heads, dim), grid, q, k, v, 0.9, rel_pos, weight)
    masks = torch.rand(heads, 3, layout.num_blocks, layout.num_blocks, generator=generator) < 0.6
    masks |= torch.eye(layout.num_blocks, dtype=torch.bool)
    return seen, layout, masks


def outputs(seen, layout, mask=None):
    """(B, N, H, C) float64 in model order: every head after its part of the projection; mask (H, R, C) blocks, None = dense."""
    heads = seen.q.shape[1]
    q, k, v = (x.double() for x in (seen.q, seen.k, seen.v))
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    logits = q @ k.transpose(-1, -2) * seen.scale
    if seen.rel_pos is not None:
        patches = torch.arange(layout.num_patches)
        for term, place in zip(
            seen.rel_pos, (patches // layout.grid[1], patches % layout.grid[1]), strict=True
        ):
            logits = logits + term.double()[..., place]
    if mask is not None:
        of_token = layout.inverse // layout.block_size
        logits = logits.masked_fill(~mask[:, of_token][:, :, of_token], -math.inf)
    out = logits.softmax(-1) @ v
    if seen.weight is None:
        return out.transpose(1, 2)
    return torch.einsum("bhnd,chd->bnhc", out, seen.weight.double().unflatten(1, (heads, -1)))


def changes_of(seen, layout):
    """(B, H, N, C, channels) float64, packed order: what each block of keys adds to the output of a query, less the output for their mass."""
    heads = seen.q.shape[1]
    q, k, v = (x.double()[:, :, layout.permutation] for x in (seen.q, seen.k, seen.v))
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    logits = q @ k.transpose(-1, -2) * seen.scale
    if seen.rel_pos is not None:
        patches = layout.permutation
        for term, place in zip(
            seen.rel_pos, (patches // layout.grid[1], patches % layout.grid[1]), strict=True
        ):
            logits = logits + term.double()[:, :, layout.permutation][..., place]
    probs = logits.softmax(-1)
    out = probs @ v
    own = probs[..., None] * (v[:, :, None] - out[..., None, :])  # (B, H, N, N, D)
    parts = torch.stack([part.sum(3) for part in own.split(layout.block_size, dim=3)], dim=3)
    if seen.weight is None:
        return parts
    return torch.einsum("bhnkd,chd->bhnkc", parts, seen.weight.double().unflatten(1, (heads, -1)))


class TestStatistics:
    @settings(max_examples=60, deadline=None)
    @given(calls())
    def test_candidate_errors_are_those_of_masked_attention(self, call):
        seen, layout, masks = call
        found = CandidateErrors.empty(*masks.shape[:2])
        found.add(seen, layout, masks)
        dense = outputs(seen, layout)
        for candidate in range(masks.shape[1]):
            off = outputs(seen, layout, masks[:, candidate]) - dense
            expected = off.square().sum((0, 1, 3))  # (H,)
            assert torch.allclose(
                found.error[:, candidate],
                expected,
                rtol=2e-3,
                atol=1e-5 * float(dense.square().sum()),
            )
        queries = torch.full_like(found.error, float(len(seen.q) * layout.num_tokens))
        assert torch.equal(found.kept.sum(-1), queries)

    @settings(max_examples=40, deadline=None)
    @given(calls())
    def test_block_statistics(self, call):
        """Rows of the mass add up to 1; one dropped block's loss is that of its `drop`, before renormalisation."""
        seen, layout, _ = call
        found = BlockStatistics.empty(seen.q.shape[1], layout)
        found.add(seen, layout)
        assert torch.allclose(
            found.mass.sum(-1), torch.full_like(found.mass[..., 0], float(len(seen.q))), atol=1e-4
        )
        assert (found.drop >= 0).all()
        if layout.num_blocks < 2:
            return
        masks = torch.ones(
            seen.q.shape[1], 1, layout.num_blocks, layout.num_blocks, dtype=torch.bool
        )
        masks[:, :, 0, -1] = False
        exact = CandidateErrors.empty(*masks.shape[:2])
        exact.add(seen, layout, masks)
        assert (
            exact.error[:, 0] >= found.drop[:, 0, -1] * (1 - 1e-4) - 1e-6
        ).all()  # divided by what is kept, at most 1

    @settings(max_examples=30, deadline=None)
    @given(calls(), st.integers(0, 10**6))
    def test_products(self, call, seed):
        """Of the changes by two blocks each, for all blocks and for some."""
        seen, layout, _ = call
        heads, blocks, size = seen.q.shape[1], layout.num_blocks, layout.block_size
        generator = torch.Generator().manual_seed(seed)
        some = torch.rand(heads, blocks, blocks, generator=generator).argsort(-1)[
            ..., : max(1, blocks - 1)
        ]
        changes = changes_of(seen, layout)  # (B, H, N, C, channels), packed order
        for among in (torch.arange(blocks).expand(heads, blocks, blocks), some):
            found = BlockStatistics.empty(heads, layout, among.shape[-1])
            found.add(seen, layout, among)
            for row in range(blocks):
                own = changes[:, :, row * size : (row + 1) * size]  # (B, H, i, C, channels)
                own = own.gather(
                    3, among[None, :, row, None, :, None].expand(*own.shape[:3], -1, own.shape[-1])
                )
                expected = torch.einsum("bhikc,bhijc->hkj", own, own)
                assert torch.allclose(
                    found.gram[:, row], expected, rtol=1e-3, atol=1e-5 * float(found.total)
                )

    @settings(max_examples=20, deadline=None)
    @given(calls())
    def test_additive_over_images(self, call):
        seen, layout, masks = call
        one, each = (CandidateErrors.empty(*masks.shape[:2]) for _ in range(2))
        one.add(seen, layout, masks)
        for image in range(len(seen.q)):
            inside = slice(image, image + 1)
            rel_pos = (
                None if seen.rel_pos is None else RelPos(*(term[inside] for term in seen.rel_pos))
            )
            part = Observation(
                seen.layer,
                seen.grid,
                seen.q[inside],
                seen.k[inside],
                seen.v[inside],
                seen.scale,
                rel_pos,
                seen.weight,
            )
            each.add(part, layout, masks)
        assert torch.allclose(one.error, each.error, rtol=1e-4, atol=1e-6)
        assert (one.kept - each.kept).abs().sum() <= 2  # one query at the border of a bin


def made_up(layout, heads, among=None, seed=0):
    """Statistics of made-up changes (H, R, queries, C, D), and the changes; `among` (H, R, K), None = all blocks."""
    generator = torch.Generator().manual_seed(seed)
    blocks = layout.num_blocks
    changes = torch.randn(heads, blocks, 3, blocks, 2, generator=generator, dtype=torch.float64)
    changes *= (
        torch.rand(heads, blocks, 1, blocks, 1, generator=generator, dtype=torch.float64) ** 2
    )
    changes -= changes.mean(3, keepdim=True)  # all together change nothing
    mass = torch.randn(heads, blocks, blocks, generator=generator, dtype=torch.float64).softmax(-1)
    among = torch.arange(blocks).expand(heads, blocks, blocks) if among is None else among
    some = changes.gather(3, among[:, :, None, :, None].expand(-1, -1, 3, -1, 2))
    gram = torch.einsum("hrikd,hrijd->hrkj", some, some)
    total = torch.tensor(1.0, dtype=torch.float64)
    return BlockStatistics(mass, changes.square().sum((2, 4)), gram, total), changes, among


def path(changes, mass, may):
    """Of one row: blocks in the order in which they go, each the one after which the squared change is least, and those changes."""
    kept, gone, costs = list(range(len(mass))), [], [0.0]
    while any(may[j] for j in kept):

        def after(j, kept=tuple(kept)):
            left = [k for k in kept if k != j]
            return float(changes[:, left].sum(1).square().sum() / mass[left].sum() ** 2)

        best = min((j for j in kept if may[j]), key=after)
        costs.append(after(best))
        kept.remove(best)
        gone.append(best)
    return gone, costs


class TestCandidates:
    LAYOUT = TokenLayout((16, 12), num_prefix_tokens=1, order="tile", **SMALL)

    def test_every_mask_keeps_what_it_must(self):
        statistics, _, among = made_up(self.LAYOUT, 2)
        special = Pattern("special")(self.LAYOUT)
        found = candidates.geometric(candidates.NAMES, self.LAYOUT)
        for _, mask in [
            *found,
            *(
                one
                for head in candidates.static(
                    candidates.order_of_dropping(statistics, self.LAYOUT, among), self.LAYOUT
                )
                for one in head
            ),
        ]:
            assert (mask | ~special).all()
            assert (mask.sum(-1) >= 2).all()
            assert not mask.all()

    @settings(max_examples=15, deadline=None)
    @given(st.integers(0, 10**6), st.integers(0, 1))
    def test_rows_go_block_by_block(self, seed, start):
        """Against a loop in Python, with other numbers where products are left out."""
        layout = TokenLayout(
            (8, 6), num_prefix_tokens=start, order="tile", tile=(2, 4), block_size=8
        )
        statistics, changes, among = made_up(layout, 2, seed=seed)
        order = candidates.order_of_dropping(statistics, layout, among)
        diagonal = torch.diag_embed(statistics.gram.diagonal(dim1=-2, dim2=-1))
        without = candidates.order_of_dropping(replace(statistics, gram=diagonal), layout, among)
        for head, row in itertools.product(range(2), range(layout.num_blocks)):
            may = order[head, row].isfinite()
            expected, _ = path(changes[head, row], statistics.mass[head, row], may.tolist())
            by_order = order[head, row].argsort().tolist()[: len(expected)]
            assert by_order == expected
        assert not torch.equal(order, without)
        kept_always = Pattern("special")(layout)
        assert order[:, kept_always].isinf().all()
        assert (order.isinf().sum(-1) >= 2).all()

    def test_rows_share_a_budget(self):
        """What goes first costs least, all that must go before it included."""
        statistics, changes, among = made_up(self.LAYOUT, 1)
        order = candidates.order_of_dropping(statistics, self.LAYOUT, among)[0]
        prices = []
        for row in range(self.LAYOUT.num_blocks):
            gone, costs = path(
                changes[0, row], statistics.mass[0, row], order[row].isfinite().tolist()
            )
            steps = [after - before for before, after in itertools.pairwise(costs)]
            prices += [
                (order[row, j].item(), price)
                for j, price in zip(gone, itertools.accumulate(steps, max))
            ]
        prices.sort()
        assert [place for place, _ in prices] == list(range(len(prices)))
        assert all(a <= b + 1e-9 for (_, a), (_, b) in itertools.pairwise(prices))

    def test_blocks_that_are_not_compared_go_first(self, monkeypatch):
        monkeypatch.setattr(candidates, "COMPARED", 5)
        whole, _, _ = made_up(self.LAYOUT, 2)
        among = candidates.compared(whole, self.LAYOUT)
        assert among.shape == (2, self.LAYOUT.num_blocks, 5)
        statistics, _, _ = made_up(self.LAYOUT, 2, among)
        order = candidates.order_of_dropping(statistics, self.LAYOUT, among)
        compared = (
            torch.zeros_like(order, dtype=torch.bool).scatter_(-1, among, True) & order.isfinite()
        )
        rest = ~compared & order.isfinite()
        assert order[rest].max() < 0 <= order[compared].min()
        for head in range(2):  # among themselves by `drop`
            by_drop = statistics.drop[head][rest[head]].argsort()
            assert torch.equal(order[head][rest[head]].argsort(), by_drop)
        for mask in (
            mask
            for head in candidates.static(
                candidates.order_of_dropping(statistics, self.LAYOUT, among), self.LAYOUT
            )
            for _, mask in head
        ):
            assert (mask | ~Pattern("special")(self.LAYOUT)).all()

    def test_better_than_one_by_one(self):
        """On changes that add up, the squared change by all that is dropped is smaller than by `drop` alone."""
        statistics, changes, among = made_up(self.LAYOUT, 1)

        def change(mask):
            kept = (changes[0] * mask[:, None, :, None]).sum(2).square().sum((1, 2))
            return float((kept / (statistics.mass[0] * mask).sum(-1).square()).sum())

        chosen = candidates.static(
            candidates.order_of_dropping(statistics, self.LAYOUT, among), self.LAYOUT
        )[0]
        alone = replace(
            statistics, gram=torch.diag_embed(statistics.gram.diagonal(dim1=-2, dim2=-1))
        )
        pairs = [
            (mask, other)
            for (_, mask), (_, other) in zip(
                chosen,
                candidates.static(
                    candidates.order_of_dropping(alone, self.LAYOUT, among), self.LAYOUT
                )[0],
            )
        ]
        different = [(mask, other) for mask, other in pairs if not torch.equal(mask, other)]
        assert len(different) > 5
        assert all(mask.sum() == other.sum() for mask, other in different)
        ratios = [change(mask) / change(other) for mask, other in different]
        assert sum(ratios) / len(ratios) < 0.8
        assert max(ratios) < 1.1  # block by block is not the best there is

    def test_no_mask_twice(self):
        masks = [
            mask
            for _, mask in candidates.geometric(
                candidates.NAMES, TokenLayout((8, 8), order="tile", **SMALL)
            )
        ]
        assert not any(torch.equal(a, b) for a, b in itertools.combinations(masks, 2))


choices = st.lists(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), min_size=1, max_size=4),
    min_size=1,
    max_size=4,
)


class TestSolver:
    @settings(max_examples=80, deadline=None)
    @given(choices, st.integers(0, 60), st.sampled_from(["budget", "max_error"]))
    def test_equals_enumeration(self, heads, limit, kind):
        problem = [Choice([e for e, _ in own], [c for _, c in own]) for own in heads]
        every = [
            (
                sum(o.errors[i] for o, i in zip(problem, picks)),
                sum(o.costs[i] for o, i in zip(problem, picks)),
            )
            for picks in itertools.product(*(range(len(own)) for own in heads))
        ]
        if kind == "max_error":
            fitting = [(cost, error) for error, cost in every if error <= limit]
        else:
            fitting = [(error, cost) for error, cost in every if cost <= limit]
        if not fitting:
            with pytest.raises(bsa.PlanError, match="the least there is is"):
                solve(problem, **{kind: limit})
            return
        picks = solve(problem, **{kind: limit})
        error = sum(own.errors[pick] for own, pick in zip(problem, picks, strict=True))
        cost = sum(own.costs[pick] for own, pick in zip(problem, picks, strict=True))
        assert (cost if kind == "budget" else error) <= limit
        assert (error if kind == "budget" else cost) == pytest.approx(min(fitting)[0], abs=1e-6)


def images(count=4, size=(96, 96)):
    return [models.image(*size, seed=seed) for seed in range(count)]


class TestTune:
    @pytest.mark.parametrize(
        ("make", "picture", "target"),
        [
            (lambda: models.make("dinov3"), lambda seed: models.image(96, 96, seed=seed), features),
            (
                lambda: timm_models.make("vit, not fused"),
                lambda seed: timm_models.image(batch=1) + seed / 10,
                features,
            ),
            (
                lambda: sam_models.make("bsa_vision.encoder"),
                lambda seed: sam_models.image(batch=1) + seed / 10,
                features,
            ),
            (
                lambda: sam2_models.make("sam2"),
                lambda seed: sam2_models.image() + seed / 10,
                sam2_models.features,
            ),
            (
                lambda: models.make("dinov3").bfloat16(),
                lambda seed: models.image(96, 96, seed=seed).bfloat16(),
                features,
            ),
            (
                lambda: models.make("dinov3"),
                lambda seed: torch.cat([models.image(96, 96, seed=seed + 9 * i) for i in range(3)]),
                features,
            ),
        ],
        ids=[
            "transformers",
            "timm",
            "own sam",
            "sam2, two images at once",
            "bfloat16",
            "three images at once",
        ],
    )
    def test_at_a_sparsity(self, make, picture, target):
        model, pictures = make(), [picture(seed) for seed in range(4)]
        kinds, keys = [type(module) for module in model.modules()], list(model.state_dict())
        plan = tune(model, pictures, sparsity=0.4, target=target, **SMALL)
        assert [type(module) for module in model.modules()] == kinds
        assert list(model.state_dict()) == keys
        found = plan.notes["tuned"]
        assert 0.4 - 1e-9 <= found["sparsity"] < 0.55
        assert found["images"] == {"calibration": 3, "held_out": 1, "seed": 0}
        with torch.no_grad():
            kept = pictures[next(i for i in range(4) if i not in chosen_on(4))]
            dense = target(model, kept)
            bsa.sparsify_(model, plan)
            assert relative(target(model, kept).double(), dense.double()) == pytest.approx(
                found["errors"][0], rel=1e-3
            )

    def test_while_training(self):
        """The plan of a model as it is used; what was in training mode is in it afterwards, layer by layer."""
        model = models.make("dinov3").train()
        model.model.layer[0].eval()
        before = [module.training for module in model.modules()]
        plan = tune(model, images(4), sparsity=0.4, **SMALL)
        assert [module.training for module in model.modules()] == before
        assert plan == tune(models.make("dinov3"), images(4), sparsity=0.4, **SMALL)

    def test_better_than_uniform_plans(self):
        """At equal sparsity, on images it never saw."""
        model = models.make("dinov3")
        plan = tune(model, images(8), sparsity=0.5, **SMALL)
        realised = plan.notes["tuned"]["sparsity"]
        others = [bsa.uniform_plan(model, "random_blocks", sparsity=realised, **SMALL)]
        others += [bsa.uniform_plan(model, "nearest", sparsity=realised, **SMALL)]
        unseen = [models.image(96, 96, seed=seed) for seed in range(100, 106)]
        with torch.no_grad():
            dense = [features(model, one) for one in unseen]

            def error(plan):
                bsa.sparsify_(model, plan)
                found = [relative(features(model, one), other) for one, other in zip(unseen, dense)]
                bsa.restore_(model)
                return sum(found) / len(found)

            assert error(plan) < min(map(error, others))

    @pytest.mark.parametrize("wanted", [0.05, 0.2])
    def test_within_an_error(self, wanted):
        model = models.make("dinov3")
        plan = tune(model, images(12), max_error=wanted, **SMALL)
        found = plan.notes["tuned"]
        assert found["measured"] <= found["bound"] <= wanted
        assert found["sparsity"] > 0
        assert found["images_above"] == sum(error > wanted for error in found["errors"])
        assert found["bound"] > 0.7 * wanted  # not needlessly dense
        assert found["bound"] == pytest.approx(mean_at_most(found["errors"]))
        assert found["bound"] > 1.02 * found["measured"]

    def test_an_error_that_anything_keeps(self):
        """The sparsest plan there is, without trying it again and again."""
        plan = tune(models.make("dinov3"), images(4), max_error=50.0, verify=0.5, **SMALL)
        assert len(plan.report["tried"]) == 2
        assert plan.report["sparsity"] > 0.6

    def with_times(self, monkeypatch, attention, off=1.0, overhead=0.0):
        """Dense runs take a second, of which this share is attention; the latency model is off by a factor, and plans may cost some time."""
        module = importlib.import_module("bsa_vision.tuning.search")

        def time_plan(model, plan, image, target, rounds):
            spec = bsa.inspect(model)
            layout = plan.layout(spec, (12, 12))
            masks = [plan.compile(key, layout) for key in plan.layers]
            density = 1 - sum(one.sparsity for one in masks) / len(masks)
            return 1 / (1 - attention + attention * density + overhead * (density < 1)), 1.0

        monkeypatch.setattr(module, "time_plan", time_plan)
        pairs = 3 * 3 * 149**2  # layers, heads
        return bsa.Latency(
            "made up", 0, off * attention / pairs, 0, 0, off * attention / pairs, True
        )

    @pytest.mark.parametrize("off", [1.0, 0.4, 3.0])
    def test_at_a_speedup(self, monkeypatch, off):
        """Of the whole model, as measured, however wrong what was expected of attention is."""
        latency = self.with_times(monkeypatch, attention=0.6, off=off)
        plan = tune(models.make("dinov3"), images(), speedup=1.3, latency=latency, **SMALL)
        assert 1.3 <= plan.report["speedup"] < 1.5
        assert plan.report["sparsity"] == pytest.approx(
            (1 - 1 / plan.report["speedup"]) / 0.6, abs=0.01
        )

    def test_a_speedup_that_costs_something_first(self, monkeypatch):
        """Sparse calls that take longer to begin with: not more is skipped than needed."""
        latency = self.with_times(monkeypatch, attention=0.6, overhead=0.15)
        plan = tune(models.make("dinov3"), images(), speedup=1.1, latency=latency, **SMALL)
        assert 1.1 <= plan.report["speedup"] < 1.25
        assert plan.report["sparsity"] < 0.6

    def test_a_speedup_that_cannot_be_had(self, monkeypatch):
        latency = self.with_times(monkeypatch, attention=0.1)
        with pytest.raises(
            bsa.PlanError,
            match=r"speedup=1.3 cannot be met: 1\.0\d+ is the most .* about 1\d% of the time",
        ):
            tune(models.make("dinov3"), images(), speedup=1.3, latency=latency, **SMALL)

    def test_measured_for_real(self):
        """A speed-up of 1 is what dense gives: nothing is skipped where skipping does not pay."""
        plan = tune(models.make("dinov3"), images(3), speedup=1.0, **SMALL)
        assert plan.report["speedup"] >= 1.0

    def test_dense_is_as_fast_as_dense(self, monkeypatch):
        """On a machine so noisy that everything seems slower than it is: what skips nothing is not timed."""
        module = importlib.import_module("bsa_vision.tuning.search")
        latency = self.with_times(monkeypatch, attention=0.5)
        monkeypatch.setattr(module, "time_plan", lambda *call: (0.9, 1.0))
        plan = tune(models.make("dinov3"), images(3), speedup=1.0, latency=latency, **SMALL)
        assert plan.report["speedup"] == 1.0
        assert plan.report["sparsity"] == 0.0
        with pytest.raises(bsa.PlanError, match=r"speedup=1\.01 cannot be met"):
            tune(models.make("dinov3"), images(3), speedup=1.01, latency=latency, **SMALL)

    def test_the_target_decides(self):
        """With a target that reads only the first special token, other heads matter."""
        model = models.make("dinov3")
        plans = [
            tune(model, images(), sparsity=0.5, target=target, **SMALL)
            for target in (features, lambda model, image: features(model, image)[:, :1])
        ]
        assert plans[0].layers != plans[1].layers or plans[0].patterns != plans[1].patterns

    def test_same_seed_same_plan(self):
        model = models.make("vit")
        plans = [
            tune(model, images(size=(64, 64)), sparsity=0.3, tile=(2, 4), block_size=8)
            for _ in range(2)
        ]
        assert plans[0] == plans[1]

    def test_planted_heads_are_found(self):
        """A head that attends nowhere in particular and one whose output is nothing: the second is made sparse first."""
        model = models.make("dinov3")
        with torch.no_grad():
            for layer in model.model.layer:
                layer.attention.o_proj.weight[:, :12] = 0  # what head 0 makes is thrown away
        layout = dict(order="tile", **SMALL)
        options = Options(
            layers_to_tune(bsa.inspect(model), None), candidates.NAMES, features, layout
        )
        tuned = calibrate(model, images(), Calibration({}), Store(None), options)
        picks = solve_for(tuned, share=0.8)
        density = [
            [own[pick][1].float().mean().item() for own, pick in zip(heads, chosen)]
            for heads, chosen in zip(tuned.options, picks)
        ]
        assert all(layer[0] == min(layer) for layer in density)
        plan = make_plan(tuned, picks)
        assert sum(names[0] != "dense" for names in plan.layers.values()) == 3

    def test_judged_on_images_they_were_not_found_on(self, monkeypatch):
        """Best blocks of each half of the images are judged on the other half; the plan's are those of all."""
        model, given, layout = models.make("dinov3"), images(5), dict(order="tile", **SMALL)
        used, add = [], CandidateErrors.add
        monkeypatch.setattr(
            CandidateErrors, "add", lambda *args: (used.append(args[3]), add(*args))[1]
        )
        options = Options(layers_to_tune(bsa.inspect(model), [1]), ["static"], features, layout)
        calibration = Calibration({})
        tuned = calibrate(model, given, calibration, Store(None), options)

        where, among = tuned.layout, calibration.compared[0]

        def found_on(some):
            found = BlockStatistics.empty(4, where, among.shape[-1])
            see = lambda seen: found.add(seen, where, among) if seen.layer.index == 1 else None  # noqa: E731
            with torch.no_grad(), bsa.observe(model, see):
                for image in some:
                    features(model, image)
            own = candidates.static(candidates.order_of_dropping(found, where, among), where)
            return torch.stack([torch.stack([mask for _, mask in head]) for head in own])

        halves = [found_on(given[1::2]), found_on(given[::2])]
        assert not torch.equal(*halves)
        assert [mask.shape for mask in used] == [
            (*halves[0].shape[:1], 13, *halves[0].shape[2:])
        ] * 5  # dense first
        assert all(torch.equal(mask[:, 1:], halves[i % 2]) for i, mask in enumerate(used))
        of_all = torch.stack(
            [torch.stack([mask for _, mask in head[1:]]) for head in tuned.options[0]]
        )
        assert torch.equal(of_all, found_on(given))
        assert calibration.blocks == []  # what is large is not kept

    def test_only_some_layers(self):
        model = models.make("dinov3")
        name = bsa.inspect(model).layers[1].name
        plan = tune(model, images(), sparsity=0.5, layers=[name], **SMALL)
        assert {key for key, names in plan.layers.items() if set(names) != {"dense"}} == {"self.1"}

    def test_saved_and_read(self, tmp_path):
        plan = tune(
            models.make("vit"), images(3, (64, 64)), sparsity=0.3, tile=(2, 4), block_size=8
        )
        plan.save(tmp_path / "plan.json")
        assert bsa.SparsityPlan.load(tmp_path / "plan.json") == plan


def chosen_on(count, verify=1 / 3, seed=0):
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[max(1, round(verify * count)) :])


class TestWrongInput:
    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({}, "tune got no budget: exactly one of sparsity, max_error, speedup"),
            ({"sparsity": 0.5, "max_error": 0.1}, "tune got sparsity, max_error"),
            ({"sparsity": 1.0}, "sparsity=1.0: expected a fraction from 0 to below 1"),
            ({"max_error": 0}, "max_error=0: expected an error above 0"),
            ({"speedup": 0.5}, "speedup=0.5: expected at least 1"),
            (
                {"sparsity": 0.99},
                r"sparsity=0.99 cannot be met with these candidates: at most 0\.\d+ can",
            ),
            ({"sparsity": 0.5, "candidates": ["locl"]}, "allowed are static, local_window"),
            ({"sparsity": 0.5, "layers": [9]}, r"layers=\[9\]: allowed are those that attend"),
            (
                {"sparsity": 0.5, "layers": ["model.layer.1.atention"]},
                "nearest are .*model.layer.1.attention",
            ),
            ({"sparsity": 0.5, "verify": 1.0}, "verify=1.0: expected the share"),
            (
                {"max_error": 0.1, "verify": 0.1},
                "one image says nothing about how far others are from it",
            ),
            ({"max_error": 1e-9, "verify": 0.5}, "max_error=1e-09"),
        ],
    )
    def test_budgets_and_options(self, options, said):
        model = models.make("dinov3")
        before = [dict(module.__dict__) for module in model.modules()]
        if options.get("max_error") == 1e-9:  # dense has no error: it can always be met
            assert tune(model, images(), **options, **SMALL).notes["tuned"]["sparsity"] == 0
        else:
            with pytest.raises(ValueError, match=said):
                tune(model, images(), **options, **SMALL)
        assert [dict(module.__dict__) for module in model.modules()] == before

    def test_images(self):
        model = models.make("dinov3")
        for few in ([], images(1)):
            with pytest.raises(ValueError, match=f"{len(few)} images: at least 2 are needed"):
                tune(model, few, sparsity=0.5)
        with pytest.raises(
            ValueError,
            match=r"images of 64 x 64 and 64 x 96 and 96 x 96 pixels: one plan is tuned for one size",
        ):
            tune(
                model,
                [models.image(96, 96), models.image(64, 96), models.image(64, 64)],
                sparsity=0.5,
                **SMALL,
            )
        broken = images(3)
        for image in broken:
            image[:, :, 5, 5] = torch.nan
        with pytest.raises(
            ValueError, match="features of length nan, of these images: they must be finite"
        ):
            tune(model, broken, sparsity=0.5, **SMALL)
        bsa.dense_plan(model)  # still a model without sparse heads
        assert not [m for m in model.modules() if "_bsa_layer" in m.__dict__]

    @pytest.mark.parametrize(
        ("given", "said"),
        [
            (
                lambda: torch.cat(images(3)),
                r"images hold Tensor \(3, 96, 96\): expected a list of tensors",
            ),
            (
                lambda: [image.numpy() for image in images(3)],
                r"images hold ndarray \(1, 3, 96, 96\)",
            ),
            (lambda: [{"pixels": image} for image in images(3)], "images hold dict"),
        ],
    )
    def test_other_things_than_images(self, given, said):
        with pytest.raises(ValueError, match=said):
            tune(models.make("dinov3"), given(), sparsity=0.5, **SMALL)

    def test_a_target_that_skips_layers(self):
        def first_layers(model, image):
            return model.model.layer[0](
                model.embeddings(image), position_embeddings=model.rope_embeddings(image)
            )

        with pytest.raises(
            ValueError,
            match=r"target ran no attention of model.layer.1.attention, model.layer.2.attention",
        ):
            tune(models.make("dinov3"), images(), sparsity=0.5, target=first_layers, **SMALL)

    @pytest.mark.parametrize(
        "out",
        [lambda x: (x,), lambda x: 0 * x, lambda x: x / 0],
        ids=["tuple", "zeros", "infinite"],
    )
    def test_odd_targets(self, out):
        with pytest.raises(ValueError, match="target returned"):
            tune(
                models.make("dinov3"),
                images(),
                sparsity=0.5,
                target=lambda m, x: out(features(m, x)),
                **SMALL,
            )

    def test_a_layer_named_twice(self):
        model = models.make("dinov3")
        plans = [
            tune(model, images(), sparsity=0.4, layers=layers, **SMALL)
            for layers in ([0, "self.0"], [0])
        ]
        assert plans[0] == plans[1]

    def test_a_target_that_runs_nothing(self):
        with pytest.raises(
            ValueError, match=r"target ran no attention of model.layer.0.attention, model.layer.1"
        ):
            tune(
                models.make("dinov3"),
                images(),
                sparsity=0.5,
                target=lambda model, image: image,
                **SMALL,
            )

    @pytest.mark.parametrize("name", ["scipy.optimize", "safetensors.torch"])
    def test_without_what_it_needs(self, monkeypatch, name):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError, match=r"pip install 'bsa-vision\[tune\]'"):
            tune(models.make("dinov3"), images(), sparsity=0.5, **SMALL)

    def test_a_model_with_sparse_heads(self):
        model = models.make("dinov3")
        bsa.sparsify_(model, bsa.uniform_plan(model, "axial", **SMALL))
        with pytest.raises(ValueError, match="sparse heads already"):
            tune(model, images(), sparsity=0.5, **SMALL)


class TestObserve:
    @pytest.mark.parametrize("name", ["vit", "dinov3", "clip", "siglip"])
    def test_what_is_seen_is_what_attention_gets(self, name):
        model, seen = models.make(name), []
        before = [dict(module.__dict__) for module in model.modules()]
        with torch.no_grad():
            expected = models.features(model, models.image())
            with bsa.observe(model, seen.append):
                out = models.features(model, models.image())
        assert relative(out, expected) < 1e-5
        assert [one.layer.key for one in seen] == ["self.0", "self.1", "self.2"]
        logits = models.attention_logits(model, models.image())
        for one, expected_logits in zip(seen, logits):
            assert torch.allclose(
                one.q @ one.k.transpose(-1, -2) * one.scale, expected_logits, atol=1e-4
            )
            assert one.weight.shape == (48, 48)
        assert [dict(module.__dict__) for module in model.modules()] == before

    def test_relative_position(self):
        model, seen = sam_models.make("segment_anything"), []
        with torch.no_grad(), bsa.observe(model, seen.append):
            model(sam_models.image())
        assert all(one.rel_pos is not None for one in seen)

    def test_the_model_comes_back_after_an_error(self):
        model = models.make("vit")
        before = [dict(module.__dict__) for module in model.modules()]

        def fail(seen):
            raise KeyError("mine")

        with pytest.raises(KeyError), bsa.observe(model, fail):
            models.features(model, models.image())
        assert [dict(module.__dict__) for module in model.modules()] == before

    def test_calls_outside_the_contract(self):
        model = models.make("vit")
        with (
            pytest.raises(bsa.BackendUnavailable, match="an attention mask was passed"),
            bsa.observe(model, lambda seen: None),
        ):
            models.features(model, models.image(), attention_mask=torch.arange(65)[None] < 60)


def photos(folder, count=3):
    folder.mkdir()
    for seed in range(count):
        pixels = torch.randint(
            0, 255, (70, 90, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
        )
        Image.fromarray(pixels.numpy()).save(folder / f"{seed}.png")
    return folder


def test_the_report_is_missed_before_anything_runs(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run(
        capsys,
        f"tune tests.tuning.test_tuning_runs:the_same_model {tmp_path} --sparsity 0.5 -o {tmp_path}/plan.json",
    )
    assert code == 2
    assert "the report needs matplotlib" in err
    assert "pip install 'bsa-vision[tune]'" in err


class TestCommand:
    def test_a_plan_from_a_folder(self, capsys, tmp_path):
        folder, plan = photos(tmp_path / "photos"), tmp_path / "plan.json"
        options = "--sparsity 0.3 --tile 2x4 --block-size 8"
        code, out, err = run(
            capsys, f"tune tests.helpers.models:dinov3 {folder} -o {plan} {options}"
        )
        assert code == 0, err
        assert "measured on 1 images that were kept back" in out
        model = models.dinov3().eval()
        bsa.sparsify_(model, bsa.SparsityPlan.load(plan))
        code, out, _ = run(
            capsys, f"compare tests.helpers.models:dinov3 {folder} --plan {plan} --rounds 1"
        )
        assert code == 0
        assert "8 x 8 patches" in out

    def test_json(self, capsys, tmp_path):
        folder = photos(tmp_path / "photos", count=6)
        options = "--max-error 0.9 --tile 2x4 --block-size 8 --json"
        code, out, _ = run(
            capsys, f"tune tests.helpers.models:dinov3 {folder} -o {tmp_path}/plan.json {options}"
        )
        assert code == 0
        assert json.loads(out)["bound"] <= 0.9

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ("", "tune got no budget"),
            ("--sparsity 0.5 --speedup 2", "exactly one of"),
            ("--sparsity 2", "sparsity=2.0: expected a fraction"),
            ("--sparsity 0.5 --order spiral", "order='spiral'"),
            ("--sparsity 0.5 --tile 3x", "--tile '3x': allowed are grids"),
        ],
    )
    def test_wrong_input(self, capsys, tmp_path, options, message):
        folder, plan = photos(tmp_path / "photos"), tmp_path / "plan.json"
        code, _, err = run(capsys, f"tune tests.helpers.models:dinov3 {folder} -o {plan} {options}")
        assert code == 2
        assert message in err
        assert not plan.exists()

    @pytest.mark.parametrize(
        ("where", "said"),
        [
            ("-o {0}/plan.html", "three files are needed"),
            ("-o {0}/plan.json --report {0}/plan.json", "three files are needed"),
            ("-o {0}/plan.json --statistics {0}/plan.json", "three files are needed"),
            ("-o {0}", "cannot be written: it is a folder"),
            ("-o {0}/nowhere/plan.json", "cannot be written"),
            ("-o .", "expected a file for the plan"),
            ("-o {0}/plan.json --device cuda:7", "this machine has cpu and"),
            ("-o {0}/plan.json --device meta", "this machine has cpu and"),
        ],
    )
    def test_files_that_cannot_be(self, capsys, tmp_path, where, said):
        folder = photos(tmp_path / "photos")
        code, _, err = run(
            capsys,
            f"tune tests.helpers.models:dinov3 {folder} --sparsity 0.3 {where.format(tmp_path)}",
        )
        assert code == 2
        assert said in err
        assert [path.name for path in tmp_path.iterdir()] == ["photos"]

    def test_one_photograph(self, capsys, tmp_path):
        folder = photos(tmp_path / "photos", count=1)
        code, _, err = run(
            capsys,
            f"tune tests.helpers.models:dinov3 {folder} -o {tmp_path}/plan.json --sparsity 0.5",
        )
        assert code == 2
        assert "1 images: at least 2 are needed" in err


class TestCost:
    """benchmarks/tuning_cost.py, which measures what tuning costs."""

    LINE = "--model tests.helpers.models:dinov3 --image-size 96 --sparsity 0.3 --block-size 16"

    def run(self, capsys, line: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as left:
            tuning_cost.main(line.split())
        return left.value.code, capsys.readouterr().out

    def test_cost(self, capsys, tmp_path):
        code, out = self.run(capsys, f"{self.LINE} --json {tmp_path}/cost.json")
        assert code == 0
        assert "dense forwards" in out
        assert "as reported" in out
        found = json.loads((tmp_path / "cost.json").read_text())
        assert found["sparsity"] > 0.3 - 1e-9
        assert found["peak"] >= 0
        assert found["forwards"] == pytest.approx(found["seconds"] / 4 / found["dense"])
        assert sum(found["parts"].values()) == pytest.approx(found["seconds"], rel=0.01)

    def test_a_wrong_report_is_found(self, capsys, monkeypatch):
        def wrong(*args, **options):
            plan = tune(*args, **options)
            tuned = plan.notes["tuned"]
            doubled = {**tuned, "errors": [2 * error for error in tuned["errors"]]}
            return replace(plan, notes={"tuned": doubled})

        monkeypatch.setattr(tuning_cost, "tune", wrong)
        code, out = self.run(capsys, self.LINE)
        assert code == 1
        assert "WRONG: reported were" in out
