"""SAM 2 in all implementations: Hiera's global blocks, and memory attention over frames."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import bsa_vision as bsa
from bsa_vision.adapters.swap.sdpa_intercept import Interception
from bsa_vision.adapters.swap.sparse_layer import layers_of
from bsa_vision.masks import Pattern, TokenLayout
from tests.helpers import sam_models
from tests.helpers.errors import relative_error
from tests.helpers.sam2_models import (
    ENCODERS,
    GLOBAL,
    GRID,
    MEMORIES,
    SIDE,
    features,
    hiera,
    image,
    make,
    remember,
)

ALL = [("encoder", name) for name in ENCODERS] + [("memory", name) for name in MEMORIES]
SMALL = dict(tile=(4, 4), block_size=16)


def local(model, **options):
    return bsa.uniform_plan(model, "local_window", radius=1, **SMALL, **options)


def build(kind, name, dtype=torch.float32):
    """Return a model, and a function that runs it."""
    model = make(name, ENCODERS if kind == "encoder" else MEMORIES).to(dtype)
    if kind == "encoder":
        return model, lambda **more: features(model, image(**more).to(dtype))
    return model, lambda **more: remember(model, dtype=dtype, **more)


def sdpa_twin(kind, name, dtype=torch.float32):
    """Return the model with the same weights in a class that calls torch's attention."""
    return build(kind, name.replace(", eager", "").replace(", not fused", ""), dtype)


@pytest.fixture(params=ALL, ids=[" ".join(pair) for pair in ALL])
def kind_and_name(request):
    return request.param


def token_mask(blocks, size, layout, keys):
    """Expand (R, C) blocks in packed order to (N, M) bool in model order."""
    packed = blocks.repeat_interleave(size, 0).repeat_interleave(size, 1)
    return packed[layout.inverse][:, keys.inverse]


def masked(masks):
    """Return an attention function that uses the next of `masks` in each call, None = dense.

    Its `spread` lists the standard deviations of the logits.
    """
    calls, spread = iter(masks), []

    def attend(q, k, v, scale, dropout):
        spread.append((q @ k.transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)).std().item())
        return F.scaled_dot_product_attention(q, k, v, next(calls), scale=scale)

    attend.spread = spread
    return attend


class Lenient(Interception):
    """An interception that ignores the mask arguments of pooling blocks and transformers."""

    def _attend(
        self,
        query,
        key,
        value,
        attn_mask=None,
        dropout_p=0.0,
        is_causal=False,
        scale=None,
        enable_gqa=False,
    ):
        return self.attend(query, key, value, scale, dropout_p)


def expected_masks(kind, plan, spec, grid=GRID, frames=3, pointers=8, side=SIDE, blocks=8):
    """Return one token mask per attention call of the model."""
    if kind == "encoder":
        layout = plan.layout(spec, grid)
        mask = token_mask(plan.compile("self.4", layout).base_blockmask[0, 0], 16, layout, layout)
        return [mask if block in GLOBAL else None for block in range(blocks)]
    layout = plan.layout(spec, (side, side))
    keys = TokenLayout(
        (side, side), order="tile", frames=frames, num_suffix_tokens=pointers, **SMALL
    )
    near = Pattern("local_window", radius=1)
    return [
        token_mask(near(layout), 16, layout, layout),
        token_mask(near(layout, keys=keys), 16, layout, keys),
    ] * 2


