"""Models that are wrapped, offloaded, quantised or pruned before or after `sparsify_`."""

from __future__ import annotations

import copy
import gc
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import bsa_vision as bsa
from bsa_vision.adapters.swap.encoder_state import EncoderState, watching
from bsa_vision.adapters.swap.sparse_layer import layers_of, swapped_in
from bsa_vision.adapters.swap.values import like_of, output_weight, state
from bsa_vision.tuning.store import digest
from tests.adapters import test_robustness
from tests.adapters.test_robustness import SEAMS, SMALL
from tests.helpers import models, sam2_models, sam_models, timm_models
from tests.helpers.errors import relative_error

MORE: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "timm's plain ViT": lambda: (timm_models.make("vit"), timm_models.image()),
    "transformers, SAM": lambda: (sam_models.make("transformers sam"), sam_models.image()),
    "transformers, SAM 2": lambda: (sam2_models.make("transformers sam2"), sam2_models.image()),
    "sam2, memory": lambda: (sam2_models.make("sam2", sam2_models.MEMORIES), None),
    "transformers, memory": lambda: (
        sam2_models.make("transformers sam2_video", sam2_models.MEMORIES),
        None,
    ),
}
FAMILIES = {**{name: make for name, (make, _, _) in SEAMS.items()}, **MORE}
# The attention modules of these have weights: tables of relative position.
HAVE_WEIGHTS = ("segment_anything, class", "transformers, SAM")
BY_CONFIG = ("transformers, its registry", "transformers, SAM 2", "transformers, memory")
ATTENTION = ("attn", "attention", "self_attention", "self_attn", "cross_attn_image")


