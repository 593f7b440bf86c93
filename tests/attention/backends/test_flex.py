"""The flex backend: eager and compiled FlexAttention against `reference`, and its block lists."""

from __future__ import annotations

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters
from torch._subclasses import FakeTensorMode

import bsa_vision as bsa
from bsa_vision import HeadMasks, RelPos
from bsa_vision.attention.backends import flex, gather, measured_costs, self_test
from bsa_vision.attention.backends.problem import Problem
from bsa_vision.attention.backends.select import choose
from bsa_vision.masks import TokenLayout, local_window, random_blocks, stack_heads
from tests.attention.backends.test_cpu_kernel import problems
from tests.attention.test_functional import close, qkv
from tests.attention.test_kernel_functions import run_varlen
from tests.helpers.calls import attend
from tests.helpers.problems import varlens


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    """Lift the GPU limits; torch refuses gradients on CPUs, but the eager form computes them."""
    from torch.nn.attention import flex_attention

    monkeypatch.setattr(flex, "why_not", lambda problem: None)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    torch._dynamo.reset()


def random_masks(layout, density=0.5, heads=2):
    base = [random_blocks(layout, density, seed=seed) for seed in range(heads)]
    return HeadMasks(stack_heads(base, 1), layout=layout)


def local_masks(layout, heads=2):
    return HeadMasks(stack_heads([local_window(layout, radius=2)] * heads, 1), layout=layout)


def small_layout():
    return TokenLayout((9, 14), order="tile", tile=(4, 4), block_size=16)


def run(problem, backend, **options):
    masks, q, k, v, rel_pos, scale = problem
    return attend(masks, q, k, v, rel_pos=rel_pos, scale=scale, backend=backend, **options)


