"""Programs from sparse models (exported, traced, compiled ahead of time) and their masks."""

from __future__ import annotations

import copy
import io
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses import FakeTensor
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx

import bsa_vision as bsa
from bsa_vision import masks
from bsa_vision.adapters.swap.sparse_layer import layers_of
from bsa_vision.attention.carried_masks import carried, read
from bsa_vision.attention.token_order import token_index
from tests.adapters import test_torchvision_vit
from tests.helpers import models, run_programs, sam_models, timm_models
from tests.helpers.errors import relative_error

SMALL = dict(tile=(4, 4), block_size=16)
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning"
)


class Features(nn.Module):
    """A model that returns one tensor; a fresh process lacks the output classes of libraries."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        out = self.model(pixels)
        return out if isinstance(out, torch.Tensor) else out.last_hidden_state


MODELS = {
    "timm": (lambda: timm_models.make("eva, dinov3", depth=2), timm_models.image),
    "DINOv3": (
        lambda: models.make("dinov3", num_hidden_layers=2, image_size=96),
        lambda: models.image(96, 96),
    ),
    "SAM": (lambda: sam_models.make("segment_anything"), sam_models.image),
    "torchvision": (lambda: test_torchvision_vit.make(num_layers=2), test_torchvision_vit.image),
}


def sparse(name: str, radius: int = 1) -> nn.Module:
    """Return a sparse model that has never run."""
    model = Features(MODELS[name][0]()).eval().requires_grad_(False)
    plan = bsa.uniform_plan(model, "local_window", radius=radius, dense_heads=1, **SMALL)
    return bsa.sparsify_(model, plan)


def dinov3(num_layers: int = 1) -> nn.Module:
    """Return a dense DINOv3."""
    model = Features(models.make("dinov3", num_hidden_layers=num_layers, image_size=96))
    return model.eval().requires_grad_(False)


def saved(program) -> io.BytesIO:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return file


def reloaded(program) -> nn.Module:
    return torch.export.load(saved(program)).module()


# torch.export, AOTInductor, jit.trace and ONNX, for each model and kind of process


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with every program of every model, and the outputs of the models."""
    root = tmp_path_factory.mktemp("programs")
    for name in MODELS:
        model, pixels, case = sparse(name), MODELS[name][1](), root / name
        case.mkdir()
        exported = torch.export.export(model, (pixels,))
        torch.export.save(exported, case / "torch.export.pt2")
        torch._inductor.aoti_compile_and_package(
            exported, package_path=str(case / "AOTInductor.pt2")
        )
        torch.jit.save(torch.jit.trace(model, pixels), case / "torch.jit.trace.pt2")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(model, (pixels,), str(case / "ONNX.pt2"), dynamo=True, verbose=False)
        torch.save((pixels, sparse(name)(pixels)), case / "expected.pt")
    return root


