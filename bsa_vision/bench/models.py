"""Whole models: the dense original against the same model with sparse heads, alternating, and whether it computed the right thing.

The built-in models have random weights, drawn so that logits have a standard deviation above 1. Nothing here says how well a
trained model would do with sparse heads.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bsa_vision import adapters
from bsa_vision.bench.amdahl import Amdahl, Clock
from bsa_vision.bench.attention import FAILED, NOT_RUN, OK, WRONG, first_line
from bsa_vision.bench.case import DTYPES
from bsa_vision.bench.correct import Error, allowed, distance
from bsa_vision.bench.machine import free_memory
from bsa_vision.errors import BackendUnavailable
from bsa_vision.masks import Pattern
from bsa_vision.measure.timing import Timing, paired
from bsa_vision.models.by_name import from_factory
from bsa_vision.models.features import features
from bsa_vision.plans.flops import cost
from bsa_vision.plans.model_spec import ModelSpec
from bsa_vision.plans.plan import SparsityPlan

# name -> (config class, model class, patch size, further settings); ViT-B of each family
BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
BUILT_IN: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    "vit": ("ViTConfig", "ViTModel", 16, {**BASE, "intermediate_size": 3072}),
    "dinov2": ("Dinov2Config", "Dinov2Model", 14, {**BASE, "mlp_ratio": 4}),
    "dinov3": ("DINOv3ViTConfig", "DINOv3ViTModel", 16, {**BASE, "intermediate_size": 3072, "num_register_tokens": 4}),
    "sam": ("SamVisionConfig", "SamVisionModel", 16, {**BASE, "mlp_dim": 3072}),
}
WEIGHT_WIDTH = 1.3  # of a projection's output for inputs of width 1: logits of standard deviation about 1.7


@dataclass(frozen=True)
class ModelCase:
    """One model at one image size under one plan.

    model       a name of `BUILT_IN`, or "package.module:factory", called without arguments
    image_size  pixels (h, w)
    """

    model: str
    image_size: tuple[int, int]
    pattern: Pattern
    dense_heads: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    batch: int = 1
    order: str = "tile"
    block_size: int = 128
    seed: int = 0

    @property
    def random_weights(self) -> bool:
        """Whether the weights are drawn here; a factory's are its own."""
        return self.model in BUILT_IN

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "image_size": list(self.image_size), "pattern": self.pattern.spec}


@dataclass(frozen=True)
class ModelRow:
    """One case.

    status      as in `attention.Measurement`, with `reason`
    density     fraction of blocks computed over all layers and heads: counted, not asked for
    timings     "dense" (the original), "sparse" and "dense plan" (the original under a plan of dense heads); ratios are to dense in the
                same round
    amdahl      how much of the dense time is attention, and what that allows; None: not on the CPU, or not all of it is torch's attention
    error       features against the same masks applied by `reference`, a name of a backend in float64; None: not checked
    difference  relative error of the sparse features to the dense ones: what sparsity changes, with these weights
    dense_plan  largest difference between the original and the model under a plan of dense heads; 0 = equal to the bit, as it
                must be where dense layers run the original
    swapped     the same with every layer sent through the swapped attention
    restored    whether the restored model gives the original's bits
    """

    case: ModelCase
    spec: ModelSpec
    tokens: int
    density: float
    backend: str = ""
    status: str = OK
    reason: str = ""
    timings: dict[str, Timing] = field(default_factory=dict)
    amdahl: Amdahl | None = None
    error: Error | None = None
    reference: str = ""
    difference: float = float("nan")
    dense_plan: float = float("nan")
    swapped: Error | None = None
    restored: bool = False

    @property
    def ok(self) -> bool:
        return self.status in (OK, NOT_RUN)


def num_model_steps(rounds: int) -> int:
    """How often `run_model_case` calls `on_step`."""
    return 4 + 1 + rounds


def default_image_size(model: str) -> tuple[int, int]:
    """64 patches a side; a factory's model keeps its own size."""
    if model in BUILT_IN:
        return (64 * BUILT_IN[model][2],) * 2
    spec = adapters.inspect(_from_factory(model))
    return spec.grid[0] * spec.patch_size[0], spec.grid[1] * spec.patch_size[1]


def build_model(case: ModelCase) -> nn.Module:
    """The model in eval mode, on its device; ValueError when it cannot be had."""
    torch.manual_seed(case.seed)
    if case.random_weights:
        model = _built_in(case)
        _redraw(model)
    else:
        model = _from_factory(case.model)
    return model.eval().to(case.device, DTYPES[case.dtype])


