"""Image encoders of our own, to train and to read: ViT and Segment Anything, sparse where they are asked to be.

    encoder = create_encoder(depth=12, dim=768, heads=12, global_attn_indexes=(2, 5, 8, 11), patterns="local_window")
    features = encoder(pixels)                                   # (B, 256, h, w)

Parameters have segment_anything's names and shapes, so `encoder.load_checkpoint("sam_vit_b_01ec64.pth")` takes its weights. The blocks are in
`bsa_vision.models.blocks`. Architecture: ViT, arXiv 2010.11929; windows, global layers and decomposed relative position, arXiv 2203.16527 and
2304.02643.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bsa_vision.adapters import dense_plan, sparsify_, uniform_plan
from bsa_vision.attention.carried_masks import plain_sizes
from bsa_vision.attention.rel_pos import resize_table
from bsa_vision.errors import PlanError
from bsa_vision.masks.layout import whole_number, whole_pair
from bsa_vision.models.blocks import (
    Block,
    Grid,
    PatchEmbed,
    Rotation,
    neck,
    resize_positions,
    rotary_angles,
)
from bsa_vision.plans.plan import PatternLike, SparsityPlan

# The three published sizes of Segment Anything: `create_encoder(**SAM["vit_b"])`.
SAM: dict[str, dict[str, Any]] = {
    "vit_b": {"depth": 12, "dim": 768, "heads": 12, "global_attn_indexes": (2, 5, 8, 11)},
    "vit_l": {"depth": 24, "dim": 1024, "heads": 16, "global_attn_indexes": (5, 11, 17, 23)},
    "vit_h": {"depth": 32, "dim": 1280, "heads": 16, "global_attn_indexes": (7, 15, 23, 31)},
}


def create_encoder(
    depth: int,
    dim: int,
    heads: int,
    global_attn_indexes: Iterable[int] | None = None,
    window_size: int = 14,
    *,
    rel_pos: bool = True,
    rope: bool | tuple[float, float] = False,
    patterns: SparsityPlan | str | PatternLike | Mapping[int, Any] | None = None,
    image_size: int | Grid = 1024,
    patch_size: int = 16,
    in_channels: int = 3,
    out_channels: int | None = 256,
    mlp_ratio: float = 4.0,
    num_special: int = 0,
    gradient_checkpointing: bool = False,
) -> ImageEncoder:
    """An image encoder with fresh weights.

    global_attn_indexes  layers that attend to the whole image, the others within windows; None = all of them
    window_size          patches per side of those windows; the last ones are padded, and padding takes part, as in SAM
    rel_pos              decomposed relative position in every layer
    rope                 rotary positions of the patches in every layer instead of `pos_embed`, in coordinates from -1 to 1, so that
                         resolution can grow: True = DINOv3's, or the (shortest, longest) period in these units; not with windows or rel_pos
    patterns             what heads look at, None = all dense: a pattern for every head of every global layer (a name of `masks.PATTERNS`, a
                         `masks.Pattern`, a function layout -> (R, C) bool), {layer: pattern or one pattern per head}, or a SparsityPlan.
                         The encoder then has sparse heads as `sparsify_` gives them: `describe`, `dense` and `restore_` work on it
    image_size           pixels, an int or (height, width): the size of `pos_embed`; others are interpolated
    out_channels         of SAM's neck; None = no neck
    num_special          learned tokens before the patches (CLS, registers); not with windows or relative position
    gradient_checkpointing   recompute each block in backward: less memory, more time; `encoder.gradient_checkpointing` sets it later

    Raises ValueError for sizes that do not fit together, PlanError for patterns that do not fit the encoder.
    """
    depth, dim, heads = (
        whole_number("depth", depth, 1),
        whole_number("dim", dim, 1),
        whole_number("heads", heads, 1),
    )
    patch_size, in_channels = (
        whole_number("patch_size", patch_size, 1),
        whole_number("in_channels", in_channels, 1),
    )
    window_size, num_special = (
        whole_number("window_size", window_size, 0),
        whole_number("num_special", num_special, 0),
    )
    if out_channels is not None:
        out_channels = whole_number("out_channels", out_channels, 1)
    if int(dim * mlp_ratio) < 1:
        raise ValueError(
            f"mlp_ratio={mlp_ratio} with dim={dim}: the MLP needs at least 1 channel; give e.g. 4."
        )
    pixels = image_size if isinstance(image_size, Sequence) else (image_size, image_size)
    encoder = ImageEncoder(
        depth,
        dim,
        heads,
        _indexes(global_attn_indexes, depth),
        window_size,
        rel_pos=rel_pos,
        rope=_periods(rope),
        image_size=whole_pair("image_size", pixels, 1),
        patch_size=patch_size,
        in_channels=in_channels,
        out_channels=out_channels,
        mlp_ratio=mlp_ratio,
        num_special=num_special,
        gradient_checkpointing=gradient_checkpointing,
    )
    return encoder if patterns is None else sparsify_(encoder, _plan(encoder, patterns, heads))


def _plan(encoder: ImageEncoder, patterns: Any, heads: int) -> SparsityPlan:
    if isinstance(patterns, SparsityPlan):
        return patterns
    if not isinstance(patterns, Mapping):
        return uniform_plan(encoder, patterns)
    plan = dense_plan(encoder)
    for layer, chosen in patterns.items():
        per_head = chosen if isinstance(chosen, (list, tuple)) else [chosen] * heads
        if len(per_head) != heads:
            raise PlanError(
                f"patterns[{layer}] has {len(per_head)} entries, the encoder {heads} heads: give one pattern per head, or one for all."
            )
        for head, pattern in enumerate(per_head):
            plan = plan.replace(layers=layer, heads=head, pattern=pattern)
    return plan


class ImageEncoder(nn.Module):
    """Patches, positions, blocks, neck. Made by `create_encoder`."""

    def __init__(
        self,
        depth: int,
        dim: int,
        heads: int,
        global_attn_indexes: Sequence[int],
        window_size: int,
        *,
        rel_pos: bool,
        rope: tuple[float, float] | None,
        image_size: Grid,
        patch_size: int,
        in_channels: int,
        out_channels: int | None,
        mlp_ratio: float,
        num_special: int,
        gradient_checkpointing: bool,
    ) -> None:
        super().__init__()
        _check_sizes(depth, dim, heads, global_attn_indexes, window_size, image_size, patch_size)
        windowed = len(set(global_attn_indexes)) < depth
        if num_special and (rel_pos or windowed):
            raise ValueError(
                f"num_special={num_special} with rel_pos={rel_pos} and {'some' if windowed else 'no'} windowed layers: special tokens have "
                "no place in windows and relative positions; set rel_pos=False and leave global_attn_indexes out, or num_special=0."
            )
        if rope and (rel_pos or windowed or dim // heads % 4):
            raise ValueError(
                f"rope={rope} with rel_pos={rel_pos}, {'some' if windowed else 'no'} windowed layers and a head dim of {dim // heads}: rotary "
                "positions are for global layers without relative position whose head dim is a multiple of 4; set rel_pos=False, leave "
                "global_attn_indexes out, and choose dim and heads to fit, or rope=False."
            )
        self.rope = rope
        self.img_size, self.patch_size, self.num_special = (
            tuple(image_size),
            patch_size,
            num_special,
        )
        self.gradient_checkpointing = gradient_checkpointing
        self.family = "sam" if rel_pos else "vit"  # what plans call it
        grid = (image_size[0] // patch_size, image_size[1] // patch_size)
        self.patch_embed = PatchEmbed(in_channels, dim, patch_size)
        self.pos_embed = None if rope else nn.Parameter(torch.zeros(1, *grid, dim))
        self.special_tokens = (
            nn.Parameter(torch.zeros(1, num_special, dim)) if num_special else None
        )
        self.blocks = nn.ModuleList(
            Block(
                dim,
                heads,
                mlp_ratio,
                0 if index in global_attn_indexes else window_size,
                grid,
                rel_pos,
            )
            for index in range(depth)
        )
        self.neck = None if out_channels is None else neck(dim, out_channels)
        self.apply(_initialise)
        for parameter in (self.pos_embed, self.special_tokens):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, pixels: Tensor, special: Tensor | None = None) -> Tensor:
        """(B, 3, H, W) -> (B, out_channels, h, w); without a neck (B, num_special + h * w, dim), special tokens first.

        special  (B, num_special, dim), added to the learned special tokens: what differs from image to image, such as an encoded click

        H and W may be any multiples of the patch size: position embeddings and tables are interpolated where they differ.
        """
        if pixels.dim() != 4 or any(
            side < 1 or side % self.patch_size for side in pixels.shape[-2:]
        ):
            raise ValueError(
                f"pixels have shape {tuple(pixels.shape)}: expected (B, channels, H, W) with H and W whole numbers of "
                f"{self.patch_size} pixel patches; resize or pad the images."
            )
        x = self.patch_embed(pixels)  # (B, h, w, C)
        height, width = plain_sizes(x.shape[1], x.shape[2])
        grid = (height, width)
        if self.pos_embed is not None:
            x = x + resize_positions(self.pos_embed, grid)
        x = self._with_special(x.flatten(1, 2), special)  # (B, N, C)
        rotation = self._rotation(grid, x.device)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, grid, rotation, use_reentrant=False)
            else:
                x = block(x, grid, rotation)
        if self.neck is None:
            return x
        return self.neck(x[:, self.num_special :].transpose(1, 2).unflatten(2, grid))

    def _with_special(self, patches: Tensor, special: Tensor | None) -> Tensor:
        """(B, h * w, C) -> (B, num_special + h * w, C)."""
        wanted = (len(patches), self.num_special, patches.shape[-1])
        if special is not None and (self.special_tokens is None or tuple(special.shape) != wanted):
            raise ValueError(
                f"special has shape {tuple(special.shape)}: expected {wanted}, (images, num_special, dim), of an encoder with num_special of "
                "at least 1; create it with as many special tokens as you pass."
            )
        if self.special_tokens is None:
            return patches
        tokens = self.special_tokens.expand(len(patches), -1, -1)
        return torch.cat([tokens if special is None else tokens + special, patches], dim=1)

    def _rotation(self, grid: Grid, device: torch.device) -> Rotation | None:
        """Made once per forward and shared by the layers; too cheap to keep."""
        if self.rope is None:
            return None
        attention: Any = self.blocks[0].attn
        return rotary_angles(
            grid,
            attention.qkv.in_features // attention.num_heads,
            self.rope,
            self.num_special,
            device,
        )

    def load_checkpoint(
        self, source: str | Path | Mapping[str, Tensor], resize: bool = False
    ) -> ImageEncoder:
        """Take the encoder's weights from a checkpoint of segment_anything (or of this encoder); returns the encoder.

        source  a file (.pth read with weights_only=True, .safetensors), or its state dict. Of a whole SAM, the `image_encoder.` part is taken
        resize  interpolate what depends on the image size, where the checkpoint is for another, and warn of it: the
                position embedding bicubically, antialiased, as timm's `resample_abs_pos_embed` does; relative tables
                linearly, as segment_anything's `get_rel_pos` does

        Raises ValueError unless every parameter is there, in its shape, and no other; the encoder is then untouched. Rotary periods are not
        in checkpoints: create the encoder with those it was trained with.
        """
        state = dict(source) if isinstance(source, Mapping) else _read(Path(source))
        prefix = "image_encoder."
        if any(str(key).startswith(prefix) for key in state):
            state = {
                key.removeprefix(prefix): x
                for key, x in state.items()
                if str(key).startswith(prefix)
            }
        own = self.state_dict()
        strange = [str(key) for key, value in state.items() if not _is_plain(value)]
        if strange:
            raise ValueError(
                f"this checkpoint holds {_some(strange)}: every value must be a dense tensor of floating-point numbers, with its data; "
                "convert them, or pass the state dict of the model."
            )
        if resize:
            state = _resized(state, own)
        wrong = {
            "missing": [key for key in own if key not in state],
            "unexpected": [key for key in state if key not in own],
            "of another shape": [
                f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}"
                for key in own
                if key in state and state[key].shape != own[key].shape
            ],
        }
        if any(wrong.values()):
            said = "; ".join(
                f"{len(keys)} {what}: {_some(keys)}" for what, keys in wrong.items() if keys
            )
            raise ValueError(
                f"this checkpoint does not fit the encoder ({said}): every parameter must be there in its shape, and no other; create the "
                "encoder with the sizes the checkpoint was trained with (`SAM` has the published ones; other image sizes work at call "
                "time), or, where only the image size differs, pass resize=True."
            )
        self.load_state_dict(state)
        return self


def _check_sizes(
    depth: int,
    dim: int,
    heads: int,
    global_attn_indexes: Sequence[int],
    window_size: int,
    image_size: Grid,
    patch_size: int,
) -> None:
    if dim % heads:
        fits = max(count for count in range(1, heads + 1) if dim % count == 0)
        raise ValueError(
            f"dim={dim} with heads={heads}: dim must be a multiple of heads; choose e.g. heads={fits}."
        )
    if len(set(global_attn_indexes)) < depth and window_size < 1:
        raise ValueError(
            f"window_size={window_size} with windowed layers: expected at least 1 patch; give one, or make all layers global."
        )
    if any(side % patch_size for side in image_size):
        raise ValueError(
            f"image_size={tuple(image_size)}: both sides must be whole numbers of {patch_size} pixel patches; choose others."
        )


def _periods(rope: bool | tuple[float, float]) -> tuple[float, float] | None:
    if isinstance(rope, bool):
        return (1.0, 100.0) if rope else None
    numbers = (
        isinstance(rope, Sequence)
        and len(rope) == 2
        and all(isinstance(x, (int, float)) for x in rope)
    )
    if not numbers or not 0 < rope[0] < rope[1]:
        raise ValueError(
            f"rope={rope!r}: expected True, False or (shortest, longest) period, above 0 and growing; the image is 2 wide, give e.g. (1, 100)."
        )
    return float(rope[0]), float(rope[1])


def _indexes(given: Iterable[int] | None, depth: int) -> tuple[int, ...]:
    if given is None:
        return tuple(range(depth))
    if not isinstance(given, Iterable) or isinstance(given, str):
        raise ValueError(
            f"global_attn_indexes={given!r}: expected layer indices; give a list, [{given}] for one."
        )
    indexes = tuple(whole_number("global_attn_indexes", index, 0) for index in given)
    if any(index >= depth for index in indexes):
        raise ValueError(
            f"global_attn_indexes={indexes}: the encoder has layers 0 to {depth - 1}; choose among them."
        )
    return indexes


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def _resized(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `state` with position embedding and relative tables interpolated to the sizes they have in `own`."""
    found, said = dict(state), []
    for key, wanted in own.items():
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
        said.append(f"{key} {tuple(given.shape)} to {tuple(wanted.shape)}")
    if said:
        warnings.warn(f"bsa_vision: resized for another image size: {_some(said)}", stacklevel=3)
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
            f"{path} holds {type(state).__name__}, not a state dict: expected {{name: tensor}}; pass the state dict itself."
        )
    return dict(state)


def _some(keys: Sequence[str], most: int = 3) -> str:
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more


__all__ = ["SAM", "ImageEncoder", "create_encoder"]