class TestEqualsReference:
    @settings(max_examples=25, deadline=None)
    @given(problems())
    def test_forward(self, problem):
        found, expected = (run(problem, name, return_lse=True) for name in ("flex", "reference"))
        close(found.out, expected.out)
        assert torch.allclose(found.lse.double(), expected.lse, atol=1e-5)
        assert found.lse.dtype in (torch.float32, torch.float64)

    @settings(max_examples=15, deadline=None)
    @given(problems(), st.sampled_from([0, 256]))
    def test_gradients(self, problem, widest):
        """Relative position as columns or, where they would be too wide, as a score_mod."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(flex, "_widest", lambda problem: widest)
            self.gradients(problem)

    def gradients(self, problem):
        masks, *tensors, rel_pos, scale = problem
        grads = []
        for backend in ("flex", "reference"):
            leaves = [x.detach().clone().requires_grad_() for x in (*tensors, *(rel_pos or ()))]
            terms = RelPos(*leaves[3:]) if rel_pos else None
            out = attend(masks, *leaves[:3], rel_pos=terms, scale=scale, backend=backend).out
            generator = torch.Generator().manual_seed(1)
            grad = torch.randn(out.shape, generator=generator, dtype=out.dtype)
            grads.append(torch.autograd.grad(out, leaves, grad))
        for found, expected in zip(*grads):
            assert (found - expected).abs().max() <= 1e-9 * max(expected.abs().max(), 1)

    @settings(max_examples=25, deadline=None)
    @given(varlens(max_tokens=200, exact=False))
    def test_ragged_causal_streaming(self, problem):
        (out, lse), (expected, expected_lse) = (
            run_varlen(problem, name, return_lse=True) for name in ("flex", "reference")
        )
        close(out, expected)
        assert torch.allclose(lse.double(), expected_lse, atol=1e-5)

    def test_relative_position_becomes_columns_if_gradients_are_needed(self, monkeypatch):
        """The gradient of a score_mod would take one atomic addition per logit."""
        masks, generator = local_masks(small_layout()), torch.Generator().manual_seed(5)
        q, k, v = qkv(2, 2, 126, 8)
        rel_pos, wide = (
            RelPos(*(torch.randn(2, 2, 126, n, generator=generator, dtype=q.dtype) for n in grid))
            for grid in ((9, 14), (9, 200))
        )
        made, score_mod = [], flex._score_mod

        def spy(problem):
            made.append(score_mod(problem))
            return made[-1]

        monkeypatch.setattr(flex, "_score_mod", spy)
        attend(masks, q, k, v, rel_pos=rel_pos, backend="flex")
        assert made == [None]
        with torch.no_grad():
            attend(masks, q, k, v, rel_pos=rel_pos, backend="flex")
        assert made[1] is not None
        attend(masks, q, k, v, rel_pos=wide, backend="flex")
        assert made[2] is not None

    @pytest.mark.parametrize("with_rel_pos", [False, True])
    @pytest.mark.parametrize("gradients", [False, True])
    def test_rows_whose_logits_are_all_minus_infinity(self, with_rel_pos, gradients):
        """Queries without keys give 0 and +inf, as columns and as a score_mod."""
        layout = small_layout()
        masks = local_masks(layout)
        q, k, v = (x.detach().abs() for x in qkv(2, 2, 126, 8))
        sides = layout.grid if with_rel_pos else ()
        terms = [torch.zeros(2, 2, 126, side, dtype=q.dtype) for side in sides]
        for term in terms:
            term[:, 0, 5] = term[:, 1, 60:70, 3:] = -torch.inf
        if not terms:
            k[0, ..., 0] = -torch.inf
        results = []
        for backend in ("flex", "reference"):
            leaves = [x.clone().requires_grad_(gradients) for x in (q, k, v, *terms)]
            options = dict(rel_pos=RelPos(*leaves[3:]) if terms else None, return_lse=True)
            out, lse, _ = attend(masks, *leaves[:3], backend=backend, **options)
            grads = torch.autograd.grad(out.sum(), leaves) if gradients else ()
            results.append([out, lse, *grads])
        assert results[0][1].isposinf().any()
        for found, expected in zip(*results):
            assert torch.equal(found.isposinf(), expected.isposinf())
            finite = expected.isfinite() & found.isfinite()
            assert torch.allclose(found[finite], expected[finite], atol=1e-9)

    def test_ragged_gradients(self):
        q, k, v = (x.squeeze(0) for x in qkv(1, 2, 300, 8))
        sizes = ((10, 9), (14, 15))
        masks = [local_masks(TokenLayout(size)) for size in sizes]
        grads = []
        for backend in ("flex", "reference"):
            lists = [x.split([90, 210], dim=1) for x in (q, k, v)]
            outs = bsa.sparse_attention(*lists, masks, backend=backend)
            grads.append(torch.autograd.grad(sum(out.square().sum() for out in outs), (q, k, v)))
        for found, expected in zip(*grads):
            close(found, expected)

    def test_twin_masks_matter(self):
        layout = TokenLayout((16, 24))
        q, k, v = (x.detach() for x in qkv(1, 2, 384, 8))
        outs = [
            attend(HeadMasks(mask.expand(1, 2, 3, 3), layout=layout), q, k, v, backend="flex").out
            for mask in (local_window(layout, radius=1), torch.eye(3, dtype=torch.bool))
        ]
        assert not torch.allclose(*outs, atol=1e-3)


def call(layout) -> Problem:
    q, k, v = (x.detach() for x in qkv(1, 2, layout.num_tokens, 8))
    return Problem(q, k, v, random_masks(layout), 1.0)


class TestCompiled:
    """Inside torch.compile: one operator, differentiated by the backend that runs it."""

    def grads(self, backend, with_rel_pos=True):
        masks = local_masks(small_layout())
        leaves = [x.detach().requires_grad_() for x in qkv(2, 2, 126, 8)]
        generator = torch.Generator().manual_seed(5)
        for side in (9, 14) if with_rel_pos else ():
            term = torch.randn(2, 2, 126, side, generator=generator, dtype=torch.float64)
            leaves.append(term.requires_grad_())

        def loss(q, k, v, *terms):
            rel_pos = RelPos(*terms) if terms else None
            out = bsa.sparse_attention(q, k, v, masks, rel_pos=rel_pos, backend=backend)
            return out.square().sum()

        if backend != "reference":
            loss = torch.compile(loss, fullgraph=True, backend="aot_eager")
        return torch.autograd.grad(loss(*leaves), leaves)

    @pytest.mark.parametrize("with_rel_pos", [False, True])
    def test_gradients(self, monkeypatch, with_rel_pos):
        expected = self.grads("reference", with_rel_pos=with_rel_pos)
        monkeypatch.setattr(gather, "gradients", None)  # must not be used
        for a, b in zip(self.grads("flex", with_rel_pos=with_rel_pos), expected, strict=True):
            close(a, b, 1e-9)

    def test_gather_computes_gradients_that_flex_lacks(self, monkeypatch):
        """A backend may be unavailable if gradients are needed, as merged parts are."""

        def no_gradient(problem):
            return "no gradient" if problem.needs_gradient else None

        monkeypatch.setattr(flex, "why_not", no_gradient)
        for a, b in zip(self.grads("flex"), self.grads("reference"), strict=True):
            close(a, b, 1e-9)
        monkeypatch.setattr(gather, "gradients", None)  # the twin
        with pytest.raises(TypeError):
            self.grads("flex")


class TestLists:
    """The block lists, which the compiled kernel uses and the eager form never reads."""

    @settings(max_examples=60, deadline=None)
    @given(varlens(max_tokens=600, exact=False))
    def test_are_the_mask(self, varlen):
        """Full blocks keep all pairs, partial blocks some, blocks that are not listed none."""
        q, k, v = (x.transpose(0, 1)[None] for x in (varlen.q, varlen.k, varlen.v))
        tensors = (varlen.base_blockmask, varlen.head_mask_type, varlen.streaming_info)
        masks = HeadMasks(*tensors, allow_empty_rows=True)
        ragged = dict(cu_seqlens_q=varlen.cu_q, cu_seqlens_k=varlen.cu_k)
        ragged["max_seqlens"] = varlen.max_seqlens
        problem = Problem(q, k, v, masks, 1.0, is_causal=varlen.causal, **ragged)
        where = flex._where(problem)
        full = dense(where.blocks.full_kv_num_blocks, where.blocks.full_kv_indices)
        partial = dense(where.blocks.kv_num_blocks, where.blocks.kv_indices)
        assert not (full & partial).any()
        assert where.tokens[0] % 128 == where.tokens[1] % 128 == 0
        seen = torch.zeros(*full.shape[:2], *where.tokens, dtype=torch.bool)
        for span in problem.spans():
            mask = problem.token_mask(span)
            rows, columns = where.place_q[span.q], where.place_k[span.k]
            if mask is None:
                mask = torch.ones(q.shape[1], len(rows), len(columns), dtype=torch.bool)
            seen[0, :, rows[:, None], columns[None]] = mask
        exists = torch.zeros(where.tokens[0], dtype=torch.bool).index_fill(0, where.place_q, True)
        blocks = seen.unflatten(3, (-1, 128)).unflatten(2, (-1, 128))  # (1, H, R, i, C, j)
        some = blocks.any(5).any(3)
        # Padding does not matter as queries, but must not be attended to as keys.
        every = (blocks | ~exists.view(1, 1, -1, 128, 1, 1)).all(5).all(3) & some
        assert torch.equal(full, every)
        assert torch.equal(partial, some & ~every)

    def test_a_plain_call_has_full_blocks_only(self):
        where = flex._where(call(TokenLayout((20, 20))))
        assert where.blocks.kv_num_blocks.sum() == 0
        assert where.place_q is None

    def test_are_built_once_and_small(self):
        problem = call(TokenLayout((64, 64)))
        where = flex._where(problem)
        assert flex._where(replace(problem, q=problem.q + 1)) is where
        held = [x for x in where.blocks.as_tuple() if isinstance(x, torch.Tensor)]
        assert sum(x.numel() for x in held) < 20 * 2 * 32 * 32  # no N x N

    def test_another_mask_does_not_recompile(self):
        layout = TokenLayout((12, 20), order="tile", tile=(4, 4))
        generator = torch.Generator().manual_seed(0)

        def random(dim):
            return torch.randn(1, 2, 240, dim, generator=generator)

        q, k, v = (random(16) for _ in range(3))
        graphs = []
        for seed in range(4):
            base = stack_heads([random_blocks(layout, 0.3, seed=seed)] * 2, 1)
            masks, rel_pos = HeadMasks(base, layout=layout), RelPos(random(12), random(20))
            attend(masks, q, k, v, rel_pos=rel_pos, backend="flex")
            graphs.append(counters["stats"]["unique_graphs"])
        assert graphs[0] == graphs[-1] > 0
        narrow = (x[..., :8] for x in (q, k, v))  # the twin: another head dim does
        attend(masks, *narrow, rel_pos=rel_pos, backend="flex")
        assert counters["stats"]["unique_graphs"] > graphs[-1]


def dense(counts, indices):
    """Convert block lists to (1, H, R, C) bool."""
    listed = torch.arange(indices.shape[-1]) < counts[..., None]
    return torch.zeros(indices.shape, dtype=torch.bool).scatter(-1, indices.long(), listed)


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("c++") is None, reason="needs a C++ compiler for FlexAttention on CPUs"
)
@pytest.mark.parametrize("with_rel_pos", [False, True])
def test_compiled_for_a_cpu(monkeypatch, with_rel_pos):
    """Inductor's CPU kernel follows the lists, as the GPU kernel does, so wrong lists are found."""
    layout = TokenLayout((17, 25), order="tile")
    q, k, v = (x.detach().float() for x in qkv(1, 2, 425, 16))
    terms = RelPos(torch.randn(1, 2, 425, 17), torch.randn(1, 2, 425, 25))
    rel_pos = terms if with_rel_pos else None
    masks = random_masks(layout)
    monkeypatch.setattr(flex, "_compiled", inductor)

    def outs():
        names = ("flex", "reference")
        return (attend(masks, q, k, v, rel_pos=rel_pos, backend=name).out for name in names)

    found, expected = outs()
    close(found, expected, 1e-5)
    k[:, 0, :128], v[:, 1, 128:256] = torch.nan, torch.nan  # skipped blocks are not read
    found, expected = outs()
    seen = expected.isnan()
    assert 0 < seen.sum() < seen.numel()
    # Values only: torch's CPU kernel loses NaN in unmasked keys.
    assert found[:, 1].isnan().equal(seen[:, 1])
    close(found[~seen], expected[~seen], 1e-5)
    if not with_rel_pos:
        k, v = k.nan_to_num(), v.nan_to_num()
        expected = attend(masks, q, k, v, backend="reference").out
        where = flex._where(Problem(q, k, v, masks, 1.0))
        where.blocks.full_kv_num_blocks[0, 0, 0] -= 1
        assert not torch.allclose(attend(masks, q, k, v, backend="flex").out, expected, atol=1e-2)


