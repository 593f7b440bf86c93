"""Common operations on swapped models: precision, checkpointing, copies, compile, LoRA, DDP."""

from __future__ import annotations

import copy
import io
import os
import pickle
import tempfile
import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.utils.parametrizations
import torch.nn.utils.parametrize
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import bsa_vision as bsa
from bsa_vision.adapters.swap.sparse_layer import layers_of
from tests import neighbours
from tests.adapters import test_torchvision_vit
from tests.helpers import models, sam2_models, sam_models, timm_models
from tests.helpers.errors import relative_error

SMALL = dict(radius=1, tile=(4, 4), block_size=16)


def hugging_face() -> tuple[nn.Module, torch.Tensor]:
    return models.make("dinov3"), models.image(96, 96, batch=2)


def timm() -> tuple[nn.Module, torch.Tensor]:
    return timm_models.make("eva, dinov3"), timm_models.image()


def torchvision() -> tuple[nn.Module, torch.Tensor]:
    return test_torchvision_vit.make(), test_torchvision_vit.image()


def sam() -> tuple[nn.Module, torch.Tensor]:
    return sam_models.make("segment_anything"), sam_models.image()


def bsa_encoder() -> tuple[nn.Module, torch.Tensor]:
    return sam_models.make("create_encoder"), sam_models.image()


def sam2() -> tuple[nn.Module, torch.Tensor]:
    return sam2_models.make("sam2"), sam2_models.image()


# Kind of swap -> (function that makes model and image, linear layers for LoRA, name of blocks).
SEAMS: dict[str, tuple[Callable[[], tuple[nn.Module, torch.Tensor]], list[str], str]] = {
    "transformers, its registry": (hugging_face, ["q_proj", "v_proj"], "layer"),
    "timm, intercepted": (timm, ["q_proj", "v_proj"], "blocks"),
    "torchvision, MultiheadAttention": (torchvision, ["mlp.0"], "layers"),
    "segment_anything, class": (sam, ["qkv"], "blocks"),
    "our encoder, attend": (bsa_encoder, ["qkv"], "blocks"),
    "sam2, intercepted": (sam2, ["qkv"], "blocks"),
}


def plan_for(model):
    return bsa.uniform_plan(model, "local_window", dense_heads=1, **SMALL)


def run(model, pixels):
    """Return the features of the last layer, in one vector."""
    out = model(pixels)
    if isinstance(out, dict):
        key = "vision_features" if "vision_features" in out else "last_hidden_state"
        out = out[key]
    return out.flatten()


@pytest.fixture(params=SEAMS)
def seam(request):
    return request.param


@pytest.fixture
def swapped(seam):
    """A model with sparse heads, an image, and the output, which differs from the dense one."""
    model, pixels = SEAMS[seam][0]()
    with torch.no_grad():
        dense = run(model, pixels)
        bsa.sparsify_(model, plan_for(model))
        expected = run(model, pixels)
    assert relative_error(expected, dense) > 1e-3
    return model, pixels, expected


def gradient(model, pixels):
    model.zero_grad()
    run(model, pixels).pow(2).mean().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def no_fallbacks(model):
    return not any(layer.fallbacks for layer in layers_of(model))


def test_autocast(swapped):
    model, pixels, expected = swapped
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = run(model, pixels)
    assert (
        out.dtype == torch.bfloat16 or relative_error(out, expected) > 0
    )  # it computed in bfloat16
    assert relative_error(out.float(), expected) < 0.1
    assert no_fallbacks(model)


def test_lower_precision(swapped):
    model, pixels, expected = swapped
    with torch.no_grad():
        out = run(model.bfloat16(), pixels.bfloat16())
    assert relative_error(out.float(), expected) < 0.15
    assert no_fallbacks(model)


