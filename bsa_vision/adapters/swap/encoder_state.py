"""Hold what the swapped layers of one encoder share: the plan, the grid of the input, its prompts."""

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
    """A vision encoder inside a model: what it is, its attention modules in the order of `spec.layers`, where pixels enter.

    grid_of  (embeddings, args, kwargs) -> (h, w) of what enters, None = cannot be told; a function of a module, for pickles
    """

    spec: ModelSpec
    modules: tuple[nn.Module, ...]
    embeddings: nn.Module
    grid_of: GridOf | None = None


@dataclass(frozen=True, eq=False)
class Observation:
    """What one layer is about to attend with, in model order.

    q, k, v  (B, H, N, D), (B, G, M, D), (B, G, M, Dv); positions applied, unscaled
    weight   (C, H * Dv) of the projection that follows, None where it cannot be told
    """

    layer: LayerSpec
    grid: tuple[int, int]
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    rel_pos: RelPos | None
    weight: Tensor | None


MOST_WAITING = 8


@dataclass
class Waiting:
    """An image whose patches were made, and the layers that its tokens went through since."""

    grid: tuple[int, int]
    ran: set[str] = field(default_factory=set)

    def may_have(self, tokens: int, special: int) -> bool:
        """Return whether so many tokens, so many of them special, may be this image's."""
        return self.grid == (0, 0) or tokens == special + self.grid[0] * self.grid[1]


