"""Image encoders of our own, to train and to read: the blocks of ViT and of Segment Anything, sparse where they are asked to be.

    encoder = create_encoder(depth=12, dim=768, heads=12, global_attn_indexes=(2, 5, 8, 11), patterns="local_window")
    features = encoder(pixels)                                   # (B, 256, h, w)

Parameters have segment_anything's names and shapes, so `encoder.load_checkpoint("sam_vit_b_01ec64.pth")` takes its weights. Attention is
exact without N x N: relative position stays factored (`bsa_vision.rel_pos`). Architecture: ViT, arXiv 2010.11929; windows, global layers and
decomposed relative position, arXiv 2203.16527 and 2304.02643.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bsa_vision.adapters import dense_plan, sparsify_, uniform_plan
from bsa_vision.attention import attend_masks
from bsa_vision.errors import PlanError
from bsa_vision.head_masks import DENSE, Handled, HeadMasks
from bsa_vision.plan import PatternLike, SparsityPlan
from bsa_vision.rel_pos import RelPos, decompose, resize_table
from masks import TokenLayout
from masks.layout import whole_number, whole_pair

Grid = tuple[int, int]
LayerNorm = partial(nn.LayerNorm, eps=1e-6)

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
    patterns             what heads look at, None = all dense: a pattern for every head of every global layer (a name of `masks.PATTERNS`, a
                         `masks.Pattern`, a function layout -> (R, C) bool), {layer: pattern or one pattern per head}, or a SparsityPlan.
                         The encoder then has sparse heads as `sparsify_` gives them: `describe`, `dense` and `restore_` work on it
    image_size           pixels, an int or (height, width): the size of `pos_embed`; others are interpolated
    out_channels         of SAM's neck; None = no neck
    num_special          learned tokens before the patches (CLS, registers); not with windows or relative position
    gradient_checkpointing   recompute each block in backward: less memory, more time; `encoder.gradient_checkpointing` sets it later

    Raises ValueError for sizes that do not fit together, PlanError for patterns that do not fit the encoder.
    """
    least = dict(depth=1, dim=1, heads=1, patch_size=1, in_channels=1, window_size=0, num_special=0)
    given = dict(depth=depth, dim=dim, heads=heads, patch_size=patch_size, in_channels=in_channels)
    given |= dict(window_size=window_size, num_special=num_special)
    sizes = {name: whole_number(name, value, least[name]) for name, value in given.items()}
    depth, dim, heads, window_size = (sizes[name] for name in ("depth", "dim", "heads", "window_size"))
    if out_channels is not None:
        out_channels = whole_number("out_channels", out_channels, 1)
    pixels = image_size if isinstance(image_size, Sequence) else (image_size, image_size)
    encoder = ImageEncoder(
        depth,
        dim,
        heads,
        _indexes(global_attn_indexes, depth),
        window_size,
        rel_pos=rel_pos,
        image_size=whole_pair("image_size", pixels, 1),
        patch_size=patch_size,
        in_channels=in_channels,
        out_channels=out_channels,
        mlp_ratio=mlp_ratio,
        num_special=num_special,
        gradient_checkpointing=gradient_checkpointing,
    )
    if patterns is None:
        return encoder
    if isinstance(patterns, SparsityPlan):
        plan = patterns
    elif isinstance(patterns, Mapping):
        plan = dense_plan(encoder)
        for layer, chosen in patterns.items():
            per_head = chosen if isinstance(chosen, (list, tuple)) else [chosen] * heads
            if len(per_head) != heads:
                raise PlanError(
                    f"patterns[{layer}] has {len(per_head)} entries, the encoder {heads} heads: give one pattern per head, or one for all."
                )
            for head, pattern in enumerate(per_head):
                plan = plan.replace(layers=layer, heads=head, pattern=pattern)
    else:
        plan = uniform_plan(encoder, patterns)
    return sparsify_(encoder, plan)


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
        self.img_size, self.patch_size, self.num_special = tuple(image_size), patch_size, num_special
        self.gradient_checkpointing = gradient_checkpointing
        self.family = "sam" if rel_pos else "vit"  # what plans call it
        grid = (image_size[0] // patch_size, image_size[1] // patch_size)
        self.patch_embed = PatchEmbed(in_channels, dim, patch_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, *grid, dim))
        self.special_tokens = nn.Parameter(torch.zeros(1, num_special, dim)) if num_special else None
        self.blocks = nn.ModuleList(
            Block(dim, heads, mlp_ratio, 0 if index in global_attn_indexes else window_size, grid, rel_pos)
            for index in range(depth)
        )
        self.neck = None if out_channels is None else neck(dim, out_channels)
        self.apply(_initialise)
        for parameter in (self.pos_embed, self.special_tokens):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, out_channels, h, w); without a neck (B, num_special + h * w, dim), special tokens first.

        H and W may be any multiples of the patch size: position embeddings and tables are interpolated where they differ.
        """
        if pixels.dim() != 4 or any(side < 1 or side % self.patch_size for side in pixels.shape[-2:]):
            raise ValueError(
                f"pixels have shape {tuple(pixels.shape)}: expected (B, channels, H, W) with H and W whole numbers of "
                f"{self.patch_size} pixel patches; resize or pad the images."
            )
        x = self.patch_embed(pixels)  # (B, h, w, C)
        grid = (x.shape[1], x.shape[2])
        x = (x + resize_positions(self.pos_embed, grid)).flatten(1, 2)  # (B, N, C)
        if self.special_tokens is not None:
            x = torch.cat([self.special_tokens.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, grid, use_reentrant=False)
            else:
                x = block(x, grid)
        if self.neck is None:
            return x
        return self.neck(x[:, self.num_special :].transpose(1, 2).unflatten(2, grid))

    def load_checkpoint(self, source: str | Path | Mapping[str, Tensor]) -> ImageEncoder:
        """Take the encoder's weights from a checkpoint of segment_anything (or of this encoder); returns the encoder.

        source  a file (.pth read with weights_only=True, .safetensors), or its state dict. Of a whole SAM, the `image_encoder.` part is taken

        Raises ValueError unless every parameter is there, in its shape, and no other; the encoder is then untouched.
        """
        state = dict(source) if isinstance(source, Mapping) else _read(Path(source))
        prefix = "image_encoder."
        if any(str(key).startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): x for key, x in state.items() if str(key).startswith(prefix)}
        own = self.state_dict()
        strange = [str(key) for key, value in state.items() if not _is_plain(value)]
        if strange:
            raise ValueError(
                f"this checkpoint holds {_some(strange)}: every value must be a dense tensor of floating-point numbers, with its data; "
                "convert them, or pass the state dict of the model."
            )
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
            said = "; ".join(f"{len(keys)} {what}: {_some(keys)}" for what, keys in wrong.items() if keys)
            raise ValueError(
                f"this checkpoint does not fit the encoder ({said}): every parameter must be there in its shape, and no other; create the "
                "encoder with the sizes the checkpoint was trained with (`SAM` has the published ones; other image sizes work at call time)."
            )
        self.load_state_dict(state)
        return self


class PatchEmbed(nn.Module):
    """Pixels to patches: (B, channels, H, W) -> (B, h, w, C)."""

    def __init__(self, in_channels: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.proj(pixels).permute(0, 2, 3, 1)


class Block(nn.Module):
    """One transformer block: attention, within windows or across the image, and an MLP, each with a norm before and a shortcut."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, window_size: int, grid: Grid, rel_pos: bool) -> None:
        super().__init__()
        self.window_size = window_size
        self.norm1 = LayerNorm(dim)
        self.attn = Attention(dim, heads, (window_size, window_size) if window_size else grid, rel_pos)
        self.norm2 = LayerNorm(dim)
        self.mlp = MLP(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """(B, N, C) -> (B, N, C); `grid` is that of the patches among the N tokens."""
        x = x + self._attend(self.norm1(x), grid)
        return x + self.mlp(self.norm2(x))

    def _attend(self, x: Tensor, grid: Grid) -> Tensor:
        size = self.window_size
        if not size:
            return self.attn(x, grid)
        down, right = -grid[0] % size, -grid[1] % size
        x = F.pad(
            x.unflatten(1, grid), (0, 0, 0, right, 0, down)
        )  # zeros after the norm, as in SAM: keys that take part
        across = x.shape[2] // size
        windows = rearrange(x, "b (i h) (j w) c -> (b i j) (h w) c", h=size, w=size)
        windows = self.attn(windows, (size, size))
        down_and_across = dict(i=x.shape[1] // size, j=across, h=size, w=size)
        x = rearrange(windows, "(b i j) (h w) c -> b (i h) (j w) c", **down_and_across)
        return x[:, : grid[0], : grid[1]].flatten(1, 2)


class Attention(nn.Module):
    """Multi-head attention, dense and exact; `sparsify_` gives its heads block masks through `attend`."""

    def __init__(self, dim: int, heads: int, grid: Grid, rel_pos: bool) -> None:
        super().__init__()
        self.num_heads, head_dim = heads, dim // heads
        self.scale = head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.use_rel_pos = rel_pos
        if rel_pos:
            self.rel_pos_h = nn.Parameter(torch.zeros(2 * grid[0] - 1, head_dim))
            self.rel_pos_w = nn.Parameter(torch.zeros(2 * grid[1] - 1, head_dim))
        self._dense: Handled = DenseHeads(heads) if rel_pos else HeadMasks(None, [DENSE] * heads)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        rel_pos = None
        if self.use_rel_pos:
            tables = (resize_table(self.rel_pos_h, grid[0]), resize_table(self.rel_pos_w, grid[1]))
            rel_pos = RelPos(*(term.to(q.dtype) for term in decompose(q, *tables, grid)))
        out = self.attend(q, k, v, rel_pos, grid)  # (B, H, N, D)
        return self.proj(rearrange(out, "b h n d -> b n (h d)"))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rel_pos: RelPos | None, grid: Grid) -> Tensor:
        """(B, H, N, D) -> (B, H, N, D), every head dense."""
        return attend_masks(self._dense, q, k, v, grid=grid, rel_pos=rel_pos)


class DenseHeads(Handled):
    """The masks of a layer whose heads are all dense, for whatever grid; relative position asks them where keys are."""

    def __init__(self, heads: int) -> None:
        self.heads = heads
        self._new_handle()

    def masks_for(self, grid: Grid) -> HeadMasks:
        return _dense_heads(self.heads, tuple(grid))


@lru_cache(maxsize=64)
def _dense_heads(heads: int, grid: Grid) -> HeadMasks:
    return HeadMasks(None, [DENSE] * heads, layout=TokenLayout(grid))


class MLP(nn.Module):
    """Two linear layers with a GELU between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.lin1, self.lin2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(F.gelu(self.lin1(x)))


class LayerNorm2d(nn.Module):
    """Layer norm over the channels of (B, C, h, w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, eps=1e-6)
        return x.permute(0, 3, 1, 2)


def neck(dim: int, channels: int) -> nn.Sequential:
    """SAM's way out: (B, C, h, w) -> (B, channels, h, w)."""
    return nn.Sequential(
        nn.Conv2d(dim, channels, 1, bias=False),
        LayerNorm2d(channels),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        LayerNorm2d(channels),
    )


def resize_positions(positions: Tensor, grid: Grid) -> Tensor:
    """(1, h, w, C) -> (1, *grid, C), bicubic and antialiased as timm and DeepSeek-OCR do it; itself where it fits."""
    if tuple(positions.shape[1:3]) == grid:
        return positions
    resized = F.interpolate(positions.permute(0, 3, 1, 2).float(), grid, mode="bicubic", antialias=True)
    return resized.permute(0, 2, 3, 1).to(positions.dtype)


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
        raise ValueError(f"dim={dim} with heads={heads}: dim must be a multiple of heads; choose e.g. heads={fits}.")
    if len(set(global_attn_indexes)) < depth and window_size < 1:
        raise ValueError(
            f"window_size={window_size} with windowed layers: expected at least 1 patch; give one, or make all layers global."
        )
    if any(side % patch_size for side in image_size):
        raise ValueError(
            f"image_size={tuple(image_size)}: both sides must be whole numbers of {patch_size} pixel patches; choose others."
        )


def _indexes(given: Iterable[int] | None, depth: int) -> tuple[int, ...]:
    if given is None:
        return tuple(range(depth))
    if not isinstance(given, Iterable) or isinstance(given, str):
        raise ValueError(f"global_attn_indexes={given!r}: expected layer indices; give a list, [{given}] for one.")
    indexes = tuple(whole_number("global_attn_indexes", index, 0) for index in given)
    if any(index >= depth for index in indexes):
        raise ValueError(f"global_attn_indexes={indexes}: the encoder has layers 0 to {depth - 1}; choose among them.")
    return indexes


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


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


__all__: list[str] = ["SAM", "Attention", "Block", "ImageEncoder", "create_encoder"]