def plan_for(model):
    heads = bsa.inspect(model).layers[0].heads
    return bsa.uniform_plan(model, "local_window", dense_heads=heads // 4, **SMALL)


def run(model, pixels):
    with torch.no_grad():
        return sam2_models.remember(model) if pixels is None else test_robustness.run(model, pixels)


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def made(family):
    """A model, an image, and the dense output."""
    model, pixels = FAMILIES[family]()
    return model, pixels, run(model, pixels)


@pytest.fixture(scope="module")
def alone():
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def is_encoder_hook(hook):
    return isinstance(getattr(hook, "__self__", None), EncoderState)


def put(model, path, module):
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = module


def block_paths(model):
    """Return the paths of the blocks that hold attention layers."""
    return list(dict.fromkeys(layer.name.rpartition(".")[0] for layer in bsa.inspect(model).layers))


def classes(model):
    return [type(module) for module in model.modules()]


class TestOffloaded:
    """accelerate offloads weights, and sets a forward on every module with weights."""

    # torchvision's model does not run offloaded.
    @pytest.fixture(params=sorted(set(FAMILIES) - {"torchvision, MultiheadAttention"}))
    def family(self, request):
        return request.param

    def test_after(self, family, made):
        from accelerate import cpu_offload
        from accelerate.hooks import remove_hook_from_module

        model, pixels, dense = made
        bsa.sparsify_(model, plan_for(model))
        expected = run(model, pixels)
        assert relative_error(expected, dense) > 1e-3
        cpu_offload(model, execution_device="cpu")
        assert relative_error(run(model, pixels), expected) < 1e-6
        if family not in HAVE_WEIGHTS:
            bsa.restore_(model)
            assert torch.equal(run(model, pixels), dense)
            return
        before = classes(model)
        message = (
            r"has its forward replaced on the module since .*remove_hook_from_module.*then call"
        )
        with pytest.raises(ValueError, match=message + " restore_"):
            bsa.restore_(model)
        assert classes(model) == before
        assert relative_error(run(model, pixels), expected) < 1e-6  # nothing was touched
        remove_hook_from_module(model, recurse=True)
        bsa.restore_(model)
        assert torch.equal(run(model, pixels), dense)
        bsa.sparsify_(model, plan_for(model))
        assert relative_error(run(model, pixels), expected) < 1e-6

    def test_before(self, family, made):
        from accelerate import cpu_offload
        from accelerate.hooks import remove_hook_from_module

        model, pixels, dense = made
        plan = plan_for(model)
        cpu_offload(model, execution_device="cpu")
        assert relative_error(run(model, pixels), dense) < 1e-6
        assert len(bsa.describe(model).layers) == len(bsa.inspect(model).layers)
        if family in HAVE_WEIGHTS:
            with pytest.raises(
                ValueError,
                match=r"has its forward replaced.*call sparsify_ before wrapping, or unwrap",
            ):
                bsa.sparsify_(model, plan)
            assert relative_error(run(model, pixels), dense) < 1e-6
            remove_hook_from_module(model, recurse=True)  # leaves the class's forward on modules
        bsa.sparsify_(model, plan)
        assert relative_error(run(model, pixels), dense) > 1e-3
        assert not any(layer.fallbacks for layer in layers_of(model))
        bsa.restore_(model)
        assert relative_error(run(model, pixels), dense) < 1e-6

    def test_tune(self, tmp_path):
        from accelerate import cpu_offload

        model, images = models.make("dinov2"), [models.image(seed=seed) for seed in range(4)]
        file, options = tmp_path / "statistics", dict(sparsity=0.4, block_size=16)
        expected = bsa.tune(model, images, **options, statistics=file)
        weights = digest(model.state_dict().items())
        cpu_offload(model, execution_device="cpu")
        assert digest(state(model)) == weights
        assert digest(model.state_dict().items()) != weights  # offloaded weights are on meta
        found = bsa.tune(model, images, **options, statistics=file, resume=True)  # the same model
        assert found.layers == expected.layers
        again = bsa.tune(model, images, **options)
        assert again.report["measured"] == pytest.approx(expected.report["measured"])


def test_a_method_set_since(family, made):
    """A method that a wrapper has set since is reported, and nothing is changed."""
    model, pixels, dense = made
    bsa.sparsify_(model, plan_for(model))
    name = "attend" if family == "our encoder, attend" else "forward"
    attention = list(swapped_in(model))[-1]
    method = getattr(attention, name)
    setattr(attention, name, lambda *args, **kwargs: method(*args, **kwargs))
    if family not in BY_CONFIG:
        before = classes(model)
        with pytest.raises(
            ValueError, match=rf"has its {name} replaced on the module since sparsify_"
        ):
            bsa.restore_(model)
        assert classes(model) == before
        delattr(attention, name)
    bsa.restore_(model)
    assert torch.equal(run(model, pixels), dense)


@pytest.mark.parametrize(
    "family", ["transformers, its registry", "transformers, SAM 2", "timm's plain ViT"]
)
def test_sharded_attention(alone, family):
    """FSDP2 changes the class of modules for good."""
    model, pixels = FAMILIES[family]()
    dense = run(model, pixels)
    bsa.sparsify_(model, plan_for(model))
    expected = run(model, pixels)
    for module in swapped_in(model):
        fully_shard(module)
    assert relative_error(run(model, pixels), expected) < 1e-6
    with bsa.dense(model):
        assert relative_error(run(model, pixels), dense) < 1e-6
    if family in BY_CONFIG:
        bsa.restore_(model)
        assert relative_error(run(model, pixels), dense) < 1e-6
        return
    with pytest.raises(
        ValueError, match=r"became a FSDPSparse\w+ since sparsify_.*bsa.dense\(model\)"
    ):
        bsa.restore_(model)
    assert relative_error(run(model, pixels), expected) < 1e-6


@pytest.mark.slow
class TestLayersRemoved:
    @pytest.fixture(params=["gone", "kept", "in a copy"])
    def pruned(self, request, made):
        """A model with sparse heads whose first swapped block was removed."""
        model, _, _ = made
        bsa.sparsify_(model, plan_for(model))
        number = len(layers_of(model))
        if request.param == "in a copy":
            model = copy.deepcopy(model)
        path = layers_of(model)[0].spec.name.rpartition(".")[0]
        blocks = model.get_submodule(path.rpartition(".")[0])
        kept = model.get_submodule(path) if request.param == "kept" else None
        del blocks._modules[path.rpartition(".")[2]]
        gc.collect()
        assert 0 < len(layers_of(model)) < number
        return model, kept

    def test_described_and_restored(self, pruned):
        model, kept = pruned
        left = layers_of(model)
        report = bsa.describe(model)
        assert [layer.name for layer in report.layers] == [layer.spec.name for layer in left]
        assert report.gain >= 1
        assert str(report)
        bsa.restore_(model)
        assert not layers_of(model)
        assert not watching(model)
        if kept is not None:
            assert layers_of(kept)
            bsa.restore_(kept)
            assert not layers_of(kept)

    def test_parts_are_refused(self, pruned):
        model, _ = pruned
        if len(layers_of(model)) == 1:
            pytest.skip("one layer is left")
        before = classes(model)
        with pytest.raises(
            ValueError,
            match=r"holds 1 of \d+ swapped layers.*pass the model that sparsify_ was given",
        ):
            bsa.restore_(next(iter(swapped_in(model))))
        assert classes(model) == before
        bsa.restore_(model)

    def test_pruned_by_timm(self):
        model = timm_models.make("vit", depth=4)
        pixels = timm_models.image()
        dense = model.forward_intermediates(pixels, indices=[1], intermediates_only=True)[0]
        bsa.sparsify_(model, plan_for(model))
        model.prune_intermediate_layers([1])
        assert [layer.name for layer in bsa.describe(model).layers] == [
            "blocks.0.attn",
            "blocks.1.attn",
        ]
        bsa.restore_(model)
        assert torch.equal(
            model.forward_intermediates(pixels, indices=[1], intermediates_only=True)[0], dense
        )
        bsa.sparsify_(model, plan_for(model))

    def test_of_two_halves_whose_model_is_gone(self):
        model = timm_models.make("vit", depth=4)
        bsa.sparsify_(model, plan_for(model))
        first, second = nn.Sequential(*model.blocks[:2]), nn.Sequential(*model.blocks[2:])
        with pytest.raises(ValueError, match="holds 2 of 4 swapped layers"):
            bsa.restore_(first)
        del model
        gc.collect()
        for half in (first, second):
            assert len(layers_of(half)) == 2
            assert not layers_of(bsa.restore_(half))

    def test_patches_made_by_another_module_since(self):
        model = timm_models.make("vit", depth=3)
        bsa.sparsify_(model, plan_for(model))
        model.patch_embed = copy.deepcopy(timm_models.make("vit").patch_embed)
        removed, model.blocks = model.blocks, model.blocks[:2]
        gc.collect()
        assert not layers_of(bsa.restore_(model))
        assert not layers_of(bsa.restore_(removed))

    def test_what_makes_patches_is_not_the_whole(self, family):
        model, _ = FAMILIES[family]()
        bsa.sparsify_(model, plan_for(model))
        (embeddings,) = [
            module
            for module in model.modules()
            if any(map(is_encoder_hook, module._forward_pre_hooks.values()))
        ]
        if layers_of(embeddings):
            return  # memory attention, which is its own embedding module
        block = model.get_submodule(layers_of(model)[0].spec.name.rpartition(".")[0])
        for part in (embeddings, nn.ModuleList([embeddings, block])):
            with pytest.raises(ValueError, match=r"holds [01] of \d+ swapped layers"):
                bsa.restore_(part)
            assert watching(model)
        bsa.restore_(model)

    def test_a_part_of_a_copy_is_refused(self):
        model = models.make("dinov3")
        bsa.sparsify_(model, plan_for(model))
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            with pytest.raises(ValueError, match="holds 1 of 3 swapped layers"):
                bsa.restore_(next(iter(swapped_in(other))))
            assert not layers_of(bsa.restore_(other))
        assert len(layers_of(model)) == 3


class Int8(torch.Tensor):
    """A quantised weight as in torchao: its dtype is float, and it has hardly any operators."""

    def __new__(cls, values, scale):
        return torch.Tensor._make_wrapper_subclass(
            cls, values.shape, dtype=scale.dtype, device=values.device
        )

    def __init__(self, values, scale):
        self.values_, self.scale = values, scale

    def __tensor_flatten__(self):
        return ["values_", "scale"], None

    def __repr__(self):
        return "Int8"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            x, weight, *bias = args
            return F.linear(x, weight.values_ * weight.scale, *bias)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].values_, args[0].scale)
        raise NotImplementedError(f"Int8 has no {func}")


