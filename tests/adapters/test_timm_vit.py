"""timm's ViTs: every branch of their attention, in their original forward."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

import bsa_vision as bsa
from bsa_vision.adapters.swap.sdpa_intercept import Interception
from bsa_vision.adapters.swap.sparse_layer import layers_of
from tests.helpers.errors import relative_error
from tests.helpers.timm_models import ANY_SIZE, MODELS, image, make

pytestmark = pytest.mark.models


def local(model, **options):
    return bsa.uniform_plan(model, "local_window", radius=1, tile=(4, 4), block_size=16, **options)


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


@pytest.fixture
def model(name):
    return make(name)


class Record(TorchFunctionMode):
    """Record the arguments of torch's attention."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            self.seen.append(args[:3])
        return func(*args, **(kwargs or {}))


class TestEveryBranch:
    def test_logits_are_wide(self, model):
        """Check the test models: logits have standard deviations above 1 in every layer."""
        for block in model.blocks:
            block.attn.fused_attn = True
        with torch.no_grad(), Record() as record:
            model(image())
        seen = [(q, k) for q, k, _ in record.seen if q.shape[2] > 1]  # a pooling head has one query
        assert len(seen) == len(model.blocks)
        for q, k in seen:
            assert (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).std() > 1

    def test_dense_plan(self, model):
        with torch.no_grad():
            expected, keys = model(image()), list(model.state_dict())
            bsa.sparsify_(model, bsa.dense_plan(model))
            assert torch.equal(model(image()), expected)  # runs the original
            assert list(model.state_dict()) == keys
            bsa.restore_(model)
            bsa.sparsify_(model, bsa.dense_plan(model), backend="gather")
            assert 0 < relative_error(model(image()), expected) < 1e-5
            with bsa.dense(model):
                assert torch.equal(model(image()), expected)

    def test_sparse_equals_masked_arithmetic(self, model):
        """Compare with torch's attention with a mask, in the unswapped model."""
        plan, spec = local(model), bsa.inspect(model)
        with torch.no_grad():
            dense = model(image())
            sparse = bsa.sparsify_(model, plan)(image())
            bsa.restore_(model)
            layout = plan.layout(spec)
            blocks = plan.compile("self.0", layout).block_mask(
                layout.num_tokens, layout.num_tokens
            )[0, 0]
            packed = blocks.repeat_interleave(16, 0).repeat_interleave(16, 1)
            mask = packed[layout.inverse][:, layout.inverse]
            for block in model.blocks:
                block.attn.fused_attn = True

            def attend(q, k, v, scale, dropout):
                return F.scaled_dot_product_attention(
                    q, k, v, mask if q.shape[2] > 1 else None, scale=scale
                )

            with Interception(attend):
                masked = model(image())
        assert relative_error(sparse, masked) < 1e-5
        assert relative_error(sparse, dense) > 1e-2

    def test_restore_is_bit_exact(self, model):
        kinds = [type(m) for m in model.modules()]
        dicts = [dict(m.__dict__) for m in model.modules()]
        with torch.no_grad():
            expected = model(image())
            bsa.restore_(bsa.sparsify_(model, local(model)))
            assert torch.equal(model(image()), expected)
        assert [type(m) for m in model.modules()] == kinds
        assert [set(m.__dict__) for m in model.modules()] == [set(d) for d in dicts]
        for block in model.blocks:
            assert isinstance(block.attn.__dict__["fused_attn"], bool)

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["dense", "sparse"])
    def test_compile_fullgraph(self, name, kind):
        model = make(name)
        with torch.no_grad():
            original = model(image())
            plan = bsa.dense_plan(model) if kind == "dense" else local(model)
            expected = bsa.sparsify_(model, plan)(image())
            torch.compiler.reset()
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            assert relative_error(compiled(image()), expected) < 1e-5
            bsa.restore_(model)
            assert relative_error(compiled(image()), original) < 1e-5

    def test_gradients(self, name):
        model, twin = make(name).train(), make(name).train()
        bsa.sparsify_(twin, bsa.dense_plan(twin), backend="gather")
        for each in (model, twin):
            each(image()).square().mean().backward()
        largest = max(
            parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None
        )
        for (key, a), b in zip(model.named_parameters(), twin.parameters()):
            if a.grad is None:  # the pooling head, which this output does not use
                assert b.grad is None
            elif "k_norm.bias" not in key:  # equal for all keys of a query: rounding error only
                assert (a.grad - b.grad).norm() < 1e-4 * a.grad.norm() + 1e-7 * largest, key

    def test_copies_and_pickles(self, model):
        with torch.no_grad():
            expected = bsa.sparsify_(model, local(model))(image())
            saved = io.BytesIO()
            torch.save(model, saved)
            saved.seek(0)
            copies = [
                copy.deepcopy(model),
                pickle.loads(pickle.dumps(model)),
                torch.load(saved, weights_only=False),
            ]
            for other in copies:
                assert torch.equal(other(image()), expected)
            assert relative_error(bsa.restore_(copies[1])(image()), expected) > 1e-2
            assert torch.equal(model(image()), expected)