def inductor(device):
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, fullgraph=True)
    # There is no log-sum-exp on CPUs.
    return lambda *tensors, **options: (compiled(*tensors, **options), torch.empty(0))


WHY_NOT = flex.why_not


def why_not(
    dim=64,
    value_dim=None,
    dtype=torch.bfloat16,
    device="cuda",
    block_size=128,
    tokens=256,
    **fields,
):
    with FakeTensorMode():
        q = torch.empty(1, 2, tokens, dim, dtype=dtype, device=device)
        v = torch.empty(1, 2, tokens, value_dim or dim, dtype=dtype, device=device)
    blocks = -(-256 // block_size)
    masks = HeadMasks(torch.ones(1, 2, blocks, blocks, dtype=torch.bool), block_size=block_size)
    return WHY_NOT(Problem(q, q, v, masks, 1.0, **fields))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dim": 8}, "needs head dims of 16 or more, got 8 and 8"),
        ({"value_dim": 4}, "got 64 and 4"),
        ({"dtype": torch.float64}, "got torch.float64"),
        ({"device": "cpu"}, "skips blocks on CUDA only, the tensors are on cpu"),
        ({"block_size": 64}, "block sizes that are multiples of 128, the masks have 64"),
        ({"exact_streaming": True}, "decided per token"),
        ({"dropout_p": 0.1}, "no dropout"),
        ({"return_probs": True}, "no dropout"),
        ({"tokens": 0}, "there are no tokens"),
        (
            {"cu_seqlens_q": torch.zeros(5000, dtype=torch.int32)},
            "whose block mask would be too large (5.0e+07 entries, limit 1.7e+07)",
        ),
    ],
)
def test_why_not(change, reason):
    assert reason in why_not(**change)