def test_gradient_checkpointing(seam, swapped):
    """Each block is recomputed in backward, by torch's `checkpoint` around it."""
    model, pixels, _ = swapped
    expected = gradient(model, pixels)
    recomputed = []
    for name, block in model.named_modules():
        parent = name.rpartition(".")[0].rpartition(".")[2]
        if parent == SEAMS[seam][2] and hasattr(block, "forward"):
            forward = block.forward

            def again(*args, forward=forward, **kwargs):
                recomputed.append(torch._C._current_graph_task_id() != -1)
                return forward(*args, **kwargs)

            block.forward = lambda *args, again=again, **kwargs: checkpoint(
                again, *args, use_reentrant=False, **kwargs
            )
    assert relative_error(gradient(model, pixels), expected) < 1e-5
    assert any(recomputed)


def test_copies_pickles_and_files(swapped):
    model, pixels, expected = swapped
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ]
    with torch.no_grad():
        for other in copies:
            assert torch.equal(run(other, pixels), expected)
            bsa.restore_(other)
            assert not torch.equal(run(other, pixels), expected)
        assert torch.equal(run(model, pixels), expected)  # the copies are independent


def test_weights_go_both_ways(seam, swapped):
    """Load the state_dict of a swapped model into an unswapped one."""
    model, pixels, expected = swapped
    plain, _ = SEAMS[seam][0]()
    plain.load_state_dict(model.state_dict(), strict=True)
    bsa.sparsify_(plain, plan_for(plain))
    with torch.no_grad():
        assert torch.equal(run(plain, pixels), expected)


def test_moving_average(swapped):
    """torch's EMA copies the model and averages parameters; the copy is sparse as well."""
    model, pixels, expected = swapped
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    assert len(layers_of(average)) == len(layers_of(model))
    with torch.no_grad():
        average.update_parameters(model)
        assert torch.equal(run(average, pixels), expected)
        for parameter in model.parameters():
            parameter.mul_(1.1)
        average.update_parameters(model)
        out = run(average, pixels)
        assert relative_error(out, expected) > 1e-4
        by_hand = copy.deepcopy(model)
        for parameter in by_hand.parameters():
            parameter.mul_(1.05 / 1.1)  # halfway between 1 and 1.1
        assert relative_error(out, run(by_hand, pixels)) < 1e-4


@pytest.mark.slow
def test_compile_fullgraph(swapped):
    model, pixels, expected = swapped
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert relative_error(run(compiled, pixels), expected) < 1e-5


@pytest.mark.parametrize("first", ["sparsify_", "lora"])
def test_lora(seam, swapped, first):
    """peft adds layers before or after the swap; merged weights give the same output."""
    from peft import LoraConfig, get_peft_model

    model, pixels, expected = swapped
    if first == "lora":
        bsa.restore_(model)
    config = LoraConfig(r=4, target_modules=SEAMS[seam][1], init_lora_weights=True)
    tuned = get_peft_model(model, config).eval()
    if first == "lora":
        bsa.sparsify_(tuned, plan_for(tuned))
    with torch.no_grad():
        assert relative_error(run(tuned, pixels), expected) < 1e-5  # B starts at zero
    loss = gradient(tuned, pixels)
    trained = [name for name, p in tuned.named_parameters() if p.grad is not None]
    assert trained
    assert all("lora_" in name for name in trained)
    assert loss.norm() > 0
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
        out = run(tuned, pixels)
        assert relative_error(out, expected) > 1e-4
        with bsa.dense(tuned):
            assert relative_error(run(tuned, pixels), out) > 1e-4
        merged = tuned.merge_and_unload()
        assert relative_error(run(merged, pixels), out) < 1e-5
        assert no_fallbacks(merged)
        bsa.restore_(merged)


# Names of the projections before and after the heads, for each kind of swap.
PROJECTIONS = {
    "transformers, its registry": ("q_proj", "o_proj"),
    "timm, intercepted": ("q_proj", "proj"),
    "segment_anything, class": ("qkv", "proj"),
    "our encoder, attend": ("qkv", "proj"),
    "sam2, intercepted": ("qkv", "proj"),
}
LORA = dict(r=4, init_lora_weights=False)
PEFT = {
    "LoRA": ("LoraConfig", LORA),
    "DoRA": ("LoraConfig", {**LORA, "use_dora": True}),
    "LoHa": ("LoHaConfig", dict(r=4, init_weights=False)),
    "IA3": ("IA3Config", dict(feedforward_modules=[], init_ia3_weights=False)),
    "OFT": ("OFTConfig", dict(r=0, oft_block_size=4, init_weights=False)),
}