@pytest.fixture(scope="module")
def found(folder):
    """Errors of the programs by process; fresh processes import only bsa_vision."""

    def fresh(*arguments):
        script = ["-W", "ignore", "-m", "tests.helpers.run_programs", str(folder), *arguments]
        root = Path(__file__).parents[2]
        result = subprocess.run([sys.executable, *script], cwd=root, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    alive = run_programs.other_model()
    assert layers_of(alive)
    return {
        "same process": run_programs.errors(folder),
        "fresh process": fresh(),
        "fresh process, another sparse model alive": fresh("other"),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "process", ["same process", "fresh process", "fresh process, another sparse model alive"]
)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", run_programs.KINDS)
def test_program_equals_its_model(found, kind, model, process):
    """Compiled programs may round differently; the others run the same kernels."""
    limit = 1e-6 if kind in ("torch.export", "torch.jit.trace") else 5e-6
    assert found[process][f"{kind}, {model}"] < limit


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_other_masks_would_show(model):
    pixels = MODELS[model][1]()
    assert relative_error(sparse(model, radius=0)(pixels), sparse(model)(pixels)) > 1e-2


# torch.export


@pytest.mark.parametrize("name", MODELS)
def test_export_of_a_model_that_never_ran_leaves_it_as_it_was(name):
    model, pixels = sparse(name), MODELS[name][1]()
    keys = list(model.state_dict())
    never_ran = torch.export.export(model, (pixels,))
    assert list(model.state_dict()) == keys
    for layer in layers_of(model):
        grid = layer.grid_of(layer.encoder.grid)
        assert all(type(side) is int for side in grid)
        hm = layer.masks.masks_for(grid)
        index = token_index(hm.layout, torch.device("cpu"))
        cached = [hm.base_blockmask, index, hm.layout.permutation]
        assert not any(isinstance(x, FakeTensor) for x in cached)
    expected = sparse(name)(pixels)
    assert torch.equal(model(pixels), expected)
    has_run = torch.export.export(model, (pixels,))
    assert torch.equal(never_ran.module()(pixels), has_run.module()(pixels))
    for a, b in zip(never_ran.constants.values(), has_run.constants.values(), strict=True):
        assert torch.equal(a, b)
    model.requires_grad_(True)
    model(pixels).sum().backward()


def test_strict_export():
    model, pixels = sparse("timm"), timm_models.image()
    exported = torch.export.export(model, (pixels,), strict=True)
    assert torch.equal(reloaded(exported)(pixels), model(pixels))


def sizes_may_change() -> dict:
    return {"pixels": {0: Dim("b", max=64), 2: 8 * Dim("h", max=64), 3: 8 * Dim("w", max=64)}}


def test_program_for_any_image_size():
    """Height and width are dynamic: the program makes masks for each grid from stored patterns."""
    model = dinov3(num_layers=2)
    plan = bsa.uniform_plan(model, "local_window", radius=1, dense_heads=1, **SMALL)
    plan = plan.replace(layers=[1], heads=[3], pattern="random_blocks", sparsity=0.5, seed=3)
    bsa.sparsify_(model, plan)
    pixels = models.image(96, 96, batch=2)
    program = reloaded(torch.export.export(model, (pixels,), dynamic_shapes=sizes_may_change()))
    for height, width, batch in ((96, 96, 2), (64, 128, 1), (128, 64, 3), (72, 40, 2)):
        pixels = models.image(height, width, batch=batch)
        assert relative_error(program(pixels), model(pixels)) < 1e-6
        if height * width > 72 * 40:  # otherwise the window covers the image
            with bsa.dense(model):
                assert relative_error(program(pixels), model(pixels)) > 1e-2


def test_program_for_any_size_with_masks_for_one():
    model = dinov3()
    plan = bsa.uniform_plan(model, "local_window", radius=1, **SMALL)
    plan = plan.freeze(plan.layout(bsa.inspect(model)))
    bsa.sparsify_(model, plan)
    pixels = models.image(96, 96, batch=2)
    program = reloaded(torch.export.export(model, (pixels,), dynamic_shapes=sizes_may_change()))
    assert torch.equal(program(pixels), model(pixels))
    with pytest.raises(bsa.PlanError, match=r"made for TokenLayout\(grid=\(12, 12\)"):
        program(models.image(96, 48, batch=2))


def test_a_function_cannot_be_carried_for_any_size():
    model = dinov3()
    diagonal = lambda layout: torch.eye(layout.num_blocks, dtype=torch.bool)  # noqa: E731
    bsa.sparsify_(model, bsa.uniform_plan(model, diagonal, **SMALL))
    pixels = models.image(96, 96, batch=2)
    with pytest.raises(
        Exception, match=r"dynamic image size stores patterns instead of masks.*Python"
    ):
        torch.export.export(model, (pixels,), dynamic_shapes=sizes_may_change())
    assert torch.equal(reloaded(torch.export.export(model, (pixels,)))(pixels), model(pixels))


def test_gradients_of_an_exported_program():
    model, pixels = sparse("DINOv3").requires_grad_(True), MODELS["DINOv3"][1]()
    program = torch.export.export(model, (pixels,)).module()
    grads = []
    for module in (program, model):
        module.zero_grad()
        module(pixels).pow(2).mean().backward()
        parameters = [p for _, p in sorted(model.named_parameters()) if p.grad is not None]
        grads.append(torch.cat([p.grad.flatten() for p in parameters]))
    assert relative_error(*grads) < 1e-6


class UserModule(nn.Module):
    """A module outside the library that calls `sparse_attention`."""

    def __init__(self, hm, scale=3.0):
        super().__init__()
        self.hm, self.scale = hm, scale

    def forward(self, q, k, v):
        return bsa.sparse_attention(q, k, v, self.hm, scale=self.scale)


def some_head_masks(per_image: bool = False) -> bsa.HeadMasks:
    layout = masks.TokenLayout((5, 7), num_prefix_tokens=1, order="tile", tile=(2, 4), block_size=8)
    heads = [masks.local_window(layout, 1), masks.random_blocks(layout, 0.5, seed=1)]
    base = masks.stack_heads(heads, 1)
    if per_image:
        base = torch.cat([base, masks.stack_heads([heads[1], heads[0]], 1)])
    return bsa.HeadMasks(base, [1, 0, 1, -1], [0, 0, 0, 0, 0, 0, 1, 2], layout=layout)


def some_tensors():
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 36, 8), (2, 2, 36, 8), (2, 2, 36, 8)]
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