def test_supported_calls(monkeypatch):
    monkeypatch.setattr(flex, "_probe", lambda: None)
    rel_pos = RelPos(torch.empty(0), torch.empty(0))
    assert why_not() is None
    assert why_not(dim=80, dtype=torch.float32) is None
    assert why_not(block_size=256, rel_pos=rel_pos, is_causal=True) is None
    monkeypatch.setattr(flex, "_probe", lambda: "no Triton")
    assert why_not() == "no Triton"


@pytest.mark.parametrize(
    ("capability", "shared_memory", "call", "tile"),
    [
        ((9, 0), 232_448, {}, None),
        ((9, 0), 232_448, {"with_rel_pos": True}, (128, 64, 8, 3)),
        ((9, 0), 232_448, {"with_rel_pos": True, "dtype": torch.float32}, None),
        ((8, 0), 166_912, {"with_rel_pos": True, "dim": 128}, None),
        ((8, 9), 101_376, {"with_rel_pos": True}, None),
        ((8, 9), 101_376, {"dim": 80}, (64, 64, 4, 2)),
        ((12, 0), 101_376, {"dim": 128, "dtype": torch.float32}, (64, 32, 4, 2)),
    ],
)
def test_tiles(monkeypatch, capability, shared_memory, call, tile):
    def problem(dim=64, with_rel_pos=False, dtype=torch.bfloat16):
        with FakeTensorMode():
            q = torch.empty(1, 2, 256, dim, dtype=dtype, device="cuda")
        rel_pos = RelPos(q, q) if with_rel_pos else None
        return Problem(q, q, q, HeadMasks(None, [0, 0]), 1.0, rel_pos=rel_pos)

    properties = SimpleNamespace(shared_memory_per_block_optin=shared_memory)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = flex._tiles(problem(**call))
    assert (found and tuple(found.values())) == tile


def test_auto_chooses_it_on_a_gpu(monkeypatch):
    monkeypatch.setattr(flex, "why_not", WHY_NOT)
    monkeypatch.setattr(flex, "_probe", lambda: None)
    monkeypatch.setattr(measured_costs, "describe", lambda *what: "a GPU")
    monkeypatch.setattr(self_test, "failure", lambda *call: None)
    with FakeTensorMode():
        q = torch.empty(1, 2, 256, 64, dtype=torch.bfloat16, device="cuda")
    base = torch.eye(2, dtype=torch.bool).expand(1, 2, -1, -1)
    assert choose(Problem(q, q, q, HeadMasks(base), 1.0, rel_pos=RelPos(q, q))) == "flex"
    q = torch.zeros(1, 2, 256, 64)
    assert choose(Problem(q, q, q, HeadMasks(base), 1.0)) == "gather"


def test_availability():
    reason = flex._probe()
    assert reason is None or "Triton" in reason