class EncoderState:
    """What the swapped layers of one encoder share: the plan, the grid of the current input, whether to run dense."""

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
        self.grid: tuple[int, int] = (0, 0)  # of the last input; (0, 0) until there was one
        # For recomputation: tokens -> grids of that many tokens, of the inputs since backward ran last.
        self.seen: dict[int, set[tuple[int, int]]] = {}
        self.recomputed = False
        self.dense: list[object] = []  # one entry for each `dense(model)` block that is open
        self.context = Context()
        self.observer: Callable[[Observation], None] | None = None
        self._forget()

    def _forget(self) -> None:
        """Start without what belongs to one process, and to one of several copies of a model."""
        self.layers: WeakSet[Any] = WeakSet()  # those that a living module has
        self.homes: tuple[
            ref[nn.Module], ...
        ] = ()  # the model that was swapped, and its embeddings; none in a copy
        self._local = threading.local()

    def see(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Forward pre-hook of the patch embedding: remember the grid of the image that comes in."""
        if torch.jit.is_tracing():
            with outside_of_tracing():  # there, sizes are numbers
                self._remember_grid(module, args, kwargs)
            if torch.onnx.is_in_onnx_export():  # dense layers only: sparse ones are refused there
                return None
            return self._fix_size(args, kwargs)
        self._remember_grid(module, args, kwargs)
        return None

    def _fix_size(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Make a traced program refuse other sizes: its grid is fixed, and as many tokens may be another grid."""

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
        grid = (
            self.grid_of(module, args, kwargs)
            if self.grid_of
            else self._grid_of_pixels(args, kwargs)
        )
        height, width = grid or (0, 0)  # (0, 0): cannot be told; not that of the image before
        if torch.compiler.is_dynamo_compiling():
            self.grid = (height, width)
            return
        if is_symbolic(
            (height, width)
        ):  # torch.export with sizes that may change: for this trace only
            self._local.symbolic = (weakref.ref(get_proxy_mode()), (height, width))
            return
        self._local.symbolic = None
        self.grid = (int(height), int(width))
        self._local.grid = self.grid  # threads that share a model each have their own image
        waiting = self._waiting()
        if self.dense or any(image.ran for image in waiting):
            waiting.clear()  # their tokens have been through the layers, or will not come
        if not self.dense:
            waiting.append(Waiting(self.grid))
        if self.recomputed:
            self.seen, self.recomputed = {}, False
        self.seen.setdefault(
            self.spec.num_prefix_tokens + self.grid[0] * self.grid[1] + self.spec.num_suffix_tokens,
            set(),
        ).add(self.grid)

    def _grid_of_pixels(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[int, int] | None:
        pixels = args[0] if args else kwargs.get("pixel_values")
        if not isinstance(pixels, Tensor):
            return None
        return pixels.shape[-2] // self.spec.patch_size[0], pixels.shape[
            -1
        ] // self.spec.patch_size[1]

    def _waiting(self) -> deque[Waiting]:
        """Images of this thread whose patches were made since tokens went through a layer."""
        if not hasattr(self._local, "waiting"):
            self._local.waiting = deque(maxlen=MOST_WAITING)
        return self._local.waiting

    def claim(self, layer: LayerSpec, tokens: int) -> str | None:
        """Find the image that these tokens of a layer come from; why that cannot be told, or None."""
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1:
            return None  # `current_grid` sees to it
        count = partial(
            Waiting.may_have,
            tokens=tokens,
            special=self.spec.num_prefix_tokens + self.spec.num_suffix_tokens,
        )
        waiting = [
            image for image in self._waiting() if layer.key not in image.ran and count(image)
        ]
        grids = sorted({image.grid for image in waiting})
        if len(grids) > 1:
            return f"patches of images of {grids} were made, and these {tokens} tokens may be of any of them"
        grid = self.current_grid(tokens)
        if grids:
            waiting[0].ran.add(layer.key)
            self._local.grid = grids[0]
        elif self.on_unsupported == "error" and grid != (0, 0) and count(Waiting(grid)):
            raise BackendUnavailable(
                f"layer {layer.name!r} got {tokens} tokens that did not come through the patch embedding since it ran last: their grid "
                "cannot be told. Run the whole model, or its patch embedding first; with on_unsupported='fallback' they are taken for those "
                f"of the last image, {grid}."
            )
        return None

    def passed(self, key: str) -> None:
        """Note that the tokens of the last image went through a layer's original."""
        if not torch.compiler.is_compiling() and self._waiting():
            self._waiting()[-1].ran.add(key)

    def current_grid(self, tokens: int) -> tuple[int, int]:
        """The grid of the image that these tokens come from."""
        if torch.compiler.is_dynamo_compiling():
            return self.grid
        symbolic = getattr(self._local, "symbolic", None)
        if symbolic is not None and symbolic[0]() is get_proxy_mode() is not None:
            return symbolic[1]
        if torch._C._current_graph_task_id() == -1:
            return getattr(self._local, "grid", self.grid)
        # Within backward: a checkpointed layer is computed again, maybe after images of other sizes came by.
        self.recomputed = True
        grids = self.seen.get(tokens, set())
        if len(grids) != 1:
            raise RuntimeError(
                f"gradient checkpointing computes {tokens} tokens again, and images of {sorted(grids)} patches came by: which "
                "one these are cannot be told; run backward before the next shape, or turn checkpointing off."
            )
        return next(iter(grids))

    def __getstate__(self) -> dict[str, Any]:
        own = ("_local", "layers", "homes")
        state = {key: value for key, value in self.__dict__.items() if key not in own}
        return {
            **state,
            "dense": [],
            "observer": None,
        }  # a copy made inside `dense(model)` is not dense for ever

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def watch(self, model: nn.Module, embeddings: nn.Module) -> None:
        """See every image that comes in, from now on."""
        self.homes = (ref(model), ref(embeddings))
        embeddings.register_forward_pre_hook(self.see, with_kwargs=True)

    def unwatch(self, modules: Iterable[nn.Module]) -> None:
        """Undo `watch`, also one that was interrupted; `modules` are where to look."""
        for module in (*modules, *(home for one in self.homes if (home := one()) is not None)):
            for key, hook in list(module._forward_pre_hooks.items()):
                if getattr(hook, "__self__", None) is self:
                    module._forward_pre_hooks_with_kwargs.pop(key, None)
                    module._forward_pre_hooks.pop(key, None)


def watching(model: nn.Module) -> list[EncoderState]:
    """Return the encoders that see what comes into a model, or into modules of it."""
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
    how = "pass the model itself"
    if isinstance(model, str):
        how = "load it first, e.g. with timm.create_model or from_pretrained"
    elif isinstance(model, type):
        how = f"make one, {model.__name__}(...)"
    elif isinstance(getattr(model, "model", None), nn.Module):  # pipelines, predictors
        how = "pass its .model"
    raise TypeError(f"model is a {type(model).__name__}: expected a torch.nn.Module; {how}.")