class TestEveryCodeBase:
    def test_dense_plan(self, kind_and_name):
        model, run = build(*kind_and_name)
        with torch.no_grad():
            expected, keys = run(), list(model.state_dict())
            bsa.sparsify_(model, bsa.dense_plan(model))
            assert torch.equal(run(), expected)
            bsa.restore_(model)
            bsa.sparsify_(model, bsa.dense_plan(model), backend="gather")
            assert list(model.state_dict()) == keys
            assert 0 < relative_error(run(), expected) < 1e-5
            with bsa.dense(model):
                assert torch.equal(run(), expected)

    def test_sparse_equals_masked_arithmetic(self, kind_and_name):
        model, run = build(*kind_and_name)
        plan, spec = local(model), bsa.inspect(model)
        _, run_twin = sdpa_twin(*kind_and_name)
        with torch.no_grad():
            dense = run()
            bsa.sparsify_(model, plan)
            sparse = run()
            attend = masked(expected_masks(kind_and_name[0], plan, spec))
            with Lenient(attend):
                expected = run_twin()
        assert min(attend.spread) > 1
        assert relative_error(sparse, expected) < 1e-5
        assert relative_error(sparse, dense) > 1e-2
        assert not any(layer.fallbacks for layer in layers_of(model))

    def test_restore_is_bit_exact(self, kind_and_name):
        model, run = build(*kind_and_name)
        kinds = [type(m) for m in model.modules()]
        dicts = [set(m.__dict__) for m in model.modules()]
        with torch.no_grad():
            expected = run()
            bsa.sparsify_(model, local(model))
            bsa.restore_(model)
            assert torch.equal(run(), expected)
        assert [type(m) for m in model.modules()] == kinds
        assert [set(m.__dict__) for m in model.modules()] == dicts

    @pytest.mark.slow
    @pytest.mark.parametrize("plan", ["dense", "sparse"])
    def test_compile_fullgraph(self, kind_and_name, plan):
        model, run = build(*kind_and_name)
        bsa.sparsify_(model, bsa.dense_plan(model) if plan == "dense" else local(model))
        with torch.no_grad():
            expected = run()
            torch.compiler.reset()
            model.compile(fullgraph=True, backend="aot_eager")
            assert relative_error(run(), expected) < 1e-5

    def test_gradients(self, kind_and_name):
        """Compare in float64: rounding can change which query max pooling selects."""
        model, run = build(*kind_and_name, torch.float64)
        plan, spec = local(model), bsa.inspect(model)
        twin, run_twin = sdpa_twin(*kind_and_name, torch.float64)
        bsa.sparsify_(model, plan)
        run().square().mean().backward()
        with Lenient(masked(expected_masks(kind_and_name[0], plan, spec))):
            run_twin().square().mean().backward()
        got, wanted = (
            torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None])
            for m in (model, twin)
        )
        assert relative_error(got, wanted) < 1e-5

    def test_copies_and_pickles(self, kind_and_name):
        model, run = build(*kind_and_name)
        bsa.sparsify_(model, local(model))
        with torch.no_grad():
            expected = run()
            for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                out = features(twin, image()) if kind_and_name[0] == "encoder" else remember(twin)
                assert torch.equal(out, expected)

    def test_one_plan_serves_all(self, kind_and_name, tmp_path):
        """A plan file for one implementation fits the others."""
        kind, name = kind_and_name
        made_for, _ = build(kind, "sam2")
        local(made_for, layers=[bsa.inspect(made_for).layers[0].key]).save(tmp_path / "plan.json")
        model, run = build(kind, name)
        with torch.no_grad():
            dense = run()
            bsa.sparsify_(model, bsa.SparsityPlan.load(tmp_path / "plan.json"))
            assert relative_error(run(), dense) > 1e-3


