"""Masked keys have no effect, even NaN, and queries without keys give 0, on every backend."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bsa_vision as bsa
from bsa_vision.attention import functional
from bsa_vision.attention.backends import cpu_kernel
from bsa_vision.masks import TokenLayout
from tests.helpers.calls import attend

WAYS = ["reference", "sdpa", "gather", "gather in torch"]
STRANGE = [torch.nan, torch.inf, -torch.inf]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(way, masks, q, k, v, rel_pos=None, **options):
    """Return output and log-sum-exp, if the backend has one."""
    with pytest.MonkeyPatch.context() as patch:
        if way == "gather in torch":
            patch.setattr(cpu_kernel, "why_not", lambda problem=None: "switched off")
        options.update(backend=way.split()[0], return_lse=way != "sdpa")
        return attend(masks, q, k, v, rel_pos=rel_pos, **options)


def differentiate(way, masks, tensors, grad, **options):
    """Return output, log-sum-exp and the gradients of q, k, v and the relative terms."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    torch.manual_seed(5)  # dropout
    with pytest.MonkeyPatch.context() as patch:
        if way == "gather in torch":
            patch.setattr(cpu_kernel, "why_not", lambda problem=None: "switched off")
        rel_pos = bsa.RelPos(*leaves[3:]) if len(leaves) > 3 else None
        out, lse, _ = run(way, masks, *leaves[:3], rel_pos, **options)
        return [out.detach(), lse, *torch.autograd.grad(out, leaves, grad)]


NAMES = ["out", "lse", "grad_q", "grad_k", "grad_v", "grad_rel_h", "grad_rel_w"]


def same(found, expected, tolerance=2e-5, kinds=True):
    """Assert that finite values are close, and others equal (kinds=False: not finite either)."""
    finite = expected.isfinite()
    assert torch.equal(found.isfinite(), finite)
    if kinds:
        a, b = (x.nan_to_num(7, 8, 9)[~finite] for x in (found, expected))
        assert torch.equal(a, b)
    scale = max(float(expected[finite].abs().max()), 1) if finite.any() else 1
    assert ((found - expected)[finite].abs() <= tolerance * scale).all()