def _built_in(case: ModelCase) -> nn.Module:
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            f"--model {case.model!r} needs transformers, which cannot be imported ({first_line(error)}): allowed without it is "
            "package.module:factory; install it with pip install 'bsa-vision[models]'."
        ) from None
    config_class, model_class, patch, settings = BUILT_IN[case.model]
    height, width = case.image_size
    if case.model == "sam" and height != width:
        raise ValueError(f"--image-size {height}x{width} with --model sam: allowed are square images; give one number.")
    size = height if case.model == "sam" else case.image_size
    config = getattr(transformers, config_class)(image_size=size, patch_size=patch, **settings)
    model: nn.Module = getattr(transformers, model_class)(config)
    return model


def _redraw(model: nn.Module) -> None:
    """Fresh weights of these models make attention nearly uniform, where any mask looks harmless and wrong ones too."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "rel_pos" in name or "pos_embed" in name:  # zero in a fresh SAM
                parameter.normal_(0, 0.2)
            elif parameter.dim() == 2 and "embeddings" not in name:
                parameter.normal_(0, WEIGHT_WIDTH * parameter.shape[-1] ** -0.5)
            elif parameter.dim() == 4:  # convolutions, which a fresh SAM has next to nothing in
                parameter.normal_(0, parameter[0].numel() ** -0.5)


def _from_factory(path: str) -> nn.Module:
    module, _, name = path.partition(":")
    if not module or not name:
        raise ValueError(
            f"--model {path!r}: allowed are {', '.join(BUILT_IN)} and package.module:factory; choose one of these."
        )
    try:
        return from_factory(path)
    except ValueError as error:
        raise ValueError(f"--{error}") from None


def run_model_case(
    case: ModelCase, backend: str = "auto", rounds: int = 5, on_step: Callable[[str], Any] = lambda what: None
) -> ModelRow:
    """Check and time one case; `on_step` is called `num_model_steps` times with what comes next.

    Raises ValueError (PlanError among them) for a model, size or plan that is not possible.
    """
    model = build_model(case)
    spec = adapters.inspect(model, case.image_size)
    plan = SparsityPlan.uniform(
        spec, case.pattern, dense_heads=case.dense_heads, order=case.order, block_size=case.block_size
    )
    layout = plan.layout(spec)
    row: dict[str, Any] = dict(case=case, spec=spec, tokens=layout.num_tokens, density=1 - plan.sparsity(layout))
    try:
        with torch.no_grad():
            return ModelRow(**row, **_measure(model, case, spec, plan, backend, rounds, on_step))
    except BackendUnavailable as error:
        return ModelRow(**row, status=NOT_RUN, reason=str(error))
    except (RuntimeError, MemoryError) as error:
        return ModelRow(**row, status=FAILED, reason=f"{type(error).__name__}: {first_line(error)}")


def _measure(
    model: nn.Module,
    case: ModelCase,
    spec: ModelSpec,
    plan: SparsityPlan,
    backend: str,
    rounds: int,
    on_step: Callable[[str], Any],
) -> dict[str, Any]:
    """The fields of a ModelRow that come from running the model."""
    height, width = case.image_size
    untouched_model = _twin(model)
    generator = torch.Generator(device="cpu").manual_seed(case.seed)
    noise = torch.randn(case.batch, 3, height, width, generator=generator, device="cpu", dtype=torch.float32)
    pixels = noise.to(case.device, DTYPES[case.dtype])
    exact = copy.deepcopy(model).double()
    on_step("dense plan")
    original = features(model, pixels)
    dense_plan, swapped, untouched = _dense_plan(model, pixels, original)
    adapters.sparsify_(model, plan, backend)
    on_step("sparse: first call")
    sparse = features(model, pixels)
    backends = dict.fromkeys(layer.backend for layer in adapters.describe(model, case.image_size).layers)
    on_step("float64, dense")
    limit = allowed(distance(original[:1], features(exact, pixels[:1].double())), original.dtype)
    on_step("float64, the same masks")
    reference, expected = _reference(exact, case, plan, pixels)
    error = None if expected is None else Error(distance(sparse[:1], expected), limit)
    del exact

    timings, amdahl = _time(
        {"dense": untouched_model, "sparse": model}, pixels, _attention_density(spec, plan), rounds, on_step
    )
    adapters.restore_(model)
    found: dict[str, Any] = dict(
        backend=", ".join(backends),
        timings=timings,
        amdahl=amdahl,
        error=error,
        reference=reference,
        difference=float((sparse - original).double().norm() / original.double().norm()),
        dense_plan=dense_plan,
        swapped=Error(swapped, limit),
        restored=torch.equal(features(model, pixels), original),
    )
    wrong = _wrong(found, untouched)
    return {**found, "status": WRONG if wrong else OK, "reason": "; ".join(wrong)}


def _twin(model: nn.Module) -> nn.Module:
    """A second model with the same parameters and buffers, not copies of them."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def _attention_density(spec: ModelSpec, plan: SparsityPlan) -> float | None:
    """Of the FLOPs of all attention products, those that are left; None where time in attention is not all in torch's attention."""
    if spec.others or any(layer.rel_pos for layer in spec.layers):
        return None
    layout = plan.layout(spec)
    products = {layer.key: layer.products for layer in cost(spec).layers}
    left = sum(flops * (1 - plan.compile(key, layout).sparsity) for key, flops in products.items())
    return left / sum(products.values())