def quantise(model):
    for module in model.modules():
        if type(module) is nn.Linear and not isinstance(module.weight, Int8):
            weight = module.weight.detach()
            scale = weight.abs().max() / 127
            module.weight = nn.Parameter(
                Int8((weight / scale).round().to(torch.int8), scale), requires_grad=False
            )
    return model


class TestQuantised:
    def test_the_stand_in_lacks_operators(self):
        weight = quantise(nn.Linear(4, 4)).weight
        assert weight.is_floating_point()
        with pytest.raises(NotImplementedError):
            weight.new_empty(1)

    def test_before_and_after(self, family, made):
        model, pixels, _ = made
        plan, twin = plan_for(model), copy.deepcopy(model)
        quantise(model)
        dense = run(model, pixels)
        spec = bsa.inspect(model)
        assert spec == bsa.inspect(twin)
        bsa.sparsify_(model, plan)
        quantise(bsa.sparsify_(twin, plan))
        out = run(model, pixels)
        assert torch.equal(out, run(twin, pixels))
        assert relative_error(out, dense) > 1e-3
        assert str(bsa.describe(model)) == str(bsa.describe(twin))
        assert torch.equal(run(bsa.restore_(model), pixels), dense)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_where_and_in_what_attention_computes(self, dtype):
        model = timm_models.make("vit").to(dtype)
        for bias in (True, False):
            for module in model.modules():
                if isinstance(module, nn.Linear) and not bias:
                    module.bias = None
            like = like_of(quantise(model).blocks[0].attn, model)
            assert (like.dtype, like.device.type, type(like)) == (dtype, "cpu", torch.Tensor)
        codes = nn.Parameter(torch.zeros(4, dtype=torch.int8), requires_grad=False)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight = codes
        assert like_of(model.blocks[0].attn, model).dtype == dtype  # of the norms

    def test_tune(self):
        model = quantise(models.make("dinov2"))
        images = [models.image(seed=seed) for seed in range(4)]
        assert bsa.tune(model, images, sparsity=0.4, block_size=16).report["measured"] < 1

    def test_the_projection_that_is_observed(self):
        """A quantised projection of the identity gives its weight."""
        attention = timm_models.make("vit").blocks[0].attn
        plain = output_weight(attention, 48, torch.empty(0))
        assert plain.data_ptr() == attention.proj.weight.data_ptr()
        quantise(attention)
        weight = attention.proj.weight
        found = output_weight(attention, 48, torch.empty(0))
        assert torch.allclose(found, weight.values_ * weight.scale, atol=1e-6)
        assert output_weight(attention, 47, torch.empty(0)) is None
        assert relative_error(found, plain) > 1e-4

    def test_contents_are_told_apart(self):
        model = quantise(timm_models.make("vit"))
        before = digest(state(model))
        assert digest(state(copy.copy(model))) == before
        model.blocks[0].attn.qkv.weight.values_[0, 0] += 1
        assert digest(state(model)) != before

    @pytest.mark.skipif(
        "x86" not in torch.backends.quantized.supported_engines,
        reason="needs torch's quantisation for x86",
    )
    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize(
        "family",
        [
            "transformers, its registry",
            "timm's plain ViT",
            "segment_anything, class",
            "torchvision, MultiheadAttention",
        ],
    )
    def test_dynamically(self, made, family):
        """torch replaces linear layers by another class, whose weight is a method."""
        model, pixels, _ = made
        spec, plan = bsa.inspect(model), plan_for(model)
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
        assert any("quantized" in type(module).__module__ for module in quantised.modules())
        assert bsa.inspect(quantised) == spec
        dense = run(quantised, pixels)
        bsa.sparsify_(quantised, plan)
        assert relative_error(run(quantised, pixels), dense) > 1e-3
        assert len(bsa.describe(quantised).layers) == len(spec.layers)
        bsa.restore_(quantised)
        seen = []
        with bsa.observe(quantised, seen.append):
            run(quantised, pixels)
        weights = [observation.weight for observation in seen]
        assert all(weight is None or weight.dtype == torch.float32 for weight in weights)
        assert digest(state(quantised)) != digest(state(model))


