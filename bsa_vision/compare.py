"""The model with its sparse heads against itself without: error layer by layer, time, memory, on images.

Errors are relative, ||sparse - dense|| / ||dense||, over all tokens and channels of one image. Features are those of `bsa_vision.models.features`.
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
    """What comes out of one attention module, output projection included; one number per image.

    sparsity  realised, all heads together, 0 to 1
    alone     error of this layer for the input it gets in the sparse model: what its own masks change
    so_far    error of the sparse model's layer to the dense model's: what came before adds to it
    """

    name: str
    sparsity: float
    alone: tuple[float, ...]
    so_far: tuple[float, ...]


@dataclass(frozen=True)
class Comparison:
    """`str()` gives a table.

    errors     of the model's features, one per image
    cosines    between sparse and dense features, one per image
    times      "dense" and "sparse", alternating, each round all images one by one
    memory     bytes at the peak of one image over what was in use before, "dense" and "sparse"; `method` says how they were read
    fallbacks  calls that ran dense although they should not, all layers together
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
        return "\n".join(
            [
                f"{images} image{'s' * (images > 1)} of {height} x {width} patches: {self.sparsity:.1%} of all blocks are skipped",
                *text_table.lines(rows),
                f"features: error {_range(self.errors)}, cosine {_range(self.cosines)}",
                f"time per image: dense {seconds['dense']:.3g} s, sparse {seconds['sparse']:.3g} s; {ratio:.2f} of dense ({spread[0]:.2f} to "
                f"{spread[1]:.2f} in {len(self.times['sparse'].seconds)} rounds)",
                f"memory at the peak of an image: dense {mib['dense']:.0f} MiB, sparse {mib['sparse']:.0f} MiB ({self.method})",
                *(
                    [f"{self.fallbacks} calls ran dense: bsa.describe(model) says why"]
                    if self.fallbacks
                    else []
                ),
            ]
        )


def _range(values: Sequence[float]) -> str:
    """Mean, and the extremes where there are several."""
    mean = sum(values) / len(values)
    return (
        f"{mean:.4f}"
        if len(values) == 1
        else f"{mean:.4f} ({min(values):.4f} to {max(values):.4f})"
    )


def compare(
    model: nn.Module,
    images: Iterable[Tensor],
    rounds: int = 3,
    on_step: Callable[[], None] = lambda: None,
) -> Comparison:
    """Run a swapped model with its sparse heads and without, on each of `images`, (1, 3, h, w) of one size, in eval mode.

    rounds   timed rounds, each of which runs both over all images, after one that is not timed
    on_step  called `num_steps(images, rounds)` times, for a progress bar

    ValueError for a model without sparse heads (or inside `bsa.dense`), with those of several encoders, and for images that are none, or of
    several sizes. The model is not changed.
    """
    images = check_pixels(images)
    if (
        not images
        or len({image.shape for image in images}) != 1
        or images[0].dim() != 4
        or len(images[0]) != 1
    ):
        raise ValueError(
            f"images of shapes {[tuple(image.shape) for image in images]}: expected at least one, each (1, 3, h, w), all of one size; resize "
            "them."
        )
    towers = {id(layer.encoder): layer.encoder for layer in layers_of(model)}
    if len(towers) != 1 or any(tower.dense for tower in towers.values()):
        raise ValueError(
            f"{type(model).__name__} has no sparse heads to compare, or runs dense at the moment, or has those of several encoders: sparsify_ one "
            "encoder, and compare it outside of `bsa.dense`."
        )
    with eval_mode(model):
        return _compare(model, images, rounds, on_step)


def num_steps(images: Sequence[Any], rounds: int) -> int:
    """How often `compare` calls `on_step`."""
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
        cosines.append(
            float(
                torch.cosine_similarity(out.double().flatten(), reference.double().flatten(), dim=0)
            )
        )
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
    """Inside, what these modules return is collected."""
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
    """Inside, every layer with sparse heads also runs dense on the input it got; layer name -> its relative errors, call by call."""
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
    """The attention modules of a swapped model, by layer name."""
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
