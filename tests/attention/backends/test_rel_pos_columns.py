"""Relative position as more columns of queries and keys, in one call and in parts, against the definition."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bsa_vision import HeadMasks, RelPos
from bsa_vision.attention.backends import reference, rel_pos_columns
from bsa_vision.attention.backends.problem import Problem
from bsa_vision.masks import TokenLayout, random_blocks, stack_heads


def problem(
    layout, dim=8, heads=3, group=1, seed=0, density=0.5, scale=0.3, dense=False
) -> Problem:
    """float64, logits and relative terms of standard deviation 1 and more; the first head is dense, or all are.

    In the order in which backends get tokens: packed, or where all heads are dense as the model has them.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = layout.num_tokens
    q = 1.5 * torch.randn(2, heads * group, tokens, dim, generator=generator, dtype=torch.float64)
    k, v = (
        1.5 * torch.randn(2, heads, tokens, dim, generator=generator, dtype=torch.float64)
        for _ in range(2)
    )
    rel_pos = RelPos(*(1.5 * torch.randn(2, heads * group, tokens, n, generator=generator, dtype=torch.float64) for n in layout.grid))  # fmt: skip
    base = (
        torch.rand(1, heads * group - 1, *(layout.num_blocks,) * 2, generator=generator) < density
    )
    masks = HeadMasks(base, [0, *[1] * (heads * group - 1)], layout=layout, allow_empty_rows=True)
    row, column = layout.coordinates
    if dense:
        masks = HeadMasks(None, [0] * heads * group, layout=layout)
        row, column = row[layout.inverse], column[layout.inverse]
    return Problem(
        q, k, v, masks, scale, rel_pos=rel_pos, key_row=row, key_column=column, return_lse=True
    )