def _time(
    models: dict[str, nn.Module], pixels: Tensor, density: float | None, rounds: int, on_step: Callable[[str], Any]
) -> tuple[dict[str, Timing], Amdahl | None]:
    """The models "dense" and "sparse", and the dense one under a plan of dense heads, alternating."""
    dense_plan = _twin(models["dense"])
    adapters.sparsify_(dense_plan, adapters.dense_plan(dense_plan))
    clock, on_cpu = Clock(), pixels.device.type == "cpu" and density is not None
    runs: dict[str, Callable[[], Any]] = {
        name: partial(features, model, pixels) for name, model in {**models, "dense plan": dense_plan}.items()
    }
    if on_cpu:
        runs = {name: clock.timed(name, run) for name, run in runs.items()}
    timings = paired(runs, rounds, on_round=lambda: on_step("timing"))
    return timings, clock.amdahl(density, skip=1) if on_cpu and density is not None else None


def _wrong(found: dict[str, Any], untouched: bool) -> list[str]:
    """What is not as it must be, in words; `untouched`: layers without a sparse head run the original."""
    wrong = []
    if found["error"] is not None and not found["error"].ok:
        wrong.append(
            f"the sparse features are off by {found['error'].found:.1e}, allowed are {found['error'].allowed:.1e}"
        )
    if found["dense_plan"] != 0 and untouched:
        wrong.append(f"a plan of dense heads changed the features by {found['dense_plan']:.1e}, not 0")
    if not found["swapped"].ok:
        swapped = found["swapped"]
        wrong.append(f"dense heads in swapped layers are off by {swapped.found:.1e}, allowed are {swapped.allowed:.1e}")
    if not found["restored"]:
        wrong.append("the restored model does not give the original's bits")
    return wrong


def _dense_plan(model: nn.Module, pixels: Tensor, original: Tensor) -> tuple[float, float, bool]:
    """What a plan of dense heads changes: largest difference as users get it, error through swapped layers, and whether users
    get the original."""
    plan = adapters.dense_plan(model)
    adapters.sparsify_(model, plan)
    untouched = all(layer.backend == "original" for layer in adapters.describe(model).layers)
    as_users_get_it = features(model, pixels)
    adapters.restore_(model)
    adapters.sparsify_(model, plan, "sdpa")
    swapped = features(model, pixels)
    adapters.restore_(model)
    return float((as_users_get_it - original).abs().max()), distance(swapped, original), untouched


def _reference(exact: nn.Module, case: ModelCase, plan: SparsityPlan, pixels: Tensor) -> tuple[str, Tensor | None]:
    """(how, features) of the float64 model with the plan's masks applied densely, for the first image."""
    spec = adapters.inspect(exact, case.image_size)
    logits = spec.layers[0].heads * plan.layout(spec).num_tokens ** 2
    free = free_memory(case.device)
    for backend, bytes_each in (("reference", 8 * 6), ("sdpa", 8 * 2)):  # float64, and what is there at a time
        if logits * bytes_each < free / 2:
            adapters.sparsify_(exact, plan, backend)
            return backend, features(exact, pixels[:1].double())
    return f"not checked: {logits * 16 / 1e9:.1f} GB would be needed, {free / 1e9:.1f} GB are free", None
