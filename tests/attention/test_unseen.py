"""What a query does not see changes nothing, whatever it holds; what sees nothing is 0: every backend against the definition."""

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
    """Output, log-sum-exp where the backend has one."""
    with pytest.MonkeyPatch.context() as patch:
        if way == "gather in torch":
            patch.setattr(cpu_kernel, "why_not", lambda problem=None: "switched off")
        return attend(
            masks,
            q,
            k,
            v,
            rel_pos=rel_pos,
            backend=way.split()[0],
            return_lse=way != "sdpa",
            **options,
        )


def differentiate(way, masks, tensors, grad, **options):
    """Output, log-sum-exp and the gradients of q, k, v and the relative terms."""
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
    """The same numbers and, where they are not finite, the same NaN and infinities, or with `kinds=False` any of them."""
    finite = expected.isfinite()
    assert torch.equal(found.isfinite(), finite)
    if kinds:
        assert torch.equal(
            found.nan_to_num(7, 8, 9)[~finite], expected.nan_to_num(7, 8, 9)[~finite]
        )
    scale = max(float(expected[finite].abs().max()), 1) if finite.any() else 1
    assert ((found - expected)[finite].abs() <= tolerance * scale).all()


@st.composite
def problems(draw, dropout=False, dtype=torch.float32):
    """(masks, tensors, gradient of the output, options): masks of their own for each head, and perhaps image."""
    layout = TokenLayout(
        (draw(st.integers(2, 6)), draw(st.integers(2, 9))),
        order=draw(st.sampled_from(["raster", "tile"])),
        tile=(2, 4),
        block_size=8,
    )
    tokens, blocks, images, group = layout.num_tokens, layout.num_blocks, 2, draw(st.integers(1, 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    base = (
        torch.rand(draw(st.sampled_from([1, images])), group, blocks, blocks, generator=generator)
        < 0.4
    )
    types = [0] * group + [1] * group if draw(st.booleans()) else [1] * group + [0] * group
    masks = bsa.HeadMasks(base, types, layout=layout, allow_empty_rows=True)
    dim, dim_v = draw(st.sampled_from([4, 19])), draw(st.sampled_from([3, 16]))
    shapes = [
        (images, 2 * group, tokens, dim),
        (images, 2, tokens, dim),
        (images, 2, tokens, dim_v),
    ]
    if draw(st.booleans()):
        shapes += [(images, 2 * group, tokens, side) for side in layout.grid]
    tensors = [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
    ]
    grad = torch.randn(
        images, 2 * group, tokens, dim_v, generator=generator, dtype=torch.float64
    ).to(dtype)
    options = {
        "is_causal": draw(st.booleans()),
        "dropout_p": 0.3 if dropout and draw(st.booleans()) else 0.0,
    }
    return masks, tensors, grad, options, generator


def plant(x, struck, generator):
    """NaN, inf or -inf where `struck`, which has the first axes of x."""
    values = torch.tensor(STRANGE, dtype=x.dtype)[
        torch.randint(3, struck.shape, generator=generator)
    ]
    struck, values = (y.reshape(*y.shape, *[1] * (x.dim() - y.dim())) for y in (struck, values))
    return torch.where(struck, values, x)


def sees(masks, images, causal):
    """(images, H, N, N) bool in model order: which query sees which key."""
    tokens, size, place = masks.layout.num_tokens, masks.block_size, masks.layout.inverse
    mask = masks.block_mask(tokens, tokens, causal=causal).expand(images, -1, -1, -1)
    mask = mask.repeat_interleave(size, 2)[:, :, :tokens].repeat_interleave(size, 3)[..., :tokens]
    if causal:
        mask = mask & torch.ones(tokens, tokens, dtype=torch.bool).tril()
    return mask[:, :, place][..., place]


def one_by_one(masks, tensors, grad, is_causal, **unused):
    """Each query for itself, with the keys it sees: output, log-sum-exp and gradients."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    q, k, v, *terms = leaves
    mask, outs, lses = sees(masks, len(q), is_causal), [], []
    across = masks.layout.grid[1]
    for image, head, query in torch.cartesian_prod(
        *(torch.arange(n) for n in q.shape[:3])
    ).tolist():
        keys, own = mask[image, head, query].nonzero()[:, 0], head * k.shape[1] // q.shape[1]
        logits = q.shape[-1] ** -0.5 * k[image, own, keys] @ q[image, head, query]
        for term, place in zip(terms, (keys // across, keys % across)):
            logits = logits + term[image, head, query, place]
        if logits.isneginf().all():
            outs.append(v.new_zeros(v.shape[-1]))
            lses.append(v.new_tensor(torch.inf))
            continue
        outs.append(logits.softmax(0) @ v[image, own, keys])
        lses.append(logits.logsumexp(0))
    out = torch.stack(outs).view(grad.shape)
    own = sum(
        (x * 0).nan_to_num().sum() for x in leaves
    )  # where nothing is seen nothing depends on them
    grads = torch.autograd.grad((out * 1).add(own * 0), leaves, grad) if out.requires_grad else None
    return [out.detach(), torch.stack(lses).view(q.shape[:3]).detach(), *grads]


@settings(max_examples=25, deadline=None)
@given(problems(dtype=torch.float64), st.sampled_from([0.0, 0.02, 0.2]), st.data())
def test_the_definition_is_each_query_with_what_it_sees(problem, share, data):
    masks, tensors, grad, options, generator = problem
    tensors = [
        plant(x, torch.rand(x.shape[:3], generator=generator) < share, generator) for x in tensors
    ]
    found = differentiate("reference", masks, tensors, grad, **options)
    for a, b in zip(found, one_by_one(masks, tensors, grad, **options), strict=True):
        same(a.double(), b.double(), 1e-9)


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from([0.0, 0.02, 0.2]))
@pytest.mark.parametrize("way", WAYS[1:])
def test_every_way_is_the_definition(way, problem, share):
    """NaN and infinities anywhere: each shows where it is seen, and nowhere else."""
    masks, tensors, grad, options, generator = problem
    tensors = [
        plant(x, torch.rand(x.shape[:3], generator=generator) < share, generator) for x in tensors
    ]
    expected = differentiate("reference", masks, tensors, grad, **options)
    found = differentiate(way, masks, tensors, grad, **options)
    for name, a, b in zip(NAMES, found, expected):
        if a is not None:
            same(a.detach(), b.detach(), kinds=name == "out")
    if (
        found[1] is not None
    ):  # +inf and NaN in one row: the compiled loop says +inf, the definition NaN
        assert found[1][expected[1].isinf()].isposinf().all()


@settings(max_examples=40, deadline=None)
@given(problems(dropout=True))
@pytest.mark.parametrize("way", WAYS)
def test_what_is_skipped_may_hold_anything(way, problem):
    """Keys and values that no query sees, queries that see nothing, relative terms of rows and columns that are not seen."""
    masks, tensors, grad, options, generator = problem
    options["dropout_p"] = (
        0.0 if way == "sdpa" else options["dropout_p"]
    )  # whose dropout is torch's own, or ours
    before = differentiate(way, masks, tensors, grad, **options)
    after = differentiate(
        way, masks, plant_unseen(masks, tensors, options["is_causal"], generator), grad, **options
    )
    for a, b in zip(before, after):
        if a is not None:
            assert a.isfinite().all() or (a is before[1] and not a.isnan().any())
            same(b.detach(), a.detach())


def plant_unseen(masks, tensors, causal, generator, but=None):
    """NaN and infinities in everything that no result may depend on, `but` one key."""
    q, k = tensors[:2]
    mask = sees(masks, len(q), causal)
    across = masks.layout.grid[1]
    unseen = ~mask.unflatten(1, (k.shape[1], -1)).any(2).any(2)  # (images, G, N)
    if but is not None:
        unseen[but] = True
    place = torch.arange(q.shape[2])
    beside = [torch.stack([~mask[..., at == i].any(-1) for i in range(int(at.max()) + 1)], -1) for at in (place // across, place % across)]  # fmt: skip
    struck = (~mask.any(-1), unseen, unseen, *beside)
    return [plant(x, own, generator) for x, own in zip(tensors, struck)]


@pytest.mark.parametrize("way", WAYS)
def test_twin_what_is_seen_shows(way):
    masks, tensors, generator = small()
    grad = torch.ones_like(tensors[0])
    clean, spoilt = (
        differentiate(way, masks, plant_unseen(masks, tensors, False, generator, but), grad)
        for but in (None, (0, 0, 0))
    )
    assert clean[0].isfinite().all()
    assert all(x.isfinite().all() for x in clean[2:])
    seen = sees(masks, 1, False)[0, 0, :, 0]
    assert seen.any()
    assert not seen.all()
    assert torch.equal(spoilt[0][0, 0].isfinite().all(-1), ~seen)


def small(dtype=torch.float32, heads=1):
    """8 blocks of 8 tokens, of which the first is seen by half of the rows and the last by none."""
    layout = TokenLayout((8, 8), block_size=8)
    base = torch.ones(1, heads, 8, 8, dtype=torch.bool)
    base[..., 4:, 0] = base[..., 7] = False
    generator = torch.Generator().manual_seed(3)
    tensors = [
        (torch.rand(1, heads, 64, 16, generator=generator) + 0.1).to(dtype) for _ in range(3)
    ]
    return bsa.HeadMasks(base, layout=layout), tensors, generator


def by_keys(q, k, v):
    k[..., 0] = -torch.inf
    return []


def by_one_key_side(q, k, v):
    k[..., 1:, 0] = -torch.inf  # the first key alone is left, for half of the rows
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
def test_a_row_whose_logits_are_all_minus_infinity_is_zero(way, dense, make, dtype):
    if make is by_overflow and dtype == torch.float16:
        pytest.skip("cannot overflow in the float32 it is computed in")
    masks, tensors, _ = small(dtype, heads=2)
    masks = bsa.HeadMasks(None, [0, 0], layout=masks.layout) if dense else masks
    tensors += make(*tensors)
    q, k, _, *terms = (x.double() for x in tensors)
    logits = q @ k.mT / 4
    if make is by_overflow:
        logits = torch.full_like(logits, -torch.inf)
    for term, place in zip(terms, (torch.arange(64) // 8, torch.arange(64) % 8)):
        logits = logits + term[..., place]
    dead = logits.masked_fill(~sees(masks, 1, False), -torch.inf).isneginf().all(-1)
    assert dead.any() or (dense and make is by_one_key_side)
    out, lse, *grads = differentiate(way, masks, tensors, torch.ones_like(tensors[2]))
    assert (out[dead] == 0).all()
    assert (out[~dead] != 0).all()
    if lse is not None:
        assert torch.equal(lse.isposinf(), dead)
    for grad in (grads[0], *grads[3:]):  # of the queries, and what they add to the logits
        assert not grad[dead].any()
    if make is not by_one_key_side:  # where 0 times -inf is seen
        assert all(grad.isfinite().all() for grad in grads)
    if dead.all():
        assert not any(grad.any() for grad in grads)
    else:
        assert grads[2].any()


@pytest.mark.parametrize("way", WAYS)
def test_images_of_different_sizes(way):
    """What one image holds, or skips, is nothing to the others."""
    generator, made = torch.Generator().manual_seed(1), []
    for tokens in (40, 27, 64):
        base = torch.eye(-(-tokens // 8), dtype=torch.bool).expand(1, 2, -1, -1).clone()
        base[..., 1] = False
        made.append(
            (
                bsa.HeadMasks(base, block_size=8, allow_empty_rows=True),
                torch.randn(2, tokens, 4, generator=generator),
            )
        )
    masks, images = map(list, zip(*made))

    def call():
        with pytest.MonkeyPatch.context() as patch:
            if way == "gather in torch":
                patch.setattr(cpu_kernel, "why_not", lambda problem=None: "switched off")
            return bsa.sparse_attention(images, images, images, masks, backend=way.split()[0])

    before = call()
    for image in images:
        image[:, 8:16] = torch.nan  # the second block, which sees nothing and is not seen
    for a, b in zip(before, call()):
        torch.testing.assert_close(a, b)
    images[1][:, 3] = torch.nan
    assert [x.isnan().any().item() for x in call()] == [False, True, False]  # the twin


def test_gradients_by_sdpa_do_not_pass_through_what_is_masked():
    """Where the output is finite all the same: torch gives masked keys no weight, and their NaN to the gradient."""
    masks, (q, k, v), _ = small()
    k[:, :, 56:] = torch.nan
    grads = differentiate("sdpa", masks, (q, k, v), torch.ones_like(q))[2:]
    assert all(x.isfinite().all() for x in grads)
    assert not grads[1][:, :, 56:].any()


def test_vmap_reaches_through_sdpa():
    """Where no value can be asked for, the definition computes."""
    masks, (q, k, v), _ = small()
    call = lambda q: bsa.sparse_attention(q, k, v, masks, backend="sdpa")  # noqa: E731
    torch.testing.assert_close(
        torch.vmap(call)(torch.stack([q, 2 * q])), torch.stack([call(q), call(2 * q)])
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # the compiled loop, torch
def test_gradients_of_gather_are_batched(dtype):
    """As jacobian(vectorize=True) asks for them: the operator is called for each."""
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


def test_gather_is_an_operator_where_one_is_needed(monkeypatch):
    """And nowhere else: it is slower, and daemon threads may crash in it as the interpreter exits."""
    seen = []
    run = functional.attention_op
    monkeypatch.setattr(functional, "attention_op", lambda *x: (seen.append(1), run(*x))[1])
    masks, (q, k, v), _ = small()
    call = lambda q: bsa.sparse_attention(q, k, v, masks, backend="gather")  # noqa: E731
    plain = call(q)
    assert not seen
    assert torch.equal(call(q.clone().requires_grad_()), plain)
    assert torch.equal(torch.vmap(call)(q[None])[0], plain)
    assert len(seen) == 2
