"""Benchmark a whole model with sparse heads against the dense original."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from bsa_vision import adapters
from bsa_vision.bench.attention import FAILED, NOT_RUN, Measurement, Row, judged
from bsa_vision.bench.case import DTYPES
from bsa_vision.bench.reference import Error, allowed, distance
from bsa_vision.errors import BackendUnavailable, first_line
from bsa_vision.masks import Pattern
from bsa_vision.measure.timing import paired
from bsa_vision.models.by_name import from_factory
from bsa_vision.models.features import eval_mode, features
from bsa_vision.models.random_weights import BUILT_IN, random_model
from bsa_vision.plans.plan import SparsityPlan
from bsa_vision.storage.machine import free_memory


@dataclass(frozen=True)
class ModelCase:
    """One model with the same pattern in every layer.

    model       a name in `BUILT_IN`, or "package.module:factory", called without arguments
    image_size  pixels (h, w); None = 64 patches per side, or the size of the factory's model
    """

    model: str
    pattern: Pattern
    image_size: tuple[int, int] | None = None
    dense_heads: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    batch: int = 1
    order: str = "tile"
    block_size: int = 128
    backend: str = "auto"
    seed: int = 0


def build_model(case: ModelCase) -> tuple[nn.Module, ModelCase]:
    """Build the model in eval mode; also return the case with its image size."""
    torch.manual_seed(case.seed)
    if case.model in BUILT_IN:
        size = case.image_size or (64 * BUILT_IN[case.model][1],) * 2
        model = random_model(case.model, size, case.seed)
    elif ":" in case.model:
        model = from_factory(case.model)
        spec = adapters.inspect(model, case.image_size)
        size = (spec.grid[0] * spec.patch_size[0], spec.grid[1] * spec.patch_size[1])
    else:
        names = f"{', '.join(BUILT_IN)} and package.module:factory"
        raise ValueError(f"--model {case.model!r}: allowed are {names}.")
    model = model.eval().to(case.device, DTYPES[case.dtype])
    return model, replace(case, image_size=size)


def make_plan(model: nn.Module, case: ModelCase) -> SparsityPlan:
    """Build the plan with the case's pattern in every layer."""
    spec = adapters.inspect(model, case.image_size)
    how = {"order": case.order, "block_size": case.block_size}
    return SparsityPlan.uniform(spec, case.pattern, dense_heads=case.dense_heads, **how)  # type: ignore[arg-type]


def make_pixels(case: ModelCase) -> Tensor:
    """Draw random images."""
    generator = torch.Generator(device="cpu").manual_seed(case.seed)
    shape = (case.batch, 3, *(case.image_size or ()))
    noise = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)
    return noise.to(case.device, DTYPES[case.dtype])


def run_model_case(case: ModelCase, rounds: int) -> Row:
    """Check and time one model.

    Raises ValueError if the model, the image size or the plan is not valid.
    """
    model, case = build_model(case)
    plan = make_plan(model, case)
    spec = adapters.inspect(model, case.image_size)
    layout = plan.layout(spec)
    first, size = spec.layers[0], f"{spec.family}, {layout.num_tokens:,} tokens"
    notes = [f"{size}, {len(spec.layers)} layers of {first.heads} heads of {first.head_dim}."]
    if case.model in BUILT_IN:
        notes.append("RANDOM WEIGHTS: differences say nothing about a trained model.")
    checked = ""
    found: dict[str, Measurement] = {}
    try:
        with eval_mode(model):
            checked, found = _measure(model, case, plan, rounds, notes)
    except BackendUnavailable as error:
        found = {"sparse": Measurement(NOT_RUN, str(error))}
    except (RuntimeError, MemoryError) as error:
        found = {"sparse": Measurement(FAILED, first_line(error))}
    return Row(case, 1 - plan.sparsity(layout), checked, found, tuple(notes))


def _measure(
    model: nn.Module, case: ModelCase, plan: SparsityPlan, rounds: int, notes: list[str]
) -> tuple[str, dict[str, Measurement]]:
    """Return what was checked, and the measurements of the dense and the sparse model."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    dense = copy.deepcopy(model, shared)  # shares the weights
    pixels, exact = make_pixels(case), copy.deepcopy(model).double()
    original = features(model, pixels)
    limit = allowed(distance(original[:1], features(exact, pixels[:1].double())), original.dtype)
    checked, expected = _reference(exact, case, plan, pixels)
    del exact
    adapters.sparsify_(model, plan, case.backend)
    sparse = features(model, pixels)
    layers = adapters.describe(model, case.image_size).layers
    difference = float((sparse - original).double().norm() / original.double().norm())
    notes.append(f"Sparse features differ from dense ones by {difference:.3f}.")
    found = {} if expected is None else {"features": distance(sparse[:1], expected)}
    errors = {name: Error(error, limit) for name, error in found.items()}
    models = {"dense": dense, "sparse": model}
    runs = {name: partial(features, each, pixels) for name, each in models.items()}
    timings = paired(runs, rounds, device=pixels.device)
    backends = ", ".join(dict.fromkeys(layer.backend for layer in layers))
    sparse_model = replace(judged(errors, backends), timing=timings["sparse"])
    return checked, {"dense": Measurement(timing=timings["dense"]), "sparse": sparse_model}


def _reference(
    exact: nn.Module, case: ModelCase, plan: SparsityPlan, pixels: Tensor
) -> tuple[str, Tensor | None]:
    """Compute the expected features of the first image, in float64 with the plan's masks.

    Returns what is checked, and the features, or None if they do not fit into memory.
    """
    spec = adapters.inspect(exact, case.image_size)
    logits = spec.layers[0].heads * plan.layout(spec).num_tokens ** 2
    for backend, bytes_each in (("reference", 8 * 6), ("sdpa", 8 * 2)):
        if logits * bytes_each < free_memory(case.device) / 2:
            adapters.sparsify_(exact, plan, backend)
            expected = features(exact, pixels[:1].double())
            return f"features of the first image, by {backend}", expected
    return f"NOTHING, it needs {logits * 16 / 1e9:.1f} GB of memory", None
