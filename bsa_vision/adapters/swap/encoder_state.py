"""State that the swapped layers of one encoder share: plan, grid of the input, prompts."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakSet, ref

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from bsa_vision.attention.carried_masks import expect_size_op, is_symbolic, outside_of_tracing
from bsa_vision.attention.rel_pos import RelPos
from bsa_vision.errors import BackendUnavailable
from bsa_vision.plans.layer_masks import Context
from bsa_vision.plans.model_spec import LayerSpec, ModelSpec
from bsa_vision.plans.plan import SparsityPlan

GridOf = Callable[[Any, tuple[Any, ...], dict[str, Any]], tuple[int, int] | None]


@dataclass(frozen=True, eq=False)
class FoundEncoder:
    """A vision encoder found in a model.

    modules     attention modules, in the order of `spec.layers`
    embeddings  the module that makes patches from pixels
    grid_of     (embeddings, args, kwargs) -> grid (h, w) of the input, None = unknown; a top-level
                function, so that it can be pickled
    """

    spec: ModelSpec
    modules: tuple[nn.Module, ...]
    embeddings: nn.Module
    grid_of: GridOf | None = None


@dataclass(frozen=True, eq=False)
class Observation:
    """Inputs of one attention call, in model order.

    q, k, v  (B, H, N, D), (B, G, M, D), (B, G, M, Dv); with rotary positions, unscaled
    weight   (C, H * Dv), weight of the output projection; None = unknown
    """

    layer: LayerSpec
    grid: tuple[int, int]
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    rel_pos: RelPos | None
    weight: Tensor | None


MAX_PENDING = 8


@dataclass
class PendingInput:
    """An input that passed the patch embedding, and the keys of the layers it has passed since."""

    grid: tuple[int, int]
    passed: set[str] = field(default_factory=set)

    def may_have(self, tokens: int, special: int) -> bool:
        """Return whether this input may have `tokens` tokens, `special` of them special."""
        return self.grid == (0, 0) or tokens == special + self.grid[0] * self.grid[1]


class EncoderState:
    """State shared by the swapped layers of one encoder."""

    def __init__(
        self,
        spec: ModelSpec,
        plan: SparsityPlan,
        backend: str,
        on_unsupported: str,
        grid_of: GridOf | None = None,
    ) -> None:
        self.spec, self.plan, self.grid_of = spec, plan, grid_of
        self.backend, self.on_unsupported = backend, on_unsupported
        self.grid: tuple[int, int] = (0, 0)  # of the last input; (0, 0) = none yet or unknown
        # Number of tokens -> grids of the inputs since the last backward, for recomputation.
        self.seen: dict[int, set[tuple[int, int]]] = {}
        self.recomputed = False
        self.dense: list[object] = []  # one entry for each open `dense(model)` block
        self.context = Context()
        self.observer: Callable[[Observation], None] | None = None
        self._reset_local_state()

    def _reset_local_state(self) -> None:
        """Reset the state that is not copied with the model or sent to other processes."""
        self.layers: WeakSet[Any] = WeakSet()  # the layers of living modules
        # The swapped model and its embeddings; empty in a copy.
        self.homes: tuple[ref[nn.Module], ...] = ()
        self._local = threading.local()

    def see(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Store the grid of the input; the forward pre-hook of the patch embedding."""
        if torch.jit.is_tracing():
            with outside_of_tracing():  # sizes are tensors while tracing
                self._remember_grid(module, args, kwargs)
            if torch.onnx.is_in_onnx_export():  # sparse layers are refused there
                return None
            return self._fix_size(args, kwargs)
        self._remember_grid(module, args, kwargs)
        return None

    def _fix_size(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Make a traced program refuse other image sizes.

        Its grid is fixed, and another grid may have the same number of tokens.
        """

        def fixed(x: Any) -> Any:
            if not isinstance(x, Tensor) or x.dim() != 4:
                return x
            with outside_of_tracing():
                height, width = x.shape[-2:]
            return expect_size_op(x, height, width)

        return tuple(map(fixed, args)), {name: fixed(x) for name, x in kwargs.items()}

    def _remember_grid(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self.grid_of:
            grid = self.grid_of(module, args, kwargs)
        else:
            grid = self._grid_of_pixels(args, kwargs)
        height, width = grid or (0, 0)
        if torch.compiler.is_dynamo_compiling():
            self.grid = (height, width)
            return
        if is_symbolic((height, width)):  # torch.export with dynamic sizes: valid for this trace
            self._local.symbolic = (weakref.ref(get_proxy_mode()), (height, width))
            return
        self._local.symbolic = None
        self.grid = (int(height), int(width))
        self._local.grid = self.grid  # threads may share a model
        pending = self._pending()
        if self.dense or any(image.passed for image in pending):
            pending.clear()  # their tokens have passed the layers, or never will
        if not self.dense:
            pending.append(PendingInput(self.grid))
        if self.recomputed:
            self.seen, self.recomputed = {}, False
        tokens = self._num_special_tokens + self.grid[0] * self.grid[1]
        self.seen.setdefault(tokens, set()).add(self.grid)

    @property
    def _num_special_tokens(self) -> int:
        return self.spec.num_prefix_tokens + self.spec.num_suffix_tokens

    def _grid_of_pixels(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[int, int] | None:
        pixels = args[0] if args else kwargs.get("pixel_values")
        if not isinstance(pixels, Tensor):
            return None
        patch_height, patch_width = self.spec.patch_size
        return pixels.shape[-2] // patch_height, pixels.shape[-1] // patch_width

    def _pending(self) -> deque[PendingInput]:
        """Return the inputs of this thread since tokens last passed a layer."""
        if not hasattr(self._local, "pending"):
            self._local.pending = deque(maxlen=MAX_PENDING)
        return self._local.pending

    def claim(self, layer: LayerSpec, tokens: int) -> str | None:
        """Match the tokens of a layer to an input; return why that is impossible, or None."""
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1:
            return None  # `current_grid` handles these
        fits = partial(PendingInput.may_have, tokens=tokens, special=self._num_special_tokens)
        pending = [
            image for image in self._pending() if layer.key not in image.passed and fits(image)
        ]
        grids = sorted({image.grid for image in pending})
        if len(grids) > 1:
            return f"images of grids {grids} were embedded: these {tokens} tokens may be of any"
        grid = self.current_grid(tokens)
        if grids:
            pending[0].passed.add(layer.key)
            self._local.grid = grids[0]
        elif self.on_unsupported == "error" and grid != (0, 0) and fits(PendingInput(grid)):
            raise BackendUnavailable(
                f"layer {layer.name!r} got {tokens} tokens that did not pass the patch embedding "
                "since the layer ran last: their grid is unknown. Run the whole model, or run its "
                "patch embedding first; on_unsupported='fallback' assumes the grid of the last "
                f"image, {grid}."
            )
        return None

    def passed(self, key: str) -> None:
        """Record that the tokens of the last input passed the original of a layer."""
        if not torch.compiler.is_compiling() and self._pending():
            self._pending()[-1].passed.add(key)

    def current_grid(self, tokens: int) -> tuple[int, int]:
        """Return the grid of the input that these tokens belong to."""
        if torch.compiler.is_dynamo_compiling():
            return self.grid
        symbolic = getattr(self._local, "symbolic", None)
        if symbolic is not None and symbolic[0]() is get_proxy_mode() is not None:
            return symbolic[1]
        if torch._C._current_graph_task_id() == -1:
            return getattr(self._local, "grid", self.grid)
        # In backward, a checkpointed layer is recomputed, maybe after inputs of other sizes.
        self.recomputed = True
        grids = self.seen.get(tokens, set())
        if len(grids) != 1:
            raise RuntimeError(
                f"gradient checkpointing recomputes {tokens} tokens, but inputs of grids "
                f"{sorted(grids)} match, and exactly one must match: run backward before the next "
                "image size, or turn checkpointing off."
            )
        return next(iter(grids))

    def __getstate__(self) -> dict[str, Any]:
        local = ("_local", "layers", "homes")
        state = {key: value for key, value in self.__dict__.items() if key not in local}
        # A copy made in a `dense` or `observe` block must not stay dense or observed.
        return {**state, "dense": [], "observer": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset_local_state()

    def watch(self, model: nn.Module, embeddings: nn.Module) -> None:
        """Register the hook that stores the grid of each input."""
        self.homes = (ref(model), ref(embeddings))
        embeddings.register_forward_pre_hook(self.see, with_kwargs=True)

    def unwatch(self, modules: Iterable[nn.Module]) -> None:
        """Undo `watch`, complete or interrupted, in `modules` and in the swapped model."""
        homes = [home for home_ref in self.homes if (home := home_ref()) is not None]
        for module in (*modules, *homes):
            for key, hook in list(module._forward_pre_hooks.items()):
                if getattr(hook, "__self__", None) is self:
                    module._forward_pre_hooks_with_kwargs.pop(key, None)
                    module._forward_pre_hooks.pop(key, None)


def watching(model: nn.Module) -> list[EncoderState]:
    """Return the encoders whose hooks are on modules of `model`."""
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    return [
        encoder
        for hook in hooks
        if isinstance(encoder := getattr(hook, "__self__", None), EncoderState)
    ]


def check_model(model: object) -> None:
    """Raise TypeError unless `model` is a module."""
    if isinstance(model, nn.Module):
        return
    hint = "pass the model itself"
    if isinstance(model, str):
        hint = "load it first, e.g. with timm.create_model or from_pretrained"
    elif isinstance(model, type):
        hint = f"create an instance, {model.__name__}(...)"
    elif isinstance(getattr(model, "model", None), nn.Module):  # pipelines, predictors
        hint = "pass its .model"
    raise TypeError(f"model is a {type(model).__name__}: expected a torch.nn.Module; {hint}.")