class TestMeta:
    def test_described_and_swapped(self, family, monkeypatch, tmp_path):
        monkeypatch.setenv("BSA_VISION_CACHE", str(tmp_path))
        model, pixels = FAMILIES[family]()
        empty = copy.deepcopy(model).to("meta")
        bsa.latency(bsa.inspect(model).layers[0].head_dim)
        assert bsa.inspect(empty) == bsa.inspect(model)
        assert str(bsa.describe(empty)) == str(bsa.describe(model))
        plan = plan_for(model)
        bsa.sparsify_(empty, plan)
        bsa.sparsify_(model, plan)
        assert str(bsa.describe(empty)) == str(bsa.describe(model))
        expected = run(model, pixels)
        empty.load_state_dict(model.state_dict(), assign=True)
        for name, buffer in model.named_buffers():  # some are not in the state_dict
            parent, _, child = name.rpartition(".")
            empty.get_submodule(parent)._buffers[child] = buffer
        assert torch.equal(run(empty, pixels), expected)
        bsa.restore_(empty)

    def test_nothing_runs_there(self):
        with pytest.raises(ValueError, match="device='meta' computes nothing"):
            bsa.latency(64, device="meta")
        model = models.make("dinov2").to("meta")
        with pytest.raises(ValueError, match=r"features on the meta device.*load them first"):
            bsa.tune(model, [models.image(seed=seed).to("meta") for seed in range(3)], sparsity=0.4)


