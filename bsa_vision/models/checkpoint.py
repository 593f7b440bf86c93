"""Read checkpoints of image encoders and resize them to another image size."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bsa_vision.attention.rel_pos import resize_table
from bsa_vision.models.blocks import resize_positions


def fitting_state(
    source: str | Path | Mapping[str, Tensor], expected: Mapping[str, Tensor], resize: bool
) -> dict[str, Tensor]:
    """Return the state dict in `source` with the names and shapes of `expected`.

    See `ImageEncoder.load_checkpoint`. Raises ValueError unless all names and shapes agree.
    """
    state = dict(source) if isinstance(source, Mapping) else _read(Path(source))
    prefix = "image_encoder."
    if any(str(key).startswith(prefix) for key in state):
        state = {
            key.removeprefix(prefix): x for key, x in state.items() if str(key).startswith(prefix)
        }
    invalid = [str(key) for key, value in state.items() if not _is_plain(value)]
    if invalid:
        raise ValueError(
            f"this checkpoint holds {_shorten(invalid)}: every value must be a dense tensor of "
            "floating-point numbers, with its data; convert them, or pass the state dict of the "
            "model."
        )
    if resize:
        state = _resized(state, expected)
    wrong = {
        "missing": [key for key in expected if key not in state],
        "unexpected": [key for key in state if key not in expected],
        "of another shape": [
            f"{key} {tuple(state[key].shape)} for {tuple(x.shape)}"
            for key, x in expected.items()
            if key in state and state[key].shape != x.shape
        ],
    }
    if any(wrong.values()):
        text = "; ".join(
            f"{len(keys)} {kind}: {_shorten(keys)}" for kind, keys in wrong.items() if keys
        )
        raise ValueError(
            f"this checkpoint does not fit the encoder ({text}): names and shapes of all "
            "parameters must agree; create the encoder with the sizes of the checkpoint (`SAM` has "
            "the published ones; the image size may differ at call time), or, if only the image "
            "size differs, pass resize=True."
        )
    return state


def _resized(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Interpolate position embedding and relative tables to their sizes in `expected`."""
    found, changes = dict(state), []
    for key, wanted in expected.items():
        given = state.get(key)
        kind = key.rpartition(".")[2]
        if given is None or given.dim() != wanted.dim() or given.shape[-1] != wanted.shape[-1]:
            continue
        if given.shape == wanted.shape or kind not in ("pos_embed", "rel_pos_h", "rel_pos_w"):
            continue
        if kind == "pos_embed":
            found[key] = resize_positions(given, (wanted.shape[1], wanted.shape[2]))
        else:
            found[key] = resize_table(given, (len(wanted) + 1) // 2)
        changes.append(f"{key} {tuple(given.shape)} to {tuple(wanted.shape)}")
    if changes:
        text = f"bsa_vision: resized for another image size: {_shorten(changes)}"
        warnings.warn(text, stacklevel=4)
    return found


def _is_plain(value: Any) -> bool:
    floats = isinstance(value, Tensor) and value.is_floating_point()
    return floats and value.layout == torch.strided and not value.is_meta


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, Mapping):
        raise ValueError(
            f"{path} holds {type(state).__name__}, not a state dict: expected {{name: tensor}}; "
            "pass the state dict itself."
        )
    return dict(state)


def _shorten(keys: Sequence[str], limit: int = 3) -> str:
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more