@st.composite
def problems(draw):
    tile = (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    order = draw(st.sampled_from(["raster", "tile"]))
    size = draw(st.sampled_from([5, 16, tile[0] * tile[1]]))
    layout = TokenLayout(
        (draw(st.integers(1, 20)), draw(st.integers(1, 20))),
        order=order,
        tile=tile,
        block_size=size,
    )
    return problem(layout, group=draw(st.integers(1, 2)), seed=draw(st.integers(0, 2**20)), density=draw(st.sampled_from([0.1, 0.5, 0.9])), dense=draw(st.booleans()))  # fmt: skip


def without_rel_pos(calls, given_problem):
    """`reference` as a kernel that takes no bias."""
    assert given_problem.rel_pos is None
    calls.append(given_problem.q.shape[-1])
    return reference.run(given_problem)


@settings(max_examples=80, deadline=None)
@given(problems(), st.integers(10, 60))
def test_exact_at_any_width(given_problem, width):
    """In one call where it fits, in parts where it does not, refused where no way is found."""
    reason, calls = rel_pos_columns.why_not(given_problem, width), []
    needed = 8 + sum(given_problem.masks.layout.grid)
    assume(reason is None)
    found = rel_pos_columns.attend(given_problem, width, lambda own: without_rel_pos(calls, own))
    expected = reference.run(given_problem)
    assert torch.allclose(found.out, expected.out, atol=1e-5)  # merged in float32
    assert torch.allclose(found.lse.double(), expected.lse, atol=1e-5)
    assert max(calls) <= width
    assert (len(calls) == 1) == (needed <= width)
    if needed <= width:
        assert torch.allclose(found.out, expected.out, atol=1e-12)


@pytest.mark.parametrize(
    ("grid", "dim", "parts"),
    [
        ((64, 64), 64, 4),
        ((32, 32), 64, 1),
        ((64, 64), 80, 8),
        ((14, 14), 80, 1),
        ((48, 64), 64, 4),
        ((40, 96), 64, 6),
    ],
)
def test_how_many_parts(grid, dim, parts):
    """SAM's global layers in tiles of 8 x 16: four for ViT-B at 1024 px, one at 512 px, eight for ViT-H."""
    layout = TokenLayout(grid, order="tile")
    found = (
        rel_pos_columns._fewest(*layout.coordinates, 128, 128 - dim)
        if sum(grid) + dim > 128
        else [list(range(layout.num_blocks))]
    )
    assert len(found) == parts
    assert sorted(block for cell in found for block in cell) == list(range(layout.num_blocks))
    assert all(
        cell == sorted(cell) for cell in found
    )  # a last block that is shorter stays the last


def test_what_cannot_be_parted():
    """Rows of an image that are too wide, and the rests of tiles that do not divide it, which lie far apart in one block."""
    assert rel_pos_columns._fewest(*TokenLayout((37, 50), order="tile").coordinates, 128, 64) == []
    own = problem(TokenLayout((64, 64), block_size=128), dim=80, heads=2)
    assert "makes queries 208 wide, more than 128, and blocks in this order fit into no 16 sub-grids" in rel_pos_columns.why_not(own, 128)  # fmt: skip


def test_all_dense_in_tile_order():
    """Tokens stay in rows, whatever the layout says, and blocks of whole rows do not fit."""
    layout = TokenLayout((64, 64), order="tile")
    assert "fit into no 16 sub-grids" in rel_pos_columns.why_not(
        problem(layout, dim=64, heads=1, dense=True), 128
    )
    assert rel_pos_columns.why_not(problem(layout, dim=64, heads=2), 128) is None


@pytest.mark.parametrize("scale", [0.125, 0.01, 3.0, -0.3])
def test_what_float16_holds(scale):
    """Terms as large as it takes are not divided beyond it."""
    own = problem(TokenLayout((5, 6), block_size=16), scale=scale)
    rel_pos = RelPos(*(term * 3000 for term in own.rel_pos))
    half = replace(own, **{name: getattr(own, name).half() for name in "qkv"}, rel_pos=RelPos(*(term.half() for term in rel_pos)))  # fmt: skip
    found = rel_pos_columns.attend(half, 64, lambda part: without_rel_pos([], part)).out
    assert found.isfinite().all()
    assert torch.allclose(found.float(), reference.run(half).out.float(), atol=0.02)


def spoilt(own, generator, but_seen=False):
    """-inf in some terms, and NaN in those of rows and columns that a query sees no key of, or `but_seen` in one that it does."""
    mask = own.token_mask(next(iter(own.spans()))) if not own.masks.all_dense else torch.ones(own.num_heads, own.q.shape[2], own.k.shape[2], dtype=torch.bool)  # fmt: skip
    terms = []
    for term, place in zip(own.rel_pos, (own.key_row, own.key_column)):
        seen = torch.stack(
            [mask[..., place == i].any(-1) for i in range(term.shape[-1])], -1
        )  # (H, N, rows)
        term = term.masked_fill(torch.rand(term.shape, generator=generator) < 0.3, -torch.inf)
        term[:, :, ::7] = -torch.inf
        terms.append(term.masked_fill(~seen, torch.nan))
        if but_seen:
            terms[-1][0, 0, 0, seen[0, 0].nonzero()[0, 0]] = torch.nan
    return replace(own, rel_pos=RelPos(*terms))


@settings(max_examples=60, deadline=None)
@given(problems(), st.integers(10, 60))
def test_terms_that_are_not_finite(given_problem, width):
    """What is not seen may hold anything, and -inf bars a key, or all there are."""
    assume(rel_pos_columns.why_not(given_problem, width) is None)
    own = spoilt(given_problem, torch.Generator().manual_seed(width))
    found, expected = (
        rel_pos_columns.attend(own, width, lambda part: without_rel_pos([], part)),
        reference.run(own),
    )
    assert torch.allclose(found.out, expected.out, atol=1e-5)
    assert torch.equal(found.lse.isposinf(), expected.lse.isposinf())
    assert torch.allclose(found.lse.double(), expected.lse, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.125, 1.0, 3.0, -0.3])
def test_terms_that_are_not_finite_in_every_precision(dtype, scale):
    own = spoilt(
        problem(TokenLayout((5, 6), block_size=16), scale=scale), torch.Generator().manual_seed(0)
    )
    narrow = replace(own, **{name: getattr(own, name).to(dtype) for name in "qkv"}, rel_pos=RelPos(*(term.to(dtype) for term in own.rel_pos)))  # fmt: skip
    results = []
    for run in (
        lambda x: rel_pos_columns.attend(x, 64, lambda y: without_rel_pos([], y)),
        reference.run,
    ):
        leaves = [
            x.clone().requires_grad_() for x in (narrow.q, narrow.k, narrow.v, *narrow.rel_pos)
        ]
        out, lse, _ = run(
            replace(narrow, q=leaves[0], k=leaves[1], v=leaves[2], rel_pos=RelPos(*leaves[3:]))
        )
        results.append((out, lse, *torch.autograd.grad(out.sum(), leaves)))
    for a, b in zip(*results):
        assert torch.equal(a.isposinf(), b.isposinf())
        assert torch.allclose(
            a.double(), b.double(), atol=0.2 if dtype.itemsize == 2 else 1e-4, rtol=0.05
        )
    assert results[0][1].isposinf().any()


