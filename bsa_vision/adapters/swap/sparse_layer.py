"""What every adapter hangs on a model: one `Tower` per vision encoder, one `Layer` per attention module it serves."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakSet, ref

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from bsa_vision.attention.carried_masks import (
    expect_size_op,
    is_recording,
    is_symbolic,
    outside_of_tracing,
    plain_sizes,
)
from bsa_vision.attention.functional import attend_masks
from bsa_vision.attention.rel_pos import RelPos
from bsa_vision.errors import BackendUnavailable, PlanError
from bsa_vision.plans.layer_masks import Context, LayerMasks
from bsa_vision.plans.model_spec import LayerSpec, ModelSpec
from bsa_vision.plans.plan import SparsityPlan

if TYPE_CHECKING:
    from bsa_vision.adapters.swap.adapter import Adapter

# On an attention module: a plain attribute, so neither a parameter, a buffer nor a state_dict key.
ATTRIBUTE = "_bsa_layer"

GridOf = Callable[[Any, tuple[Any, ...], dict[str, Any]], tuple[int, int] | None]


@dataclass(frozen=True, eq=False)
class Found:
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


class Tower:
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
        self.layers: WeakSet[Layer] = WeakSet()  # those that a living module has
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
            self.spec.start + self.grid[0] * self.grid[1] + self.spec.end, set()
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
        count = partial(Waiting.may_have, tokens=tokens, special=self.spec.start + self.spec.end)
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

    def check_whole(self, model: nn.Module, layers: Iterable[Layer]) -> None:
        """Raise ValueError where `model` is only a part of the encoder, and holds only `layers` of it.

        Blocks that were removed from the encoder since, gone or kept elsewhere, are not missed.
        """
        here = set(layers)
        elsewhere = [layer for layer in self.layers if layer not in here]
        root, embeddings = (one() for one in self.homes) if self.homes else (None, None)
        inside = set(model.modules())
        if not elsewhere or root in inside:
            return
        missed = root is not None and not set(elsewhere).isdisjoint(layers_of(root))
        encoder = here and (self in watching(model) or embeddings in inside)
        no_more = (
            self.homes and embeddings is None
        )  # the encoder is gone, these are what is left of it
        if missed or not (encoder or no_more):
            raise ValueError(
                f"{type(model).__name__} holds {len(here)} of {len(here) + len(elsewhere)} swapped layers: an encoder is "
                "restored as a whole; pass the model that sparsify_ was given."
            )


class Layer:
    """One swapped attention module: its masks, and the calls that went to the original instead, by reason."""

    def __init__(self, tower: Tower, spec: LayerSpec, adapter: Adapter, original: Any) -> None:
        self.tower, self.spec = tower, spec
        self.adapter = adapter
        self.masks = LayerMasks(tower.plan, tower.spec, spec, tower.context)
        self.original = original  # what the adapter needs to put back
        self.swapped: Any = None  # what it needs to know of what it put there instead
        # A layer without a sparse head has nothing to skip: unless a backend was named, or we are faster (`exact`), the original
        # runs as it is.
        self.untouched = self.masks.all_dense and tower.backend == "auto" and not adapter.exact
        self.fallbacks: Counter[str] = Counter()
        self.covered: dict[
            str, Any
        ] = {}  # attributes of the module that properties hide while it is swapped
        self.weight: Tensor | None = None  # of the output projection, while the layer is observed

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.tower.layers.add(self)
        self.adapter.prepare()  # unpickled, maybe in a process that never called sparsify_

    def attach(self, module: nn.Module) -> None:
        """Say of `module` that it is swapped, or about to be."""
        self.tower.layers.add(self)
        setattr(module, ATTRIBUTE, self)

    def detach(self, module: nn.Module) -> None:
        """Say of `module` that it is as it was."""
        self.tower.layers.discard(self)
        delattr(module, ATTRIBUTE)

    def runs_original(self) -> bool:
        return (self.untouched and self.tower.observer is None) or bool(self.tower.dense)

    def wrong_grid(self, tokens: int, keys: int | None = None) -> str | None:
        """Why `tokens`, and so many remembered `keys`, do not fit the image seen last, or None when they do."""
        if self.spec.window:
            return None  # dense, whatever the image
        (tokens,) = plain_sizes(tokens)
        unknown = self.tower.claim(self.spec, tokens)
        if unknown is not None:
            return unknown
        height, width = self.tower.current_grid(tokens)
        spec = self.tower.spec
        if (height, width) == (0, 0):
            return "the grid of this input cannot be told"
        if self.spec.frames and keys is not None and keys < height * width:
            return f"{keys} remembered tokens are less than a frame of {height} x {width}"
        if tokens == spec.start + height * width + spec.end:
            return None
        return f"{tokens} tokens do not fit the grid {height} x {width} with {spec.start} + {spec.end} special tokens"

    def fall_back(self, reason: str) -> None:
        """Count a call that the original serves; warn the first time. Raises instead with on_unsupported="error"."""
        self.tower.passed(self.spec.key)
        if self.tower.on_unsupported == "error":
            raise BackendUnavailable(
                f"layer {self.spec.name!r} cannot run this call sparse: {reason}. Change the call, or sparsify_ with "
                "on_unsupported='fallback' to let the original attention serve it."
            )
        if torch.compiler.is_compiling():
            if torch.compiler.is_exporting():
                raise BackendUnavailable(
                    f"torch.export would export layer {self.spec.name!r} dense: {reason}. Exported programs cannot fall back "
                    "and count; export the original model, or one whose attention takes no mask while tracing (DINOv3). torch.compile "
                    "before torch 2.13 says that it exports: there, compile with torch 2.13 or newer."
                )
            return
        if not self.fallbacks[reason]:
            warnings.warn(
                f"bsa_vision: {self.spec.name} runs its original, dense attention: {reason}",
                stacklevel=3,
            )
        self.fallbacks[reason] += 1

    def grid_of(self, image_grid: tuple[int, int]) -> tuple[int, int]:
        """The grid this layer's attention sees of an image: all of it, or one window."""
        return (self.spec.window, self.spec.window) if self.spec.window else image_grid

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None,
        dropout_p: float,
        grid: tuple[int, int] | None = None,
        rel_pos: RelPos | None = None,
    ) -> Tensor:
        """(B, H, N, D) in model order -> (B, H, N, D) with this layer's masks. grid None = that of the last image."""
        if self.masks.is_dynamic:
            self._check_prompts(q)
        if grid is None:
            grid = self.tower.current_grid(*plain_sizes(q.shape[2]))
        height, width = plain_sizes(*grid)
        grid = (height, width)
        if self.tower.observer is not None:
            factor = q.shape[-1] ** -0.5 if scale is None else scale
            self.tower.observer(Observation(self.spec, grid, q, k, v, factor, rel_pos, self.weight))
        options = dict(scale=scale, dropout_p=dropout_p, backend=self.tower.backend)
        return attend_masks(self.masks, q, k, v, grid=grid, rel_pos=rel_pos, **options)  # type: ignore[arg-type]

    def _check_prompts(self, q: Tensor) -> None:
        """Prompts belong to the moment of the call: refuse what would look for them later, when there may be others."""
        if is_recording():
            raise BackendUnavailable(
                f"layer {self.spec.name!r} follows prompts: an exported or traced program would keep the masks of one "
                "prompt; export the model with other patterns, or inside `with bsa.dense(model)`."
            )
        if torch.compiler.is_compiling():
            if torch.is_grad_enabled() and q.requires_grad:
                raise RuntimeError(
                    f"layer {self.spec.name!r} follows prompts: a compiled model would look them up again in backward, when there may be "
                    "others; train without torch.compile, or run under torch.no_grad()."
                )
            return
        entry = self.tower.context.entry
        if entry is not None:
            entry.check_batch(q.shape[0])
        if torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                f"layer {self.spec.name!r} follows prompts, and gradient checkpointing runs it again in backward, when there may be others: "
                "turn checkpointing off."
            )


