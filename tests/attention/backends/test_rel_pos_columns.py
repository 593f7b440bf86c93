"""Relative position as extra columns, in one call and in sub-grids, against `reference`."""

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
    """Build a float64 problem with wide logits and relative terms; head 0 is dense, or all are.

    Tokens are in packed order, or in model order if all heads are dense, as backends get them.
    """
    generator, key_heads, heads = torch.Generator().manual_seed(seed), heads, heads * group

    def random(heads, dim):
        shape = (2, heads, layout.num_tokens, dim)
        return 1.5 * torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k, v = random(heads, dim), random(key_heads, dim), random(key_heads, dim)
    rel_pos = RelPos(*(random(heads, side) for side in layout.grid))
    base = torch.rand(1, heads - 1, *(layout.num_blocks,) * 2, generator=generator) < density
    masks = HeadMasks(base, [0, *[1] * (heads - 1)], layout=layout, allow_empty_rows=True)
    row, column = layout.coordinates
    if dense:
        masks = HeadMasks(None, [0] * heads, layout=layout)
        row, column = row[layout.inverse], column[layout.inverse]
    problem = Problem(q, k, v, masks, scale, rel_pos=rel_pos, return_lse=True)
    return replace(problem, key_row=row, key_column=column)


@st.composite
def problems(draw):
    tile = (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    order = draw(st.sampled_from(["raster", "tile"]))
    size = draw(st.sampled_from([5, 16, tile[0] * tile[1]]))
    grid = (draw(st.integers(1, 20)), draw(st.integers(1, 20)))
    layout = TokenLayout(grid, order=order, tile=tile, block_size=size)
    return problem(
        layout,
        group=draw(st.integers(1, 2)),
        seed=draw(st.integers(0, 2**20)),
        density=draw(st.sampled_from([0.1, 0.5, 0.9])),
        dense=draw(st.booleans()),
    )


def without_rel_pos(calls, given_problem):
    """Run `reference` as a kernel that supports no bias; append the width to `calls`."""
    assert given_problem.rel_pos is None
    calls.append(given_problem.q.shape[-1])
    return reference.run(given_problem)


def with_columns(given_problem, width=64, calls=None):
    calls = [] if calls is None else calls
    return rel_pos_columns.attend(given_problem, width, lambda x: without_rel_pos(calls, x))


@settings(max_examples=80, deadline=None)
@given(problems(), st.integers(10, 60))
def test_exact_at_any_width(given_problem, width):
    """One call if the columns fit, otherwise one call per sub-grid."""
    assume(rel_pos_columns.why_not(given_problem, width) is None)
    calls, needed = [], 8 + sum(given_problem.masks.layout.grid)
    found = with_columns(given_problem, width, calls)
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
    """SAM's global layers in 8 x 16 tiles: 4 for ViT-B at 1024 px, 1 at 512 px, 8 for ViT-H."""
    layout = TokenLayout(grid, order="tile")
    blocks = list(range(layout.num_blocks))
    found = [blocks]
    if sum(grid) + dim > 128:
        found = rel_pos_columns._fewest(*layout.coordinates, 128, 128 - dim)
    assert len(found) == parts
    assert sorted(block for cell in found for block in cell) == blocks
    assert all(cell == sorted(cell) for cell in found)  # the last block, which may be shorter


def test_orders_that_cannot_be_split():
    """Ragged tiles of one block can be far apart, and image rows can be too wide."""
    assert rel_pos_columns._fewest(*TokenLayout((37, 50), order="tile").coordinates, 128, 64) == []
    own = problem(TokenLayout((64, 64), block_size=128), dim=80, heads=2)
    reason = rel_pos_columns.why_not(own, 128)
    assert "makes queries 208 wide, more than 128" in reason
    assert reason.endswith(", and this token order needs more than 16 sub-grids")


def test_all_dense_in_tile_order():
    """Tokens stay in model order, and blocks of whole image rows do not fit."""
    layout = TokenLayout((64, 64), order="tile")
    dense = problem(layout, dim=64, heads=1, dense=True)
    assert "needs more than 16 sub-grids" in rel_pos_columns.why_not(dense, 128)
    assert rel_pos_columns.why_not(problem(layout, dim=64, heads=2), 128) is None


@pytest.mark.parametrize("scale", [0.125, 0.01, 3.0, -0.3])
def test_large_terms_do_not_overflow_float16(scale):
    own = problem(TokenLayout((5, 6), block_size=16), scale=scale)
    rel_pos = RelPos(*(term * 3000 for term in own.rel_pos))
    half = replace(
        own,
        **{name: getattr(own, name).half() for name in "qkv"},
        rel_pos=RelPos(*(term.half() for term in rel_pos)),
    )
    found = with_columns(half).out
    assert found.isfinite().all()
    assert torch.allclose(found.float(), reference.run(half).out.float(), atol=0.02)


def spoilt(own, generator, but_seen=False):
    """Put -inf into some terms, and NaN into those of rows and columns that a query does not use.

    but_seen  also put NaN into one that it does use
    """
    mask = own.token_mask(next(iter(own.spans())))
    if mask is None:
        mask = torch.ones(own.num_heads, own.q.shape[2], own.k.shape[2], dtype=torch.bool)
    terms = []
    for term, place in zip(own.rel_pos, (own.key_row, own.key_column)):
        used = [mask[..., place == i].any(-1) for i in range(term.shape[-1])]
        seen = torch.stack(used, -1)  # (H, N, rows or columns)
        term = term.masked_fill(torch.rand(term.shape, generator=generator) < 0.3, -torch.inf)
        term[:, :, ::7] = -torch.inf
        terms.append(term.masked_fill(~seen, torch.nan))
        if but_seen:
            terms[-1][0, 0, 0, seen[0, 0].nonzero()[0, 0]] = torch.nan
    return replace(own, rel_pos=RelPos(*terms))


@settings(max_examples=60, deadline=None)
@given(problems(), st.integers(10, 60))
def test_terms_that_are_not_finite(given_problem, width):
    """Unused terms may hold anything, and -inf masks a key, or all keys."""
    assume(rel_pos_columns.why_not(given_problem, width) is None)
    own = spoilt(given_problem, torch.Generator().manual_seed(width))
    found, expected = with_columns(own, width), reference.run(own)
    assert torch.allclose(found.out, expected.out, atol=1e-5)
    assert torch.equal(found.lse.isposinf(), expected.lse.isposinf())
    assert torch.allclose(found.lse.double(), expected.lse, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.125, 1.0, 3.0, -0.3])