class TestEncoder:
    @pytest.mark.parametrize("name", ENCODERS)
    def test_what_is_found(self, name):
        spec = bsa.inspect(make(name))
        assert [layer.key for layer in spec.layers] == ["self.4", "self.6"]
        assert {(layer.heads, layer.head_dim) for layer in spec.layers} == {(4, 16)}
        assert (spec.family, spec.patch_size, len(spec.others)) == ("sam2", (16, 16), 6)

    @pytest.mark.parametrize("name", ENCODERS)
    def test_other_sizes(self, name):
        """The grid follows the input image."""
        model, run = build("encoder", name)
        plan, spec = local(model), bsa.inspect(model)
        _, run_twin = sdpa_twin("encoder", name)
        bsa.sparsify_(model, plan)
        with torch.no_grad():
            run()
            for height, width in ((128, 256), (256, 128)):
                sparse = run(height=height, width=width)
                with Lenient(
                    masked(expected_masks("encoder", plan, spec, (height // 16, width // 16)))
                ):
                    expected = run_twin(height=height, width=width)
                assert relative_error(sparse, expected) < 1e-5

    def test_without_global_blocks(self):
        from sam2.modeling.backbones.hieradet import Hiera

        model = Hiera(
            embed_dim=16,
            num_heads=1,
            stages=(1, 1, 2, 1),
            window_spec=(8, 4, 4, 4),
            global_att_blocks=(),
        )
        with pytest.raises(bsa.PlanError, match="Hiera has no supported attention layer"):
            bsa.inspect(model)

    def test_fused_attn_is_an_attribute_in_timm_only(self):
        model = make("sam2")
        attention = bsa.sparsify_(model, local(model)).trunk.blocks[4].attn
        assert not hasattr(attention, "fused_attn")
        assert hasattr(make("timm hieradet").blocks[4].attn, "fused_attn")

    @pytest.mark.parametrize("kind", ["published", "large"])
    @pytest.mark.parametrize("size", [1024, 896])
    def test_flops_equal_torchs_counter(self, kind, size):
        """Count FLOPs at real sizes on the meta device, with and without padded windows."""
        from sam2.modeling.backbones.hieradet import Hiera

        large = dict(
            embed_dim=144, num_heads=2, stages=(2, 6, 36, 4), global_att_blocks=(23, 33, 43)
        )
        options = dict(large, window_spec=(8, 4, 16, 8)) if kind == "large" else {}
        model = Hiera(**options).to("meta").requires_grad_(False)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(torch.empty(1, 3, size, size, device="meta"))
        assert bsa.cost(bsa.inspect(model, size)).flops == pytest.approx(
            counter.get_total_flops(), rel=0.01
        )

    def test_flops_where_pooling_rounds_down(self):
        """Pooling reduces 11 x 11 tokens to 5 x 5."""
        from sam2.modeling.backbones.hieradet import Hiera

        options = dict(
            embed_dim=16, stages=(1, 2, 4, 1), window_spec=(4, 4, 4, 4), global_att_blocks=GLOBAL
        )
        model = Hiera(**options).to("meta").requires_grad_(False)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(torch.empty(1, 3, 176, 176, device="meta"))
        assert bsa.cost(bsa.inspect(model, 176)).flops == pytest.approx(
            counter.get_total_flops(), rel=0.01
        )

    def test_the_neck_counts(self):
        model = hiera().to("meta")
        model.requires_grad_(False)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(torch.empty(1, 3, 1024, 1024, device="meta"))
        assert bsa.cost(bsa.inspect(model)).flops == pytest.approx(
            counter.get_total_flops(), rel=0.01
        )
        assert bsa.cost(bsa.inspect(model.trunk)).flops < bsa.cost(bsa.inspect(model)).flops

    def test_describe_says_what_is_left(self):
        model = make("sam2")
        text = str(bsa.describe(bsa.sparsify_(model, local(model))))
        assert "trunk.blocks, 6 x MultiScaleAttention: it attends within windows" in text


class TestMemory:
    @pytest.mark.parametrize("name", MEMORIES)
    @pytest.mark.parametrize(("frames", "pointers"), [(1, 0), (2, 4), (5, 64)])
    def test_any_number_of_frames(self, name, frames, pointers):
        model, run = build("memory", name)
        plan, spec = local(model), bsa.inspect(model)
        _, run_twin = sdpa_twin("memory", name)
        bsa.sparsify_(model, plan)
        with torch.no_grad():
            sparse = run(frames=frames, pointers=pointers)
            with Lenient(
                masked(expected_masks("memory", plan, spec, frames=frames, pointers=pointers))
            ):
                expected = run_twin(frames=frames, pointers=pointers)
        assert relative_error(sparse, expected) < 1e-5

    def test_pointers_are_always_kept_and_frames_are_told_apart(self):
        """A query attends to its neighbourhood in every frame, and to all pointers."""
        model = make("sam2", MEMORIES)
        plan, spec = local(model), bsa.inspect(model)
        layout = plan.layout(spec)
        keys = plan.key_layout(spec.find("mem_cross.0"), layout, 3 * SIDE**2 + 8)
        assert (keys.frames, keys.num_suffix_tokens, keys.grid) == (3, 8, (SIDE, SIDE))
        masks = plan.compile("mem_cross.0", layout, keys=keys)
        mask = token_mask(masks.base_blockmask[0, 0], 16, layout, keys)
        assert mask[:, -8:].all()
        frames = mask[:, :-8].unflatten(1, (3, SIDE**2))
        assert torch.equal(frames[:, 0], frames[:, 1])
        assert torch.equal(
            frames[:, 0],
            token_mask(plan.compile("mem_self.0", layout).base_blockmask[0, 0], 16, layout, layout),
        )
        assert not frames.all()

    def test_masks_depend_on_pointers(self):
        layout = TokenLayout((SIDE, SIDE), order="tile", **SMALL)
        near = Pattern("local_window", radius=1)
        with_pointers = near(
            layout,
            keys=TokenLayout((SIDE, SIDE), order="tile", frames=2, num_suffix_tokens=8, **SMALL),
        )
        without = near(layout, keys=TokenLayout((SIDE, SIDE), order="tile", frames=2, **SMALL))
        assert with_pointers.shape != without.shape

    @pytest.mark.parametrize("name", ["sam2", "transformers sam2_video"])
    def test_pointers_that_fill_frames_fall_back(self, name):
        """They could be mistaken for a frame, from the number of keys alone."""
        model, run = build("memory", name)
        with torch.no_grad():
            expected = run(frames=1, pointers=SIDE**2 + 4)
            bsa.sparsify_(model, local(model))
            with pytest.warns(UserWarning, match="the grid of this input is unknown"):
                out = run(frames=1, pointers=SIDE**2 + 4)
            assert torch.equal(out, expected)

    def test_another_frame_size(self):
        model, run = build("memory", "sam2")
        plan, spec = local(model), bsa.inspect(model)
        _, run_twin = sdpa_twin("memory", "sam2")
        bsa.sparsify_(model, plan)
        with torch.no_grad():
            sparse = run(side=9, frames=2)
            with Lenient(masked(expected_masks("memory", plan, spec, side=9, frames=2))):
                expected = run_twin(side=9, frames=2)
        assert relative_error(sparse, expected) < 1e-5

    def test_the_grid_is_read_from_the_rotations(self):
        """sam2 stores only the rotations: 9 x 16 tokens are not taken for a 12 x 12 square."""
        model = make("sam2", MEMORIES)
        for layer in model.layers:
            for attn in (layer.self_attn, layer.cross_attn_image):
                attn.freqs_cis = attn.compute_cis(end_x=16, end_y=9)
        spec = bsa.inspect(model)
        assert spec.grid == (9, 16)
        bsa.sparsify_(model, local(model))
        with torch.no_grad():
            remember(model)
        assert layers_of(model)[0].encoder.grid == (9, 16)

    def test_dropout_in_training(self):
        model, run = build("memory", "sam2")
        bsa.sparsify_(model, local(model))
        model.train()
        with torch.no_grad():
            assert relative_error(run(), run()) > 1e-3

    def test_flops(self):
        """A full memory: 7 frames of 64 x 64 and 64 pointers."""
        from transformers import Sam2VideoConfig
        from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoMemoryAttention

        config = Sam2VideoConfig()
        config._attn_implementation = "sdpa"
        with torch.device("meta"):
            model = Sam2VideoMemoryAttention(config).eval()
        spec = bsa.inspect(model)
        assert {(layer.heads, layer.head_dim) for layer in spec.layers} == {(1, 256)}
        assert spec.find("mem_cross.3").frames == 7
        model.requires_grad_(False)
        tokens, keys = 4096, 7 * 4096 + 64
        shapes = [(tokens, 1, 256), (keys, 1, 64), (tokens, 1, 256), (keys, 1, 64)]
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(*(torch.empty(shape, device="meta") for shape in shapes), 64)
        assert bsa.cost(spec).flops == pytest.approx(counter.get_total_flops(), rel=0.01)

    @pytest.mark.parametrize(
        ("pattern", "options", "message"),
        [
            (
                "window",
                dict(size=4),
                "for other keys allowed are dense, special, local_window, axial",
            ),
            (
                "prompt_region",
                dict(radius=2),
                "for other keys allowed are dense, special, local_window, axial",
            ),
        ],
    )
    def test_patterns_that_do_not_fit(self, pattern, options, message):
        model, _ = build("memory", "sam2")
        kinds = [type(module) for module in model.modules()]
        with pytest.raises(ValueError, match=message):
            bsa.sparsify_(model, bsa.uniform_plan(model, pattern, **options, **SMALL))
        assert [type(module) for module in model.modules()] == kinds

    def test_static_masks_do_not_fit(self):
        model, _ = build("memory", "sam2")
        spec = bsa.inspect(model)
        layout = TokenLayout((SIDE, SIDE), **SMALL)
        masks = bsa.HeadMasks(Pattern("local_window", radius=1)(layout)[None, None], layout=layout)
        bsa.sparsify_(model, bsa.SparsityPlan.from_head_masks(spec, {"mem_self.0": masks}))
        bsa.restore_(model)
        with pytest.raises(bsa.PlanError, match="a static mask fits one number of keys"):
            bsa.sparsify_(model, bsa.SparsityPlan.from_head_masks(spec, {"mem_cross.0": masks}))
        with pytest.raises(bsa.PlanError, match="attends to remembered frames"):
            local(model).freeze(layout)

    def test_sparsity_of_a_plan_counts_one_frame(self):
        model = make("sam2", MEMORIES)
        plan = local(model)
        layout = plan.layout(bsa.inspect(model))
        assert plan.sparsity(layout) == pytest.approx(plan.compile("mem_self.0", layout).sparsity)

    def test_describe_lists_supported_attention_that_is_not_swapped(self):
        model = torch.nn.ModuleList([make("sam2", MEMORIES), sam_models.make("segment_anything")])
        bsa.sparsify_(model[0], local(model[0]))
        (left,) = bsa.describe(model).left
        assert "supported, but not swapped: pass it to sparsify_ by itself" in str(left)

    def test_a_function_gets_both_layouts(self):
        model, run = build("memory", "sam2")
        near = Pattern("local_window", radius=1)

        def mine(layout, keys=None):
            return near(layout, keys=keys)

        with torch.no_grad():
            expected = bsa.sparsify_(model, local(model)) and run()
            bsa.restore_(model)
            bsa.sparsify_(model, bsa.uniform_plan(model, mine, **SMALL))
            assert torch.equal(run(), expected)


class TestVideoModel:
    """The whole model of transformers has two encoders, each with a plan."""

    @pytest.fixture
    def model(self):
        from transformers import Sam2VideoConfig, Sam2VideoModel

        with torch.device("meta"):
            return Sam2VideoModel(Sam2VideoConfig())

    def test_both_are_named(self, model):
        message = (
            r"holds 2 encoders: sam2 \(.*vision_encoder.*\), "
            r"sam2_memory \(memory_attention.layers\)"
        )
        with pytest.raises(bsa.PlanError, match=message):
            bsa.dense_plan(model)
        layers = bsa.inspect(model.vision_encoder).layers
        assert [layer.head_dim for layer in layers] == [96, 96, 96]
        assert bsa.inspect(model.memory_attention).find("mem_cross.0").pointers == 64