WRAPPERS = {
    "checkpoint": lambda block: checkpoint_wrapper(block),
    "compile": lambda block: torch.compile(block, backend="eager"),
    "both": lambda block: torch.compile(checkpoint_wrapper(block), backend="eager"),
}


class Unknown(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.inner = module

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


@pytest.mark.slow
class TestWrappedFirst:
    def check(self, model, pixels, plain):
        """Compare `model` with `plain`, the same model without wrappers."""
        plan, spec = plan_for(plain), bsa.inspect(plain)
        dense, expected = run(plain, pixels), run(bsa.sparsify_(plain, plan), pixels)
        found = bsa.inspect(model)
        assert found.fingerprint == spec.fingerprint
        assert [layer.key for layer in found.layers] == [layer.key for layer in spec.layers]
        for a, b in zip(found.layers, spec.layers):
            assert (a.window, a.attention_weights, a.mlp_weights) == (
                b.window,
                b.attention_weights,
                b.mlp_weights,
            )
            assert type(model.get_submodule(a.name)) in classes(model)
        assert (found.grid, found.patch_weights, found.image_weights) == (
            spec.grid,
            spec.patch_weights,
            spec.image_weights,
        )
        bsa.sparsify_(model, plan)
        assert list(swapped_in(model)) == [
            model.get_submodule(layer.name) for layer in found.layers
        ]
        assert relative_error(run(model, pixels), expected) < 1e-4
        assert not any(layer.fallbacks for layer in layers_of(model))
        assert str(bsa.describe(model))
        bsa.restore_(model)
        assert relative_error(run(model, pixels), dense) < 1e-4
        assert relative_error(expected, dense) > 1e-3

    @pytest.mark.parametrize("wrapper", WRAPPERS)
    def test_blocks(self, made, wrapper):
        model, pixels, _ = made
        plain = copy.deepcopy(model)
        torch.compiler.reset()
        for path in block_paths(model):
            put(model, path, WRAPPERS[wrapper](model.get_submodule(path)))
        self.check(model, pixels, plain)

    def test_compiled_and_run_before(self):
        """Existing compiled programs must not keep running dense."""
        model, pixels = timm_models.make("vit"), timm_models.image()
        plain = copy.deepcopy(model)
        torch.compiler.reset()
        for path in block_paths(model):
            put(model, path, torch.compile(model.get_submodule(path), backend="eager"))
        run(model, pixels)
        self.check(model, pixels, plain)

    def test_attention_and_embeddings(self, family, made):
        model, pixels, _ = made
        plain = copy.deepcopy(model)
        names = [layer.name for layer in bsa.inspect(model).layers]
        names += [
            name
            for name, _ in model.named_modules()
            if name.split(".")[-1] in ("patch_embed", "embeddings", "conv_proj")
        ]
        if family == "sam2, memory":  # sam2 checks the class of this module
            names = [name for name in names if not name.endswith("cross_attn_image")]
        for name in names:
            put(model, name, checkpoint_wrapper(model.get_submodule(name)))
        self.check(model, pixels, plain)

    @pytest.mark.parametrize(
        "wrap",
        [DistributedDataParallel, lambda model: torch.compile(model, backend="eager")],
        ids=["DDP", "compile"],
    )
    def test_the_model(self, alone, made, wrap):
        model, pixels, _ = made
        plain = copy.deepcopy(model)
        torch.compiler.reset()
        self.check(wrap(model), pixels, plain)

    @pytest.mark.parametrize(
        "family",
        [
            "transformers, its registry",
            "timm's plain ViT",
            "segment_anything, class",
            "torchvision, MultiheadAttention",
        ],
    )
    @pytest.mark.parametrize("flat", [True, False], ids=["FSDP", "FSDP2"])
    def test_sharded(self, alone, made, flat):
        """FSDP removes weights from modules; FSDP2 changes the classes of modules."""
        model, pixels, _ = made
        plain = copy.deepcopy(model)
        paths = block_paths(model)
        attention = [layer.name for layer in bsa.inspect(model).layers]
        if flat:
            for path in paths:
                block = FullyShardedDataParallel(
                    model.get_submodule(path), device_id=torch.device("cpu")
                )
                put(model, path, block)
        else:
            for path in (*attention, *paths, ""):
                fully_shard(model.get_submodule(path))
        self.check(model, pixels, plain)

    def test_unknown_wrappers_of_blocks(self, family, made):
        """The error names the wrapper and what to do."""
        model, pixels, dense = made
        for path in block_paths(model):
            put(model, path, Unknown(model.get_submodule(path)))
        if family == "transformers, its registry":  # finds attention at any path
            bsa.sparsify_(model, plan_for(model))
            assert relative_error(run(model, pixels), dense) > 1e-3
            return
        for call in (bsa.inspect, bsa.dense_plan, bsa.describe):
            with pytest.raises(
                bsa.PlanError,
                match=r"a block of this model is a Unknown.*call sparsify_ before wrapping",
            ):
                call(model)

    def test_unknown_wrappers_of_attention(self):
        model = timm_models.make("vit")
        for block in model.blocks:
            block.attn = nn.Sequential(block.attn)
        with pytest.raises(
            bsa.PlanError,
            match=r"only inside the encoders named below.*call sparsify_ before wrapping",
        ) as error:
            bsa.inspect(model)
        assert not re.search("unsupported attention class", str(error.value))