@pytest.mark.parametrize("per_image", [False, True])
def test_export_of_head_masks_in_a_module_of_the_user(per_image):
    tensors = some_tensors()
    module = UserModule(some_head_masks(per_image))
    exported = torch.export.export(module, tensors)
    del module.hm  # the program must not need it
    again = UserModule(some_head_masks(per_image))
    assert torch.equal(reloaded(exported)(*tensors), again(*tensors))
    assert (
        relative_error(again(*tensors), UserModule(some_head_masks(not per_image))(*tensors)) > 1e-2
    )


def test_export_of_the_kernels_function():
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in some_tensors())
    q = q[:, :2]
    lengths = torch.tensor([0, 36, 72], dtype=torch.int32)
    types, base = torch.tensor([1, 1], dtype=torch.int32), torch.ones(1, 2, 1, 1, dtype=torch.bool)

    class Kernel(nn.Module):
        def forward(self, q, k, v):
            return bsa.block_sparse_attn_func(
                q, k, v, lengths, lengths, types, None, base, 36, 36, 0.0
            )

    program = reloaded(torch.export.export(Kernel(), (q, k, v)))
    assert torch.equal(program(q, k, v), Kernel()(q, k, v))


@given(st.data())
def test_carried_masks_are_the_masks(data):
    rows, columns = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    heads, images = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(rows)
    bits = torch.randint(0, 2, (images, heads, rows, columns), generator=generator) > 0
    types = [*range(1, heads + 1), 0, -1]
    streaming = [0, 0] * (heads + 1) + [1, 2]
    hm = bsa.HeadMasks(
        bits, types, streaming, block_size=data.draw(st.integers(1, 200)), allow_empty_rows=True
    )
    again = read(carried(hm, (0, 0), 0)).masks_for((0, 0), 0)
    assert torch.equal(again.base_blockmask, hm.base_blockmask)
    for name in ("slices", "streaming", "block_size"):
        assert getattr(again, name) == getattr(hm, name)


def test_carried_layouts_and_unknown_versions():
    queries = masks.TokenLayout(
        (4, 6), num_prefix_tokens=2, order="tile", tile=(2, 2), block_size=8
    )
    keys = masks.TokenLayout((4, 6), num_suffix_tokens=3, frames=3, block_size=8)
    base = torch.ones(1, 1, queries.num_blocks, keys.num_blocks, dtype=torch.bool)
    tensor = carried(bsa.HeadMasks(base, layout=queries, kv_layout=keys), (0, 0), 0)
    again = read(tensor).masks_for((0, 0), 0)
    assert (again.layout, again.kv_layout) == (queries, keys)
    assert read(tensor.clone()) is read(tensor)
    data = tensor.numpy().tobytes().replace(b'"version": 2', b'"version": 9')
    newer = torch.tensor(list(data), dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=r"does not read.*Export it again"):
        read(newer)


