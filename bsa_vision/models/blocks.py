"""The blocks of ViT and of Segment Anything's image encoder, to read: patches, windows, attention with decomposed relative position or
rotary positions, neck.

Attention is exact without N x N: relative position stays factored (`bsa_vision.rel_pos`). Names and shapes of parameters are
segment_anything's.
"""

from __future__ import annotations

import math
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from bsa_vision.attention.carried_masks import READERS, carry, encode
from bsa_vision.attention.functional import attend_masks
from bsa_vision.attention.head_masks import HeadMasks
from bsa_vision.attention.mask_source import MaskSource
from bsa_vision.attention.mask_tensors import DENSE
from bsa_vision.attention.rel_pos import RelPos, decompose, resize_table
from bsa_vision.masks import TokenLayout

Grid = tuple[int, int]
Rotation = tuple[
    Tensor, Tensor
]  # cosines and sines, (N, D) float32 each, of the angles that queries and keys are turned by
LayerNorm = partial(nn.LayerNorm, eps=1e-6)


class PatchEmbed(nn.Module):
    """Pixels to patches: (B, channels, H, W) -> (B, h, w, C)."""

    def __init__(self, in_channels: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.proj(pixels).permute(0, 2, 3, 1)


class Block(nn.Module):
    """One transformer block: attention, within windows or across the image, and an MLP, each with a norm before and a shortcut."""

    def __init__(
        self, dim: int, heads: int, mlp_ratio: float, window_size: int, grid: Grid, rel_pos: bool
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.norm1 = LayerNorm(dim)
        self.attn = Attention(
            dim, heads, (window_size, window_size) if window_size else grid, rel_pos
        )
        self.norm2 = LayerNorm(dim)
        self.mlp = MLP(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, grid: Grid, rotation: Rotation | None = None) -> Tensor:
        """(B, N, C) -> (B, N, C); `grid` is that of the patches among the N tokens, `rotation` that of their positions."""
        x = x + self._attend(self.norm1(x), grid, rotation)
        return x + self.mlp(self.norm2(x))

    def _attend(self, x: Tensor, grid: Grid, rotation: Rotation | None) -> Tensor:
        size = self.window_size
        if not size:
            return self.attn(x, grid, rotation)
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
        self._dense: MaskSource = DenseHeads(heads) if rel_pos else HeadMasks(None, [DENSE] * heads)

    def forward(self, x: Tensor, grid: Grid, rotation: Rotation | None = None) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        q, k, v = rearrange(
            self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads
        )
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        rel_pos = None
        if self.use_rel_pos:
            tables = (resize_table(self.rel_pos_h, grid[0]), resize_table(self.rel_pos_w, grid[1]))
            rel_pos = RelPos(*(term.to(q.dtype) for term in decompose(q, *tables, grid)))
        out = self.attend(q, k, v, rel_pos, grid)  # (B, H, N, D)
        return self.proj(rearrange(out, "b h n d -> b n (h d)"))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rel_pos: RelPos | None, grid: Grid) -> Tensor:
        """(B, H, N, D) -> (B, H, N, D), every head dense."""
        return attend_masks(self._dense, q, k, v, grid=grid, rel_pos=rel_pos)


class DenseHeads(MaskSource):
    """The masks of a layer whose heads are all dense, for whatever grid; relative position asks them where keys are."""

    def __init__(self, heads: int) -> None:
        self.heads = heads
        self._new_handle()

    def masks_for(self, grid: Grid, num_keys: int) -> HeadMasks:
        return _dense_heads(self.heads, tuple(grid))


@carry.register
def _(source: DenseHeads, grid: Grid, num_keys: int) -> bytes:
    return encode("dense", {"heads": source.heads})


READERS["dense"] = lambda header, payload: DenseHeads(header["heads"])


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
        self.weight, self.bias = (
            nn.Parameter(torch.ones(channels)),
            nn.Parameter(torch.zeros(channels)),
        )

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
    resized = F.interpolate(
        positions.permute(0, 3, 1, 2).float(), grid, mode="bicubic", antialias=True
    )
    return resized.permute(0, 2, 3, 1).to(positions.dtype)


def rotary_angles(
    grid: Grid, head_dim: int, periods: tuple[float, float], start: int, device: torch.device
) -> Rotation:
    """Cosines and sines of 2-D rotary positions, (start + h * w, D) each; the `start` tokens before the patches are not turned.

    Patch centres lie in [-1, 1] whatever the grid, so that resolution can grow. A quarter of the channels turns with the row and a quarter
    with the column, at periods from the first of `periods` on, spaced evenly in the logarithm, the second excluded; the other half of the
    channels are their partners. With periods (1, 100) as in DINOv3, arXiv 2508.10104.
    """
    quarter = head_dim // 4
    shortest, longest = periods
    share = torch.arange(quarter, device=device, dtype=torch.float32) / quarter
    period = shortest * (longest / shortest) ** share  # (D/4,)
    rows, columns = (
        ((torch.arange(n, device=device, dtype=torch.float32) + 0.5) / n * 2 - 1) for n in grid
    )
    down = (2 * math.pi * rows[:, None] / period)[:, None].expand(*grid, quarter)
    across = (2 * math.pi * columns[:, None] / period)[None].expand(*grid, quarter)
    angles = torch.cat([down, across], dim=-1).flatten(0, 1).repeat(1, 2)  # (h * w, D)
    angles = F.pad(angles, (0, 0, start, 0))
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """(B, H, N, D) -> (B, H, N, D): channel i and its partner i + D / 2 turned together by the angle of their token."""
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)
