from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bsa_vision import pack, unpack
from bsa_vision.attention.token_order import order_tokens, restore_tokens
from bsa_vision.masks import TokenLayout

layouts = st.builds(
    TokenLayout,
    st.tuples(st.integers(1, 12), st.integers(1, 17)),
    num_prefix_tokens=st.integers(0, 5),
    num_suffix_tokens=st.integers(0, 4),
    order=st.sampled_from(["raster", "tile"]),
    tile=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    block_size=st.sampled_from([8, 128]),
)


@settings(max_examples=60, deadline=None)
@given(layouts)
def test_restore_undoes_order(layout):
    x = torch.randn(2, 3, layout.num_tokens, 4)
    ordered = order_tokens(x, layout)
    assert torch.equal(ordered, x[:, :, layout.permutation])
    assert torch.equal(restore_tokens(ordered, layout), x)
    assert torch.equal(restore_tokens(order_tokens(x, layout, dim=2), layout, dim=2), x)


def test_nothing_is_copied_when_order_changes_nothing():
    x = torch.randn(1, 2, 30, 4)
    assert order_tokens(x, None) is x
    assert order_tokens(x, TokenLayout((5, 6))) is x
    assert order_tokens(x, TokenLayout((5, 6), order="tile", tile=(2, 2))) is not x


@settings(max_examples=40, deadline=None)
@given(st.lists(layouts, min_size=1, max_size=3))
def test_ragged_round_trip(images):
    tensors = [torch.randn(2, layout.num_tokens, 3) for layout in images]
    packed = pack(tensors, images)
    lengths = [layout.num_tokens for layout in images]
    assert packed.tokens.shape == (sum(lengths), 2, 3)
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.cu_seqlens.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert packed.max_seqlen == max(lengths)
    for back, tensor in zip(unpack(packed.tokens, packed), tensors):
        assert torch.equal(back, tensor)


@settings(max_examples=40, deadline=None)
@given(layouts, st.integers(1, 3))
def test_uniform_round_trip(layout, batch):
    x = torch.randn(batch, 2, layout.num_tokens, 3)
    packed = pack(x, layout)
    assert torch.equal(packed.tokens[: layout.num_tokens, 1], x[0, 1, layout.permutation])
    assert torch.equal(unpack(packed.tokens, packed), x)


def test_twin_another_order_is_another_tensor():
    x = torch.arange(40.0).view(1, 1, 40, 1)
    packed = [
        pack(x, TokenLayout((5, 8), order=order, tile=(2, 4))).tokens
        for order in ("raster", "tile")
    ]
    assert not torch.equal(*packed)


def test_errors():
    x = torch.randn(2, 30, 4)
    with pytest.raises(
        ValueError, match=r"shapes \[\(30, 4\)\]: expected \(B, H, N, D\), or a list"
    ):
        pack([x[0]])
    with pytest.raises(ValueError, match=r"expected .* the same heads and head dim"):
        pack([x, x[:1]])
    with pytest.raises(ValueError, match=r"2 images but 1 layouts"):
        pack([x, x], [None])
    with pytest.raises(ValueError, match=r"image 1 has 30 tokens, its layout 31.*special tokens"):
        pack([x, x], [TokenLayout((5, 6)), TokenLayout((5, 6), num_prefix_tokens=1)])
    packed = pack([x])
    with pytest.raises(ValueError, match=r"unpack got 29 tokens, `packed` holds 30"):
        unpack(packed.tokens[1:], packed)
    with pytest.raises(ValueError, match=r"shapes \[\]"):
        pack([])