@st.composite
def problems(draw, dropout=False, dtype=torch.float32):
    """Draw (masks, tensors, gradient of the output, options, generator)."""
    layout = TokenLayout(
        (draw(st.integers(2, 6)), draw(st.integers(2, 9))),
        order=draw(st.sampled_from(["raster", "tile"])),
        tile=(2, 4),
        block_size=8,
    )
    tokens, blocks, images, group = layout.num_tokens, layout.num_blocks, 2, draw(st.integers(1, 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    shape = (draw(st.sampled_from([1, images])), group, blocks, blocks)
    base = torch.rand(shape, generator=generator) < 0.4
    types = [0] * group + [1] * group if draw(st.booleans()) else [1] * group + [0] * group
    masks = bsa.HeadMasks(base, types, layout=layout, allow_empty_rows=True)
    dim, dim_v = draw(st.sampled_from([4, 19])), draw(st.sampled_from([3, 16]))
    sizes = [(2 * group, dim), (2, dim), (2, dim_v)]  # heads and features of q, k and v
    if draw(st.booleans()):
        sizes += [(2 * group, side) for side in layout.grid]
    *tensors, grad = (
        torch.randn(images, heads, tokens, features, generator=generator, dtype=torch.float64)
        for heads, features in (*sizes, (2 * group, dim_v))
    )
    tensors, grad = [x.to(dtype) for x in tensors], grad.to(dtype)
    options = {
        "is_causal": draw(st.booleans()),
        "dropout_p": 0.3 if dropout and draw(st.booleans()) else 0.0,
    }
    return masks, tensors, grad, options, generator


def plant(x, where, generator):
    """Return `x` with NaN, inf or -inf at `where`, a mask over the first axes of `x`."""
    values = torch.tensor(STRANGE, dtype=x.dtype)
    values = values[torch.randint(3, where.shape, generator=generator)]
    where, values = (y.reshape(*y.shape, *[1] * (x.dim() - y.dim())) for y in (where, values))
    return torch.where(where, values, x)


def plant_anywhere(tensors, share, generator):
    """Return the tensors with a share of their vectors replaced by NaN, inf or -inf."""
    return [
        plant(x, torch.rand(x.shape[:3], generator=generator) < share, generator) for x in tensors
    ]


def token_mask(masks, images, causal):
    """Return which query attends to which key, (images, H, N, N) bool in model order."""
    tokens, size, order = masks.layout.num_tokens, masks.block_size, masks.layout.inverse
    mask = masks.block_mask(tokens, tokens, causal=causal).expand(images, -1, -1, -1)
    mask = mask.repeat_interleave(size, 2)[:, :, :tokens].repeat_interleave(size, 3)[..., :tokens]
    if causal:
        mask = mask & torch.ones(tokens, tokens, dtype=torch.bool).tril()
    return mask[:, :, order][..., order]


def one_by_one(masks, tensors, grad, is_causal, **unused):
    """Return output, log-sum-exp and gradients, computed query by query with its keys."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    q, k, v, *terms = leaves
    mask, outs, lses = token_mask(masks, len(q), is_causal), [], []
    width, group = masks.layout.grid[1], q.shape[1] // k.shape[1]
    rows = torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3]))
    for image, head, query in rows.tolist():
        keys, key_head = mask[image, head, query].nonzero()[:, 0], head // group
        logits = q.shape[-1] ** -0.5 * k[image, key_head, keys] @ q[image, head, query]
        for term, position in zip(terms, (keys // width, keys % width)):
            logits = logits + term[image, head, query, position]
        if logits.isneginf().all():
            outs.append(v.new_zeros(v.shape[-1]))
            lses.append(v.new_tensor(torch.inf))
            continue
        outs.append(logits.softmax(0) @ v[image, key_head, keys])
        lses.append(logits.logsumexp(0))
    out = torch.stack(outs).view(grad.shape)
    # If all queries are empty, the output depends on no leaf, and autograd would raise.
    zero = sum((x * 0).nan_to_num().sum() for x in leaves)
    grads = torch.autograd.grad(out + zero * 0, leaves, grad) if out.requires_grad else None
    return [out.detach(), torch.stack(lses).view(q.shape[:3]).detach(), *grads]


@settings(max_examples=25, deadline=None)
@given(problems(dtype=torch.float64), st.sampled_from([0.0, 0.02, 0.2]), st.data())
def test_reference_equals_query_by_query(problem, share, data):
    masks, tensors, grad, options, generator = problem
    tensors = plant_anywhere(tensors, share, generator)
    found = differentiate("reference", masks, tensors, grad, **options)
    for a, b in zip(found, one_by_one(masks, tensors, grad, **options), strict=True):
        same(a.double(), b.double(), 1e-9)


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from([0.0, 0.02, 0.2]))
@pytest.mark.parametrize("way", WAYS[1:])
def test_every_way_equals_reference(way, problem, share):
    """NaN and infinities reach exactly the queries that attend to them."""
    masks, tensors, grad, options, generator = problem
    tensors = plant_anywhere(tensors, share, generator)
    expected = differentiate("reference", masks, tensors, grad, **options)
    found = differentiate(way, masks, tensors, grad, **options)
    for name, a, b in zip(NAMES, found, expected):
        if a is not None:
            same(a.detach(), b.detach(), kinds=name == "out")
    if found[1] is not None:  # for +inf and NaN in one row the compiled loop gives +inf, not NaN
        assert found[1][expected[1].isinf()].isposinf().all()


@settings(max_examples=40, deadline=None)
@given(problems(dropout=True))
@pytest.mark.parametrize("way", WAYS)
def test_values_without_effect_may_be_nan(way, problem):
    """Masked keys and values, queries without keys, relative terms of masked rows and columns."""
    masks, tensors, grad, options, generator = problem
    if way == "sdpa":  # its dropout may be torch's
        options["dropout_p"] = 0.0
    planted = plant_unseen(masks, tensors, options["is_causal"], generator)
    before = differentiate(way, masks, tensors, grad, **options)
    after = differentiate(way, masks, planted, grad, **options)
    for a, b in zip(before, after):
        if a is not None:
            assert a.isfinite().all() or (a is before[1] and not a.isnan().any())
            same(b.detach(), a.detach())


def plant_unseen(masks, tensors, causal, generator, extra=None):
    """Put NaN and infinities in all values without effect, and in the key at index `extra`."""
    q, k = tensors[:2]
    mask = token_mask(masks, len(q), causal)
    width = masks.layout.grid[1]
    unseen = ~mask.unflatten(1, (k.shape[1], -1)).any(2).any(2)  # (images, G, N)
    if extra is not None:
        unseen[extra] = True
    patch = torch.arange(q.shape[2])
    terms = [
        torch.stack([~mask[..., axis == i].any(-1) for i in range(int(axis.max()) + 1)], -1)
        for axis in (patch // width, patch % width)
    ]
    masked = (~mask.any(-1), unseen, unseen, *terms)
    return [plant(x, where, generator) for x, where in zip(tensors, masked)]


@pytest.mark.parametrize("way", WAYS)
def test_twin_nan_in_a_kept_key_has_an_effect(way):
    masks, tensors, generator = small()
    grad = torch.ones_like(tensors[0])
    clean, planted = (
        differentiate(way, masks, plant_unseen(masks, tensors, False, generator, extra), grad)
        for extra in (None, (0, 0, 0))
    )
    assert clean[0].isfinite().all()
    assert all(x.isfinite().all() for x in clean[2:])
    attends = token_mask(masks, 1, False)[0, 0, :, 0]
    assert attends.any()
    assert not attends.all()
    assert torch.equal(planted[0][0, 0].isfinite().all(-1), ~attends)


def small(dtype=torch.float32, heads=1):
    """Return masks of 8 x 8 blocks: half of the rows keep the first column, none the last."""
    layout = TokenLayout((8, 8), block_size=8)
    base = torch.ones(1, heads, 8, 8, dtype=torch.bool)
    base[..., 4:, 0] = base[..., 7] = False
    generator = torch.Generator().manual_seed(3)
    draws = (torch.rand(1, heads, 64, 16, generator=generator) for _ in range(3))
    tensors = [(x + 0.1).to(dtype) for x in draws]
    return bsa.HeadMasks(base, layout=layout), tensors, generator


def by_keys(q, k, v):
    k[..., 0] = -torch.inf
    return []


def by_one_key_side(q, k, v):
    k[..., 1:, 0] = -torch.inf  # only the first key is left, in half of the rows
    return []


def by_queries(q, k, v):
    q[:, :, 3] = -torch.inf
    return []


def by_rel_pos(q, k, v):
    terms = [torch.zeros(*q.shape[:3], 8, dtype=q.dtype) for _ in range(2)]
    terms[0][:, :, 5] = -torch.inf
    terms[1][:, :, 9] = -torch.inf
    terms[0][:, :, 12, 1:] = -torch.inf  # one row of patches is left
    return terms


def by_overflow(q, k, v):
    size = 1e20 if q.dtype in (torch.float32, torch.bfloat16) else 1e160
    q *= size
    k *= -size
    return []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [by_keys, by_one_key_side, by_queries, by_rel_pos, by_overflow])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_a_row_with_all_logits_minus_infinity_is_zero(way, dense, make, dtype):
    if make is by_overflow and dtype == torch.float16:
        pytest.skip("cannot overflow, because it is computed in float32")
    masks, tensors, _ = small(dtype, heads=2)
    masks = bsa.HeadMasks(None, [0, 0], layout=masks.layout) if dense else masks
    tensors += make(*tensors)
    q, k, _, *terms = (x.double() for x in tensors)
    logits = q @ k.mT / 4
    if make is by_overflow:
        logits = torch.full_like(logits, -torch.inf)
    for term, position in zip(terms, (torch.arange(64) // 8, torch.arange(64) % 8)):
        logits = logits + term[..., position]
    dead = logits.masked_fill(~token_mask(masks, 1, False), -torch.inf).isneginf().all(-1)
    assert dead.any() or (dense and make is by_one_key_side)
    out, lse, *grads = differentiate(way, masks, tensors, torch.ones_like(tensors[2]))
    assert (out[dead] == 0).all()
    assert (out[~dead] != 0).all()
    if lse is not None:
        assert torch.equal(lse.isposinf(), dead)
    for grad in (grads[0], *grads[3:]):  # of the queries and of their relative terms
        assert not grad[dead].any()
    if make is not by_one_key_side:  # there, 0 * -inf is NaN
        assert all(grad.isfinite().all() for grad in grads)
    if dead.all():
        assert not any(grad.any() for grad in grads)
    else:
        assert grads[2].any()


@pytest.mark.parametrize("way", WAYS)
def test_images_of_different_sizes(way):
    """NaN in one image, or in its skipped blocks, has no effect on others."""
    generator, made = torch.Generator().manual_seed(1), []
    for tokens in (40, 27, 64):
        base = torch.eye(-(-tokens // 8), dtype=torch.bool).expand(1, 2, -1, -1).clone()
        base[..., 1] = False
        hm = bsa.HeadMasks(base, block_size=8, allow_empty_rows=True)
        made.append((hm, torch.randn(2, tokens, 4, generator=generator)))
    masks, images = map(list, zip(*made))

    def call():
        with pytest.MonkeyPatch.context() as patch:
            if way == "gather in torch":
                patch.setattr(cpu_kernel, "why_not", lambda problem=None: "switched off")
            return bsa.sparse_attention(images, images, images, masks, backend=way.split()[0])

    before = call()
    for image in images:
        image[:, 8:16] = torch.nan  # the second block has no keys, and no row keeps it
    for a, b in zip(before, call()):
        torch.testing.assert_close(a, b)
    images[1][:, 3] = torch.nan
    assert [x.isnan().any().item() for x in call()] == [False, True, False]


def test_gradients_of_sdpa_are_not_nan_for_masked_nan():
    """torch ignores NaN in masked keys in the output, but not in the gradient."""
    masks, (q, k, v), _ = small()
    k[:, :, 56:] = torch.nan
    grads = differentiate("sdpa", masks, (q, k, v), torch.ones_like(q))[2:]
    assert all(x.isfinite().all() for x in grads)
    assert not grads[1][:, :, 56:].any()


def test_vmap_works_with_sdpa():
    """Under vmap tensors have no values to test, so the reference formula is used."""
    masks, (q, k, v), _ = small()
    call = lambda q: bsa.sparse_attention(q, k, v, masks, backend="sdpa")  # noqa: E731
    found, expected = torch.vmap(call)(torch.stack([q, 2 * q])), torch.stack([call(q), call(2 * q)])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # the compiled loop, torch
def test_gradients_of_gather_are_batched(dtype):
    """jacobian(vectorize=True) batches gradients; the operator runs once for each."""
    masks, tensors, _ = small()
    grads = torch.randn(3, *tensors[0].shape, dtype=dtype)
    out, leaves = {}, [x.to(dtype).requires_grad_() for x in tensors]
    for backend in ("gather", "reference"):
        out[backend] = bsa.sparse_attention(*leaves, masks, backend=backend)
    together = torch.autograd.grad(out["gather"], leaves, grads, is_grads_batched=True)
    each = [
        torch.autograd.grad(out["reference"], leaves, grad, retain_graph=True) for grad in grads
    ]
    for found, expected in zip(together, map(torch.stack, zip(*each)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_gather_is_an_operator_only_if_needed(monkeypatch):
    """An operator is slower, and may crash in daemon threads while the interpreter exits."""
    calls = []
    run = functional.attention_op
    monkeypatch.setattr(functional, "attention_op", lambda *x: (calls.append(1), run(*x))[1])
    masks, (q, k, v), _ = small()
    call = lambda q: bsa.sparse_attention(q, k, v, masks, backend="gather")  # noqa: E731
    plain = call(q)
    assert not calls
    assert torch.equal(call(q.clone().requires_grad_()), plain)
    assert torch.equal(torch.vmap(call)(q[None])[0], plain)
    assert len(calls) == 2