def test_masks_that_follow_prompts_refuse_programs(tmp_path):
    model = dinov3()
    bsa.sparsify_(model, bsa.uniform_plan(model, "prompt_region", radius=1, **SMALL))
    pixels = models.image(96, 96)
    with bsa.context(model, prompts=bsa.Prompts(points=[(20, 30)], image_size=(96, 96))):
        model(pixels)
        for program in (
            lambda: torch.export.export(model, (pixels,)),
            lambda: torch.jit.trace(model, pixels),
            lambda: make_fx(model)(pixels),
        ):
            with pytest.raises(
                bsa.BackendUnavailable, match=r"follows prompts.*exported or traced"
            ):
                program()
        with pytest.raises(torch.onnx.OnnxExporterError) as error:
            torch.onnx.export(
                model, (pixels,), str(tmp_path / "model.onnx"), dynamo=True, verbose=False
            )
    assert "follows prompts" in causes(error.value)


def causes(error: BaseException | None) -> str:
    text = ""
    while error is not None:
        text, error = text + str(error), error.__cause__ or error.__context__
    return text


# torch.jit.trace, make_fx


@pytest.mark.parametrize("name", MODELS)
def test_traced_program_at_another_size_is_refused_by_name(name):
    """Even if the other grid has as many tokens: 8 x 12 and 12 x 8 patches have other masks."""
    if name in ("torchvision", "SAM"):  # one size only
        return
    if name == "DINOv3":
        model = Features(models.make("dinov3", image_size=96))
    else:
        model = Features(timm_models.make("vit, any size"))
    model.eval().requires_grad_(False)
    bsa.sparsify_(model, bsa.uniform_plan(model, "local_window", radius=1, **SMALL))
    pixels = models.image(64, 96)
    program = torch.jit.trace(model, pixels)
    assert torch.equal(program(pixels), model(pixels))
    assert (
        relative_error(program(pixels.repeat(3, 1, 1, 1)), model(pixels.repeat(3, 1, 1, 1))) < 1e-6
    )
    with pytest.raises(RuntimeError, match=r"traced with images of 64 x 96 pixels.*got 96 x 64"):
        program(pixels.transpose(2, 3))


def test_make_fx_records_no_living_object():
    model, pixels = sparse("DINOv3"), MODELS["DINOv3"][1]()
    expected = model(pixels)
    graph = make_fx(model)(pixels)
    bsa.restore_(model)
    assert torch.equal(graph(pixels), expected)


# ONNX


def to_onnx(module: nn.Module, inputs, path) -> tuple[Callable[..., torch.Tensor], list[str]]:
    """Return a function that runs the exported module, and the warnings of bsa_vision."""
    import onnxruntime

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.onnx.export(module, inputs, str(path), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(path))
    names = [x.name for x in session.get_inputs()]

    def run(*tensors):
        (out,) = session.run(None, {n: x.numpy() for n, x in zip(names, tensors)})
        return torch.from_numpy(out)

    return run, [str(x.message) for x in caught if "bsa_vision" in str(x.message)]


@pytest.mark.slow
def test_onnx_export_warns_once_that_no_blocks_are_skipped(tmp_path):
    model, pixels = sparse("timm"), timm_models.image()
    run, texts = to_onnx(model, (pixels,), tmp_path / "model.onnx")
    assert len(layers_of(model)) == 2
    assert len(texts) == 1
    assert "N x N" in texts[0]
    assert relative_error(run(pixels), model(pixels)) < 5e-6
    _, texts = to_onnx(model, (pixels,), tmp_path / "again.onnx")
    assert len(texts) == 1


