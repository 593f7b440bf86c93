"""Candidates of a head: blocks that are always kept, and the order in which blocks are dropped."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bsa_vision.masks import Pattern, TokenLayout
from bsa_vision.tuning import candidates
from bsa_vision.tuning.statistics import BlockStatistics
from tests.helpers.tuning import SMALL


def random_statistics(layout, heads, among=None, seed=0):
    """Return statistics of random changes (H, R, queries, C, D), the changes, and `among`.

    among  (H, R, K); None = all blocks
    """
    generator = torch.Generator().manual_seed(seed)
    blocks = layout.num_blocks
    changes = torch.randn(heads, blocks, 3, blocks, 2, generator=generator, dtype=torch.float64)
    changes *= (
        torch.rand(heads, blocks, 1, blocks, 1, generator=generator, dtype=torch.float64) ** 2
    )
    changes -= changes.mean(3, keepdim=True)  # all blocks together change nothing
    mass = torch.randn(heads, blocks, blocks, generator=generator, dtype=torch.float64).softmax(-1)
    among = torch.arange(blocks).expand(heads, blocks, blocks) if among is None else among
    some = changes.gather(3, among[:, :, None, :, None].expand(-1, -1, 3, -1, 2))
    gram = torch.einsum("hrikd,hrijd->hrkj", some, some)
    total = torch.tensor(1.0, dtype=torch.float64)
    return BlockStatistics(mass, changes.square().sum((2, 4)), gram, total), changes, among


def drop_greedily(changes, mass, droppable):
    """Drop the blocks of one row one by one, each time the one that leaves the least change.

    Return the blocks in this order, and the squared changes, starting with 0.
    """
    kept, gone, costs = list(range(len(mass))), [], [0.0]
    while any(droppable[j] for j in kept):

        def after(j, kept=tuple(kept)):
            left = [k for k in kept if k != j]
            return float(changes[:, left].sum(1).square().sum() / mass[left].sum() ** 2)

        best = min((j for j in kept if droppable[j]), key=after)
        costs.append(after(best))
        kept.remove(best)
        gone.append(best)
    return gone, costs


def static_masks(statistics, layout, among):
    """Return the masks of the static candidates, [head][density]."""
    order = candidates.order_of_dropping(statistics, layout, among)
    return [[mask for _, mask in head] for head in candidates.static(order, layout)]


class TestCandidates:
    LAYOUT = TokenLayout((16, 12), num_prefix_tokens=1, order="tile", **SMALL)

    def test_every_mask_keeps_what_it_must(self):
        statistics, _, among = random_statistics(self.LAYOUT, 2)
        special = Pattern("special")(self.LAYOUT)
        found = candidates.geometric(candidates.NAMES, self.LAYOUT)
        heads = static_masks(statistics, self.LAYOUT, among)
        for mask in [*(mask for _, mask in found), *itertools.chain(*heads)]:
            assert (mask | ~special).all()
            assert (mask.sum(-1) >= 2).all()
            assert not mask.all()

    @settings(max_examples=15, deadline=None)
    @given(st.integers(0, 10**6), st.integers(0, 1))
    def test_rows_go_block_by_block(self, seed, start):
        """The order is that of a loop in Python, and another one without the products."""
        layout = TokenLayout(
            (8, 6), num_prefix_tokens=start, order="tile", tile=(2, 4), block_size=8
        )
        statistics, changes, among = random_statistics(layout, 2, seed=seed)
        order = candidates.order_of_dropping(statistics, layout, among)
        diagonal = torch.diag_embed(statistics.gram.diagonal(dim1=-2, dim2=-1))
        without = candidates.order_of_dropping(replace(statistics, gram=diagonal), layout, among)
        for head, row in itertools.product(range(2), range(layout.num_blocks)):
            droppable = order[head, row].isfinite()
            expected, _ = drop_greedily(
                changes[head, row], statistics.mass[head, row], droppable.tolist()
            )
            by_order = order[head, row].argsort().tolist()[: len(expected)]
            assert by_order == expected
        assert not torch.equal(order, without)
        kept_always = Pattern("special")(layout)
        assert order[:, kept_always].isinf().all()
        assert (order.isinf().sum(-1) >= 2).all()

    def test_rows_share_a_budget(self):
        """Blocks are ordered by cost, including the cost of blocks dropped before in their row."""
        statistics, changes, among = random_statistics(self.LAYOUT, 1)
        order = candidates.order_of_dropping(statistics, self.LAYOUT, among)[0]
        prices = []
        for row in range(self.LAYOUT.num_blocks):
            gone, costs = drop_greedily(
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
        whole, _, _ = random_statistics(self.LAYOUT, 2)
        among = candidates.compared(whole, self.LAYOUT)
        assert among.shape == (2, self.LAYOUT.num_blocks, 5)
        statistics, _, _ = random_statistics(self.LAYOUT, 2, among)
        order = candidates.order_of_dropping(statistics, self.LAYOUT, among)
        compared = (
            torch.zeros_like(order, dtype=torch.bool).scatter_(-1, among, True) & order.isfinite()
        )
        rest = ~compared & order.isfinite()
        assert order[rest].max() < 0 <= order[compared].min()
        for head in range(2):  # the rest is ordered by `drop`
            by_drop = statistics.drop[head][rest[head]].argsort()
            assert torch.equal(order[head][rest[head]].argsort(), by_drop)
        for mask in itertools.chain(*static_masks(statistics, self.LAYOUT, among)):
            assert (mask | ~Pattern("special")(self.LAYOUT)).all()

    def test_better_than_one_by_one(self):
        """If changes add up, dropping with products changes less than dropping by `drop` alone."""
        statistics, changes, among = random_statistics(self.LAYOUT, 1)

        def change(mask):
            kept = (changes[0] * mask[:, None, :, None]).sum(2).square().sum((1, 2))
            return float((kept / (statistics.mass[0] * mask).sum(-1).square()).sum())

        diagonal = torch.diag_embed(statistics.gram.diagonal(dim1=-2, dim2=-1))
        (chosen,) = static_masks(statistics, self.LAYOUT, among)
        (alone,) = static_masks(replace(statistics, gram=diagonal), self.LAYOUT, among)
        different = [pair for pair in zip(chosen, alone) if not torch.equal(*pair)]
        assert len(different) > 5
        assert all(mask.sum() == other.sum() for mask, other in different)
        ratios = [change(mask) / change(other) for mask, other in different]
        assert sum(ratios) / len(ratios) < 0.8
        assert max(ratios) < 1.1  # a greedy order is not optimal

    def test_no_mask_twice(self):
        layout = TokenLayout((8, 8), order="tile", **SMALL)
        masks = [mask for _, mask in candidates.geometric(candidates.NAMES, layout)]
        assert not any(torch.equal(a, b) for a, b in itertools.combinations(masks, 2))