def test_twin_nan_that_is_seen_shows():
    own = spoilt(
        problem(TokenLayout((5, 6), block_size=16)), torch.Generator().manual_seed(0), but_seen=True
    )
    for run in (
        lambda x: rel_pos_columns.attend(x, 64, lambda y: without_rel_pos([], y)),
        reference.run,
    ):
        assert run(own).out[0, 0, 0].isnan().all()
        assert run(own).out[0, 0, 1:].isfinite().all()


def test_twin_relative_position_matters():
    own = problem(TokenLayout((9, 11), block_size=16))
    expected = reference.run(own).out
    found = rel_pos_columns.attend(own, 30, lambda part: without_rel_pos([], part)).out
    assert torch.allclose(found, expected, atol=1e-10)
    assert not torch.allclose(reference.run(replace(own, rel_pos=None)).out, expected, atol=0.5)


def test_parts_are_made_once():
    own = problem(TokenLayout((20, 20), order="tile", tile=(4, 4), block_size=16))
    parts = rel_pos_columns._parts(own, 30)
    assert len(parts) > 1
    assert rel_pos_columns._parts(replace(own, q=own.q + 1), 30) is parts


class TestGradients:
    def leaves(self, own):
        return [x.clone().requires_grad_() for x in (own.q, own.k, own.v, *own.rel_pos)]

    def with_leaves(self, own, leaves):
        return replace(own, q=leaves[0], k=leaves[1], v=leaves[2], rel_pos=RelPos(*leaves[3:]))

    def test_in_one_call(self):
        own, grads = problem(TokenLayout((7, 9), block_size=16)), []
        for run in (
            lambda x: rel_pos_columns.attend(x, 64, lambda y: without_rel_pos([], y)),
            reference.run,
        ):
            leaves = self.leaves(own)
            out = run(self.with_leaves(own, leaves)).out
            grads.append(torch.autograd.grad(out.square().sum(), leaves))
        for found, expected in zip(*grads):
            assert torch.allclose(found, expected, atol=1e-9)

    def test_none_in_parts(self):
        own = problem(TokenLayout((20, 20), order="tile", tile=(4, 4), block_size=16))
        assert rel_pos_columns.why_not(own, 30) is None
        wants = self.with_leaves(own, self.leaves(own))
        assert "in parts it has no gradient" in rel_pos_columns.why_not(wants, 30)
        with torch.no_grad():
            assert rel_pos_columns.why_not(wants, 30) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"scale": 0.0}, "a scale other than 0"),
        ({"dropout_p": 0.1}, "neither dropout"),
        ({"is_causal": True}, "causality"),
    ],
)
def test_why_not(change, reason):
    own = problem(TokenLayout((20, 20), order="tile", tile=(4, 4), block_size=16))
    assert reason in rel_pos_columns.why_not(replace(own, **change), 30)


def test_merge_of_nothing():
    out, lse = rel_pos_columns.merge([torch.zeros(1, 1, 2, 3), torch.ones(1, 1, 2, 3)], [torch.tensor([[[torch.inf] * 2]]), torch.tensor([[[torch.inf, 1.0]]])])  # fmt: skip
    assert out[0, 0, 0].eq(0).all()
    assert out[0, 0, 1].eq(1).all()
    assert lse.tolist() == [[[torch.inf, 1.0]]]


def test_head_masks_of_parts_stay_what_they_were():
    layout = TokenLayout((16, 16), order="tile", tile=(4, 4), block_size=16)
    mask = random_blocks(layout, 0.5, seed=0)
    own = replace(problem(layout, heads=2), masks=HeadMasks(stack_heads([mask, ~mask], 1), layout=layout, allow_empty_rows=True))  # fmt: skip
    for part in rel_pos_columns._parts(own, 24):
        blocks = part.tokens[::16] // 16
        assert torch.equal(part.masks.base_blockmask[0, 0], mask[:, blocks])