class TestGrid:
    @pytest.mark.parametrize("size", [(96, 64), (64, 136)])
    @pytest.mark.parametrize("name", sorted(ANY_SIZE))
    def test_of_the_image_that_comes(self, name, size):
        model = make(name)
        plan = local(model)
        with torch.no_grad():
            outs = []
            for backend in ("auto", "reference"):
                outs.append(bsa.sparsify_(model, plan, backend=backend)(image(*size)))
                assert bsa.describe(model).grid == (size[0] // 8, size[1] // 8)
                bsa.restore_(model)
        assert relative_error(outs[0], outs[1]) < 1e-5

    def test_padded_to_whole_patches(self):
        model = make("vit, any size", dynamic_img_pad=True)
        bsa.sparsify_(model, local(model), on_unsupported="error")
        with torch.no_grad():
            model(image(93, 60))
        assert bsa.describe(model).grid == (12, 8)

    def test_dropped_patches_fall_back(self):
        model = make("vit", patch_drop_rate=0.5)
        bsa.sparsify_(model, local(model)).train()
        with (
            torch.no_grad(),
            pytest.warns(UserWarning, match=r"73 tokens do not fit the grid 12 x 12"),
        ):
            model(image())

    def test_families(self):
        import timm

        names = {
            "vit_tiny_patch16_224": "vit",
            "vit_small_patch14_reg4_dinov2": "dinov2",
            "vit_small_patch16_dinov3": "dinov3",
        }
        names |= {
            "vit_base_patch16_siglip_224": "siglip",
            "vit_base_patch16_clip_224": "clip",
            "eva02_tiny_patch14_224": "eva",
        }
        for name, family in names.items():
            with torch.device("meta"):
                model = timm.create_model(name, num_classes=0, depth=1)
            assert bsa.inspect(model).family == family

    def test_one_plan_serves_timm_and_transformers(self):
        """The same architecture has the same properties in both libraries."""
        import timm
        from transformers import DINOv3ViTConfig, DINOv3ViTModel

        with torch.device("meta"):
            timm_model = timm.create_model(
                "vit_small_patch16_dinov3", num_classes=0, depth=2, img_size=224
            )
        sizes = dict(hidden_size=384, num_attention_heads=6, num_hidden_layers=2, image_size=224)
        transformers_model = DINOv3ViTModel(DINOv3ViTConfig(**sizes, num_register_tokens=4))
        a, b = bsa.inspect(timm_model), bsa.inspect(transformers_model)
        assert (a.fingerprint, a.grid, a.num_prefix_tokens, a.patch_size) == (
            b.fingerprint,
            b.grid,
            b.num_prefix_tokens,
            b.patch_size,
        )
        bsa.sparsify_(transformers_model, bsa.uniform_plan(timm_model, "axial"))


class TestOutsideTheContract:
    @pytest.mark.parametrize("name", ["vit", "vit, not fused", "eva, fused"])
    def test_masks_go_to_the_original_bit_for_bit(self, name):
        model = make(name)
        mask = torch.rand(145, 145) > 0.3
        x = torch.randn(2, 145, 48)
        attention = model.blocks[0].attn
        with torch.no_grad():
            masked, causal = attention(x, attn_mask=mask), attention(x, is_causal=True)
            bsa.sparsify_(model, local(model))
            model(image())
            with pytest.warns(
                UserWarning,
                match=r"blocks\.0\.attn runs its original.*an attention mask was passed",
            ):
                assert torch.equal(attention(x, attn_mask=mask), masked)
            with pytest.warns(UserWarning, match="causal attention was requested"):
                assert torch.equal(attention(x, is_causal=True), causal)
            assert bsa.describe(model).layers[0].fallbacks == {
                "an attention mask was passed": 1,
                "causal attention was requested": 1,
            }
            bsa.restore_(model)
            bsa.sparsify_(model, local(model), on_unsupported="error")
            with pytest.raises(bsa.BackendUnavailable, match="an attention mask was passed"):
                attention(x, attn_mask=mask)

    def test_attention_that_calls_torchs_twice_is_refused(self):
        """An unsupported version of timm raises an error."""
        model = make("vit")
        bsa.sparsify_(model, local(model))
        attention = model.blocks[0].attn
        attention.proj_drop = Twice()
        with (
            torch.no_grad(),
            pytest.raises(
                RuntimeError, match=r"'blocks\.0\.attn' called torch's attention 2 times"
            ),
        ):
            model(image())
        torch.compiler.reset()
        compiled = torch.compile(model, backend="aot_eager")
        with torch.no_grad(), pytest.raises(Exception, match=r"called torch's attention 2 times"):
            compiled(image())

    def test_threads_are_independent(self):
        """While one thread runs sparse heads, other threads run torch's attention."""
        model, other = make("vit, not fused"), make("vit, not fused", seed=1)
        bsa.sparsify_(model, local(model))
        wrong = []
        with torch.no_grad():
            expected, theirs = model(image()), other(image())

            def run(which, wanted):
                with torch.no_grad():
                    wrong.extend(1 for _ in range(20) if not torch.equal(which(image()), wanted))

            threads = [
                threading.Thread(target=run, args=pair)
                for pair in ((model, expected), (other, theirs)) * 2
            ]
            [thread.start() for thread in threads]
            [thread.join() for thread in threads]
        assert not wrong

    @pytest.mark.parametrize("block", ["ParallelScalingBlock", "DiffParallelScalingBlock"])
    def test_unsupported_blocks(self, block):
        from timm.models import vision_transformer

        model = make("vit")
        with pytest.raises(bsa.PlanError, match=block):
            bsa.inspect(make("vit", block_fn=getattr(vision_transformer, block)))
        model.extra = getattr(vision_transformer, block)(48, 4)
        report = bsa.describe(bsa.sparsify_(model, local(model)))
        assert any(left.kind == block for left in report.left)
        assert len(layers_of(model)) == 2


class Twice(nn.Module):
    def forward(self, x):
        q = x[:, None]
        return x + 0 * F.scaled_dot_product_attention(q, q, q)[:, 0]


class TestNaFlex:
    """Images of one size, or patches of several with their coordinates."""

    def make(self, **changes: Any) -> nn.Module:
        from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg

        torch.manual_seed(0)
        config = NaFlexVitCfg(
            patch_size=8, embed_dim=48, depth=2, num_heads=4, reg_tokens=2, **changes
        )
        model = NaFlexVit(config, num_classes=0).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 2:
                    gain = 2.2 if any(part in name for part in ("qkv", "q_proj", "k_proj")) else 0.8
                    parameter.normal_(0, gain * parameter.shape[-1] ** -0.5)
        return model

    @pytest.mark.parametrize("changes", [{}, dict(rope_type="axial", attn_type="rope")])
    def test_images(self, changes):
        model, pixels = self.make(**changes), image(96, 64)
        assert (bsa.inspect(model).grid, bsa.inspect(model).num_prefix_tokens) == ((16, 16), 2)
        with torch.no_grad():
            dense, outs = model(pixels), {}
            bsa.sparsify_(model, bsa.dense_plan(model), backend="gather", on_unsupported="error")
            assert relative_error(model(pixels), dense) < 1e-5
            for backend in ("gather", "reference"):
                bsa.restore_(model)
                bsa.sparsify_(model, local(model), backend=backend, on_unsupported="error")
                outs[backend] = model(pixels)
            assert layers_of(model)[0].encoder.grid == (12, 8)
        assert relative_error(outs["gather"], outs["reference"]) < 1e-5
        assert relative_error(outs["gather"], dense) > 1e-2

    def test_patches_with_coordinates_run_the_original(self):
        from timm.models.naflexvit import batch_patchify

        model = self.make()
        patches, (height, width) = batch_patchify(image(96, 64), (8, 8))
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        coordinates = torch.stack([rows, columns], -1).flatten(0, 1).expand(2, -1, 2)
        valid = torch.ones(2, height * width, dtype=torch.bool)
        valid[1, 50:] = False
        given = dict(patches=patches, patch_coord=coordinates, patch_valid=valid)
        with torch.no_grad():
            expected = model(given)
            bsa.sparsify_(model, local(model))
            model(image(96, 64))
            with pytest.warns(UserWarning, match="an attention mask was passed"):
                assert torch.equal(model(given), expected)