def test_terms_that_are_not_finite_in_every_precision(dtype, scale):
    plain = problem(TokenLayout((5, 6), block_size=16), scale=scale)
    own = spoilt(plain, torch.Generator().manual_seed(0))
    narrow = replace(
        own,
        **{name: getattr(own, name).to(dtype) for name in "qkv"},
        rel_pos=RelPos(*(term.to(dtype) for term in own.rel_pos)),
    )
    results = []
    for run in (with_columns, reference.run):
        leaves = leaves_of(narrow)
        out, lse, _ = run(with_leaves(narrow, leaves))
        results.append((out, lse, *torch.autograd.grad(out.sum(), leaves)))
    tolerance = 0.2 if dtype.itemsize == 2 else 1e-4
    for a, b in zip(*results):
        assert torch.equal(a.isposinf(), b.isposinf())
        assert torch.allclose(a.double(), b.double(), atol=tolerance, rtol=0.05)
    assert results[0][1].isposinf().any()


def leaves_of(own):
    return [x.clone().requires_grad_() for x in (own.q, own.k, own.v, *own.rel_pos)]


def with_leaves(own, leaves):
    q, k, v, *terms = leaves
    return replace(own, q=q, k=k, v=v, rel_pos=RelPos(*terms))


def test_twin_nan_in_used_terms_reaches_the_result():
    plain = problem(TokenLayout((5, 6), block_size=16))
    own = spoilt(plain, torch.Generator().manual_seed(0), but_seen=True)
    for run in (with_columns, reference.run):
        assert run(own).out[0, 0, 0].isnan().all()
        assert run(own).out[0, 0, 1:].isfinite().all()


def test_twin_relative_position_matters():
    own = problem(TokenLayout((9, 11), block_size=16))
    expected = reference.run(own).out
    assert torch.allclose(with_columns(own, 30).out, expected, atol=1e-10)
    assert not torch.allclose(reference.run(replace(own, rel_pos=None)).out, expected, atol=0.5)


def test_parts_are_built_once():
    own = problem(TokenLayout((20, 20), order="tile", tile=(4, 4), block_size=16))
    parts = rel_pos_columns._parts(own, 30)
    assert len(parts) > 1
    assert rel_pos_columns._parts(replace(own, q=own.q + 1), 30) is parts


class TestGradients:
    def test_in_one_call(self):
        own, grads = problem(TokenLayout((7, 9), block_size=16)), []
        for run in (with_columns, reference.run):
            leaves = leaves_of(own)
            out = run(with_leaves(own, leaves)).out
            grads.append(torch.autograd.grad(out.square().sum(), leaves))
        for found, expected in zip(*grads):
            assert torch.allclose(found, expected, atol=1e-9)

    def test_none_in_sub_grids(self):
        own = problem(TokenLayout((20, 20), order="tile", tile=(4, 4), block_size=16))
        assert rel_pos_columns.why_not(own, 30) is None
        training = with_leaves(own, leaves_of(own))
        assert "split into sub-grids it has no gradient" in rel_pos_columns.why_not(training, 30)
        with torch.no_grad():
            assert rel_pos_columns.why_not(training, 30) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"scale": 0.0}, "divided by the scale, which is 0"),
        ({"dropout_p": 0.1}, "neither dropout"),
        ({"is_causal": True}, "causality"),
    ],
)
def test_why_not(change, reason):
    own = problem(TokenLayout((20, 20), order="tile", tile=(4, 4), block_size=16))
    assert reason in rel_pos_columns.why_not(replace(own, **change), 30)


def test_merge_with_empty_queries():
    out, lse = rel_pos_columns.merge(
        [torch.zeros(1, 1, 2, 3), torch.ones(1, 1, 2, 3)],
        [torch.tensor([[[torch.inf] * 2]]), torch.tensor([[[torch.inf, 1.0]]])],
    )
    assert out[0, 0, 0].eq(0).all()
    assert out[0, 0, 1].eq(1).all()
    assert lse.tolist() == [[[torch.inf, 1.0]]]


def test_masks_of_parts_are_columns_of_the_mask():
    layout = TokenLayout((16, 16), order="tile", tile=(4, 4), block_size=16)
    mask = random_blocks(layout, 0.5, seed=0)
    masks = HeadMasks(stack_heads([mask, ~mask], 1), layout=layout, allow_empty_rows=True)
    own = replace(problem(layout, heads=2), masks=masks)
    for part in rel_pos_columns._parts(own, 24):
        blocks = part.tokens[::16] // 16
        assert torch.equal(part.masks.base_blockmask[0, 0], mask[:, blocks])
