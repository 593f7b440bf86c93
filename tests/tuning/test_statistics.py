"""Statistics of dense runs against brute force in float64."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bsa_vision.adapters import Observation
from bsa_vision.attention.rel_pos import RelPos
from bsa_vision.masks import TokenLayout
from bsa_vision.plans.model_spec import LayerSpec
from bsa_vision.tuning.statistics import BlockStatistics, CandidateErrors


@st.composite
def calls(draw):
    """Draw an observed call of a small layer, its layout and masks of 3 candidates per head."""
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
    call = Observation(LayerSpec("a", 0, heads, dim), grid, q, k, v, 0.9, rel_pos, weight)
    masks = torch.rand(heads, 3, layout.num_blocks, layout.num_blocks, generator=generator) < 0.6
    masks |= torch.eye(layout.num_blocks, dtype=torch.bool)
    return call, layout, masks


def outputs(call, layout, mask=None):
    """Return the output of every head after its part of the projection.

    (B, N, H, C) float64 in model order. mask (H, R, C) of blocks; None = dense.
    """
    heads = call.q.shape[1]
    q, k, v = (x.double() for x in (call.q, call.k, call.v))
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    logits = q @ k.transpose(-1, -2) * call.scale
    if call.rel_pos is not None:
        patches = torch.arange(layout.num_patches)
        for term, place in zip(
            call.rel_pos, (patches // layout.grid[1], patches % layout.grid[1]), strict=True
        ):
            logits = logits + term.double()[..., place]
    if mask is not None:
        of_token = layout.inverse // layout.block_size
        logits = logits.masked_fill(~mask[:, of_token][:, :, of_token], -math.inf)
    out = logits.softmax(-1) @ v
    if call.weight is None:
        return out.transpose(1, 2)
    return torch.einsum("bhnd,chd->bnhc", out, call.weight.double().unflatten(1, (heads, -1)))


def changes_of(call, layout):
    """Return u_iJ of `bsa_vision.tuning.statistics` for every query and block of keys.

    (B, H, N, C, channels) float64 in packed order.
    """
    heads = call.q.shape[1]
    q, k, v = (x.double()[:, :, layout.permutation] for x in (call.q, call.k, call.v))
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    logits = q @ k.transpose(-1, -2) * call.scale
    if call.rel_pos is not None:
        patches = layout.permutation
        for term, place in zip(
            call.rel_pos, (patches // layout.grid[1], patches % layout.grid[1]), strict=True
        ):
            logits = logits + term.double()[:, :, layout.permutation][..., place]
    probs = logits.softmax(-1)
    out = probs @ v
    by_key = probs[..., None] * (v[:, :, None] - out[..., None, :])  # (B, H, N, N, D)
    parts = torch.stack([part.sum(3) for part in by_key.split(layout.block_size, dim=3)], dim=3)
    if call.weight is None:
        return parts
    return torch.einsum("bhnkd,chd->bhnkc", parts, call.weight.double().unflatten(1, (heads, -1)))


class TestStatistics:
    @settings(max_examples=60, deadline=None)
    @given(calls())
    def test_candidate_errors_are_those_of_masked_attention(self, problem):
        call, layout, masks = problem
        found = CandidateErrors.empty(*masks.shape[:2])
        found.add(call, layout, masks)
        dense = outputs(call, layout)
        for candidate in range(masks.shape[1]):
            off = outputs(call, layout, masks[:, candidate]) - dense
            expected = off.square().sum((0, 1, 3))  # (H,)
            assert torch.allclose(
                found.error[:, candidate],
                expected,
                rtol=2e-3,
                atol=1e-5 * float(dense.square().sum()),
            )
        queries = torch.full_like(found.error, float(len(call.q) * layout.num_tokens))
        assert torch.equal(found.kept.sum(-1), queries)

    @settings(max_examples=40, deadline=None)
    @given(calls())
    def test_block_statistics(self, problem):
        """Rows of `mass` sum to 1; `drop` is the loss of one block before renormalisation."""
        call, layout, _ = problem
        found = BlockStatistics.empty(call.q.shape[1], layout)
        found.add(call, layout)
        assert torch.allclose(
            found.mass.sum(-1), torch.full_like(found.mass[..., 0], float(len(call.q))), atol=1e-4
        )
        assert (found.drop >= 0).all()
        if layout.num_blocks < 2:
            return
        masks = torch.ones(
            call.q.shape[1], 1, layout.num_blocks, layout.num_blocks, dtype=torch.bool
        )
        masks[:, :, 0, -1] = False
        exact = CandidateErrors.empty(*masks.shape[:2])
        exact.add(call, layout, masks)
        # The exact error is divided by the mass kept, which is at most 1.
        assert (exact.error[:, 0] >= found.drop[:, 0, -1] * (1 - 1e-4) - 1e-6).all()

    @settings(max_examples=30, deadline=None)
    @given(calls(), st.integers(0, 10**6))
    def test_products(self, problem, seed):
        """`gram` has the products of the changes by two blocks, for all blocks or some."""
        call, layout, _ = problem
        heads, blocks, size = call.q.shape[1], layout.num_blocks, layout.block_size
        generator = torch.Generator().manual_seed(seed)
        some = torch.rand(heads, blocks, blocks, generator=generator).argsort(-1)[
            ..., : max(1, blocks - 1)
        ]
        changes = changes_of(call, layout)  # (B, H, N, C, channels), packed order
        for among in (torch.arange(blocks).expand(heads, blocks, blocks), some):
            found = BlockStatistics.empty(heads, layout, among.shape[-1])
            found.add(call, layout, among)
            for row in range(blocks):
                of_row = changes[:, :, row * size : (row + 1) * size]  # (B, H, i, C, channels)
                index = among[None, :, row, None, :, None]
                index = index.expand(*of_row.shape[:3], -1, of_row.shape[-1])
                of_row = of_row.gather(3, index)
                expected = torch.einsum("bhikc,bhijc->hkj", of_row, of_row)
                assert torch.allclose(
                    found.gram[:, row], expected, rtol=1e-3, atol=1e-5 * float(found.total)
                )

    @settings(max_examples=20, deadline=None)
    @given(calls())
    def test_additive_over_images(self, problem):
        call, layout, masks = problem
        one, each = (CandidateErrors.empty(*masks.shape[:2]) for _ in range(2))
        one.add(call, layout, masks)
        for image in range(len(call.q)):
            inside = slice(image, image + 1)
            rel_pos = (
                None if call.rel_pos is None else RelPos(*(term[inside] for term in call.rel_pos))
            )
            part = Observation(
                call.layer,
                call.grid,
                call.q[inside],
                call.k[inside],
                call.v[inside],
                call.scale,
                rel_pos,
                call.weight,
            )
            each.add(part, layout, masks)
        assert torch.allclose(one.error, each.error, rtol=1e-4, atol=1e-6)
        assert (one.kept - each.kept).abs().sum() <= 2  # one query at the edge of a bin