def check_indices(attention: Sequence[tuple[str, nn.Module]]) -> None:
    """PlanError unless `<encoder>.<blocks>.<index>.attn` are all there: a plan that counts only some would mean others."""
    indices = [int(name.split(".")[-2]) for name, _ in attention]
    missing = sorted(set(range(max(indices) + 1)) - set(indices))
    if missing:
        blocks = attention[0][0].rpartition(".")[0].rpartition(".")[0]
        raise PlanError(
            f"the attention of blocks {', '.join(map(str, missing))} of {blocks!r} is of another class, or wrapped: all of an encoder is "
            "served, or nothing; unwrap it, or call bsa_vision.sparse_attention from it."
        )


def layer_of(module: nn.Module) -> Layer | None:
    return module.__dict__.get(ATTRIBUTE)


def swapped_in(model: nn.Module) -> dict[nn.Module, Layer]:
    """Return the swapped attention modules of a model and their layers, in order."""
    check_model(model)
    return {module: layer for module in model.modules() if (layer := layer_of(module)) is not None}


def layers_of(model: nn.Module) -> list[Layer]:
    """The swapped layers of a model, in order."""
    return list(swapped_in(model).values())


def watching(model: nn.Module) -> list[Tower]:
    """Return the towers that see what comes into a model, or into modules of it."""
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    return [tower for hook in hooks if isinstance(tower := getattr(hook, "__self__", None), Tower)]


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
