"""torch.fx, torch.jit.trace and torch.jit.script of swapped models: they work or raise an error."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from torch import nn

import bsa_vision as bsa
from bsa_vision.adapters.swap.sparse_layer import layers_of
from tests.adapters import test_torchvision_vit
from tests.helpers import models, sam2_models, sam_models, timm_models
from tests.helpers.errors import relative_error


def local(model):
    return bsa.uniform_plan(model, "local_window", radius=0, tile=(2, 4), block_size=8)


def run(model, pixels):
    return model(pixels)


class Function(nn.Module):
    """A model whose outputs are converted to tensors, for tracing."""

    def __init__(self, model, features):
        super().__init__()
        self.model, self.features = model, features

    def forward(self, *inputs):
        return self.features(self.model, *inputs)


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def remember(pointers, model, current, keys, place, key_place):
    return model(current, keys, place, key_place, pointers)


def memory_inputs():
    tokens, keys = sam2_models.SIDE**2, 2 * sam2_models.SIDE**2 + 8
    sizes = ((tokens, sam2_models.CHANNELS), (keys, sam2_models.MEMORY_CHANNELS)) * 2
    return tuple(draw(count, 1, channels) for count, channels in sizes)


# name -> (function that makes the model, function that runs it, inputs)
TRACED = {
    "dinov3": (partial(models.make, "dinov3"), models.features, (models.image(),)),
    "clip": (partial(models.make, "clip"), models.features, (models.image(),)),
    "timm, any size": (partial(timm_models.make, "vit, any size"), run, (timm_models.image(),)),
    "timm eva": (partial(timm_models.make, "eva, not fused"), run, (timm_models.image(),)),
    "torchvision": (test_torchvision_vit.make, run, (test_torchvision_vit.image(),)),
    **{
        f"sam, {name}": (partial(sam_models.make, name), sam_models.features, (sam_models.image(),))
        for name in (
            "segment_anything",
            "transformers sam, eager",
            "timm",
            "timm, qk-norm",
            "create_encoder",
        )
    },
    "sam2": (partial(sam2_models.make, "sam2"), sam2_models.features, (sam2_models.image(),)),
    "sam2 of timm": (
        partial(sam2_models.make, "timm hieradet"),
        sam2_models.features,
        (sam2_models.image(),),
    ),
    **{
        f"memory, {name}": (
            partial(sam2_models.make, name, sam2_models.MEMORIES),
            partial(remember, 8),
            memory_inputs(),
        )
        for name in ("sam2", "transformers sam2_video")
    },
}


@pytest.mark.parametrize("name", TRACED)
@torch.no_grad()
def test_trace(name):
    make, features, inputs = TRACED[name]
    model = Function(make(), features).eval()
    dense = model(*inputs)
    bsa.sparsify_(model, local(model), on_unsupported="error")
    expected = model(*inputs)
    assert relative_error(expected, dense) > 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, inputs, check_trace=False)
    assert relative_error(traced(*inputs), expected) < 1e-6
    other = tuple(x.flip(0) + 0.1 for x in inputs)
    assert relative_error(traced(*other), model(*other)) < 1e-6
    encoder = layers_of(model)[0].encoder
    assert all(type(side) is int for side in encoder.grid)  # no tensor is left in the model


SCRIPTED = {
    "timm": (lambda: scriptable(), timm_models.image()),
    "torchvision": (test_torchvision_vit.make, test_torchvision_vit.image()),
    "segment_anything": (partial(sam_models.make, "segment_anything"), sam_models.image()),
    "timm hieradet": (partial(sam2_models.make, "timm hieradet"), sam2_models.image()),
}


def scriptable():
    import timm

    return timm.create_model(
        "vit_tiny_patch16_224", img_size=96, patch_size=8, depth=2, scriptable=True
    ).eval()


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("name", SCRIPTED)
def test_script_is_refused_in_one_sentence(name, kind):
    make, _ = SCRIPTED[name]
    model = make()
    bsa.sparsify_(model, bsa.dense_plan(model) if kind == "dense" else local(model))
    message = (
        r"^torch\.jit\.script cannot compile layer '.*', which has sparse heads: .*restore_.*trace"
    )
    with pytest.raises(RuntimeError, match=message):
        torch.jit.script(model)
    bsa.restore_(model)


def test_a_restored_model_scripts():
    model = scriptable()
    bsa.restore_(bsa.sparsify_(model, local(model)))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted, pixels = torch.jit.script(model), timm_models.image()
        assert relative_error(scripted(pixels), model(pixels)) < 1e-6


class TestFx:
    NODE = "encoder.layers.encoder_layer_1.mlp"

    def extract(self, model, node):
        from torchvision.models.feature_extraction import create_feature_extractor

        return create_feature_extractor(model, {node: "out"})

    @pytest.mark.parametrize("kind", ["dense", "dense by gather", "sparse"])
    @torch.no_grad()
    def test_torchvision(self, kind):
        """The attention is a leaf; the patch embedding is called, so the grid is known."""
        model, pixels = test_torchvision_vit.make(), test_torchvision_vit.image()
        outs = []
        hook = model.get_submodule(self.NODE).register_forward_hook(
            lambda module, args, out: outs.append(out)
        )
        model(pixels)
        plan = local(model) if kind == "sparse" else bsa.dense_plan(model)
        bsa.sparsify_(
            model, plan, backend="gather" if "gather" in kind else "auto", on_unsupported="error"
        )
        model(pixels)
        hook.remove()
        extractor = self.extract(model, self.NODE)
        assert torch.equal(extractor(pixels)["out"], outs[1])
        assert (relative_error(outs[1], outs[0]) > 1e-3) == (kind == "sparse")
        with bsa.dense(model):  # the extractor has the swapped modules, not copies
            assert torch.equal(extractor(pixels)["out"], outs[0])
        bsa.restore_(model)

    @torch.no_grad()
    def test_timm(self):
        """The patch embedding is traced through, so the grid is unknown: the original runs."""
        model, pixels = timm_models.make("vit"), timm_models.image()
        dense = model(pixels)
        bsa.sparsify_(model, local(model))
        sparse = model(pixels)
        from timm.models._features_fx import create_feature_extractor

        extractor = create_feature_extractor(model, {"norm": "out"})
        with pytest.warns(UserWarning, match="the grid of this input is unknown"):
            assert relative_error(extractor(pixels)["out"], dense) < 1e-5
        assert torch.equal(model(pixels), sparse)  # the extractor does not change it

    @torch.no_grad()
    def test_layers_left_alone_are_traced_through(self):
        """The softmax of timm's attention is a node, as in the original."""
        from timm.utils import AttentionExtract

        model = timm_models.not_fused(partial(timm_models.make, "vit"))
        expected = AttentionExtract(model, method="fx")(timm_models.image())
        bsa.sparsify_(model, bsa.dense_plan(model), on_unsupported="error")
        got = AttentionExtract(model, method="fx")(timm_models.image())
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[key], expected[key]) for key in expected)
        bsa.restore_(model)
        bsa.sparsify_(model, local(model))
        with pytest.raises(RuntimeError, match="No node names found"):  # by timm
            AttentionExtract(model, method="fx")

    def test_a_graph_cannot_be_swapped(self):
        extractor = self.extract(test_torchvision_vit.make(), self.NODE)
        with pytest.raises(
            bsa.PlanError, match=r"is a graph traced by torch\.fx.*sparsify_ the original first"
        ):
            bsa.inspect(extractor)