def peft_of(kind, model, names):
    import peft

    config, options = PEFT[kind]
    torch.manual_seed(3)
    if kind != "LoRA":  # only LoRA supports the convolution of the patch embedding
        names = [key for key, m in model.named_modules() if m in linears(model, names)]
    return peft.get_peft_model(
        model, getattr(peft, config)(target_modules=list(names), **options)
    ).eval()


def linears(model, names):
    return [
        m
        for key, m in model.named_modules()
        if key.rpartition(".")[2] in names and isinstance(m, nn.Linear)
    ]


class Shifted(nn.Module):
    def forward(self, weight):
        return weight.roll(1, 0)


def parametrized(model, names):
    for linear in linears(model, names):
        nn.utils.parametrize.register_parametrization(linear, "weight", Shifted())
    return model


def weight_normed(model, names):
    for linear in linears(model, names):
        nn.utils.parametrizations.weight_norm(linear)
        with torch.no_grad():
            linear.parametrizations.weight.original0.mul_(1.5)
    return model


def old_weight_norm(model, names):
    """Apply `weight_norm`, a hook that computes the weight before each call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for linear in linears(model, names):
            nn.utils.weight_norm(linear)
            linear.weight_g.data.mul_(1.5)
    return model


def hooked(model, names):
    for linear in linears(model, names):
        linear.register_forward_pre_hook(lambda module, args: (args[0] * 1.2,))
        linear.register_forward_hook(lambda module, args, out: out + 0.1 * out.roll(1, -1))
    return model


def quantized(model, names):
    kinds = {
        key: torch.ao.quantization.default_dynamic_qconfig
        for key, m in model.named_modules()
        if key.rpartition(".")[2] in names
    }
    return torch.ao.quantization.quantize_dynamic(model, kinds, dtype=torch.qint8)


WRAPPERS = {
    **{kind: partial(peft_of, kind) for kind in PEFT},
    "parametrization": parametrized,
    "weight norm": weight_normed,
    "old weight norm": old_weight_norm,
    "hooks": hooked,
    "quantized": quantized,
}


class TestWrappedProjections:
    """Wrappers and hooks of a projection have the same effect in swapped and original models."""

    @pytest.mark.parametrize("kind", WRAPPERS)
    @pytest.mark.parametrize("name", PROJECTIONS)
    @torch.no_grad()
    def test_in_every_family(self, name, kind):
        if kind == "OFT" and name in ("segment_anything, class", "sam2, intercepted"):
            pytest.skip("peft's OFT takes (B, N, C), not (B, h, w, C)")
        plain, pixels = SEAMS[name][0]()
        before = run(plain, pixels)
        model = WRAPPERS[kind](plain, PROJECTIONS[name])
        expected = run(model, pixels)
        assert relative_error(expected, before) > 1e-3  # the wrapper has an effect
        bsa.sparsify_(model, bsa.dense_plan(model), backend="gather", on_unsupported="error")
        # Dynamic quantization amplifies rounding differences of the activations.
        assert relative_error(run(model, pixels), expected) < (
            1e-2 if kind == "quantized" else 1e-5
        )
        bsa.restore_(model)
        assert torch.equal(run(model, pixels), expected)

    @pytest.mark.parametrize(
        "kind",
        ["LoRA", "in_proj parametrized", "out_proj parametrized", "out_proj hooked", "weight norm"],
    )
    def test_torchvision(self, kind):
        """The original reads `out_proj` without calling it; peft wraps the whole module."""
        model, pixels = torchvision()
        with torch.no_grad():
            before = run(model, pixels)
        attention = [block.self_attention for block in model.encoder.layers]
        if kind == "LoRA":
            model = peft_of("LoRA", model, ["self_attention"])
        for module in attention:
            if kind == "in_proj parametrized":
                nn.utils.parametrize.register_parametrization(module, "in_proj_weight", Shifted())
            elif kind == "out_proj parametrized":
                nn.utils.parametrize.register_parametrization(module.out_proj, "weight", Shifted())
            elif kind == "weight norm":
                weight_normed(nn.ModuleDict({"out_proj": module.out_proj}), ["out_proj"])
            elif kind == "out_proj hooked":
                module.out_proj.register_forward_hook(lambda module, args, out: 0 * out)
        with torch.no_grad():
            expected = run(model, pixels)
        assert (relative_error(expected, before) > 1e-3) == (kind != "out_proj hooked")
        wanted = gradient(model, pixels)
        bsa.sparsify_(model, bsa.dense_plan(model), backend="gather", on_unsupported="error")
        with torch.no_grad():
            assert relative_error(run(model, pixels), expected) < 1e-5
        assert relative_error(gradient(model, pixels), wanted) < 1e-4
        if kind == "LoRA":
            with model.disable_adapter(), torch.no_grad():
                assert relative_error(run(model, pixels), before) < 1e-5
            model.merge_and_unload()
            with torch.no_grad():
                assert relative_error(run(model, pixels), expected) < 1e-5
        bsa.restore_(model)
        with torch.no_grad():
            assert relative_error(run(model, pixels), expected) < 1e-5

    def test_lora_on_torchvision_after_the_swap(self):
        model, pixels = torchvision()
        bsa.sparsify_(model, bsa.dense_plan(model), backend="gather", on_unsupported="error")
        twin = peft_of("LoRA", torchvision()[0], ["self_attention"])
        tuned = peft_of("LoRA", model, ["self_attention"])
        with torch.no_grad():
            assert relative_error(run(tuned, pixels), run(twin, pixels)) < 1e-5
        bsa.restore_(tuned)

    def test_multihead_attention_of_another_kind_is_refused(self):
        class Scaled(nn.MultiheadAttention):
            def forward(self, *args, **kwargs):
                out, weights = super().forward(*args, **kwargs)
                return 2 * out, weights

        others = {
            "is a .*with a custom forward": Scaled(48, 4, batch_first=True),
            "has other options than in torchvision": nn.MultiheadAttention(
                48, 4, batch_first=True, add_zero_attn=True
            ),
            "is a .*: expected torch's nn.MultiheadAttention": nn.Identity(),
        }
        for message, other in others.items():
            model, _ = torchvision()
            model.encoder.layers[1].self_attention = other
            with pytest.raises(bsa.PlanError, match=rf"encoder_layer_1\.self_attention {message}"):
                bsa.inspect(model)


def train_a_step(rank, name, address, folder):
    """Run one of two processes on half of the batch, and save its gradients."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(address)}
    neighbours.enable()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    model, pixels = SEAMS[name][0]()
    bsa.sparsify_(model, plan_for(model))
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    (run(parallel, pixels[rank : rank + 1]).pow(2).mean()).backward()
    found = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    torch.save(found, os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["transformers, its registry", "timm, intercepted", "our encoder, attend"]
)
def test_two_processes(name):
    """With DDP over gloo, half batches give the gradients of the whole batch."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(train_a_step, args=(name, free_port(), folder), nprocs=2)
        found = [torch.load(os.path.join(folder, f"{rank}.pt")) for rank in range(2)]
    model, pixels = SEAMS[name][0]()
    bsa.sparsify_(model, plan_for(model))
    for image in pixels.split(1):
        (run(model, image).pow(2).mean() / 2).backward()
    expected = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert expected.keys() == found[0].keys()
    for key in expected:
        assert torch.equal(found[0][key], found[1][key])
    got, wanted = (
        torch.cat([x.flatten() for x in grads.values()]) for grads in (found[0], expected)
    )
    assert relative_error(got, wanted) < 1e-5
