"""Decomposed relative position in every backend."""

from __future__ import annotations

import pytest
import torch

import bsa_vision as bsa
from bsa_vision.attention.rel_pos import decompose
from bsa_vision.masks import TokenLayout, local_window, random_blocks, stack_heads
from tests.attention.test_functional import CPU_BACKENDS, close, masked_softmax, qkv


class TestRelPos:
    def setup_method(self):
        self.layout = TokenLayout((6, 9), order="tile", tile=(2, 4), block_size=8)
        base = stack_heads([local_window(self.layout, 1), random_blocks(self.layout, 0.5, 3)], 1)
        self.masks = bsa.HeadMasks(base, [0, 1, 1], layout=self.layout)
        self.inputs = qkv(2, 3, 54, 8)
        generator = torch.Generator().manual_seed(5)
        tables = [
            torch.randn(2 * side - 1, 8, generator=generator, dtype=torch.float64) / 2
            for side in (6, 9)
        ]
        self.rel_pos = decompose(self.inputs[0], *tables, (6, 9))
        assert all(term.std() > 1 for term in self.rel_pos)
        self.tables = tables

    def bias(self):
        """Return the bias of segment_anything's `add_decomposed_rel_pos`, pair by pair."""
        q, (table_h, table_w) = self.inputs[0], self.tables
        bias = torch.zeros(2, 3, 54, 54, dtype=torch.float64)
        for i in range(54):
            for j in range(54):
                rows = table_h[i // 9 - j // 9 + 5]
                columns = table_w[i % 9 - j % 9 + 8]
                bias[:, :, i, j] = q[:, :, i] @ (rows + columns)
        return bias

    @pytest.mark.parametrize("backend", CPU_BACKENDS)
    def test_equals_the_bias_built_pair_by_pair(self, backend):
        out = bsa.sparse_attention(*self.inputs, self.masks, rel_pos=self.rel_pos, backend=backend)
        expected = masked_softmax(*self.inputs, self.masks, self.bias())
        close(out, expected)
        no_rel_pos = bsa.sparse_attention(*self.inputs, self.masks, backend=backend)
        assert (no_rel_pos - expected).abs().max() > 0.1

    @pytest.mark.parametrize("backend", CPU_BACKENDS)
    def test_autocast(self, backend):
        q, k, v, *terms = (x.detach().float() for x in (*self.inputs, *self.rel_pos))
        expected = bsa.sparse_attention(
            q, k, v, self.masks, rel_pos=bsa.RelPos(*terms), backend=backend
        )
        with torch.autocast("cpu", torch.bfloat16):
            out = bsa.sparse_attention(
                q, k, v, self.masks, rel_pos=bsa.RelPos(*terms), backend=backend
            )
        assert out.dtype == torch.bfloat16
        assert (out - expected).norm() / expected.norm() < 0.05

    def test_gradients(self):
        terms = [term.detach().requires_grad_() for term in self.rel_pos]
        grad = torch.randn(2, 3, 54, 8, dtype=torch.float64)
        results = []
        for backend in CPU_BACKENDS:
            out = bsa.sparse_attention(
                *self.inputs, self.masks, rel_pos=bsa.RelPos(*terms), backend=backend
            )
            results.append(torch.autograd.grad(out, (*self.inputs, *terms), grad))
        for got in results[1:]:
            for a, b in zip(got, results[0]):
                close(a, b)

    def test_errors(self):
        with pytest.raises(
            ValueError, match=r"rel_pos needs HeadMasks with a layout .* pass layout="
        ):
            bsa.sparse_attention(
                *self.inputs, bsa.HeadMasks(None, [0, 0, 0], block_size=8), rel_pos=self.rel_pos
            )
        swapped = bsa.RelPos(self.rel_pos.rel_w, self.rel_pos.rel_h)
        with pytest.raises(ValueError, match=r"rel_pos has shapes .*expected .*\(2, 3, 54, 6\)"):
            bsa.sparse_attention(*self.inputs, self.masks, rel_pos=swapped)
        with pytest.raises(ValueError, match=r"table_h has shape \(5, 8\): expected \(11, 8\)"):
            decompose(self.inputs[0], torch.zeros(5, 8), torch.zeros(17, 8), (6, 9))
