"""Compare a model with and without its sparse heads on images: error per layer, time and memory.

Errors are relative, ||sparse - dense|| / ||dense||, over all tokens and channels of one image.
Features are those of `bsa_vision.models.features`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bsa_vision.adapters import dense
from bsa_vision.adapters.swap.sparse_layer import layer_of, layers_of
from bsa_vision.measure.peak_memory import Meter
from bsa_vision.measure.timing import Timing, paired
from bsa_vision.models.features import check_pixels, eval_mode, features
from bsa_vision.plans import text_table


@dataclass(frozen=True)
class LayerError:
    """Errors of one attention module's output, projection included; one number per image.

    sparsity  realised, over all heads, 0 to 1
    alone     sparse against dense attention on the same input: the error of this layer
    so_far    the sparse model's layer against the dense model's, errors of earlier layers included
    """

    name: str
    sparsity: float
    alone: tuple[float, ...]
    so_far: tuple[float, ...]


@dataclass(frozen=True)
class Comparison:
    """Result of `compare`; print it for a table.

    errors     of the model's features, one per image
    cosines    between sparse and dense features, one per image
    times      "dense" and "sparse", in alternation; each round runs all images one by one
    memory     "dense" and "sparse", peak bytes of one image over what was in use before; `method`
               names how they were read
    fallbacks  calls that ran dense because they were unsupported, over all layers
    """

    grid: tuple[int, int]
    layers: tuple[LayerError, ...]
    errors: tuple[float, ...]
    cosines: tuple[float, ...]
    times: dict[str, Timing]
    memory: dict[str, int]
    method: str
    sparsity: float
    fallbacks: int

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        data["times"] = {
            name: {**asdict(timing), "ratio": timing.ratio} for name, timing in self.times.items()
        }
        return data

    def __str__(self) -> str:
        rows = [("layer", "sparsity", "error alone", "error so far")]
        rows += [
            (x.name, f"{x.sparsity:.1%}", _range(x.alone), _range(x.so_far)) for x in self.layers
        ]
        ratio, spread = self.times["sparse"].ratio, self.times["sparse"].spread
        images, (height, width) = len(self.errors), self.grid
        seconds = {name: timing.median / images for name, timing in self.times.items()}
        mib = {name: peak / 2**20 for name, peak in self.memory.items()}
        rounds = len(self.times["sparse"].seconds)
        lines = [
            f"{images} image{'s' * (images > 1)} of {height} x {width} patches: "
            f"{self.sparsity:.1%} of all blocks are skipped",
            *text_table.lines(rows),
            f"features: error {_range(self.errors)}, cosine {_range(self.cosines)}",
            f"time per image: dense {seconds['dense']:.3g} s, sparse {seconds['sparse']:.3g} s; "
            f"{ratio:.2f} of dense ({spread[0]:.2f} to {spread[1]:.2f} in {rounds} rounds)",
            f"peak memory of an image: dense {mib['dense']:.0f} MiB, sparse {mib['sparse']:.0f} "
            f"MiB ({self.method})",
        ]
        if self.fallbacks:
            lines.append(f"{self.fallbacks} calls ran dense: bsa.describe(model) says why")
        return "\n".join(lines)


def _range(values: Sequence[float]) -> str:
    """Return the mean, with the extremes if there are several values."""
    mean = f"{sum(values) / len(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.4f} to {max(values):.4f})"


def compare(
    model: nn.Module,
    images: Iterable[Tensor],
    rounds: int = 3,
    on_step: Callable[[], None] = lambda: None,
) -> Comparison:
    """Compare a swapped model with and without its sparse heads, in eval mode.

    images   each (1, 3, h, w), all of one size
    rounds   timed rounds; each runs both models over all images, after one warm-up round
    on_step  called `num_steps(images, rounds)` times, for a progress bar

    Raises ValueError for a model without sparse heads, inside `bsa.dense`, or with several
    encoders, and for no images or images of several sizes. The model is not changed.
    """
    images = check_pixels(images)
    shapes = [tuple(image.shape) for image in images]
    if len({*shapes}) != 1 or len(shapes[0]) != 4 or shapes[0][0] != 1:
        raise ValueError(
            f"images of shapes {shapes}: expected at least one, each (1, 3, h, w), all of one "
            "size; resize them."
        )
    encoders = {id(layer.encoder): layer.encoder for layer in layers_of(model)}
    if len(encoders) != 1 or any(encoder.dense for encoder in encoders.values()):
        raise ValueError(
            f"{type(model).__name__} has no sparse heads, is inside bsa.dense, or has several "
            "encoders with sparse heads: sparsify_ one encoder, and compare outside bsa.dense."
        )
    with eval_mode(model):
        return _compare(model, images, rounds, on_step)


def num_steps(images: Sequence[Any], rounds: int) -> int:
    """Return how often `compare` calls `on_step`."""
    return len(images) + 1 + rounds


def _compare(
    model: nn.Module, images: Sequence[Tensor], rounds: int, on_step: Callable[[], None]
) -> Comparison:
    modules = _modules(model)
    before = _fallbacks(model)
    errors, cosines = [], []
    alone: dict[str, list[float]] = {name: [] for name in modules}
    so_far: dict[str, list[float]] = {name: [] for name in modules}
    for image in images:
        with dense(model), _outputs(modules) as expected:
            reference = features(model, image)
        with _outputs(modules) as found, errors_alone(model) as own:
            out = features(model, image)
        for name in found:
            so_far[name].append(_error(found[name], expected[name]))
            alone[name] += own[name]
        errors.append(_error(out, reference))
        flat = out.double().flatten(), reference.double().flatten()
        cosines.append(float(torch.cosine_similarity(*flat, dim=0)))
        on_step()
    memory, method = _memory(model, images[0])
    times = paired(
        {
            "dense": lambda: _run_dense(model, images),
            "sparse": lambda: [features(model, image) for image in images],
        },
        rounds,
        on_round=on_step,
    )
    layers = layers_of(model)
    grid = layers[0].encoder.grid
    sparsity = {x.spec.name: x.masks.without_prompts(x.grid_of(grid)).sparsity for x in layers}
    return Comparison(
        grid=grid,
        layers=tuple(
            LayerError(x, sparsity[x], tuple(alone[x]), tuple(so_far[x]))
            for x in modules
            if so_far[x]
        ),
        errors=tuple(errors),
        cosines=tuple(cosines),
        times=times,
        memory=memory,
        method=method,
        sparsity=sum(sparsity.values()) / len(sparsity),
        fallbacks=_fallbacks(model) - before,
    )


def _fallbacks(model: nn.Module) -> int:
    return sum(sum(layer.fallbacks.values()) for layer in layers_of(model))


@contextmanager
def _outputs(modules: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Collect what these modules return, while the context lasts."""
    found: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, args: Any, out: Any) -> None:
        found[name] = _tensor(out)

    hooks = [module.register_forward_hook(partial(keep, name)) for name, module in modules.items()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def errors_alone(model: nn.Module) -> Iterator[dict[str, list[float]]]:
    """Run every sparse layer also dense on its input; collect {layer name: errors, per call}."""
    modules = _modules(model)
    errors: dict[str, list[float]] = {name: [] for name in modules}

    def rerun(name: str, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        with dense(model):
            errors[name].append(_error(_tensor(out), _tensor(module.forward(*args, **kwargs))))

    hooks = [
        module.register_forward_hook(partial(rerun, name), with_kwargs=True)
        for name, module in modules.items()
    ]
    try:
        yield errors
    finally:
        for hook in hooks:
            hook.remove()


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the attention modules of a swapped model, by layer name."""
    return {
        layer.spec.name: module
        for module in model.modules()
        if (layer := layer_of(module)) is not None
    }


def _tensor(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]


def _error(found: Tensor, expected: Tensor) -> float:
    difference, length = (found.double() - expected.double()).norm(), expected.double().norm()
    return float(difference / length) if length else float(difference > 0)


def _run_dense(model: nn.Module, images: Sequence[Tensor]) -> None:
    with dense(model):
        for image in images:
            features(model, image)


def _memory(model: nn.Module, image: Tensor) -> tuple[dict[str, int], str]:
    peaks = {}
    runs: dict[str, Callable[[], Any]] = {
        "dense": lambda: _run_dense(model, [image]),
        "sparse": lambda: features(model, image),
    }
    for name, run in runs.items():
        meter = Meter(image.device)
        run()
        peaks[name] = meter.peak()
    return peaks, meter.method
