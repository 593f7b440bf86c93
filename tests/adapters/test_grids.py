"""The grid of the image whose tokens a layer gets."""

from __future__ import annotations

import pytest
import torch

import bsa_vision as bsa
from bsa_vision.adapters.swap.sparse_layer import layers_of
from tests.adapters.test_sparsify import BLOCK, sparse_plan
from tests.helpers import timm_models
from tests.helpers.models import features, image, make


def test_unknown_grid_runs_the_original():
    """Without a call of the embeddings, the grid is unknown."""
    model = make("dinov2")
    hidden = torch.randn(1, 30, 48)
    expected = model.encoder(hidden).last_hidden_state
    bsa.sparsify_(model, sparse_plan(model))
    with pytest.warns(UserWarning, match="the grid of this input is unknown"):
        assert torch.equal(model.encoder(hidden).last_hidden_state, expected)


def test_grid_follows_the_input():
    model = make("dinov3")
    bsa.sparsify_(model, sparse_plan(model))
    for size in ((64, 32), (32, 64), (40, 72)):
        features(model, image(*size))
        report = bsa.describe(model)
        assert report.grid == (size[0] // 8, size[1] // 8)
        assert report.layers[0].tokens == 5 + report.grid[0] * report.grid[1]
    assert bsa.describe(model, image_size=128).grid == (16, 16)


class TestTokensOfAnotherImage:
    """Grids with the same number of tokens: only the patch embedding knows which one it is."""

    def made(self, model, pixels):
        """Run the patch embedding only, and return the tokens for the first layer."""
        from timm.models import VisionTransformer

        assert isinstance(model, VisionTransformer)
        return model.norm_pre(model._pos_embed(model.patch_embed(pixels)))

    def blocks(self, model, tokens):
        return model.blocks(tokens)

    @pytest.fixture
    def model(self):
        return timm_models.make("vit, any size")

    def images(self):
        return timm_models.image(96, 64, batch=1), timm_models.image(64, 96, batch=1)

    def sparse(self, model, **options):
        return bsa.sparsify_(
            model, bsa.uniform_plan(model, "local_window", radius=1, **BLOCK), **options
        )

    @torch.no_grad()
    @pytest.mark.parametrize("on_unsupported", ["error", "fallback"])
    def test_made_one_after_the_other(self, model, on_unsupported):
        """The grid of two embedded images is ambiguous: fall back, or raise an error."""
        tall, wide = self.images()
        dense = self.blocks(model, self.made(model, tall))
        self.sparse(model, on_unsupported=on_unsupported)
        tokens, _ = self.made(model, tall), self.made(model, wide)
        message = r"grids \[\(8, 12\), \(12, 8\)\] were embedded: these 97 tokens may be of any"
        if on_unsupported == "error":
            with pytest.raises(bsa.BackendUnavailable, match=message):
                self.blocks(model, tokens)
        else:
            with pytest.warns(UserWarning, match=message):
                assert torch.equal(self.blocks(model, tokens), dense)
        for pixels in (tall, wide, tall):  # later calls are not affected
            model(pixels)
        assert layers_of(model)[0].fallbacks.total() == (on_unsupported == "fallback")

    @torch.no_grad()
    def test_of_other_sizes_are_told_apart(self, model):
        tall, small = self.images()[0], timm_models.image(64, 64, batch=1)
        self.sparse(model, on_unsupported="error")
        expected = [self.blocks(model, self.made(model, pixels)) for pixels in (tall, small)]
        tokens = [self.made(model, pixels) for pixels in (tall, small)]
        for each, wanted in zip(tokens, expected, strict=True):
            assert torch.equal(self.blocks(model, each), wanted)

    @torch.no_grad()
    def test_that_came_without_their_image(self, model):
        tall, wide = self.images()
        tokens = self.made(model, wide)
        self.sparse(model, on_unsupported="error")
        model(tall)
        for _ in range(2):
            with pytest.raises(
                bsa.BackendUnavailable,
                match=r"got 97 tokens that did not pass the patch embedding.*\(12, 8\)",
            ):
                self.blocks(model, tokens)
        model(tall)  # the error has no side effects
        self.blocks(model, self.made(model, wide))
        assert layers_of(model)[0].encoder.grid == (8, 12)

    @torch.no_grad()
    def test_dense_runs_and_failures_leave_nothing_behind(self, model):
        tall, wide = self.images()
        self.sparse(model, on_unsupported="error")
        expected = model(wide)
        with bsa.dense(model):
            model(tall)
        assert torch.equal(model(wide), expected)
        mask = torch.ones(97, 97, dtype=torch.bool)
        with pytest.raises(bsa.BackendUnavailable, match="an attention mask was passed"):
            model(tall, attn_mask=mask)
        assert torch.equal(model(wide), expected)

    @torch.no_grad()
    def test_an_unknown_grid_is_not_that_of_an_image_that_waits(self):
        model = make("siglip2")
        bsa.sparsify_(model, sparse_plan(model))
        grids = torch.tensor([[4, 8], [8, 4]])
        patches = torch.randn(2, 32, 192)
        embed = next(
            module
            for module in model.modules()
            if type(module).__name__ == "Siglip2VisionEmbeddings"
        )
        embed(patches[:1], grids[:1])
        with pytest.warns(UserWarning, match="tokens may be of any"):
            model(patches, pixel_attention_mask=None, spatial_shapes=grids)
