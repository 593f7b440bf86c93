"""One swapped attention module: its masks, and its calls that run the original attention."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bsa_vision.adapters.swap.adapter import Adapter
from bsa_vision.adapters.swap.encoder_state import (
    EncoderState,
    Observation,
    check_model,
    watching,
)
from bsa_vision.attention.carried_masks import is_recording, plain_sizes
from bsa_vision.attention.functional import attend_masks
from bsa_vision.attention.rel_pos import RelPos
from bsa_vision.errors import BackendUnavailable, PlanError
from bsa_vision.plans.layer_masks import LayerMasks
from bsa_vision.plans.model_spec import LayerSpec

# A plain attribute of the attention module, not a parameter, buffer or state_dict key.
ATTRIBUTE = "_bsa_layer"


class SparseLayer:
    """One swapped attention module: its masks, and its calls that ran the original, by reason."""

    def __init__(
        self, encoder: EncoderState, spec: LayerSpec, adapter: Adapter, original: Any
    ) -> None:
        self.encoder, self.spec = encoder, spec
        self.adapter = adapter
        self.masks = LayerMasks(encoder.plan, encoder.spec, spec, encoder.context)
        self.original = original  # the original class or config of the module
        self.swapped: Any = None  # the mixin or config that replaces it
        # A layer without sparse heads runs the original, unless a backend was named or swapped
        # layers are faster (`exact`).
        self.untouched = self.masks.all_dense and encoder.backend == "auto" and not adapter.exact
        self.fallbacks: Counter[str] = Counter()
        self.covered: dict[str, Any] = {}  # attributes that properties of the mixin hide
        self.weight: Tensor | None = None  # of the output projection, while the layer is observed

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.encoder.layers.add(self)
        self.adapter.prepare()  # this process may never have called sparsify_

    def attach(self, module: nn.Module) -> None:
        """Mark `module` as swapped, or about to be."""
        self.encoder.layers.add(self)
        setattr(module, ATTRIBUTE, self)

    def detach(self, module: nn.Module) -> None:
        """Mark `module` as not swapped."""
        self.encoder.layers.discard(self)
        delattr(module, ATTRIBUTE)

    def runs_original(self) -> bool:
        """Return whether the layer runs its original attention, whatever the call."""
        return (self.untouched and self.encoder.observer is None) or bool(self.encoder.dense)

    def wrong_grid(self, tokens: int, keys: int | None = None) -> str | None:
        """Return why the number of tokens or keys does not fit the last input; None if it does."""
        if self.spec.window:
            return None  # windowed layers are dense for any image
        (tokens,) = plain_sizes(tokens)
        unknown = self.encoder.claim(self.spec, tokens)
        if unknown is not None:
            return unknown
        height, width = self.encoder.current_grid(tokens)
        spec = self.encoder.spec
        if (height, width) == (0, 0):
            return "the grid of this input is unknown"
        if self.spec.frames and keys is not None and keys < height * width:
            return f"{keys} remembered tokens are fewer than one frame of {height} x {width}"
        if tokens == spec.num_prefix_tokens + height * width + spec.num_suffix_tokens:
            return None
        return (
            f"{tokens} tokens do not fit the grid {height} x {width} with "
            f"{spec.num_prefix_tokens} prefix and {spec.num_suffix_tokens} suffix tokens"
        )

    def fall_back(self, reason: str) -> None:
        """Count a call that runs the original, and warn the first time.

        Raises BackendUnavailable instead with on_unsupported="error".
        """
        self.encoder.passed(self.spec.key)
        if self.encoder.on_unsupported == "error":
            raise BackendUnavailable(
                f"layer {self.spec.name!r} cannot run this call sparse: {reason}. Change the call, "
                "or call sparsify_ with on_unsupported='fallback' to run the original attention."
            )
        if torch.compiler.is_compiling():
            if torch.compiler.is_exporting():
                raise BackendUnavailable(
                    f"torch.export would export layer {self.spec.name!r} dense: {reason}. Exported "
                    "programs cannot fall back: export the original model, or one that passes no "
                    "attention mask while tracing (DINOv3). torch.compile before torch 2.13 counts "
                    "as an export: compile with torch 2.13 or newer."
                )
            return
        if not self.fallbacks[reason]:
            warnings.warn(
                f"bsa_vision: {self.spec.name} runs its original, dense attention: {reason}",
                stacklevel=3,
            )
        self.fallbacks[reason] += 1

    def grid_of(self, image_grid: tuple[int, int]) -> tuple[int, int]:
        """Return the grid that this layer attends to: the whole image, or one window."""
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
        """Attend with this layer's masks: (B, H, N, D) -> (B, H, N, D), in model order.

        grid  None = that of the last input
        """
        if self.masks.is_dynamic:
            self._check_prompts(q)
        if grid is None:
            grid = self.encoder.current_grid(*plain_sizes(q.shape[2]))
        height, width = plain_sizes(*grid)
        grid = (height, width)
        if self.encoder.observer is not None:
            factor = q.shape[-1] ** -0.5 if scale is None else scale
            self.encoder.observer(
                Observation(self.spec, grid, q, k, v, factor, rel_pos, self.weight)
            )
        options = dict(scale=scale, dropout_p=dropout_p, backend=self.encoder.backend)
        return attend_masks(self.masks, q, k, v, grid=grid, rel_pos=rel_pos, **options)  # type: ignore[arg-type]

    def _check_prompts(self, q: Tensor) -> None:
        """Raise if a later call, with other prompts, would read them: exports, recomputation."""
        if is_recording():
            raise BackendUnavailable(
                f"layer {self.spec.name!r} follows prompts: an exported or traced program would "
                "keep the masks of one prompt; export the model with other patterns, or inside "
                "`with bsa.dense(model)`."
            )
        if torch.compiler.is_compiling():
            if torch.is_grad_enabled() and q.requires_grad:
                raise RuntimeError(
                    f"layer {self.spec.name!r} follows prompts: a compiled model would look them "
                    "up again in backward, when they may have changed; train without "
                    "torch.compile, or run under torch.no_grad()."
                )
            return
        entry = self.encoder.context.entry
        if entry is not None:
            entry.check_batch(q.shape[0])
        if torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                f"layer {self.spec.name!r} follows prompts, and gradient checkpointing runs it "
                "again in backward, when they may have changed: turn checkpointing off."
            )


def check_indices(attention: Sequence[tuple[str, nn.Module]]) -> None:
    """Raise PlanError unless `attention` has every index of `<encoder>.<blocks>.<index>.attn`.

    Plans number the layers, so a missing one would shift the others.
    """
    indices = [int(name.split(".")[-2]) for name, _ in attention]
    missing = sorted(set(range(max(indices) + 1)) - set(indices))
    if missing:
        blocks = attention[0][0].rpartition(".")[0].rpartition(".")[0]
        raise PlanError(
            f"the attention of blocks {', '.join(map(str, missing))} of {blocks!r} has another "
            "class, or is wrapped: all blocks of an encoder must be supported; unwrap it, or call "
            "bsa_vision.sparse_attention from it."
        )


def layer_of(module: nn.Module) -> SparseLayer | None:
    """Return the `SparseLayer` of a swapped module, None for other modules."""
    return module.__dict__.get(ATTRIBUTE)


def swapped_in(model: nn.Module) -> dict[nn.Module, SparseLayer]:
    """Return the swapped attention modules of a model and their layers, in order."""
    check_model(model)
    return {module: layer for module in model.modules() if (layer := layer_of(module)) is not None}


def layers_of(model: nn.Module) -> list[SparseLayer]:
    """Return the swapped layers of a model, in order."""
    return list(swapped_in(model).values())


def check_whole(state: EncoderState, model: nn.Module, layers: Iterable[SparseLayer]) -> None:
    """Raise ValueError if `model` is only a part of the encoder, with only `layers` of it.

    Blocks that were removed from the encoder after sparsify_ may be missing.
    """
    present = set(layers)
    elsewhere = [layer for layer in state.layers if layer not in present]
    root, embeddings = (home() for home in state.homes) if state.homes else (None, None)
    modules = set(model.modules())
    if not elsewhere or root in modules:
        return
    missing = root is not None and not set(elsewhere).isdisjoint(layers_of(root))
    is_encoder = present and (state in watching(model) or embeddings in modules)
    is_deleted = state.homes and embeddings is None  # only parts of the encoder are left
    if missing or not (is_encoder or is_deleted):
        raise ValueError(
            f"{type(model).__name__} holds {len(present)} of {len(present) + len(elsewhere)} "
            "swapped layers: an encoder is restored as a whole; pass the model that sparsify_ was "
            "given."
        )
