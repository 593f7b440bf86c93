"""What people do to models, done to swapped ones: one model per seam, each with sparse heads."""

from __future__ import annotations

import copy
import io
import os
import pickle
import tempfile
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import bsa_vision as bsa
from bsa_vision.adapters.layer import layers_of
from tests import models, neighbours, sam2_models, sam_models, test_torchvision, timm_models

SMALL = dict(radius=1, tile=(4, 4), block_size=16)


def hugging_face() -> tuple[nn.Module, torch.Tensor]:
    return models.make("dinov3"), models.image(96, 96, batch=2)


def timm() -> tuple[nn.Module, torch.Tensor]:
    return timm_models.make("eva, dinov3"), timm_models.image()


def torchvision() -> tuple[nn.Module, torch.Tensor]:
    return test_torchvision.make(), test_torchvision.image()


def sam() -> tuple[nn.Module, torch.Tensor]:
    return sam_models.make("segment_anything"), sam_models.image()


def own() -> tuple[nn.Module, torch.Tensor]:
    return sam_models.make("bsa_vision.encoder"), sam_models.image()


def sam2() -> tuple[nn.Module, torch.Tensor]:
    return sam2_models.make("sam2"), sam2_models.image()


# seam -> (model and image, linear layers for LoRA, blocks for checkpointing)
SEAMS: dict[str, tuple[Callable[[], tuple[nn.Module, torch.Tensor]], list[str], str]] = {
    "transformers, its registry": (hugging_face, ["q_proj", "v_proj"], "layer"),
    "timm, intercepted": (timm, ["q_proj", "v_proj"], "blocks"),
    "torchvision, MultiheadAttention": (torchvision, ["mlp.0"], "layers"),
    "segment_anything, class": (sam, ["qkv"], "blocks"),
    "our encoder, attend": (own, ["qkv"], "blocks"),
    "sam2, intercepted": (sam2, ["qkv"], "blocks"),
}


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def plan_for(model):
    return bsa.uniform_plan(model, "local_window", dense_heads=1, **SMALL)


def run(model, pixels):
    """Everything the model makes of the image that its last features depend on, in one vector."""
    out = model(pixels)
    if isinstance(out, dict):
        return out["vision_features"].flatten() if "vision_features" in out else out.last_hidden_state.flatten()
    return out.flatten()


@pytest.fixture(params=SEAMS)
def seam(request):
    return request.param


@pytest.fixture
def swapped(seam):
    """A model with sparse heads, its image, and its output, which differs from the dense one."""
    model, pixels = SEAMS[seam][0]()
    with torch.no_grad():
        dense = run(model, pixels)
        bsa.sparsify_(model, plan_for(model))
        expected = run(model, pixels)
    assert relative(expected, dense) > 1e-3
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
    assert out.dtype == torch.bfloat16 or relative(out, expected) > 0  # it did compute in bfloat16
    assert relative(out.float(), expected) < 0.1
    assert no_fallbacks(model)


def test_lower_precision(swapped):
    model, pixels, expected = swapped
    with torch.no_grad():
        out = run(model.bfloat16(), pixels.bfloat16())
    assert relative(out.float(), expected) < 0.15
    assert no_fallbacks(model)


def test_gradient_checkpointing(seam, swapped):
    """Each block computed again in backward, by torch's own function around it."""
    model, pixels, _ = swapped
    expected = gradient(model, pixels)
    recomputed = []
    for name, block in model.named_modules():
        if name.rpartition(".")[0].rpartition(".")[2] == SEAMS[seam][2] and hasattr(block, "forward"):
            forward = block.forward

            def again(*args, forward=forward, **kwargs):
                recomputed.append(torch._C._current_graph_task_id() != -1)
                return forward(*args, **kwargs)

            block.forward = lambda *args, again=again, **kwargs: checkpoint(again, *args, use_reentrant=False, **kwargs)
    assert relative(gradient(model, pixels), expected) < 1e-5
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
        assert torch.equal(run(model, pixels), expected)  # untouched by what happened to its copies


def test_weights_go_both_ways(seam, swapped):
    """Into an unswapped model and back, by state_dict."""
    model, pixels, expected = swapped
    plain, _ = SEAMS[seam][0]()
    plain.load_state_dict(model.state_dict(), strict=True)
    bsa.sparsify_(plain, plan_for(plain))
    with torch.no_grad():
        assert torch.equal(run(plain, pixels), expected)


def test_moving_average(swapped):
    """torch's EMA copies the model and averages parameters; the copy is sparse as well, and follows."""
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
        assert relative(out, expected) > 1e-4
        by_hand = copy.deepcopy(model)
        for parameter in by_hand.parameters():
            parameter.mul_(1.05 / 1.1)  # halfway between 1 and 1.1
        assert relative(out, run(by_hand, pixels)) < 1e-4


def test_compile_fullgraph(swapped):
    model, pixels, expected = swapped
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert relative(run(compiled, pixels), expected) < 1e-5


@pytest.mark.parametrize("first", ["sparsify_", "lora"])
def test_lora(seam, swapped, first):
    """peft puts its layers into swapped modules, or we swap modules that hold some; merged weights give the same."""
    from peft import LoraConfig, get_peft_model

    model, pixels, expected = swapped
    if first == "lora":
        bsa.restore_(model)
    config = LoraConfig(r=4, target_modules=SEAMS[seam][1], init_lora_weights=True)
    tuned = get_peft_model(model, config).eval()
    if first == "lora":
        bsa.sparsify_(tuned, plan_for(tuned))
    with torch.no_grad():
        assert relative(run(tuned, pixels), expected) < 1e-5  # B starts at zero
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
        assert relative(out, expected) > 1e-4
        with bsa.dense(tuned):
            assert relative(run(tuned, pixels), out) > 1e-4
        merged = tuned.merge_and_unload()
        assert relative(run(merged, pixels), out) < 1e-5
        assert no_fallbacks(merged)
        bsa.restore_(merged)


def train_a_step(rank, name, address, folder):
    """One process of two: half of the batch, then what the gradients became."""
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


@pytest.mark.parametrize("name", ["transformers, its registry", "timm, intercepted", "our encoder, attend"])
def test_two_processes(name):
    """DistributedDataParallel over gloo: each process half of the batch, the gradients those of the whole."""
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
    both, one = (torch.cat([x.flatten() for x in grads.values()]) for grads in (found[0], expected))
    assert relative(both, one) < 1e-5
