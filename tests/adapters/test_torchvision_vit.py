"""torchvision's ViT: exact and sparse; other `nn.MultiheadAttention` is not supported."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import bsa_vision as bsa
from bsa_vision.adapters.swap.sparse_layer import layers_of
from tests.helpers.errors import relative_error

pytestmark = pytest.mark.models


def make(**changes) -> nn.Module:
    from torchvision.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    sizes = dict(
        image_size=96,
        patch_size=8,
        num_layers=3,
        num_heads=4,
        hidden_dim=48,
        mlp_dim=96,
        num_classes=10,
    )
    model = VisionTransformer(**{**sizes, **changes}).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                gain = 2.0 if "in_proj" in key else 0.8
                parameter.copy_(torch.randn_like(parameter) * gain * parameter[0].numel() ** -0.5)
            elif "bias" in key:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model


def image(batch=2):
    return torch.randn(batch, 3, 96, 96, generator=torch.Generator().manual_seed(1))


def local(model):
    return bsa.uniform_plan(
        model, "local_window", radius=1, dense_heads=1, tile=(4, 4), block_size=16
    )


def test_logits_are_wide():
    model, seen = make(), []

    def record(module, args):
        qkv = nn.functional.linear(args[0], module.in_proj_weight, module.in_proj_bias)
        q, k, _ = qkv.unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        seen.append((q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).std())

    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.register_forward_pre_hook(record)
    model(image())
    assert len(seen) == 3
    assert min(seen) > 1


@pytest.mark.parametrize("grad", [False, True], ids=["fast path", "with gradients"])
def test_dense_and_sparse(grad):
    """Without gradients the original runs a fused path; swapped modules must not."""
    model = make()
    keys = list(model.state_dict())
    with torch.set_grad_enabled(grad):
        expected = model(image())
        bsa.sparsify_(model, bsa.dense_plan(model), backend="gather")
        assert 0 < relative_error(model(image()), expected) < 1e-5
        assert list(model.state_dict()) == keys
        bsa.restore_(model)
        assert torch.equal(model(image()), expected)
        outs = []
        for backend in ("auto", "sdpa", "reference"):
            outs.append(bsa.sparsify_(model, local(model), backend=backend)(image()))
            with bsa.dense(model):
                assert torch.equal(model(image()), expected)
            bsa.restore_(model)
    assert relative_error(outs[0], outs[2]) < 1e-5
    assert relative_error(outs[1], outs[2]) < 1e-5
    assert relative_error(outs[0], expected) > 1e-2


def test_equals_masked_attention():
    """Compare with the unswapped modules, given the mask as an attention mask."""
    model = make()
    plan, spec = local(model), bsa.inspect(model)
    layout = plan.layout(spec)
    masks = plan.compile("self.0", layout)
    blocks = masks.block_mask(layout.num_tokens, layout.num_tokens)[0]  # (H, R, C)
    packed = blocks.repeat_interleave(16, 1).repeat_interleave(16, 2)
    mask = packed[:, layout.inverse][:, :, layout.inverse]
    twin = copy.deepcopy(model)
    for block in twin.encoder.layers:
        attention = block.self_attention
        original = attention.forward
        attention.forward = lambda x, k, v, original=original, **kw: original(
            x, k, v, attn_mask=~mask.repeat(2, 1, 1), **kw
        )
    with torch.no_grad():
        assert relative_error(bsa.sparsify_(model, plan)(image()), twin(image())) < 1e-5


def test_gradients():
    model, twin = make().train(), make().train()
    bsa.sparsify_(twin, bsa.dense_plan(twin), backend="gather")
    for each in (model, twin):
        each(image()).square().mean().backward()
    for (key, a), b in zip(model.named_parameters(), twin.parameters()):
        assert relative_error(b.grad, a.grad) < 1e-4, key


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_compile_fullgraph(kind):
    model = make()
    with torch.no_grad():
        original = model(image())
        plan = bsa.dense_plan(model) if kind == "dense" else local(model)
        expected = bsa.sparsify_(model, plan)(image())
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert relative_error(compiled(image()), expected) < 1e-5
        bsa.restore_(model)
        assert relative_error(compiled(image()), original) < 1e-5


def test_copies_and_pickles():
    model = make()
    with torch.no_grad():
        expected = bsa.sparsify_(model, local(model))(image())
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(image()), expected)
            assert not layers_of(bsa.restore_(other))


def test_outside_the_contract():
    model = make()
    attention = model.encoder.layers[0].self_attention
    x, mask = torch.randn(2, 145, 48), torch.rand(145, 145) > 0.5
    with torch.no_grad():
        expected, weights = attention(x, x, x)
        masked = attention(x, x, x, need_weights=False, attn_mask=mask)[0]
        cross = attention(x, x.flip(1), x, need_weights=False)[0]
        bsa.sparsify_(model, local(model))
        model(image())
        with pytest.warns(UserWarning, match="attention weights were requested"):
            got = attention(x, x, x)
        assert torch.equal(got[0], expected)
        assert torch.equal(got[1], weights)
        with pytest.warns(UserWarning, match="an attention mask was passed"):
            assert torch.equal(attention(x, x, x, None, False, mask)[0], masked)
        with pytest.warns(UserWarning, match="query, key and value are not the same tensor"):
            assert torch.equal(attention(x, x.flip(1), x, need_weights=False)[0], cross)
    assert sum(bsa.describe(model).layers[0].fallbacks.values()) == 3


def test_other_multihead_attention_is_not_supported():
    with pytest.raises(
        bsa.PlanError, match="TransformerEncoderLayer has no supported attention layer"
    ):
        bsa.inspect(nn.TransformerEncoderLayer(8, 2))


def test_flops():
    model = make().train()  # the counter does not support the fused path of eval
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        model(image(1))
    assert bsa.cost(bsa.inspect(model)).flops == pytest.approx(counter.get_total_flops(), rel=0.01)