def test_the_old_onnx_exporter_is_refused(tmp_path):
    with pytest.raises(bsa.BackendUnavailable, match=r"dynamo=False.*pass dynamo=True"):
        torch.onnx.export(
            sparse("timm"), (timm_models.image(),), str(tmp_path / "model.onnx"), dynamo=False
        )


def test_the_old_onnx_exporter_takes_a_dense_plan(tmp_path):
    import onnxruntime

    model, pixels, path = timm_models.make("vit"), timm_models.image(), str(tmp_path / "model.onnx")
    bsa.sparsify_(model, bsa.dense_plan(model))
    with torch.no_grad():
        expected = model(pixels)
    torch.onnx.export(model, (pixels,), path, dynamo=False)
    session = onnxruntime.InferenceSession(path)
    (found,) = session.run(None, {session.get_inputs()[0].name: pixels.numpy()})
    assert relative_error(torch.from_numpy(found), expected) < 5e-6


def test_onnx_with_image_sizes_that_change_is_refused(tmp_path):
    model = dinov3()
    bsa.sparsify_(model, bsa.uniform_plan(model, "local_window", radius=1, **SMALL))
    shapes, pixels = sizes_may_change(), models.image(96, 96, batch=2)
    path = str(tmp_path / "model.onnx")
    with pytest.raises(torch.onnx.OnnxExporterError) as error:
        torch.onnx.export(model, (pixels,), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    assert "fixed image size" in causes(error.value)


def test_onnx_with_a_free_batch_groups_and_masks_per_image(tmp_path):
    q, k, v = some_tensors()
    module = UserModule(some_head_masks(per_image=True))
    run, _ = to_onnx(module, (q, k, v), tmp_path / "groups.onnx")
    assert relative_error(run(q, k, v), module(q, k, v)) < 5e-6
    other = UserModule(some_head_masks())
    assert relative_error(run(q, k, v), other(q, k, v)) > 1e-2


def test_onnx_values_in_skipped_blocks_have_no_effect(tmp_path):
    """Rows without keys give 0; NaN in a skipped key block does not reach the output."""
    base = torch.tensor([[True, False], [False, False]])[None, None]
    hm = bsa.HeadMasks(base, block_size=8, allow_empty_rows=True)
    generators = (torch.Generator().manual_seed(i) for i in range(3))
    q, k, v = (torch.randn(1, 1, 16, 4, generator=generator) for generator in generators)
    module = UserModule(hm)
    run, _ = to_onnx(module, (q, k, v), tmp_path / "nan.onnx")
    expected = run(q, k, v)
    assert (expected[:, :, 8:] == 0).all()
    assert relative_error(expected, module(q, k, v)) < 5e-6
    k[:, :, 8:], v[:, :, 8:] = torch.nan, torch.inf
    assert torch.equal(run(q, k, v), expected)
    v[:, :, 3] = torch.nan  # this block is not skipped
    assert run(q, k, v)[:, :, :8].isnan().all()


# torch.compile, block by block


@pytest.mark.parametrize(
    ("make", "blocks"),
    [
        (lambda: timm_models.make("vit", depth=12), "blocks"),
        (lambda: models.make("dinov3", num_hidden_layers=12, image_size=96), "model.layer"),
        (lambda: test_torchvision_vit.make(num_layers=12), "encoder.layers"),
    ],
)
def test_compiling_block_by_block_makes_few_graphs(make, blocks):
    model = make().requires_grad_(False)
    bsa.sparsify_(model, bsa.uniform_plan(model, "local_window", radius=1, **SMALL))
    expected = Features(model)(models.image(96, 96))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = copy.copy(model)
    torch.compiler.reset()
    for block in model.get_submodule(blocks).children():
        block.compile(backend=backend, fullgraph=True)
    assert relative_error(Features(compiled)(models.image(96, 96)), expected) < 1e-6
    assert 1 <= len(graphs) <= 2
    torch.compiler.reset()
